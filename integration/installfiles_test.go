// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// etc is a directory of containerd's configuration on a node where nothing runs.
type etc struct {
	dir, main, socket string
	program           string
	containerd        string
}

func newEtc(t *testing.T, config string) etc {
	t.Helper()
	program, err := node.Program()
	check(t, err)
	containerd, err := node.Containerd()
	check(t, err)
	dir, err := os.MkdirTemp("", "etc-") // a socket's path must be short
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	e := etc{dir: filepath.Join(dir, "etc"), program: program, containerd: containerd, socket: filepath.Join(dir, "state", "artifact-snapshotter.sock")}
	e.main = filepath.Join(e.dir, "config.toml")
	check(t, os.Mkdir(e.dir, 0o755))
	writeFile(t, filepath.Join(dir, "daemon.toml"), fmt.Sprintf("root = %q\nstate = %q\ncontainerd_address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "containerd.sock")), 0o644)
	if config != "" {
		writeFile(t, e.main, strings.ReplaceAll(config, "/etc/containerd", e.dir), 0o640)
	}
	return e
}

// command is install or uninstall for these files.
func (e etc) command(args ...string) *exec.Cmd {
	args = append(args, "--no-service", "--containerd-config", e.main, "--config", filepath.Join(filepath.Dir(e.dir), "daemon.toml"))
	return exec.Command(e.program, args...)
}

func (e etc) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := e.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// dump is what containerd itself makes of the files, and defaults.
func (e etc) dump(t *testing.T) (all struct {
	ProxyPlugins map[string]struct {
		Type    string `toml:"type"`
		Address string `toml:"address"`
	} `toml:"proxy_plugins"`
	Plugins struct {
		Images struct {
			Snapshotter string `toml:"snapshotter"`
		} `toml:"io.containerd.cri.v1.images"`
		Runtime struct {
			Containerd struct {
				Runtimes map[string]struct {
					Type        string `toml:"runtime_type"`
					Snapshotter string `toml:"snapshotter"`
					Options     struct {
						SystemdCgroup bool
					} `toml:"options"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"io.containerd.cri.v1.runtime"`
		Transfer struct {
			Unpack []struct {
				Platform    string `toml:"platform"`
				Snapshotter string `toml:"snapshotter"`
			} `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
	} `toml:"plugins"`
},
) {
	t.Helper()
	cmd := exec.Command(e.containerd, "--config", e.main, "config", "dump")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("containerd config dump: %v\n%s", err, said.String())
	}
	check(t, toml.Unmarshal(out, &all))
	return all
}

// nodeFiles are containerd's configuration as nodes have it.
func nodeFiles(t *testing.T) map[string]string {
	t.Helper()
	containerd, err := node.Containerd()
	check(t, err)
	byDefault, err := exec.Command(containerd, "config", "default").Output()
	check(t, err)
	return map[string]string{
		"none":        "",
		"its default": strings.Replace(string(byDefault), "SystemdCgroup = false", "SystemdCgroup = true", 1),
		"version 2": `# of an older installation
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example.com/pause:3"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
`,
		"version 2 without runtimes": "version = 2\n[debug]\nlevel = 'info'",
		"comments and others": `# imports = ["/nowhere/*.toml"]
version = 3	# [three]

imports = [
	'/etc/containerd/conf.d/*.toml', # ours
]
[proxy_plugins] # of a colleague
  nydus = { type = 'snapshot', address = '/run/nydus.sock' }
[plugins]
  [plugins.'io.containerd.transfer.v1.local']
    unpack_config = [ { platform = 'linux', snapshotter = 'nydus', differ = 'walking' }, { platform = 'linux', snapshotter = 'overlayfs' } ]
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  options = { SystemdCgroup = true }
`,
		"another list": "version = 3\r\nimports = [ '/etc/containerd/others/*.toml' ]\r\n[debug]\r\n  level = 'info'\r\n",
	}
}

func TestInstallFitsTheFilesOfNodes(t *testing.T) {
	for kind, text := range nodeFiles(t) {
		for _, handler := range []string{"", "models"} {
			t.Run(kind+" "+handler, func(t *testing.T) {
				e := newEtc(t, text)
				check(t, os.MkdirAll(filepath.Join(e.dir, "others"), 0o755))
				before := files(t, e.dir)
				var flags []string
				if handler != "" {
					flags = []string{"--scope", "runtime-handler", "--runtime-handler", handler}
				}
				e.run(t, append([]string{"install", "--dry-run"}, flags...)...)
				wantSame(t, e.dir, before)
				e.run(t, append([]string{"install"}, flags...)...)

				got := e.dump(t)
				if p := got.ProxyPlugins["artifact"]; p.Type != "snapshot" || p.Address != e.socket {
					t.Errorf("the proxy plugin is %+v", p)
				}
				if p := got.ProxyPlugins["artifact-diff"]; p.Type != "diff" || p.Address != e.socket {
					t.Errorf("the differ is %+v", p)
				}
				want, of := "artifact", got.Plugins.Images.Snapshotter
				if handler != "" {
					want = "overlayfs"
					runtime := got.Plugins.Runtime.Containerd.Runtimes[handler]
					if runtime.Snapshotter != "artifact" || runtime.Type != "io.containerd.runc.v2" || runtime.Options.SystemdCgroup != strings.Contains(text, "SystemdCgroup = true") {
						t.Errorf("the runtime handler is %+v", runtime)
					}
				}
				if of != want {
					t.Errorf("the node's snapshotter is %q, want %q", of, want)
				}
				if strings.Contains(text, "SystemdCgroup = true") && !got.Plugins.Runtime.Containerd.Runtimes["runc"].Options.SystemdCgroup {
					t.Error("SystemdCgroup is lost")
				}
				var unpacked []string
				for _, u := range got.Plugins.Transfer.Unpack {
					if p, err := platforms.Parse(u.Platform); err == nil && platforms.Only(p).Match(platforms.DefaultSpec()) || u.Platform == "linux" {
						unpacked = append(unpacked, u.Snapshotter)
					}
				}
				slices.Sort(unpacked)
				wanted := []string{"artifact", "overlayfs"}
				if strings.Contains(text, "nydus") {
					wanted = []string{"artifact", "nydus", "overlayfs"}
					if got.ProxyPlugins["nydus"].Address != "/run/nydus.sock" {
						t.Error("nydus is lost")
					}
				}
				if !slices.Equal(unpacked, wanted) {
					t.Errorf("images are unpacked for %q, want %q", unpacked, wanted)
				}

				installed := files(t, e.dir)
				if said := e.run(t, append([]string{"install"}, flags...)...); said != "nothing to do" {
					t.Errorf("a second time it said %q", said)
				}
				wantSame(t, e.dir, installed)
				if fi, err := os.Stat(e.main); err != nil || text != "" && fi.Mode().Perm() != 0o640 {
					t.Errorf("the mode of the file is %v now, %v", fi.Mode(), err)
				}
				e.run(t, append([]string{"uninstall"}, flags...)...)
				wantSame(t, e.dir, before)
			})
		}
	}
}

// What is somebody else's, and what has come since, stays.
func TestUninstallKeepsWhatIsNotOurs(t *testing.T) {
	e := newEtc(t, "version = 3\nroot = '/data'\n")
	e.run(t, "install")
	text, err := os.ReadFile(e.main)
	check(t, err)
	writeFile(t, e.main, string(text)+"# since\n", 0o640)
	other := filepath.Join(e.dir, "conf.d", "other.toml")
	writeFile(t, other, "version = 3\n", 0o644)
	e.run(t, "uninstall")
	if got := files(t, e.dir); got[other] != "version = 3\n" || !strings.Contains(got[e.main], "conf.d/*.toml") || !strings.HasSuffix(got[e.main], "# since\n") {
		t.Errorf("left: %q", got)
	}
	check(t, os.Remove(other))
	e.run(t, "install")
	e.run(t, "uninstall")
	if got := files(t, e.dir)[e.main]; !strings.HasSuffix(got, "# since\n") {
		t.Errorf("left: %q", got)
	}
}

func TestInstallRefusesAndWritesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		flags []string
		spoil func(t *testing.T, e etc)
		want  string
	}{
		"no TOML":                 {"version = 3\n[plugins\n", nil, nil, "config.toml: toml: "},
		"a value of another kind": {"version = 3\nplugins = 1\n", nil, nil, "config.toml"},
		"a table twice":           {"version = 3\n[debug]\n[debug]\n", nil, nil, "config.toml"},
		"another snapshotter of that name": {
			"version = 3\n[proxy_plugins.artifact]\ntype = 'snapshot'\naddress = '/run/other.sock'\n", nil, nil,
			`another plugin called artifact already (type "snapshot", address "/run/other.sock"`,
		},
		"another snapshotter of the node": {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'nydus'\n", nil, nil, "the snapshotter of the node is nydus"},
		"another snapshotter of the default handler": {
			"version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\nsnapshotter = 'nydus'\n", nil, nil, "default runtime handler runc is nydus",
		},
		"a handler that is there": {
			"version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n",
			[]string{"--scope", "runtime-handler", "--runtime-handler", "kata"}, nil, "has a runtime handler kata already",
		},
		"a folder that is not there": {"version = 3\nimports = ['/etc/containerd/more/*.toml']\n", nil, nil, "mkdir -p "},
		"a file that is not there":   {"version = 3\nimports = ['/etc/containerd/more.toml']\n", nil, nil, "more.toml: no such file"},
		"a file made by another":     {"# File generated by k3s. DO NOT EDIT. Use config.toml.tmpl instead.\nversion = 3\n", nil, nil, "is made anew whenever its service starts"},
		"a file that overrules it": {"version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", nil, func(t *testing.T, e etc) {
			writeFile(t, filepath.Join(e.dir, "conf.d", "z.toml"), "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n", 0o644)
		}, "the snapshotter of the node is overruled"},
		"a file that must not be changed": {"version = 3\n", nil, func(t *testing.T, e etc) {
			t.Cleanup(func() { check(t, exec.Command("chattr", "-i", e.main).Run()) })
			check(t, exec.Command("chattr", "+i", e.main).Run())
		}, "may not be written to"},
		"a folder that is read-only": {"version = 3\n", nil, func(t *testing.T, e etc) {
			check(t, unix.Mount(e.dir, e.dir, "", unix.MS_BIND, ""))
			t.Cleanup(func() { check(t, unix.Unmount(e.dir, 0)) })
			check(t, unix.Mount("", e.dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		}, "on a filesystem that is read-only"},
		"no DNS label":   {"", []string{"--scope", "runtime-handler", "--runtime-handler", "a b"}, nil, "is not a DNS label"},
		"no such scope":  {"", []string{"--scope", "all"}, nil, "is neither node nor runtime-handler"},
		"no such host":   {"", []string{"--host", "/nowhere"}, nil, "--host /nowhere"},
		"no daemon file": {"", []string{"--config", "/nowhere.toml"}, nil, "/nowhere.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEtc(t, c.text)
			if c.spoil != nil {
				c.spoil(t, e)
			}
			before := files(t, e.dir)
			for _, args := range [][]string{{"install"}, {"install", "--dry-run"}} {
				if name == "a file that overrules it" && len(args) > 1 {
					continue // only containerd's order tells, once the file is there
				}
				cmd := e.command(args...)
				cmd.Args = append(cmd.Args, c.flags...)
				out, err := cmd.CombinedOutput()
				if err == nil || !strings.Contains(string(out), c.want) || strings.Count(string(out), "\n") != 1 {
					t.Errorf("%v: %v, want one line with %q:\n%s", args, err, c.want, out)
				}
				wantSame(t, e.dir, before)
			}
		})
	}
}

// Killed at any instant, containerd can start with what is there, and the next run
// does the rest.
func TestInstallIsKilledHalfWay(t *testing.T) {
	e := newEtc(t, "version = 3\nroot = '/data'\n")
	before := files(t, e.dir)
	e.run(t, "install")
	installed := files(t, e.dir)
	e.run(t, "uninstall")
	wantSame(t, e.dir, before)

	began := time.Now()
	e.run(t, "install")
	takes := time.Since(began)
	e.run(t, "uninstall")
	partly := 0
	const kills = 60
	for i := range kills {
		for _, step := range []struct {
			do    string
			after map[string]string
		}{{"install", installed}, {"uninstall", before}} {
			cmd := e.command(step.do)
			check(t, cmd.Start())
			timer := time.AfterFunc(takes*time.Duration(i)/kills, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
			_ = cmd.Wait()
			timer.Stop()
			if now := files(t, e.dir); !same(now, before) && !same(now, installed) {
				partly++
			}
			e.dump(t)
			e.run(t, step.do)
			wantSame(t, e.dir, step.after)
		}
	}
	t.Logf("killed %d times, %d of them half-way", 2*kills, partly)
}

func same(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for path, text := range a {
		if got, ok := b[path]; !ok || got != text {
			return false
		}
	}
	return true
}
