// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdtest"
)

// binary is the real program, built once for all tests.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", name)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, name)
		build := exec.Command("go", "build", "-ldflags", "-X main.version=v1.2.3", "-o", binary, ".")
		if output, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, output)
			return 1
		}
		return m.Run()
	}())
}

// run runs the program to its end.
func run(t *testing.T, args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, binary, args...)
	var out, errs bytes.Buffer
	command.Stdout, command.Stderr = &out, &errs
	err := command.Run()
	if exited := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exited) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), command.ProcessState.ExitCode()
}

// output runs the program, which must succeed and print nothing on stderr.
func output(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, exit := run(t, args...)
	if exit != 0 || stderr != "" {
		t.Fatalf("%s: exit code %d\n%s", strings.Join(args, " "), exit, stderr)
	}
	return stdout
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestVersion(t *testing.T) {
	want := fmt.Sprintf("artifact-snapshotter v1.2.3 %s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	for _, args := range []string{"version", "--version", "-v"} {
		if got := output(t, args); got != want {
			t.Errorf("%s: got %q, want %q", args, got, want)
		}
	}
}

func TestConfigDefault(t *testing.T) {
	if got := output(t, "config", "default"); got != daemon.DefaultFile {
		t.Errorf("got %q", got)
	}
}

// An error is one line on stderr that says what to do, and exit code 1.
func TestErrors(t *testing.T) {
	unknown := writeFile(t, "rooot = '/r'\nother = 1\n")
	bad := writeFile(t, "root = 'r'\nraw_mode = 'stairs'\n")
	for name, test := range map[string]struct {
		args []string
		want []string
	}{
		"an unknown command":              {[]string{"server"}, []string{"server", "artifact-snapshotter --help"}},
		"version and an argument":         {[]string{"-v", "extra"}, []string{"no such command: artifact-snapshotter extra (see artifact-snapshotter --help)"}},
		"a namespace that is none":        {[]string{"-n", "a b", "ls"}, []string{`"a b" is no namespace of containerd`}},
		"a filter that is none":           {[]string{"prune", "--filter", "foo"}, []string{`filter "foo": it is not like until=24h`}},
		"a host that is none":             {[]string{"install", "--no-service", "--host", "/var"}, []string{"--host /var is not the root of a host: it has no /proc"}},
		"an unknown command with a flag":  {[]string{"server", "--root", "/r"}, []string{"no such command: artifact-snapshotter server (see artifact-snapshotter --help)"}},
		"an unknown subcommand":           {[]string{"config", "docker"}, []string{"config docker", "config --help"}},
		"an unknown subcommand and flag":  {[]string{"config", "docker", "--x"}, []string{"config docker", "config --help"}},
		"an unknown flag":                 {[]string{"serve", "--rooot", "/r"}, []string{"unknown flag: --rooot (see artifact-snapshotter serve --help)"}},
		"an unknown flag with a value":    {[]string{"ls", "-nk8s.io=x"}, []string{"unknown flag: -nk8s.io (see artifact-snapshotter ls --help)"}},
		"a flag without its value":        {[]string{"serve", "--root"}, []string{"flag --root needs a value"}},
		"a long flag with one dash":       {[]string{"ls", "-output"}, []string{"flag -output needs a value (see artifact-snapshotter ls --help)"}},
		"a number that is no duration":    {[]string{"health", "--timeout", "5"}, []string{`invalid value "5" for --timeout: it is no duration like 5s`}},
		"no bool":                         {[]string{"doctor", "--nri=x"}, []string{`invalid value "x" for --nri: it is neither true nor false`}},
		"a relative socket":               {[]string{"health", "--address", "a.sock"}, []string{`--address "a.sock" is not the absolute path`}},
		"no snapshotter":                  {[]string{"ls", "--snapshotter", ""}, []string{"--snapshotter is empty"}},
		"an argument too many":            {[]string{"version", "now"}, []string{": version accepts no arguments, got \"now\""}},
		"inspect without a digest":        {[]string{"inspect"}, []string{": inspect requires exactly 1 argument (REF), got 0 (see artifact-snapshotter inspect --help)"}},
		"inspect of two digests":          {[]string{"inspect", "a", "b"}, []string{"requires exactly 1 argument (REF), got 2"}},
		"mount without a target":          {[]string{"mount", "a"}, []string{"requires exactly 2 arguments (REF TARGET), got 1"}},
		"an alias":                        {[]string{"umount"}, []string{": unmount requires exactly 1 argument (TARGET), got 0"}},
		"another alias":                   {[]string{"list", "a"}, []string{": ls accepts no arguments"}},
		"a flag of completion":            {[]string{"completion", "--x"}, []string{"unknown flag: --x (see artifact-snapshotter completion --help)"}},
		"a missing configuration":         {[]string{"serve", "--config", "/none.toml"}, []string{"/none.toml"}},
		"unknown keys":                    {[]string{"serve", "--config", unknown}, []string{unknown, "rooot (line 1)", "other (line 2)"}},
		"bad values":                      {[]string{"serve", "--config", bad}, []string{"root", "absolute", "stairs"}},
		"a bad flag":                      {[]string{"serve", "--log-level", "loud"}, []string{"log_level", "loud"}},
		"an unknown scope":                {[]string{"config", "containerd", "--scope", "pod"}, []string{"pod", "node", "runtime-handler"}},
		"a handler of the whole node":     {[]string{"config", "containerd", "--scope", "node", "--runtime-handler", "x"}, []string{"--scope runtime-handler"}},
		"a handler that is not a label":   {[]string{"config", "containerd", "--runtime-handler", "a.b"}, []string{"a.b", "DNS label"}},
		"containerd config, bad file":     {[]string{"config", "containerd", "--config", bad}, []string{"stairs"}},
		"containerd config, no file":      {[]string{"config", "containerd", "--config", "/none.toml"}, []string{"/none.toml"}},
		"a flag of the command before it": {[]string{"--root", "/r", "serve"}, []string{"root"}},
		"help of an unknown command":      {[]string{"help", "config", "docker"}, []string{"no such command: artifact-snapshotter config docker (see artifact-snapshotter config --help)"}},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, exit := run(t, test.args...)
			if exit != 1 || stdout != "" {
				t.Errorf("exit code %d, want 1; stdout %q, want nothing", exit, stdout)
			}
			wantErrorLine(t, stderr, test.want...)
		})
	}
}

// The flags of the commands that talk to containerd may precede the command. The error
// about a missing socket names the socket.
func TestGlobalFlags(t *testing.T) {
	t.Setenv("CONTAINERD_ADDRESS", "/env.sock")
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"the environment":       {[]string{"ls"}, "not answer on /env.sock"},
		"before the command":    {[]string{"-a", "/before.sock", "ls"}, "not answer on /before.sock"},
		"behind the command":    {[]string{"ls", "--address", "/behind.sock"}, "not answer on /behind.sock"},
		"the nearest wins":      {[]string{"--address=/before.sock", "ls", "-a", "/behind.sock"}, "not answer on /behind.sock"},
		"all of them":           {[]string{"--output", "json", "-n", "k8s.io", "-a", "/before.sock", "ls"}, "not answer on /before.sock"},
		"an empty namespace":    {[]string{"-n", "", "ls"}, "the namespace is empty"},
		"an empty one replaced": {[]string{"-n", "", "ls", "-n", "k8s.io"}, "not answer on /env.sock"},
		"a missing file":        {[]string{"--config", "/none.toml", "-a", "", "ls"}, "/none.toml"},
		"a short name":          {[]string{"-o", "json", "list"}, "not answer on /env.sock"},
		"a bad form":            {[]string{"--output", "xml", "ls"}, `--output "xml" is neither`},
		"a bad form, doctor":    {[]string{"--output", "xml", "doctor"}, `--output "xml" is neither`},
		"a bad form replaced":   {[]string{"--output", "xml", "ls", "--output", "json"}, "not answer on /env.sock"},

		"-n of another command":      {[]string{"-n", "k8s.io", "install", "--dry-run"}, ": install does not take --namespace, which is before the command (see artifact-snapshotter install --help)"},
		"-a of another command":      {[]string{"-a", "/x.sock", "serve", "--address", "/y.sock"}, "serve does not take --address"},
		"-a of doctor":               {[]string{"-a", "/x.sock", "doctor"}, "doctor does not take --address"},
		"--output of another":        {[]string{"--output", "json", "version"}, "version does not take --output"},
		"of a command of a command":  {[]string{"-n", "x", "config", "default"}, ": config default does not take --namespace"},
		"of completion":              {[]string{"-n", "x", "completion", "bash"}, ": completion bash does not take --namespace"},
		"behind one without it":      {[]string{"install", "-n", "x"}, "unknown flag: -n"},
		"--config of another":        {[]string{"--config", "/x", "config", "default"}, ": config default does not take --config"},
		"a local flag of a command":  {[]string{"--mounts", "ls"}, "unknown flag: --mounts (see artifact-snapshotter --help)"},
		"a flag without its value":   {[]string{"-n"}, "flag -n needs a value"},
		"and then no such a command": {[]string{"-n", "x", "lst"}, "no such command"},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, exit := run(t, test.args...)
			if exit != 1 || stdout != "" {
				t.Errorf("exit code %d, want 1; stdout %q, want nothing", exit, stdout)
			}
			wantErrorLine(t, stderr, test.want)
		})
	}
	t.Run("help", func(t *testing.T) {
		for _, words := range []string{"", "pull", "config default"} {
			want := output(t, append(strings.Fields(words), "--help")...)
			if got := output(t, append([]string{"help"}, strings.Fields(words)...)...); got != want {
				t.Errorf("help %s prints\n%s\nand --help\n%s", words, got, want)
			}
		}
		for _, flag := range []string{"--namespace string, -n string", "--address string, -a string", "--output string, -o string", "--snapshotter string", "--config string"} {
			if help := output(t, "--help"); !strings.Contains(help, flag) {
				t.Errorf("the help does not say %q:\n%s", flag, help)
			}
		}
		if help := output(t, "install", "--help"); strings.Contains(help, "--namespace") {
			t.Errorf("install does not take --namespace, and its help says:\n%s", help)
		}
	})
}

// What the scripts of completion ask for.
func TestCompletion(t *testing.T) {
	for words, want := range map[string]string{
		"ls --output":       "text\njson\n",
		"-o":                "text\njson\n",
		"install --scope":   "runtime-handler\nnode\n",
		"serve --log-level": "trace\ndebug\ninfo\nwarn\nerror\nfatal\npanic\n",
		"ls --root":         "",
		"config":            "default\ncontainerd\n",
	} {
		got := output(t, append(strings.Fields(words), "--generate-shell-completion")...)
		if got != want {
			t.Errorf("%s: got %q, want %q", words, got, want)
		}
	}
	if got := output(t, "--generate-shell-completion"); strings.Contains(got, "pause") || !strings.Contains(got, "verify\n") {
		t.Errorf("the commands are %q", got)
	}
}

func wantErrorLine(t *testing.T, stderr string, words ...string) {
	t.Helper()
	if !strings.HasPrefix(stderr, "artifact-snapshotter: ") || strings.Index(stderr, "\n") != len(stderr)-1 {
		t.Errorf("stderr is not one line of ours: %q", stderr)
	}
	for _, word := range words {
		if !strings.Contains(stderr, word) {
			t.Errorf("stderr %q does not say %q", stderr, word)
		}
	}
}

// The real containerd reads what `config containerd` prints as it is meant, both alone and
// as an import.
func TestConfigContainerd(t *testing.T) {
	ours := writeFile(t, "root = '/srv/artifacts'\nstate = '/run/other'\n")
	for name, test := range map[string]struct {
		args    []string
		image   string // snapshotter of the node
		handler string // handler with the snapshotter artifact
		address string
		root    string
	}{
		"for the node": {
			args:  []string{"--scope", "node"},
			image: "artifact", address: "/run/artifact-snapshotter/artifact-snapshotter.sock", root: "/var/lib/artifact-snapshotter",
		},
		"for the node, with a file": {
			args:  []string{"--scope", "node", "--config", ours},
			image: "artifact", address: "/run/other/artifact-snapshotter.sock", root: "/srv/artifacts",
		},
		"by default": {
			image: "overlayfs", handler: "artifact",
			address: "/run/artifact-snapshotter/artifact-snapshotter.sock", root: "/var/lib/artifact-snapshotter",
		},
		"for a runtime handler": {
			args:  []string{"--scope", "runtime-handler"},
			image: "overlayfs", handler: "artifact",
			address: "/run/artifact-snapshotter/artifact-snapshotter.sock", root: "/var/lib/artifact-snapshotter",
		},
		"for a runtime handler with a name": {
			args:  []string{"--runtime-handler", "models-1"},
			image: "overlayfs", handler: "models-1",
			address: "/run/artifact-snapshotter/artifact-snapshotter.sock", root: "/var/lib/artifact-snapshotter",
		},
	} {
		t.Run(name, func(t *testing.T) {
			alone := writeFile(t, output(t, append([]string{"config", "containerd"}, test.args...)...))
			importing := writeFile(t, fmt.Sprintf("version = 3\nimports = [%q]\n", alone))
			for _, path := range []string{alone, importing} {
				got := containerdtest.Dump(t, containerdtest.Tool(t, "containerd"), path)
				proxy := got.ProxyPlugins["artifact"]
				if proxy.Type != "snapshot" || proxy.Address != test.address || proxy.Exports["root"] != test.root ||
					len(proxy.Capabilities) != 1 || proxy.Capabilities[0] != "remap-ids" {
					t.Errorf("the proxy plugin is %+v", proxy)
				}
				if snapshotter := got.Plugins.Images.Snapshotter; snapshotter != test.image {
					t.Errorf("the node's snapshotter is %q, want %q", snapshotter, test.image)
				}
				runtimes := got.Plugins.Runtime.Containerd.Runtimes
				if runc := runtimes["runc"]; runc.Type != "io.containerd.runc.v2" || runc.Snapshotter != "" {
					t.Errorf("the handler runc is %+v, want it unchanged", runc)
				}
				for handler, runtime := range runtimes {
					if handler == "runc" {
						continue
					}
					if handler != test.handler || runtime.Type != "io.containerd.runc.v2" || runtime.Snapshotter != "artifact" {
						t.Errorf("the handler %s is %+v", handler, runtime)
					}
				}
				if test.handler != "" && len(runtimes) != 2 {
					t.Errorf("the handlers are %+v, want runc and %s", runtimes, test.handler)
				}
				unpack := got.Plugins.Transfer.UnpackConfig
				if len(unpack) != 2 || unpack[0].Snapshotter != "overlayfs" || unpack[1].Snapshotter != "artifact" ||
					unpack[0].Differ != "walking" || unpack[1].Differ != "walking" {
					t.Errorf("unpack_config is %+v", unpack)
				}
			}
		})
	}
}

// containerd takes the first entry that matches, so the entries of artifacts come last.
func TestConfigContainerdWithNativeUnpacking(t *testing.T) {
	got := containerdtest.Dump(t, containerdtest.Tool(t, "containerd"), writeFile(t, output(t, "config", "containerd", "--native-unpack")))
	if proxy := got.ProxyPlugins["artifact-diff"]; proxy.Type != "diff" || proxy.Address != got.ProxyPlugins["artifact"].Address {
		t.Errorf("the proxy plugin of the differ is %+v", proxy)
	}
	unpack := got.Plugins.Transfer.UnpackConfig
	if len(unpack) != 5 || unpack[0].Differ != "walking" || unpack[1].Differ != "walking" {
		t.Fatalf("unpack_config is %+v", unpack)
	}
	platforms := map[string]bool{}
	for _, entry := range unpack[2:] {
		if entry.Snapshotter != "artifact" || entry.Differ != "artifact-diff" || !strings.HasPrefix(entry.Platform, "linux(+") {
			t.Errorf("unpack_config has %+v", entry)
		}
		platforms[entry.Platform] = true
	}
	if len(platforms) != 3 {
		t.Errorf("the platforms are %v, and only the first of each is taken", platforms)
	}
}

// Flags override the configuration file, and SIGTERM ends serve with exit code 0.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	config := writeFile(t, fmt.Sprintf("root = %q\nstate = '/nowhere'\naddress = '/nowhere/a.sock'\nlog_level = 'error'\nnamespaces = []\n", dir+"/root"))
	address := filepath.Join(dir, "a.sock")
	command := exec.Command(binary, "serve", "--config", config, "--state", dir+"/state", "--address", address,
		"--content-root", dir+"/content", "--containerd-address", dir+"/c.sock", "--log-level", "debug")
	if err := os.MkdirAll(filepath.Join(dir, "content", "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	command.Stderr = &stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- command.Wait() }()
	for answers := false; !answers; {
		conn, err := net.Dial("unix", address)
		if err == nil {
			answers = true
			conn.Close()
			continue
		}
		select {
		case err := <-exited:
			t.Fatalf("serve ended: %v\n%s", err, &stderr)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err := command.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("serve: %v", err)
		}
	case <-time.After(2 * time.Minute):
		_ = command.Process.Kill()
		t.Errorf("serve does not end on SIGTERM: %v", <-exited)
	}
	if text := stderr.String(); !strings.Contains(text, "level=info msg=serving address="+address) {
		t.Errorf("the log does not say where it serves:\n%s", text)
	}
	if _, err := os.Stat(filepath.Join(dir, "root", "lock")); err != nil {
		t.Errorf("the root of the file is not used: %v", err)
	}
}
