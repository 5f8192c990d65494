// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// unasked is a node with a daemon on /run/a.sock and no containerd.
func unasked(t *testing.T, path string) Node {
	t.Helper()
	cfg := daemon.Default()
	cfg.Address = "/run/a.sock"
	return Node{Config: cfg, ConfigFile: "/our/file.toml", ContainerdConfig: path, Unanswered: errors.New("not asked")}
}

// configured returns what doctor finds in containerd's configuration file at path, for a
// containerd that may be older than 2.3.
func configured(t *testing.T, path string) (Finding, ConfigFacts) {
	t.Helper()
	found := checkContainerdConfig(t.Context(), unasked(t, path))
	facts, _ := found.Facts.(ConfigFacts)
	return found, facts
}

// needed are the tables that the daemon needs in containerd's configuration.
func needed(t *testing.T, handler string) []string {
	t.Helper()
	var text strings.Builder
	if err := (containerdconfig.Needs{Daemon: unasked(t, "").Config, Handler: handler, MapsOwners: true}).Write(&text); err != nil {
		t.Fatal(err)
	}
	return tablesOf(text.String())
}

// wantAdvice checks that one piece of advice has both words.
func wantAdvice(t *testing.T, all []Advice, do, gain string) {
	t.Helper()
	if n := len(slices.DeleteFunc(slices.Clone(all), func(a Advice) bool {
		return !strings.Contains(a.Do, do) || !strings.Contains(a.Gain, gain)
	})); n != 1 {
		t.Errorf("%d of %+v are %q with the gain %q, want 1", n, all, do, gain)
	}
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tablesOf splits a TOML file into tables: they begin in the first column, and their keys
// do not.
func tablesOf(text string) (tables []string) {
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "["):
			tables = append(tables, line)
		case strings.HasPrefix(line, " ") && len(tables) > 0:
			tables[len(tables)-1] += line
		}
	}
	return tables
}

// without are the tables that do not contain the word.
func without(tables []string, word string) []string {
	return slices.DeleteFunc(slices.Clone(tables), func(table string) bool { return strings.Contains(table, word) })
}

// entryOfArtifacts is an entry of unpack_config for artifacts of one config type.
const entryOfArtifacts = `[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux(+model)/amd64"
  snapshotter = "artifact"
  differ = "artifact-diff"
  config_type = "application/vnd.example.config"
`

func TestDoctorFindsNothingMissingInWhatItAdvises(t *testing.T) {
	for _, handler := range []string{"", "models"} {
		t.Run(handler, func(t *testing.T) {
			got, f := configured(t, writeFile(t, "version = 3\n"+strings.Join(needed(t, handler), "")))
			if got.Problem != "" || len(got.Advice) > 0 {
				t.Errorf("%+v", got)
			}
			if !strings.Contains(got.Unknown, "what containerd has loaded of it") {
				t.Errorf("it does not say what is unknown: %q", got.Unknown)
			}
			if f.Snapshotter.Configured != "/run/a.sock" || !slices.Equal(f.Unpack, []string{"artifact", "overlayfs"}) {
				t.Errorf("%+v", f)
			}
			if handler == "" && f.Node != "artifact" || handler != "" && (f.Node != "overlayfs" || !slices.Equal(f.Handlers, []string{"models"})) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Doctor names what is missing, and prints the lines to write.
func TestDoctorPrintsWhatContainerdLacks(t *testing.T) {
	all := needed(t, "")
	handler := needed(t, "artifact")
	const snapshotter, images, overlayfs, unpack = "[proxy_plugins.artifact]", "cri.v1.images", `snapshotter = "overlayfs"`, `[[plugins`
	for name, test := range map[string]struct {
		tables  []string
		problem string // "" for none
		gain    string // of the advice that has the lines
	}{
		"the snapshotter":                  {without(all, snapshotter), "does not have the snapshotter", "has the snapshotter"},
		"the differ that is named":         {append(without(all, "artifact-diff"), entryOfArtifacts), "names the differ artifact-diff", "native-unpack"},
		"the proxy of the differ":          {without(all, "[proxy_plugins.artifact-diff]"), "", "native-unpack"},
		"the scope":                        {without(all, images), "no pod uses the snapshotter", "pods see artifacts"},
		"unpack_config":                    {without(all, unpack), "unpack_config does not list artifact", "for artifact"},
		"unpack_config of overlayfs":       {without(all, overlayfs), "", "for overlayfs"},
		"unpack_config of the node's":      {without(handler, overlayfs), "unpack_config does not list overlayfs", "for overlayfs"},
		"unpack_config of a handler alone": {without(handler, unpack), "", "for artifact"},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "version = 3\n"+strings.Join(test.tables, ""))
			got, _ := configured(t, path)
			if !strings.Contains(got.Problem, test.problem) || (got.Problem == "") != (test.problem == "") {
				t.Errorf("problem %q, want %q", got.Problem, test.problem)
			}
			wantAdvice(t, got.Advice, filepath.Join(filepath.Dir(path), "conf.d", "artifact-snapshotter.toml"), test.gain)
			wantNothingLeft(t, path, got.Advice)
		})
	}
}

func TestDoctorSaysWhatIsWrongInContainerdsConfiguration(t *testing.T) {
	text := "version = 3\n" + strings.Join(needed(t, ""), "")
	for name, test := range map[string]struct {
		old, new      string
		problem, gain string // "" for none
	}{
		"another socket":           {`"/run/a.sock"`, `"/run/b.sock"`, "at /run/b.sock, but it serves on /run/a.sock", "reaches the daemon"},
		"another type":             {`"snapshot"`, `"content"`, `type "content"`, "is a snapshotter"},
		"no capabilities":          {`"remap-ids"`, ``, "", "user namespace"},
		"a refusal of old kernels": {`"remap-ids"`, `"only-remap-ids"`, "", "pods with a user namespace start"},
		"a URL is no other":        {`"/run/a.sock"`, `"unix:///run/a.sock"`, "", ""},
		"another snapshotter":      {`  snapshotter = "artifact"` + "\n" + `[[`, `  snapshotter = "native"` + "\n" + `[[`, "no pod uses the snapshotter", "pods see artifacts"},
		"another platform":         {"[[", "[plugins.'io.containerd.transfer.v1.local']\n  check_platform_supported = true\n[[", "", ""},
		"artifacts alone first":    {"[[", strings.Replace(entryOfArtifacts, "(+model)", "", 1) + "[[", "", ""},
		"artifacts with feature":   {"[[", entryOfArtifacts + "[[", "", ""},
		"another type of differ":   {`"diff"`, `"snapshot"`, `type "snapshot"`, "is a differ"},
		"another default handler":  {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  snapshotter = 'overlayfs'\n[[", "no pod uses the snapshotter", "the runtime handler runc"},
		"another handler":          {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n  snapshotter = 'overlayfs'\n[[", "", ""},
		"pods of one handler only": {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  snapshotter = 'overlayfs'\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n[[", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(text, test.old) {
				t.Fatalf("no %q in %s", test.old, text)
			}
			path := writeFile(t, strings.Replace(text, test.old, test.new, 1))
			got, _ := configured(t, path)
			if (got.Problem == "") != (test.problem == "") || !strings.Contains(got.Problem, test.problem) {
				t.Errorf("the problem %q, want %q", got.Problem, test.problem)
			}
			if test.gain == "" && len(got.Advice) > 0 {
				t.Errorf("advice %+v", got.Advice)
			} else if test.gain != "" {
				wantAdvice(t, got.Advice, "write this into", test.gain)
			}
			wantNothingLeft(t, path, got.Advice)
		})
	}
}

// A kernel before 5.19 cannot map the owners of layers, and the configuration must not say
// that it can.
func TestDoctorSaysWhatAnOldKernelCannotDo(t *testing.T) {
	for name, test := range map[string]struct {
		told          string
		slowChown     bool
		problem, gain string // "" for none
		want          string
	}{
		"that it can":                   {`"remap-ids"`, false, "this kernel cannot do", "what slow_chown says", `["only-remap-ids"]`},
		"that it can, and may be slow":  {`"remap-ids"`, true, "this kernel cannot do", "what slow_chown says", `[]`},
		"that it cannot":                {`"only-remap-ids"`, false, "", "", `["only-remap-ids"]`},
		"that it cannot, may be slow":   {`"only-remap-ids"`, true, "", "start with a copy", `[]`},
		"nothing":                       {``, false, "", "refuses pods with a user namespace", `["only-remap-ids"]`},
		"nothing, for it may be slow":   {``, true, "", "", `[]`},
		"something of a later version":  {`"only-remap-ids", "rebase"`, false, "", "", `["only-remap-ids"]`},
		"something, for it may be slow": {`"rebase"`, true, "", "", `[]`},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := daemon.Default()
			cfg.Overlayfs.SlowChown = test.slowChown
			var text strings.Builder
			if err := (containerdconfig.Needs{Daemon: cfg}).Write(&text); err != nil {
				t.Fatal(err)
			}
			if want := "  capabilities = " + test.want + "\n"; !strings.Contains(text.String(), want) {
				t.Errorf("`config containerd` does not print %q:\n%s", want, text.String())
			}
			path := writeFile(t, strings.Replace(text.String(), "capabilities = "+test.want, "capabilities = ["+test.told+"]", 1))
			n := unasked(t, path)
			n.Config = cfg
			e := newConfigCheck(n)
			e.mapsOwners = false
			if err := e.checkFiles(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if (e.Problem == "") != (test.problem == "") || !strings.Contains(e.Problem, test.problem) {
				t.Errorf("the problem %q, want %q", e.Problem, test.problem)
			}
			if test.gain == "" && len(e.Advice) > 0 {
				t.Errorf("advice %+v", e.Advice)
			} else if test.gain != "" {
				wantAdvice(t, e.Advice, "write this into", test.gain)
				if !strings.Contains(strings.ReplaceAll(e.Advice[0].Lines, "'", `"`), "capabilities = "+test.want) {
					t.Errorf("the lines are\n%s", e.Advice[0].Lines)
				}
			}
		})
	}
}

// If the daemon lacks options of containerd's own overlayfs, doctor says so.
func TestDoctorComparesTheOptionsOfOverlayfs(t *testing.T) {
	const theirs = "\n[plugins.'io.containerd.snapshotter.v1.overlayfs']\n  root_path = '/data'\n  mount_options = ['volatile', 'metacopy=off']\n  upperdir_label = true\n  sync_remove = true\n  slow_chown = true\n"
	want := snapshot.Overlayfs{MountOptions: []string{"volatile", "metacopy=off"}, UpperdirLabel: true, SyncRemove: true, SlowChown: true}
	for name, text := range map[string]string{
		"for the node":                         strings.Join(needed(t, ""), ""),
		"for a handler":                        strings.Join(needed(t, "artifact"), ""),
		"for no pod, which would lose nothing": "",
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "version = 3\n"+text+theirs)
			ask := func(cfg daemon.Config) []Advice {
				t.Helper()
				n := unasked(t, path)
				n.Config = cfg
				return slices.DeleteFunc(checkContainerdConfig(t.Context(), n).Advice, func(a Advice) bool { return !strings.Contains(a.Gain, "overlayfs") })
			}
			cfg := daemon.Default()
			cfg.Address = "/run/a.sock"
			cfg.Overlayfs.SlowChown = true
			got := ask(cfg)
			if text == "" {
				if len(got) > 0 {
					t.Errorf("it says %+v", got)
				}
				return
			}
			if len(got) != 1 || !strings.Contains(got[0].Do, "/our/file.toml") {
				t.Fatalf("it says %+v", got)
			}
			cfg, err := daemon.Load(writeFile(t, got[0].Lines))
			if err != nil || !cfg.Overlayfs.Equal(want) {
				t.Errorf("the lines say %+v, want %+v: %v", cfg.Overlayfs, want, err)
			}
			cfg.Address = "/run/a.sock"
			cfg.Overlayfs.MountOptions = append(cfg.Overlayfs.MountOptions, "xino=off") // more options are fine
			if got := ask(cfg); len(got) > 0 {
				t.Errorf("with its lines it says %+v", got)
			}
		})
	}
}

// Doctor reports facts that are not problems.
func TestDoctorReportsHandlersAndLateUnpacking(t *testing.T) {
	text := strings.Join(without(needed(t, ""), `snapshotter = "artifact"`+"\n  differ"), "")
	text += strings.Replace(entryOfArtifacts, "(+model)", "", 1) + "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n  snapshotter = 'devmapper'\n"
	got, f := configured(t, writeFile(t, "version = 3\n"+text))
	if got.Problem != "" || len(got.Advice) > 0 {
		t.Errorf("%+v", got)
	}
	if !slices.Equal(f.Unpack, []string{"artifact", "overlayfs"}) || !slices.Equal(f.UnpackLate, []string{"artifact"}) ||
		len(f.OtherHandlers) != 1 || f.OtherHandlers["kata"] != "devmapper" || f.Handlers == nil {
		t.Errorf("%+v", f)
	}
	for _, want := range []string{"except those of these runtime handlers: kata (devmapper)", "for their first container, not when they are pulled, for: artifact"} {
		if !slices.ContainsFunc(got.Text, func(line string) bool { return strings.HasSuffix(line, want) }) {
			t.Errorf("no %q in %q", want, got.Text)
		}
	}
}

func TestDoctorNamesAFileThatContainerdCannotRead(t *testing.T) {
	for name, text := range map[string]string{"no TOML": "version = ", "a version to come": "version = 99\n", "a bad table": "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 1\n"} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, text)
			if got, _ := configured(t, path); !strings.Contains(got.Problem, path) {
				t.Errorf("the problem %q", got.Problem)
			}
		})
	}
}

// Doctor reports why a plugin of containerd does not start.
func TestDoctorSaysWhichPluginOfContainerdDoesNotStart(t *testing.T) {
	c := containerdtest.New(t, strings.Join(without(needed(t, ""), "artifact-diff"), "")+entryOfArtifacts)
	c.Start(t, containerdtest.Tool(t, "containerd"))
	n := unasked(t, filepath.Join(c.Dir, "config.toml"))
	n.Root, n.ContentRoot, n.ContainerdAddress = c.Dir+"/daemon", c.Dir+"/root/io.containerd.content.v1.content", c.Address
	if n.Containerd, n.Unanswered = client.Connect(t.Context(), n.ContainerdAddress, "default", containerdconfig.Snapshotter); n.Unanswered != nil {
		t.Fatal(n.Unanswered)
	}
	defer n.Containerd.Close()
	findings, err := Examine(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]Finding{}
	for _, found := range findings {
		got[found.Check] = found
	}
	for _, want := range []string{"plugin " + containerdconfig.Transfer + " does not start: ", `"artifact-diff"`, "names the differ artifact-diff"} {
		if !strings.Contains(got["containerd config"].Problem, want) {
			t.Errorf("the problem is %q, want %q", got["containerd config"].Problem, want)
		}
	}
	if containerd, socket := got["containerd"], got["socket"]; containerd.Problem != "" || containerd.Facts.(ContainerdFacts).Version == "" || socket.Unknown == "" || socket.Problem != "" {
		t.Errorf("containerd %+v, socket %+v", containerd, socket)
	}
}
