// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/doctor"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// report is what doctor prints as JSON.
type report struct {
	Kernel struct {
		Facts struct {
			Release string `json:"release"`
		} `json:"facts"`
	} `json:"kernel"`
	Raw     modeReport `json:"raw_layers"`
	Tar     modeReport `json:"tar_layers"`
	Content struct {
		Problem string                    `json:"problem"`
		Facts   unpack.RetentionDiagnosis `json:"facts"`
		Advice  []doctor.Advice           `json:"advice"`
	} `json:"content_root"`
	Containerd       section[doctor.ContainerdFacts] `json:"containerd"`
	Socket           section[doctor.SocketFacts]     `json:"socket"`
	ContainerdConfig section[doctor.ConfigFacts]     `json:"containerd_config"`
	EmptyBlob        section[doctor.BlobFacts]       `json:"empty_blob"`
	SharedConfigs    section[[]doctor.SharedFacts]   `json:"shared_configs"`
	Verdict          doctor.Verdict                  `json:"verdict"`
}

type section[T any] struct {
	Problem string          `json:"problem"`
	Unknown string          `json:"unknown"`
	Facts   T               `json:"facts"`
	Advice  []doctor.Advice `json:"advice"`
}

// nowhere are flags that hide the containerd and the daemon of the machine from doctor.
func nowhere(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	return []string{"--address", filepath.Join(dir, "a.sock"), "--containerd-address", filepath.Join(dir, "c.sock"), "--containerd-config", filepath.Join(dir, "none.toml")}
}

type modeReport struct {
	Problem string           `json:"problem"`
	Facts   doctor.ModeFacts `json:"facts"`
	Advice  []doctor.Advice  `json:"advice"`
}

// examine runs doctor twice, for people and for programs. Both must read the same, and
// nothing must be left in root.
func examine(t *testing.T, root, content, config string) (text string, got report, exit int) {
	t.Helper()
	before := names(t, root)
	args := append(nowhere(t), "--config", writeFile(t, config), "--root", root, "--content-root", content)
	args = append([]string{"doctor"}, args...)
	text, stderr, exit := run(t, args...)
	printed, jsonStderr, jsonExit := run(t, append(args, "--output", "json")...)
	if jsonExit != exit || jsonStderr != stderr {
		t.Errorf("--output json ends with %d and %q, the text with %d and %q", jsonExit, jsonStderr, exit, stderr)
	}
	if exit == 0 && stderr != "" {
		t.Errorf("stderr: %q", stderr)
	}
	decoder := json.NewDecoder(strings.NewReader(printed))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&got); err != nil {
		t.Fatalf("%v in %s", err, printed)
	}
	if want := "kernel: Linux " + got.Kernel.Facts.Release + "\n"; got.Kernel.Facts.Release == "" || !strings.Contains(text, want) {
		t.Errorf("the text has no %q", want)
	}
	for _, r := range []modeReport{got.Raw, got.Tar} {
		for _, trial := range r.Facts.Trials {
			line := row(text, string(trial.Mode))
			if strings.Contains(line, "does not work") == trial.Works || !strings.Contains(line, trial.Reason) ||
				!strings.Contains(line, trial.Tried) || strings.Contains(line, "  taken") != (trial.Mode == r.Facts.Taken) {
				t.Errorf("the text says %q, JSON %+v of %+v", line, trial, r.Facts)
			}
		}
	}
	for name, p := range map[string]unpack.Location{"root": got.Content.Facts.Root, "blobs": got.Content.Facts.Blobs} {
		for _, word := range []string{p.Type, p.Device, p.Mount, p.Path} {
			if line := row(text, name); word == "" || !strings.Contains(line, word) {
				t.Errorf("the text says %q, JSON %+v", line, p)
			}
		}
	}
	for _, a := range slices.Concat(got.Raw.Advice, got.Tar.Advice, got.Content.Advice, got.Containerd.Advice, got.Socket.Advice) {
		if want := fmt.Sprintf("advice: %s: %s\n", a.Do, a.Gain); a.Do == "" || a.Gain == "" || !strings.Contains(text, want) {
			t.Errorf("the text has no %q", want)
		}
	}
	for check, problem := range map[string]string{"raw layers": got.Raw.Problem, "tar layers": got.Tar.Problem, "content root": got.Content.Problem} {
		if problem != "" {
			wantErrorLine(t, stderr, check)
		}
		if (problem != "") != strings.Contains(stderr, check) {
			t.Errorf("stderr %q, and of %s JSON has %q", stderr, check, problem)
		}
	}
	if want := fmt.Sprintf("\n\nverdict: %s\n", got.Verdict); !strings.HasSuffix(text, want) || (got.Verdict.Result == doctor.ResultProblem) != (exit == 1) {
		t.Errorf("exit code %d, and the text does not end with %q", exit, want)
	}
	if after := names(t, root); !slices.Equal(after, before) {
		t.Errorf("%s has %q, before it had %q", root, after, before)
	}
	return text, got, exit
}

// row is the line of a table that begins with name.
func row(text, name string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, name+" ") {
			return line
		}
	}
	return ""
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// wantAdvice checks that one piece of advice has both words.
func wantAdvice(t *testing.T, all []doctor.Advice, do, gain string) {
	t.Helper()
	if n := len(slices.DeleteFunc(slices.Clone(all), func(a doctor.Advice) bool {
		return !strings.Contains(a.Do, do) || !strings.Contains(a.Gain, gain)
	})); n != 1 {
		t.Errorf("%d of %+v are %q with the gain %q, want 1", n, all, do, gain)
	}
}

// mounted mounts a new filesystem of a type until the test ends.
func mounted(t *testing.T, fstype string) string {
	t.Helper()
	dir := t.TempDir()
	if fstype == "ext4" {
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, 64<<20); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, dir}} {
			if output, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, output)
			}
		}
	} else if err := unix.Mount(fstype, dir, fstype, 0, ""); err != nil {
		t.Fatal(err)
	}
	unmountAtEnd(t, dir)
	return dir
}

func unmountAtEnd(t *testing.T, dir string) {
	t.Helper()
	t.Cleanup(func() {
		// A loop device is busy until the last process closes it, and a process that
		// looks for a free one opens them all.
		err := unix.Unmount(dir, 0)
		for deadline := time.Now().Add(30 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); {
			<-time.After(10 * time.Millisecond)
			err = unix.Unmount(dir, 0)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// contentIn creates a content root with a blob.
func contentIn(t *testing.T, dir string) (content string, blob digest.Digest) {
	t.Helper()
	content = filepath.Join(dir, "content")
	blob = digest.FromString("blob")
	blobs := filepath.Join(content, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"0-no-blob": "", blob.Encoded(): "blob"} {
		if err := os.WriteFile(filepath.Join(blobs, name), []byte(text), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	return content, blob
}

func TestDoctorHasNoAdviceForAGoodNode(t *testing.T) {
	disk := mounted(t, "ext4")
	content, blob := contentIn(t, disk)
	root := filepath.Join(disk, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	text, got, exit := examine(t, root, content, "")
	if exit != 0 || got.Raw.Facts.Taken != unpack.Overlay || got.Tar.Facts.Taken != unpack.EROFS ||
		len(got.Raw.Facts.Trials) != len(unpack.RawModes) || len(got.Tar.Facts.Trials) != len(unpack.TarModes) {
		t.Errorf("exit code %d, %+v, %+v", exit, got.Raw, got.Tar)
	}
	if s := got.Content.Facts; s.Blob != blob.String() || s.Retention != unpack.Linked || s.Apart != "" || s.Root.Type != "ext4" {
		t.Errorf("%+v", s)
	}
	if layers, _, _ := strings.Cut(text, "\ncontainerd: "); strings.Contains(layers, "advice:") || strings.Contains(layers, "problem:") {
		t.Errorf("there is nothing to do, but:\n%s", layers)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(content, "blobs", "sha256", blob.Encoded()), &st); err != nil || st.Nlink != 1 {
		t.Errorf("the blob has %d links (%v), want 1", st.Nlink, err)
	}
}

// A containerd or daemon that does not run is not a problem.
func TestDoctorWithoutContainerdAndDaemon(t *testing.T) {
	text, got, exit := examine(t, t.TempDir(), t.TempDir(), "")
	if exit != 0 {
		t.Errorf("exit code %d", exit)
	}
	for check, unknown := range map[string]string{
		"containerd": got.Containerd.Unknown, "socket": got.Socket.Unknown, "containerd config": got.ContainerdConfig.Unknown,
		"empty blob": got.EmptyBlob.Unknown, "shared configs": got.SharedConfigs.Unknown,
	} {
		if want := fmt.Sprintf("%s: not examined\nunknown: %s\n", check, unknown); unknown == "" || !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if v := got.Verdict; v.Result != doctor.ResultUnknown || !slices.Equal(v.Unknown, []string{"containerd", "socket", "containerd config", "empty blob", "shared configs"}) {
		t.Errorf("the verdict is %+v", v)
	}
	_, stderr, exit := run(t, append([]string{"doctor", "--strict", "--root", t.TempDir(), "--content-root", t.TempDir(), "--config", writeFile(t, "")}, nowhere(t)...)...)
	if exit != 1 {
		t.Errorf("--strict: exit code %d", exit)
	}
	wantErrorLine(t, stderr, "--strict: no problem found, but this could not be examined: containerd, ")
	wantAdvice(t, got.Containerd.Advice, "containerd_address", "empty blob")
	wantAdvice(t, got.Socket.Advice, "start the daemon", "start")
	wantAdvice(t, got.ContainerdConfig.Advice, "--containerd-config", "checks it")
}

// containerd need not run for its configuration to tell where its blobs will be.
func TestDoctorComparesTheContentRootWithTheConfiguration(t *testing.T) {
	root := t.TempDir()
	for content, wrong := range map[string]bool{filepath.Join(root, "io.containerd.content.v1.content"): false, t.TempDir(): true} {
		args := append(nowhere(t), "--config", writeFile(t, ""), "--root", t.TempDir(), "--content-root", content,
			"--containerd-config", writeFile(t, fmt.Sprintf("version = 3\nroot = %q\n", root)), "--output", "json")
		printed, _, _ := run(t, append([]string{"doctor"}, args...)...)
		var got report
		if err := json.Unmarshal([]byte(printed), &got); err != nil {
			t.Fatal(err)
		}
		advised := slices.ContainsFunc(got.Content.Advice, func(a doctor.Advice) bool {
			return strings.Contains(a.Do, fmt.Sprintf("set content_root to %q", filepath.Join(root, "io.containerd.content.v1.content")))
		})
		if advised != wrong {
			t.Errorf("content_root %s: the advice is %+v", content, got.Content.Advice)
		}
	}
}

// The lines to write are indented below the advice.
func TestDoctorPrintsTheLinesToWrite(t *testing.T) {
	args := append(nowhere(t), "--config", writeFile(t, ""), "--root", t.TempDir(), "--content-root", t.TempDir(), "--containerd-config", writeFile(t, "version = 3\n"))
	text, stderr, exit := run(t, append([]string{"doctor"}, args...)...)
	if exit != 1 {
		t.Errorf("exit code %d", exit)
	}
	wantErrorLine(t, stderr, "containerd config")
	printed, _, _ := run(t, append([]string{"doctor", "--output", "json"}, args...)...)
	var got report
	if err := json.Unmarshal([]byte(printed), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.ContainerdConfig.Advice) != 2 || !strings.Contains(text, "\nproblem: "+got.ContainerdConfig.Problem+"\n") {
		t.Errorf("%+v, and the text says\n%s", got.ContainerdConfig, text)
	}
	for _, a := range got.ContainerdConfig.Advice {
		lines := strings.ReplaceAll(strings.TrimSpace(a.Lines), "\n", "\n    ")
		if want := fmt.Sprintf("\nadvice: %s: %s\n    %s\n", a.Do, a.Gain, strings.ReplaceAll(lines, "\n    \n", "\n\n")); a.Lines == "" || !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestDoctorTriesModesAboveAMissingRoot(t *testing.T) {
	disk := mounted(t, "ext4")
	content, _ := contentIn(t, disk)
	before := names(t, disk)
	text, got, exit := examine(t, filepath.Join(disk, "a", "root"), content, "")
	if exit != 0 || got.Raw.Facts.Root.Existing != disk || got.Content.Facts.Retention != unpack.Linked {
		t.Errorf("exit code %d, %+v, %+v", exit, got.Raw, got.Content)
	}
	if want := fmt.Sprintf("tried in %s, since %s/a/root does not exist yet", disk, disk); !strings.Contains(text, want) {
		t.Errorf("no %q in:\n%s", want, text)
	}
	if after := names(t, disk); !slices.Equal(after, before) {
		t.Errorf("%q is left, before it was %q", after, before)
	}
}

func TestDoctorTriesNoRetentionWithoutABlob(t *testing.T) {
	disk := mounted(t, "ext4")
	for name, test := range map[string]struct {
		root  string
		apart unpack.Boundary
		want  string
	}{
		"on the same filesystem": {filepath.Join(disk, "root"), "", "can be linked into root"},
		"on another one":         {mounted(t, "tmpfs"), unpack.FilesystemBoundary, "cannot be linked into root, which is on another filesystem"},
	} {
		t.Run(name, func(t *testing.T) {
			text, got, exit := examine(t, test.root, filepath.Join(disk, "content"), "")
			s := got.Content.Facts
			if exit != 0 || s.Blob != "" || s.Retention != "" || s.Apart != test.apart {
				t.Errorf("exit code %d, %+v", exit, s)
			}
			if !strings.Contains(text, "not tried") || !strings.Contains(text, test.want) {
				t.Errorf("no %q in:\n%s", test.want, text)
			}
			wantAdvice(t, got.Content.Advice, "set content_root", "finds the blobs")
		})
	}
}

// If root is a tmpfs, tar layers need loop devices, and blobs are copied.
func TestDoctorSaysWhatAnotherRootWouldGain(t *testing.T) {
	disk, root := mounted(t, "ext4"), mounted(t, "tmpfs")
	content, _ := contentIn(t, disk)
	text, got, exit := examine(t, root, content, "")
	if exit != 0 || got.Tar.Facts.Taken != unpack.EROFSLoop || got.Content.Facts.Retention != unpack.Copied {
		t.Errorf("exit code %d, %+v, %+v", exit, got.Tar, got.Content)
	}
	if s := got.Content.Facts; s.Apart != unpack.FilesystemBoundary || s.Root.Type != "tmpfs" || s.Blobs.Type != "ext4" {
		t.Errorf("%+v", s)
	}
	wantAdvice(t, got.Tar.Advice, "move root to ext4", "no loop devices")
	wantAdvice(t, got.Content.Advice, "move root to the filesystem of content_root", "need no second copy")
	if line := row(text, "erofs"); !strings.Contains(line, "tmpfs") || !strings.Contains(line, unix.ENOTBLK.Error()) {
		t.Errorf("%q does not say why", line)
	}
}

// Hard links cannot cross a bind mount, even within one filesystem.
func TestDoctorTellsMountsFromFilesystems(t *testing.T) {
	disk := mounted(t, "ext4")
	content, _ := contentIn(t, disk)
	root := t.TempDir()
	if err := unix.Mount(disk, root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	unmountAtEnd(t, root)
	_, got, exit := examine(t, filepath.Join(root, "root"), content, "")
	if s := got.Content.Facts; exit != 0 || s.Apart != unpack.MountBoundary || s.Retention != unpack.Copied {
		t.Errorf("exit code %d, %+v", exit, s)
	}
	wantAdvice(t, got.Content.Advice, "on one mount", "need no second copy")
}

// ramfs lacks extended attributes, which overlayfs needs.
func TestDoctorTriesWhatIsConfigured(t *testing.T) {
	root := mounted(t, "ramfs")
	content, _ := contentIn(t, t.TempDir())
	for name, test := range map[string]struct {
		config   string
		exit     int
		raw, tar unpack.Mode
		row      string
		do, gain string
	}{
		"nothing": {
			"", 0, unpack.Link, unpack.EROFS, "link ",
			"move root to ext4", "files of raw layers have the modes",
		},
		"a mode that does not work": {
			"raw_mode = 'overlay'", 1, "", unpack.EROFS, "overlay ",
			`set raw_mode to "auto"`, `takes "link"`,
		},
		"a mode that does not work, with a remedy": {
			"raw_mode = 'overlay'", 1, "", unpack.EROFS, "overlay ",
			"move root to ext4", `raw_mode = "overlay" works`,
		},
		"a worse mode than possible": {
			"raw_mode = 'copy'\ntar_mode = 'extract'", 0, unpack.Copy, unpack.Extract, "copy ",
			`set raw_mode to "auto"`, "not copied",
		},
	} {
		t.Run(name, func(t *testing.T) {
			text, got, exit := examine(t, root, content, test.config)
			if exit != test.exit || got.Raw.Facts.Taken != test.raw || got.Tar.Facts.Taken != test.tar {
				t.Errorf("exit code %d, raw %q, tar %q, want %d, %q, %q",
					exit, got.Raw.Facts.Taken, got.Tar.Facts.Taken, test.exit, test.raw, test.tar)
			}
			wantAdvice(t, got.Raw.Advice, test.do, test.gain)
			line, configured := row(text, strings.TrimSpace(test.row)), test.config != ""
			if strings.Contains(line, "configured") != configured || strings.Contains(line, "does not work") != (test.exit != 0) {
				t.Errorf("%q", line)
			}
			if (got.Raw.Problem != "") != (test.exit != 0) {
				t.Errorf("the problem %q", got.Raw.Problem)
			}
		})
	}
}

// serve refuses a mode that does not work with the same reason as doctor.
func TestServeRefusesWhatDoctorRefuses(t *testing.T) {
	dir, root := t.TempDir(), mounted(t, "ramfs")
	content, _ := contentIn(t, dir)
	_, stderr, exit := run(t, "serve", "--config", writeFile(t, "raw_mode = 'overlay'\nnamespaces = []\n"),
		"--root", root, "--state", filepath.Join(dir, "state"), "--content-root", content, "--containerd-address", filepath.Join(dir, "c.sock"))
	if exit != 1 {
		t.Fatalf("exit code %d\n%s", exit, stderr)
	}
	_, got, _ := examine(t, root, content, "raw_mode = 'overlay'")
	for _, want := range []string{`mode "overlay" does not work in ` + root, unix.EOPNOTSUPP.Error()} {
		if !strings.Contains(stderr, want) || !strings.Contains(got.Raw.Problem, want) {
			t.Errorf("serve says %q, doctor %q, want %q", stderr, got.Raw.Problem, want)
		}
	}
}

// A process in its own user namespace has the IDs of the namespace, and no privileges
// outside.
func TestDoctorWithoutPrivileges(t *testing.T) {
	as := func(uid int, args ...string) (stdout, stderr string, exit int) {
		command := exec.Command(binary, args...)
		command.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: 0, Size: 1}},
		}
		var out, errs bytes.Buffer
		command.Stdout, command.Stderr = &out, &errs
		if err := command.Run(); command.ProcessState == nil {
			t.Fatal(err)
		}
		return out.String(), errs.String(), command.ProcessState.ExitCode()
	}
	root := t.TempDir()
	args := append([]string{"doctor", "--config", writeFile(t, ""), "--root", root, "--content-root", t.TempDir()}, nowhere(t)...)
	stdout, stderr, exit := as(1000, args...)
	if exit != 1 || stdout != "" {
		t.Errorf("another user: exit code %d\n%s", exit, stdout)
	}
	wantErrorLine(t, stderr, "run it as root")

	stdout, stderr, exit = as(0, args...)
	if exit != 0 || stderr != "" {
		t.Errorf("exit code %d\n%s", exit, stderr)
	}
	for name, want := range map[string]string{"overlay": "the kernel does not permit it", "link": "taken", "extract": "taken"} {
		if line := row(stdout, name); !strings.Contains(line, want) {
			t.Errorf("%q does not say %q", line, want)
		}
	}
	if want := "advice: run as root with all capabilities, and not in a user namespace: tar layers"; !strings.Contains(stdout, want) {
		t.Errorf("no %q in:\n%s", want, stdout)
	}
	if left := names(t, root); len(left) != 0 {
		t.Errorf("%q is left", left)
	}
}

// Limits of a user namespace replace those of the node.
func TestDoctorAdvisesToRaiseInotifyLimits(t *testing.T) {
	containerd := []string{"--config", writeFile(t, ""), "--content-root", t.TempDir()}
	crio := []string{"--config", writeFile(t, fmt.Sprintf("blob_roots = [%q]\n", t.TempDir())), "--content-root", "/nowhere"}
	for _, test := range []struct {
		limit, parameter string
		roots            []string
	}{
		{"max_inotify_watches", "max_user_watches", containerd},
		{"max_inotify_watches", "max_user_watches", crio},
		{"max_inotify_instances", "max_user_instances", containerd},
	} {
		args := slices.Concat([]string{"-c", `echo 0 >/proc/sys/user/` + test.limit + ` && exec "$@"`, "sh", binary, "doctor", "--root", t.TempDir()}, test.roots, nowhere(t))
		command := exec.Command("sh", args...)
		ids := []syscall.SysProcIDMap{{Size: 1}}
		command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
		out, err := command.CombinedOutput()
		if want := "advice: raise the kernel parameter fs.inotify." + test.parameter + ", now "; err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%v, and no %q in:\n%s", err, want, out)
		}
	}
}

func TestDoctorRefusesUnknownOutputs(t *testing.T) {
	stdout, stderr, exit := run(t, "doctor", "--output", "yaml")
	if exit != 1 || stdout != "" {
		t.Errorf("exit code %d\n%s", exit, stdout)
	}
	wantErrorLine(t, stderr, "yaml", "text", "json")
}
