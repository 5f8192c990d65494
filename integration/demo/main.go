// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command demo shows the main feature on this machine: a pod that mounts a model artifact,
// under containerd with artifact-snapshotter and under stock containerd. It checks
// everything that it prints and exits with 1 if a check fails. It is a demonstration; the
// tests are in package integration.
//
// It needs root, and what `make build tools` builds. Everything that it starts is in
// temporary directories and is removed at the end, also after Ctrl-C.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func main() { os.Exit(run()) }

func run() (exitCode int) {
	// A signal cancels the current step. Neither a second signal nor a closed output
	// prevents the clean-up.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()

	start := time.Now()
	d := &demo{ctx: ctx}
	err := d.run()
	switch {
	case ctx.Err() != nil:
		say("interrupted")
		exitCode = 130 // like a shell
	case err != nil:
		say("FAILED: %v", err)
		exitCode = 1
	}
	if err := d.cleanUp(); err != nil {
		say("CLEAN-UP FAILED: %v", err)
		exitCode = 1
	}
	switch {
	case exitCode == 0:
		say("all checks passed in %.0f seconds", time.Since(start).Seconds())
	case exitCode == 1 && d.ours != nil:
		fmt.Println(d.ours.Logs())
	}
	return exitCode
}

// demo is the state that the steps share.
type demo struct {
	ctx    context.Context
	dir    string     // everything is below it
	ours   *node.Node // with artifact-snapshotter
	stock  *node.Node // stock containerd
	ref    string     // the model in the registry of ours; the stock node pulls from there too
	model  digest.Digest
	source []treelist.Entry // the model's files as packed
	size   int64            // of all files, in bytes
	mode   unpack.Mode      // that ours chose on this kernel
	empty  int64            // disk use of ours before the pull, in bytes
	pods   []*node.Pod      // of ours
}

func (d *demo) run() error {
	for _, step := range []func() error{d.start, d.push, d.pull, d.show, d.share, d.refuseWrite, d.refuseHostile, d.remove} {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) start() (err error) {
	say("starting two nodes in temporary directories, each with containerd, runc and a registry of its own:")
	// The path is short because sockets are below it. It is searchable because user
	// namespaces in pods must pass through it.
	if d.dir, err = os.MkdirTemp("", "as-"); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(d.dir, 0o711), os.Setenv("TMPDIR", d.dir)); err != nil {
		return err
	}
	if d.ours, err = node.Start(d.ctx, node.Options{}); err != nil {
		return err
	}
	line("%s  containerd with artifact-snapshotter as its snapshotter", d.ours.Dir)
	if d.stock, err = node.Start(d.ctx, node.Options{Stock: true}); err != nil {
		return err
	}
	line("%s  stock containerd, with overlayfs", d.stock.Dir)
	return nil
}

func (d *demo) push() error {
	source := filepath.Join(d.dir, "model")
	err := writeModel(source)
	if err != nil {
		return err
	}
	if d.source, err = treelist.List(source); err != nil {
		return err
	}
	files := 0
	for i := range d.source {
		if e := &d.source[i]; e.Type == "dir" {
			e.ModTime = pack.Created.UnixNano() // no layer describes directories; they get the model's creation time
		} else {
			files++
			d.size += e.Size
		}
	}
	say("packing a model (%d files, %s) as a ModelPack artifact, one raw layer per file, and pushing it:", files, mebibytes(d.size))
	model, err := pack.Model(source, pack.Options{})
	if err != nil {
		return err
	}
	if d.model, err = model.Push(d.ctx, d.ours.Registry, "models/tiny", "v1"); err != nil {
		return err
	}
	d.ref = d.ours.Registry + "/models/tiny:v1"
	line("%s  %s", d.ref, d.model)
	return nil
}

func (d *demo) pull() error {
	say("pulling it on both nodes: crictl pull %s", d.ref)
	var err error
	if d.empty, err = d.diskUse(); err != nil {
		return err
	}
	for _, n := range []*node.Node{d.stock, d.ours} {
		if _, err := n.Pull(d.ref); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) show() error {
	say("running a pod on both nodes, with the model as an image volume at /model; ls in the pod:")
	stock, err := d.stock.RunPod(d.podSpec())
	if err != nil {
		return err
	}
	listing, err := stock.Exec("main", node.Guest, "ls", "/model")
	if err != nil {
		return err
	}
	line("stock containerd:\n%s", indent(listing))
	if strings.TrimSpace(listing) != "(empty)" {
		return errors.New("stock containerd shows the model too, so the demo proves nothing")
	}

	before, err := d.diskUse()
	if err != nil {
		return err
	}
	pod, err := d.runPod()
	if err != nil {
		return err
	}
	if listing, err = pod.Exec("main", node.Guest, "ls", "/model"); err != nil {
		return err
	}
	line("containerd with artifact-snapshotter:\n%s", indent(listing))
	tree, err := unpack.Load(d.tree())
	if err != nil {
		return err
	}
	d.mode = tree.Modes.Raw
	if err := d.compare(pod); err != nil {
		return err
	}
	if d.mode == unpack.Link {
		ok("every path and byte is as packed; modes, owners and mtimes need Linux 6.5")
	} else {
		ok("every path, byte, mode, owner and mtime is as packed")
	}

	after, err := d.diskUse()
	if err != nil {
		return err
	}
	say("looking for a second copy of the model on the disk:")
	if err := d.compareInodes(); err != nil {
		return err
	}
	if after-before > d.size/100 {
		return fmt.Errorf("the pod and its volume took %d bytes of the disk, more than 1 %% of the model", after-before)
	}
	ok("the pull took %s of the disk, the pod and its volume another %s", mebibytes(before-d.empty), mebibytes(after-before))
	return nil
}

func (d *demo) podSpec() node.PodSpec {
	return node.PodSpec{Volumes: []node.Volume{{Image: d.ref, Path: "/model"}}}
}

func (d *demo) runPod() (*node.Pod, error) {
	pod, err := d.ours.RunPod(d.podSpec())
	if err == nil {
		d.pods = append(d.pods, pod)
	}
	return pod, err
}

// compare compares the volume in a pod with the source.
func (d *demo) compare(pod *node.Pod) error {
	seen, err := pod.Tree("main", "/model")
	if err != nil {
		return err
	}
	source := slices.Clone(d.source)
	if d.mode == unpack.Link { // with this mode files have the attributes of the blobs
		for _, entries := range [][]treelist.Entry{source, seen} {
			for i := range entries {
				if e := &entries[i]; e.Type == "file" {
					e.Mode, e.UID, e.GID, e.ModTime = 0, 0, 0, 0
				}
			}
		}
	}
	if diff := treelist.Diff(source, seen); diff != "" {
		return fmt.Errorf("the volume differs from the source:\n%s", diff)
	}
	return nil
}

// compareInodes checks that every byte of the tree is an inode of containerd's content
// store.
func (d *demo) compareInodes() error {
	theirs, err := inodes(d.ours.ContentRoot)
	if err != nil {
		return err
	}
	data := filepath.Join(d.tree(), "data")
	served, err := os.ReadDir(data)
	if err != nil {
		return err
	}
	var size int64
	for _, blob := range served {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(data, blob.Name()), &st); err != nil {
			return err
		}
		if _, ok := theirs[inode{st.Dev, st.Ino}]; !ok {
			return fmt.Errorf("%s in %s is not one of containerd's blobs", blob.Name(), data)
		}
		size += st.Size
	}
	if size != d.size {
		return fmt.Errorf("the blobs in %s have %d bytes, the model has %d", data, size, d.size)
	}
	ok("all %d blobs of the volume (%s) are containerd's: the same inodes", len(served), mebibytes(size))
	return nil
}

// tree returns the directory of the model's tree (package store).
func (d *demo) tree() string {
	return filepath.Join(d.ours.DaemonRoot, "trees", d.model.Algorithm().String()+"-"+d.model.Encoded())
}

// diskUse returns the disk usage of containerd's blobs and of the daemon's root in bytes.
// Like du, it counts an inode once.
func (d *demo) diskUse() (sum int64, err error) {
	found, err := inodes(d.ours.ContentRoot, d.ours.DaemonRoot)
	for _, allocated := range found {
		sum += allocated
	}
	return sum, err
}

type inode struct{ dev, ino uint64 }

// inodes returns every inode below the directories, with its disk usage in bytes.
func inodes(dirs ...string) (map[inode]int64, error) {
	found := map[inode]int64{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &st)
			}
			if errors.Is(err, os.ErrNotExist) {
				return nil // removed in the meantime
			}
			if err == nil {
				found[inode{st.Dev, st.Ino}] = st.Blocks * 512
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

func (d *demo) share() error {
	say("running a second pod with the model:")
	pod, err := d.runPod()
	if err != nil {
		return err
	}
	if err := d.compare(pod); err != nil {
		return err
	}
	mounts, err := node.Mounts(d.ours.DaemonState)
	if err != nil {
		return err
	}
	if len(mounts) != 1 {
		return fmt.Errorf("the daemon has the mounts %q, want one mount for all pods", mounts)
	}
	ok("both pods see the same files through one mount")
	return nil
}

func (d *demo) refuseWrite() error {
	say("writing to the volume from inside the pod:")
	for _, path := range []string{"/model/config.json", "/model/new"} {
		out, err := d.pods[0].Exec("main", node.Guest, "write", path)
		if err != nil {
			return err
		}
		if out != "EROFS\n" {
			return fmt.Errorf("writing to %s: %q, want EROFS", path, out)
		}
	}
	ok("refused with EROFS (read-only file system), for an existing file and a new one")
	return nil
}

// message matches the message in a log line of crictl.
var message = regexp.MustCompile(`msg=("(?:[^"\\]|\\.)*")`)

func (d *demo) refuseHostile() error {
	const path = "../../etc/passwd"
	say("mounting a hostile artifact whose only file has the path %s; crictl says:", path)
	hostile := pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{{
		MediaType:   modelspec.MediaTypeModelWeightRaw,
		Data:        []byte("root::0:0::/:/bin/sh\n"),
		Annotations: map[string]string{modelspec.AnnotationFilepath: path},
	}}}
	if _, err := hostile.Push(d.ctx, d.ours.Registry, "models/hostile", "v1"); err != nil {
		return err
	}
	ref := d.ours.Registry + "/models/hostile:v1"
	if _, err := d.ours.Pull(ref); err != nil {
		return err
	}
	_, err := d.ours.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	if err == nil {
		return errors.New("the container started")
	}
	text := err.Error()
	if found := message.FindStringSubmatch(text); found != nil {
		if text, err = strconv.Unquote(found[1]); err != nil {
			return err
		}
	}
	line("%s", wrap(text, 96))
	if !strings.Contains(text, "layer 0") || !strings.Contains(text, path) {
		return errors.New("the error names neither the layer nor the path")
	}
	ok("the container was not created")
	return nil
}

func (d *demo) remove() error {
	say("removing the pods and the model: crictl rmp, crictl rmi %s", d.ref)
	for _, pod := range d.pods {
		if err := pod.Remove(); err != nil {
			return err
		}
	}
	if _, err := d.ours.Crictl("rmi", d.ref); err != nil {
		return err
	}
	// containerd and the daemon delete files in the background. If the daemon gets no
	// event, it checks every minute (package store).
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		now, err := d.diskUse()
		if err != nil {
			return err
		}
		rest := now - d.empty
		if rest <= d.size/100 {
			ok("the disk space is free again, except for %s", mebibytes(rest))
			return nil
		}
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the disk usage is still %d bytes higher than before the pull", rest)
		}
	}
}

// cleanUp stops the nodes, whose Stop reports leftovers, and then searches for leftovers
// itself.
func (d *demo) cleanUp() error {
	if d.dir == "" {
		return nil
	}
	say("stopping the nodes and removing %s", d.dir)
	var errs []error
	for _, n := range []*node.Node{d.ours, d.stock} {
		if n != nil {
			errs = append(errs, n.Stop())
		}
	}
	left := d.left()
	// The linker of an interrupted `go build` may outlive it for a moment.
	for deadline := time.Now().Add(time.Minute); left != nil && time.Now().Before(deadline); left = d.left() {
		time.Sleep(50 * time.Millisecond)
	}
	if left == nil { // never remove anything through a mount
		left = os.RemoveAll(d.dir)
	}
	if err := errors.Join(append(errs, left)...); err != nil {
		return err
	}
	ok("no process, mount, control group or file is left")
	return nil
}

// left returns an error that lists the remaining mounts and processes.
func (d *demo) left() error {
	mounts, err := node.Mounts(d.dir)
	if err != nil {
		return err
	}
	processes, err := node.Processes(d.dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 || len(processes) > 0 {
		return fmt.Errorf("the mounts %q and the processes %v remain in %s", mounts, processes, d.dir)
	}
	return nil
}

// writeModel writes a small model. One file is executable, and one is readable only for a
// user other than root.
func writeModel(dir string) error {
	for i, f := range []struct {
		name string
		mode os.FileMode
		data []byte
	}{
		{"README.md", 0o644, []byte("# tiny\n\nA model that is just large enough to be looked at.\n")},
		{"config.json", 0o600, []byte(`{"architectures": ["TinyForCausalLM"], "hidden_size": 64}` + "\n")},
		{"model-00001-of-00002.safetensors", 0o644, weights(1, 32<<20)},
		{"model-00002-of-00002.safetensors", 0o644, weights(2, 16<<20+1234)},
		{"scripts/serve.sh", 0o755, []byte("#!/bin/sh\nexec serve --model /model\n")},
		{"tokenizer/tokenizer.json", 0o644, []byte(`{"version": "1.0", "added_tokens": []}` + "\n")},
	} {
		path := filepath.Join(dir, f.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		mtime := pack.Created.Add(time.Duration(i) * time.Hour)
		if err := errors.Join(os.WriteFile(path, f.data, f.mode), os.Chmod(path, f.mode), os.Chtimes(path, time.Time{}, mtime)); err != nil {
			return err
		}
	}
	return os.Chown(filepath.Join(dir, "config.json"), 1000, 1000)
}

func weights(seed byte, size int) []byte {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data) // never fails
	return data
}

func say(format string, args ...any) { fmt.Printf("==> "+format+"\n", args...) }

func line(format string, args ...any) {
	fmt.Printf("    "+strings.ReplaceAll(format, "\n", "\n    ")+"\n", args...)
}

func ok(format string, args ...any) { line("ok: "+format, args...) }

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n      ")
}

// wrap breaks text into lines of at most width bytes; it does not break words.
func wrap(text string, width int) string {
	var out strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column == 0:
		case column+1+len(word) > width:
			out.WriteString("\n    ")
			column = 0
		default:
			out.WriteByte(' ')
			column++
		}
		out.WriteString(word)
		column += len(word)
	}
	return out.String()
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
