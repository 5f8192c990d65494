// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

// toWrite matches advice to write lines, with the file.
var toWrite = regexp.MustCompile(`^(write this into|add this at the top of|write this in place of the imports in) (\S+\.toml)`)

// write follows the advice to write lines.
func write(t *testing.T, all []Advice) {
	t.Helper()
	for _, a := range all {
		if a.Lines == "" {
			continue
		}
		place := toWrite.FindStringSubmatch(a.Do)
		if place == nil {
			t.Fatalf("%q does not say where to write the lines", a.Do)
		}
		path, text := place[2], a.Lines
		if place[1] != "write this into" {
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if place[1] != "add this at the top of" {
				before = regexp.MustCompile(`(?m)^imports = .*\n`).ReplaceAll(before, nil)
			}
			text += string(before)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// migrate follows the advice to migrate containerd's file at path, but makes it import
// conf.d beside it rather than that of the machine.
func migrate(t *testing.T, do, path string) {
	t.Helper()
	said := regexp.MustCompile("^run `(.+)`, restart containerd, and run doctor again$").FindStringSubmatch(do)
	if said == nil {
		t.Fatalf("no command in %q", do)
	}
	command := exec.Command("sh", "-c", said[1])
	command.Env = append(os.Environ(), "PATH="+filepath.Dir(containerdtest.Tool(t, "containerd"))+":"+os.Getenv("PATH"))
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const imports = "/etc/containerd/conf.d/*.toml"
	if !strings.Contains(string(text), imports) {
		t.Fatalf("no %q in\n%s", imports, text)
	}
	text = []byte(strings.ReplaceAll(string(text), imports, filepath.Join(filepath.Dir(path), "conf.d", "*.toml")))
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// wantTodo checks what the advice says to do, in this order.
func wantTodo(t *testing.T, all []Advice, todo []string) {
	t.Helper()
	if len(all) != len(todo) {
		t.Fatalf("%+v, want %q", all, todo)
	}
	for i, want := range todo {
		if !strings.HasPrefix(all[i].Do, want) {
			t.Errorf("it says to %q, want %q", all[i].Do, want)
		}
	}
}

// wantNothingLeft follows the advice for containerd's file at path. Then doctor must find
// nothing more, and containerd must have the snapshotter.
func wantNothingLeft(t *testing.T, path string, all []Advice) containerdtest.Config {
	t.Helper()
	write(t, all)
	again, _ := configured(t, path)
	if again.Problem != "" || len(again.Advice) > 0 {
		t.Errorf("with the lines: %+v", again)
	}
	got := containerdtest.Dump(t, containerdtest.Tool(t, "containerd"), path)
	if proxy := got.ProxyPlugins["artifact"]; proxy.Type != "snapshot" || containerdconfig.Socket(proxy.Address) != "/run/a.sock" || !slices.Equal(proxy.Capabilities, []string{"remap-ids"}) {
		t.Errorf("containerd has the proxy plugin %+v", proxy)
	}
	for _, want := range []string{"overlayfs", "artifact"} {
		if !slices.Contains(got.Unpacks(), want) {
			t.Errorf("containerd has the unpack_config %+v", got.Plugins.Transfer.UnpackConfig)
		}
	}
	return got
}

// With the lines that doctor prints, containerd has the snapshotter, whatever its file.
func TestTheLinesOfDoctorFitTheFilesOfNodes(t *testing.T) {
	out, err := exec.Command(containerdtest.Tool(t, "containerd"), "config", "default").Output()
	if err != nil {
		t.Fatalf("containerd is not built, run `make tools`: %v", err)
	}
	const imports = "imports = ['/etc/containerd/conf.d/*.toml']\n"
	byDefault := string(out)
	if !strings.Contains(byDefault, imports) {
		t.Fatalf("no %q in\n%s", imports, byDefault)
	}
	const relative = "imports = ['conf.d/*.toml']\n"
	snippet := "version = 3\n" + strings.Join(needed(t, ""), "")
	for name, test := range map[string]struct {
		main   string
		dropIn string // "" for none
		todo   []string
		unpack int
	}{
		"containerd's default":                 {strings.Replace(byDefault, imports, relative, 1), "", []string{"write this into"}, 2},
		"its default without imports":          {strings.Replace(byDefault, imports, "", 1), "", []string{"write this into", "add this at the top of"}, 2},
		"its default with other files":         {strings.Replace(byDefault, imports, "imports = ['other.d/*.toml']\n", 1), "", []string{"write this into"}, 2},
		"its default, nothing imported":        {strings.Replace(byDefault, imports, "imports = []\n", 1), "", []string{"write this into", "write this in place of the imports"}, 2},
		"an empty one":                         {"", "", []string{"write this into", "add this at the top of"}, 2},
		"the install steps without the import": {"version = 3\n", snippet, []string{"add this at the top of"}, 2},
		"the same for one handler":             {"version = 3\n", "version = 3\n" + strings.Join(needed(t, "artifact"), ""), []string{"add this at the top of"}, 2},
		"an earlier address":                   {relative, strings.ReplaceAll(snippet, "/run/a.sock", "/run/b.sock"), []string{"write this into"}, 2},
		"a file of version 2":                  {containerdtest.Kubeadm, "", []string{"migrate", "write this into", "add this at the top of"}, 2},
		"a file of version 2 with imports":     {relative + containerdtest.Kubeadm, "", []string{"migrate", "write this into"}, 2},
		"a file of version 2, in part": {
			relative + containerdtest.Kubeadm, "version = 3\n" + strings.Join(without(needed(t, ""), "cri.v1.images"), ""), []string{"migrate", "write this into"}, 2,
		},
		"another snapshotter": {
			"version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'nydus'\n  discard_unpacked_layers = false\n" +
				"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/amd64'\n  snapshotter = 'nydus'\n  differ = 'walking'\n",
			"", []string{"write this into", "add this at the top of"}, 3,
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, test.main)
			if test.dropIn != "" {
				write(t, []Advice{{Do: "write this into " + filepath.Join(filepath.Dir(path), "conf.d", "artifact-snapshotter.toml"), Lines: test.dropIn}})
			}
			got, _ := configured(t, path)
			todo := test.todo
			if todo[0] == "migrate" {
				todo = todo[1:]
				// containerd 2.3 and later need no migration.
				later := newConfigCheck(unasked(t, path))
				if err := later.checkFiles(t.Context(), false); err != nil {
					t.Fatal(err)
				}
				wantTodo(t, later.Advice, todo)
				// Older versions need it first; the rest of the advice follows.
				if got.Problem == "" || len(got.Advice) != 1 {
					t.Fatalf("%+v", got)
				}
				migrate(t, got.Advice[0].Do, path)
				got, _ = configured(t, path)
				todo = []string{"write this into"} // migrated, it has imports
			}
			if got.Problem == "" {
				t.Errorf("%+v", got)
			}
			wantTodo(t, got.Advice, todo)
			after := wantNothingLeft(t, path, got.Advice)
			if n := len(after.Plugins.Transfer.UnpackConfig); n != test.unpack {
				t.Errorf("containerd has an unpack_config of %d, want %d", n, test.unpack)
			}
			want := "artifact"
			if strings.Contains(test.dropIn, "runtimes.artifact") {
				want = "overlayfs"
			}
			if got := after.Plugins.Images.Snapshotter; got != want {
				t.Errorf("the node's snapshotter is %q, want %q", got, want)
			}
			if strings.Contains(test.main, containerdtest.Kubeadm) && !after.Plugins.Runtime.Containerd.Runtimes["runc"].Options.SystemdCgroup {
				t.Error("runc's options are lost")
			}
		})
	}
}

// A file that is imported later takes precedence over the lines in the drop-in.
func TestDoctorSaysThatAnotherFileOverrules(t *testing.T) {
	path := writeFile(t, "version = 3\nimports = ['conf.d/*.toml']\n")
	dir := filepath.Join(filepath.Dir(path), "conf.d")
	write(t, []Advice{
		{Do: "write this into " + filepath.Join(dir, "artifact-snapshotter.toml"), Lines: "version = 3\n" + strings.Join(needed(t, ""), "")},
		{Do: "write this into " + filepath.Join(dir, "later.toml"), Lines: "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'native'\n"},
	})
	got, _ := configured(t, path)
	if got.Problem == "" || len(got.Advice) != 1 {
		t.Errorf("%+v", got)
	}
	wantAdvice(t, got.Advice, "imported after "+dir+"/artifact-snapshotter.toml that says something else", "pods see artifacts")
}
