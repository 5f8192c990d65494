// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// configured is what doctor says of containerd's configuration file at path, and
// its exit code, for a daemon on /run/a.sock.
func configured(t *testing.T, path string) (got section[configFacts], text string, exit int) {
	t.Helper()
	dir := t.TempDir()
	args := []string{"doctor", "--config", writeFile(t, ""), "--root", dir, "--content-root", t.TempDir(),
		"--containerd-address", filepath.Join(dir, "c.sock"), "--address", "/run/a.sock", "--containerd-config", path}
	text, _, exit = run(t, args...)
	printed, stderr, _ := run(t, append(args, "--output", "json")...)
	var all report
	if err := json.Unmarshal([]byte(printed), &all); err != nil {
		t.Fatalf("%v in %s", err, printed)
	}
	got = all.ContainerdConfig
	if (got.Problem != "") != (exit == 1) || (exit == 1) != strings.Contains(stderr, "containerd config") {
		t.Errorf("exit code %d and %q, with the problem %q", exit, stderr, got.Problem)
	}
	for _, a := range got.Advice {
		for line := range strings.Lines(fmt.Sprintf("advice: %s: %s\n", a.Do, a.Gain) + a.Lines) {
			if !strings.Contains(text, line) {
				t.Errorf("the text has no %q", line)
			}
		}
	}
	return got, text, exit
}

// printed are the tables that `config containerd` prints for that daemon.
func printed(t *testing.T, args ...string) []string {
	t.Helper()
	return tablesOf(output(t, append([]string{"config", "containerd", "--config", writeFile(t, "address = '/run/a.sock'\n")}, args...)...))
}

// tablesOf are the tables of a TOML file in which a table begins in the first
// column, and all that is in it does not.
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

// without are the tables but for those that have the word.
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
	for name, args := range map[string][]string{
		"node":            nil,
		"runtime handler": {"--snapshotter-scope", "runtime-handler", "--runtime-handler", "models"},
	} {
		t.Run(name, func(t *testing.T) {
			got, text, exit := configured(t, writeFile(t, "version = 3\n"+strings.Join(printed(t, args...), "")))
			if exit != 0 || got.Problem != "" || len(got.Advice) > 0 {
				t.Errorf("exit code %d, %+v", exit, got)
			}
			if got.Unknown == "" || !strings.Contains(text, "unknown: what of it containerd has loaded") {
				t.Errorf("it does not say what is not known: %q", got.Unknown)
			}
			if f := got.Facts; f.Snapshotter.Configured != "/run/a.sock" || !slices.Equal(f.Unpack, []string{"artifact", "overlayfs"}) {
				t.Errorf("%+v", f)
			}
			if f := got.Facts; args == nil && f.Node != "artifact" || args != nil && (f.Node != "overlayfs" || !slices.Equal(f.Handlers, []string{"models"})) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Each thing that is missing is said, with the lines that are.
func TestDoctorSaysWhatContainerdLacks(t *testing.T) {
	all := printed(t)
	handler := printed(t, "--snapshotter-scope", "runtime-handler")
	const snapshotter, images, overlayfs, unpack = "[proxy_plugins.artifact]", "cri.v1.images", `snapshotter = "overlayfs"`, `[[plugins`
	for name, test := range map[string]struct {
		tables  []string
		problem string // "" for none
		gain    string // of the advice that has the lines
	}{
		"the snapshotter":                  {without(all, snapshotter), "does not have the snapshotter", "has the snapshotter"},
		"the differ that is named":         {append(without(all, "artifact-diff"), entryOfArtifacts), "names the differ artifact-diff", "native-unpack"},
		"the proxy of the differ":          {without(all, "[proxy_plugins.artifact-diff]"), "", "native-unpack"},
		"the scope":                        {without(all, images), "no pod has the snapshotter", "pods see artifacts"},
		"unpack_config":                    {without(all, unpack), "unpack_config does not list artifact", "for artifact"},
		"unpack_config of overlayfs":       {without(all, overlayfs), "", "for overlayfs"},
		"unpack_config of the node's":      {without(handler, overlayfs), "unpack_config does not list overlayfs", "for overlayfs"},
		"unpack_config of a handler alone": {without(handler, unpack), "", "for artifact"},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "version = 3\n"+strings.Join(test.tables, ""))
			got, _, exit := configured(t, path)
			if !strings.Contains(got.Problem, test.problem) || (exit == 0) != (test.problem == "") {
				t.Errorf("exit code %d, problem %q, want %q", exit, got.Problem, test.problem)
			}
			wantAdvice(t, got.Advice, filepath.Join(filepath.Dir(path), "conf.d", "artifact-snapshotter.toml"), test.gain)
			wantNothingLeft(t, path, got.Advice)
		})
	}
}

func TestDoctorSaysWhatIsWrongInContainerdsConfiguration(t *testing.T) {
	text := "version = 3\n" + strings.Join(printed(t), "")
	for name, test := range map[string]struct {
		old, new      string
		problem, gain string // "" for none
	}{
		"another socket":            {`"/run/a.sock"`, `"/run/b.sock"`, "at /run/b.sock, and it serves on /run/a.sock", "reaches the daemon"},
		"another type":              {`"snapshot"`, `"content"`, `type "content"`, "is a snapshotter"},
		"no capabilities":           {`"remap-ids"`, ``, "", "user namespace"},
		"a refusal of old kernels":  {`"remap-ids"`, `"only-remap-ids"`, "", "pods with a user namespace start"},
		"a URL is no other":         {`"/run/a.sock"`, `"unix:///run/a.sock"`, "", ""},
		"another snapshotter":       {`  snapshotter = "artifact"` + "\n" + `[[`, `  snapshotter = "native"` + "\n" + `[[`, "no pod has the snapshotter", "pods see artifacts"},
		"another platform":          {"[[", "[plugins.'io.containerd.transfer.v1.local']\n  check_platform_supported = true\n[[", "", ""},
		"artifacts alone first":     {"[[", strings.Replace(entryOfArtifacts, "(+model)", "", 1) + "[[", "", ""},
		"artifacts with feature":    {"[[", entryOfArtifacts + "[[", "", ""},
		"another type of differ":    {`"diff"`, `"snapshot"`, `type "snapshot"`, "is a differ"},
		"another default handler":   {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  snapshotter = 'overlayfs'\n[[", "no pod has the snapshotter", "the runtime handler runc"},
		"another handler":           {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n  snapshotter = 'overlayfs'\n[[", "", ""},
		"no pod but of one handler": {"[[", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  snapshotter = 'overlayfs'\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n[[", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(text, test.old) {
				t.Fatalf("no %q in %s", test.old, text)
			}
			path := writeFile(t, strings.Replace(text, test.old, test.new, 1))
			got, _, _ := configured(t, path)
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

// A kernel before 5.19 cannot map the owners of layers, and containerd must not be told that
// it can.
func TestDoctorSaysWhatAnOldKernelCannotDo(t *testing.T) {
	for name, test := range map[string]struct {
		told          string
		slowChown     bool
		problem, gain string // "" for none
		want          string
	}{
		"that it can":                   {`"remap-ids"`, false, "this kernel cannot", "what slow_chown says", `["only-remap-ids"]`},
		"that it can, and may be slow":  {`"remap-ids"`, true, "this kernel cannot", "what slow_chown says", `[]`},
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
			if err := writeContainerdConfig(&text, cfg, "", false); err != nil {
				t.Fatal(err)
			}
			if want := "  capabilities = " + test.want + "\n"; !strings.Contains(text.String(), want) {
				t.Errorf("`config containerd` does not print %q:\n%s", want, text.String())
			}
			path := writeFile(t, strings.Replace(text.String(), "capabilities = "+test.want, "capabilities = ["+test.told+"]", 1))
			e := newConfigExam(patient{Config: cfg, containerdConfig: path, unanswered: errors.New("not asked")})
			e.mapsOwners = false
			if err := e.examineFiles(t.Context(), false); err != nil {
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

// The options of containerd's own overlayfs are not lost without a word.
func TestDoctorComparesTheOptionsOfOverlayfs(t *testing.T) {
	const theirs = "\n[plugins.'io.containerd.snapshotter.v1.overlayfs']\n  root_path = '/data'\n  mount_options = ['volatile', 'metacopy=off']\n  upperdir_label = true\n  sync_remove = true\n  slow_chown = true\n"
	want := snapshot.Overlayfs{MountOptions: []string{"volatile", "metacopy=off"}, UpperdirLabel: true, SyncRemove: true, SlowChown: true}
	for name, text := range map[string]string{
		"for the node":                       strings.Join(printed(t), ""),
		"for a handler":                      strings.Join(printed(t, "--snapshotter-scope", "runtime-handler"), ""),
		"for nobody, who would lose nothing": "",
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "version = 3\n"+text+theirs)
			ask := func(cfg daemon.Config) []advice {
				t.Helper()
				e := newConfigExam(patient{Config: cfg, configFile: "/our/file.toml", containerdConfig: path, unanswered: errors.New("not asked")})
				if err := e.examineFiles(t.Context(), false); err != nil {
					t.Fatal(err)
				}
				return slices.DeleteFunc(e.Advice, func(a advice) bool { return !strings.Contains(a.Gain, "overlayfs") })
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
			cfg.Overlayfs.MountOptions = append(cfg.Overlayfs.MountOptions, "xino=off") // and more is nobody's business
			if got := ask(cfg); len(got) > 0 {
				t.Errorf("with its lines it says %+v", got)
			}
		})
	}
}

// What is no problem is said nevertheless.
func TestDoctorTellsOfHandlersAndOfLateUnpacking(t *testing.T) {
	text := strings.Join(without(printed(t), `snapshotter = "artifact"`+"\n  differ"), "")
	text += strings.Replace(entryOfArtifacts, "(+model)", "", 1) + "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n  runtime_type = 'x'\n  snapshotter = 'devmapper'\n"
	got, said, exit := configured(t, writeFile(t, "version = 3\n"+text))
	if exit != 0 || got.Problem != "" || len(got.Advice) > 0 {
		t.Errorf("exit code %d, %+v", exit, got)
	}
	if f := got.Facts; !slices.Equal(f.Unpack, []string{"artifact", "overlayfs"}) || !slices.Equal(f.UnpackLate, []string{"artifact"}) ||
		len(f.OtherHandlers) != 1 || f.OtherHandlers["kata"] != "devmapper" || f.Handlers == nil {
		t.Errorf("%+v", f)
	}
	for _, want := range []string{"but not those of these runtime handlers: kata (devmapper)\n", "but for their first container, for: artifact\n"} {
		if !strings.Contains(said, want) {
			t.Errorf("no %q in\n%s", want, said)
		}
	}
}

func TestDoctorNamesAFileThatContainerdCannotRead(t *testing.T) {
	for name, text := range map[string]string{"no TOML": "version = ", "a version to come": "version = 99\n", "a bad table": "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 1\n"} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, text)
			if got, _, _ := configured(t, path); !strings.Contains(got.Problem, path) {
				t.Errorf("the problem %q", got.Problem)
			}
		})
	}
}

// What doctor reads is what containerd itself makes of the file.
func TestDoctorReadsTheConfigurationAsContainerd(t *testing.T) {
	dir := t.TempDir()
	imported := filepath.Join(dir, "conf.d", "imported.toml")
	if err := os.Mkdir(filepath.Dir(imported), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(imported, []byte(`version = 2
[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.imported]
  snapshotter = 'artifact'
[proxy_plugins.artifact]
  type = 'snapshot'
  address = '/imported'
`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty":              "",
		"no version":         "[plugins.cri.containerd]\n  snapshotter = 'artifact'\n  [plugins.cri.containerd.runtimes.a]\n    snapshotter = 'native'\n",
		"version 2, alone":   "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n",
		"version 2":          "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.a]\n    snapshotter = 'artifact'\n",
		"version 2, both":    "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'artifact'\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n",
		"version 2, kubeadm": strings.Replace(kubeadm, `= "runc"`, `= "other"`, 1) + "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.other]\n  runtime_type = 'io.containerd.runc.v2'\n",
		"version 3":          "version = 3\n" + strings.Join(printed(t), ""),
		"version 4":          "version = 4\n" + strings.Join(printed(t, "--snapshotter-scope", "runtime-handler"), ""),
		"an import":          fmt.Sprintf("version = 3\nimports = [%q]\n[proxy_plugins.artifact]\n  address = '/here'\n", imported),
		"imports by a *":     "version = 4\nimports = ['conf.d/*.toml']\n",
		"a relative import":  "version = 4\nimports = ['conf.d/imported.toml']\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'artifact'\n",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "containerd.toml")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := readRuntimeConfig(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			want := dump(t, path)
			if got.images.Snapshotter != want.Plugins.Images.Snapshotter {
				t.Errorf("the node's snapshotter is %q, containerd says %q", got.images.Snapshotter, want.Plugins.Images.Snapshotter)
			}
			var handlers, unpack []string
			for name, runtime := range want.Plugins.Runtime.Containerd.Runtimes {
				if runtime.Snapshotter == "artifact" {
					handlers = append(handlers, name)
				}
			}
			slices.Sort(handlers)
			for _, entry := range want.Plugins.Transfer.UnpackConfig {
				unpack = append(unpack, entry.Snapshotter)
			}
			if unpack == nil { // it does not print its default
				unpack = []string{"overlayfs"}
			}
			slices.Sort(unpack)
			unpacks, _ := got.unpacks()
			if !slices.Equal(got.handlers(), handlers) || !slices.Equal(unpacks, slices.Compact(unpack)) {
				t.Errorf("handlers %q and unpack_config %q, containerd says %q and %q", got.handlers(), unpacks, handlers, unpack)
			}
			if got.runtime.Containerd.Default != want.Plugins.Runtime.Containerd.Default {
				t.Errorf("the default handler is %q, containerd says %q", got.runtime.Containerd.Default, want.Plugins.Runtime.Containerd.Default)
			}
			if got.proxies["artifact"].Address != want.ProxyPlugins["artifact"].Address {
				t.Errorf("the address is %q, containerd says %q", got.proxies["artifact"].Address, want.ProxyPlugins["artifact"].Address)
			}
		})
	}
}

// A plugin of containerd that does not start says why, and so does doctor.
func TestDoctorSaysWhichPluginOfContainerdDoesNotStart(t *testing.T) {
	dir, err := os.MkdirTemp("", "d") // sockets need short paths
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	config := writeFile(t, fmt.Sprintf(`version = 3
root = "%[1]s/root"
state = "%[1]s/state"
temp = "%[1]s/tmp"
[grpc]
  address = "%[1]s/c.sock"
[plugins.'io.containerd.cri.v1.runtime'.cni]
  conf_dir = "%[1]s/cni"
[plugins.'io.containerd.internal.v1.opt']
  path = "%[1]s/opt"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`, dir)+strings.Join(without(printed(t), "artifact-diff"), "")+entryOfArtifacts)
	containerd := exec.Command(filepath.Join("..", "..", "integration", "tools", "bin", "containerd"), "--config", config)
	if err := containerd.Start(); err != nil {
		t.Fatalf("containerd is not built, run `make tools`: %v", err)
	}
	defer func() {
		if err := errors.Join(containerd.Process.Signal(unix.SIGTERM), containerd.Wait()); err != nil {
			t.Error(err)
		}
	}()
	var got report
	for deadline := time.Now().Add(30 * time.Second); got.Containerd.Facts.Version == ""; {
		if time.Now().After(deadline) {
			t.Fatal("containerd does not answer")
		}
		out, _, _ := run(t, "doctor", "--config", writeFile(t, ""), "--root", dir+"/daemon", "--address", "/run/a.sock",
			"--content-root", dir+"/root/io.containerd.content.v1.content", "--containerd-address", dir+"/c.sock",
			"--containerd-config", config, "--output", "json")
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
	}
	for _, want := range []string{"plugin " + transfer + " does not start: ", `"artifact-diff"`, "names the differ artifact-diff"} {
		if !strings.Contains(got.ContainerdConfig.Problem, want) {
			t.Errorf("the problem is %q, want %q", got.ContainerdConfig.Problem, want)
		}
	}
	if got.Containerd.Problem != "" || got.Socket.Unknown == "" || got.Socket.Problem != "" {
		t.Errorf("containerd %+v, socket %+v", got.Containerd, got.Socket)
	}
}
