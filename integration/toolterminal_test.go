// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// onTerminal starts a command on a terminal with 80 columns.
func onTerminal(t *testing.T, n *node.Node, args ...string) (console.Console, *exec.Cmd) {
	t.Helper()
	master, path, err := console.NewPty()
	check(t, err)
	t.Cleanup(func() { _ = master.Close() })
	check(t, master.Resize(console.WinSize{Height: 24, Width: 80}))
	slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	check(t, err)
	cmd, err := n.ArtifactCommand(args...)
	check(t, err)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	check(t, cmd.Start())
	check(t, slave.Close())
	return master, cmd
}

// terminal runs a command on a terminal, types the input, and returns the output.
func terminal(t *testing.T, n *node.Node, typed string, args ...string) string {
	t.Helper()
	master, cmd := onTerminal(t, n, args...)
	_, err := master.Write([]byte(typed))
	check(t, err)
	var shown bytes.Buffer
	_, err = io.Copy(&shown, master)
	if err != nil && !errors.Is(err, unix.EIO) { // EIO means that the other end of the terminal was closed
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%q: %v, with\n%s", args, err, shown.String())
	}
	return shown.String()
}

func TestPullOnATerminalAndWithAPassword(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	pushModel(t, n, src, pack.Raw, "raw")
	shown := terminal(t, n, "", "pull", n.Registry+"/models/tiny:raw")
	for _, want := range []string{"model-00001.safetensors", "|\x1b[32m++++", "3.0 MiB/3.0 MiB", "8 of 8 layers", "\x1b[1A"} {
		if !strings.Contains(shown, want) {
			t.Errorf("the output does not contain %q:\n%q", want, shown)
		}
	}

	shown = terminal(t, n, "", "verify", n.Registry+"/models/tiny:raw")
	if !regexp.MustCompile(`\r\x1b\[Kmanifest  [0-9a-f]{12}  3\.. KiB of 3\.. KiB\r\x1b\[KBLOB`).MatchString(shown) {
		t.Errorf("the terminal shows no progress:\n%q", shown)
	}

	private, err := n.StartPrivateRegistry()
	check(t, err)
	ref := private + "/models/tiny:raw"
	before := state(t, n, t.TempDir())
	wantRefusal(t, n, []string{ref, "401 Unauthorized"}, "pull", ref)
	wantRefusal(t, n, []string{ref, "401 Unauthorized"}, "pull", "-u", node.PrivateUser+":wrong", ref)
	if after := state(t, n, t.TempDir()); withoutDirs(after) != withoutDirs(before) {
		t.Errorf("the state changed from\n%s\nto\n%s", before, after)
	}
	tool(t, n, "pull", "-u", node.PrivateUser+":"+node.PrivatePassword, ref)
	check(t, removeByName(n, ref))
	shown = terminal(t, n, node.PrivatePassword+"\n", "pull", "-u", node.PrivateUser, ref)
	if !strings.Contains(shown, "Password: ") || !strings.Contains(shown, ref) {
		t.Errorf("unexpected output: %q", shown)
	}

	// Both containerd and the command read hosts.toml.
	hosts := t.TempDir()
	check(t, os.Mkdir(filepath.Join(hosts, "models.example.com"), 0o755))
	check(t, os.WriteFile(filepath.Join(hosts, "models.example.com", "hosts.toml"), []byte("server = 'http://"+private+"'\n"), 0o600))
	named := "models.example.com/models/tiny:raw"
	out := tool(t, n, "pull", "--hosts-dir", hosts, "-u", node.PrivateUser+":"+node.PrivatePassword, named)
	if !strings.Contains(out, named) {
		t.Errorf("pull prints %q", out)
	}

	// Credentials are not sent to the target of a redirect.
	var asked atomic.Int64
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if header := r.Header.Get("Authorization"); header != "" {
			t.Errorf("another host got the credentials %q", header)
		}
		asked.Add(1)
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer thief.Close()
	trusted := httptest.NewServer(http.RedirectHandler(thief.URL, http.StatusTemporaryRedirect))
	defer trusted.Close()
	wantRefusal(t, n, []string{"credentials"}, "pull", "-u", node.PrivateUser+":"+node.PrivatePassword, strings.TrimPrefix(trusted.URL, "http://")+"/models/tiny:raw")
	if asked.Load() == 0 {
		t.Error("the redirect was not followed, so the test proves nothing")
	}

	// After an interrupted password prompt the terminal echoes again.
	master, cmd := onTerminal(t, n, "pull", "-u", node.PrivateUser, ref)
	echo := func() bool {
		termios, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
		check(t, err)
		return termios.Lflag&unix.ECHO != 0
	}
	waitFor(t, "the terminal to stop echoing", func() bool { return !echo() })
	check(t, cmd.Process.Signal(unix.SIGINT))
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("pull ends with %v, want exit code 1", err)
	}
	if !echo() {
		t.Error("the terminal does not echo any more")
	}
}

func removeByName(n *node.Node, ref string) error {
	_, err := n.Ctr("images", "rm", "--sync", ref)
	return err
}

// withoutDirs removes the last line of a state, which describes a directory.
func withoutDirs(state string) string {
	return state[:strings.LastIndex(strings.TrimSpace(state), "\n")]
}

// prune asks before it deletes, and rm deletes only one name.
func TestPruneAsksAndRmDeletesOneName(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	src := writeModel(t)
	one, two := pulled(t, n, src, pack.Raw), pulled(t, n, src, pack.TarGzip)
	other := strings.Replace(one, "/models/", "/other/", 1)
	_, err := n.Ctr("images", "tag", one, other)
	check(t, err)
	left := func() (refs []string) {
		for _, l := range toolJSON[[]jsonListed](t, n, "list") {
			refs = append(refs, l.Reference)
		}
		return refs
	}
	want := func(refs ...string) {
		t.Helper()
		slices.Sort(refs)
		if got := left(); !slices.Equal(got, refs) {
			t.Errorf("remaining: %q, want %q", got, refs)
		}
	}
	asked := func(answer string, args ...string) string {
		master, cmd := onTerminal(t, n, args...)
		_, err := master.Write([]byte(answer + "\n"))
		check(t, err)
		var shown bytes.Buffer
		_, _ = io.Copy(&shown, master)
		_ = cmd.Wait()
		return shown.String()
	}
	for _, answer := range []string{"", "n", "yeah"} {
		if shown := asked(answer, "prune"); !strings.Contains(shown, one) || !strings.Contains(shown, "Delete 2 artifacts (6.0 MiB)? [y/N]") || !strings.Contains(shown, "nothing was deleted") {
			t.Errorf("with the answer %q the output is\n%s", answer, shown)
		}
	}
	want(one, two, other)
	// prune would delete all names of an artifact, so it skips one that has a name without
	// a match.
	for _, filter := range []string{"reference=*/other/*", "label=nobody", "until=24h"} {
		if got := toolJSON[jsonPruned](t, n, "prune", "-f", "--filter", filter); len(got.Artifacts) != 0 {
			t.Errorf("--filter %s deleted %+v", filter, got)
		}
	}
	target := toolTarget(t)
	tool(t, n, "mount", one, target)
	if out := tool(t, n, "rm", other); !strings.Contains(out, other) || strings.Contains(out, one) {
		t.Errorf("rm prints\n%s", out)
	}
	want(one, two)
	for _, ref := range []string{one, manifestOf(t, n, one)[:12]} {
		wantRefusal(t, n, []string{"is in use by the mount " + target, "--force"}, "rm", two, ref)
	}
	want(one, two)
	if shown := asked("y", "prune", "--filter", "reference=*/models/*", "--filter", "until=1ms"); !strings.Contains(shown, "Delete 1 artifact (3.0 MiB)? [y/N]") || !strings.Contains(shown, "total: 1 artifact (3.0 MiB), ") {
		t.Errorf("unexpected output:\n%s", shown)
	}
	want(one)
	tool(t, n, "rm", "--force", one)
	want()
	wantFiles(t, target, wantTree(t, src, pack.Raw))
	tool(t, n, "unmount", target)
}

func TestBashCompletesReferences(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t, "src/__init__.py"), pack.Raw)
	// bash inserts completions without quoting.
	c := connect(t, n)
	image, err := c.Image(t.Context(), ref)
	check(t, err)
	image.Name = "zz;touch$IFS/tmp/x;$(id)"
	_, err = c.ImageService().Create(c.Context(t.Context()), image.Image)
	check(t, err)
	script, _, err := n.Artifact("completion", "bash")
	check(t, err)
	bin, err := n.ArtifactCommand()
	check(t, err)
	complete := func(line string) []string {
		t.Helper()
		// The script also runs the first word of the line, so define it as a function.
		text := "artifact-snapshotter() { " + bin.Path + ` "$@"; }` + "\n" + script +
			"COMP_LINE=$1 COMP_POINT=${#1}; _artifact_snapshotter; printf '%s\\n' \"${COMPREPLY[@]}\""
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "bash", "-c", text, "bash", line)
		cmd.Env = bin.Env
		out, err := cmd.Output()
		check(t, err)
		return strings.Fields(string(out))
	}
	host, _, _ := strings.Cut(ref, ":")
	for line, want := range map[string][]string{
		"artifact-snapshotter ver":                        {"verify", "version"},
		"artifact-snapshotter config d":                   {"default"},
		"artifact-snapshotter ls --mo":                    {"--mounts"},
		"artifact-snapshotter verify ":                    {ref},
		"artifact-snapshotter rm ":                        {ref},
		"artifact-snapshotter mount -n k8s.io " + ref[:5]: {ref},
		// For bash a new word begins after the colon.
		"artifact-snapshotter inspect " + ref[:len(host)+3]: {strings.TrimPrefix(ref, host+":")},
		"artifact-snapshotter verify x":                     nil,
		"artifact-snapshotter verify zz":                    nil,
		"artifact-snapshotter completion ":                  {"bash", "zsh", "fish"},
		"artifact-snapshotter ls --output ":                 {"text", "json"},
		"artifact-snapshotter ls -n ":                       nil,
		"artifact-snapshotter verify -n nowhere ":           nil,
		"artifact-snapshotter unmount ":                     nil,
		// Flags before the command work too.
		"artifact-snapshotter --na":                 {"--namespace"},
		"artifact-snapshotter -n ":                  nil,
		"artifact-snapshotter -n k8s.io ver":        {"verify", "version"},
		"artifact-snapshotter -n k8s.io verify ":    {ref},
		"artifact-snapshotter -n nowhere verify ":   nil,
		"artifact-snapshotter -a /nowhere inspect ": nil,
	} {
		if got := complete(line); !slices.Equal(got, want) {
			t.Errorf("%q is completed with %q, want %q", line, got, want)
		}
	}
}
