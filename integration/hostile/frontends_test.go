// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// shelf is the blob directory of a content store.
type shelf string

func (s shelf) path(d digest.Digest) (string, bool) {
	if d.Validate() != nil {
		return "", false // no runtime stores such a blob
	}
	return filepath.Join(string(s), "blobs", d.Algorithm().String(), d.Encoded()), true
}

// put stores an artifact's blobs like containerd: complete files, by rename, the manifest
// last.
func (s shelf) put(a *Artifact) error {
	names := slices.DeleteFunc(slices.Collect(func(yield func(digest.Digest) bool) {
		for d := range a.Blobs {
			if d != a.Target && !yield(d) {
				return
			}
		}
		yield(a.Target)
	}), func(d digest.Digest) bool { return d.Validate() != nil })
	for _, d := range names {
		path, _ := s.path(d)
		tmp := filepath.Join(string(s), "ingest")
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(tmp, a.Blobs[d], 0o444), os.Rename(tmp, path)); err != nil {
			return err
		}
	}
	return nil
}

func (s shelf) drop(a *Artifact) error {
	var errs []error
	for d := range a.Blobs {
		if path, ok := s.path(d); ok {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// process is a daemon with its own modes; all daemons share the blobs.
type process struct {
	modes unpack.Modes
	dir   string
	cmd   *exec.Cmd
	conn  *grpc.ClientConn
	count atomic.Int64
	ended <-chan struct{} // closed when the daemon has ended, with its error in err
	err   error
}

const hostileNamespace = "k8s.io"

// alone returns the configuration of a daemon without containerd.
func alone(dir string, blobs shelf, decompressOnPull bool) string {
	return fmt.Sprintf("content_root = %q\ncontainerd_address = %q\ndecompress_on_pull = %v\n", string(blobs), filepath.Join(dir, "none.sock"), decompressOnPull)
}

// start starts a daemon with these modes and additional configuration. The command by, if
// any, must exec the daemon.
func start(t *testing.T, dir, more string, modes unpack.Modes, by ...string) (*process, error) {
	t.Helper()
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	d := &process{modes: modes, dir: filepath.Join(dir, string(modes.Raw)+"+"+string(modes.Tar))}
	if err := os.MkdirAll(d.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("root = %q\nstate = %q\naddress = %q\nraw_mode = %q\ntar_mode = %q\nlog_level = \"warn\"\n",
		filepath.Join(d.dir, "root"), filepath.Join(d.dir, "state"), d.socket(), modes.Raw, modes.Tar) + more
	file := filepath.Join(d.dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(d.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	args := slices.Concat(by, []string{program, "serve", "--config", file})
	d.cmd = exec.Command(args[0], args[1:]...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop(t)
		if t.Failed() {
			t.Logf("end of the daemon's log:\n%s", tail(filepath.Join(d.dir, "log")))
		}
	})
	if d.conn, err = grpc.NewClient("unix://"+d.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	ended := make(chan struct{})
	d.ended = ended
	go func() {
		d.err = d.cmd.Wait()
		close(ended)
		cancel()
	}()
	if _, err := grpc_health_v1.NewHealthClient(d.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		return nil, fmt.Errorf("the daemon does not answer: %w\n%s", err, tail(filepath.Join(d.dir, "log")))
	}
	return d, nil
}

func (d *process) socket() string { return filepath.Join(d.dir, "s") }

func tail(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-3000):])
}

func (d *process) stop(t *testing.T) {
	t.Helper()
	if d.conn != nil {
		d.conn.Close()
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err == nil {
		<-d.ended
		if d.err != nil {
			t.Errorf("the daemon: %v", d.err)
		}
	} else { // it did not start, which start reports
		<-d.ended
	}
	if left, err := node.Mounts(d.dir); err != nil || len(left) > 0 {
		t.Errorf("remaining mounts: %q (%v)", left, err)
		for _, at := range slices.Backward(left) {
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	}
}

func (d *process) pid() int { return d.cmd.Process.Pid }

func (d *process) snapshotter() snapshots.Snapshotter {
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(d.conn), "artifact")
}

func (d *process) applier() diff.Applier {
	return diffproxy.NewDiffApplier(diffapi.NewDiffClient(d.conn)).(diff.Applier)
}

// peak returns the daemon's peak resident memory in bytes since the last call.
func (d *process) peak(t *testing.T) int64 {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", d.pid())
	text, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	// Writing 5 resets the peak (proc_pid_clear_refs(5)).
	if err := os.WriteFile(proc+"clear_refs", []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// again retries while the error is Unavailable, as kubelet does.
func again(f func() error) error {
	for deadline := time.Now().Add(5 * time.Minute); ; {
		err := f()
		if !errdefs.IsUnavailable(err) || time.Now().After(deadline) {
			return err
		}
	}
}

// treeFrontEnd mounts an artifact like `artifact-snapshotter mount`. An image volume
// differs only in the key.
type treeFrontEnd struct{ *process }

func (d treeFrontEnd) Way() Way { return Way(string(d.modes.Raw) + "+" + string(d.modes.Tar)) }

func (d treeFrontEnd) Mount(ctx context.Context, a *Artifact) (string, func() error, error) {
	ctx = namespaces.WithNamespace(ctx, hostileNamespace)
	key := snapshot.MountKey(fmt.Sprintf("/nowhere/%d", d.count.Add(1)))
	var mounts []mount.Mount
	err := again(func() (err error) {
		mounts, err = d.snapshotter().View(ctx, key, "", snapshots.WithLabels(map[string]string{snapshot.LabelTarget: a.Target.String()}))
		return err
	})
	if err != nil {
		return "", nil, err
	}
	path, err := boundIn(mounts)
	return path, func() error {
		return errors.Join(err, d.snapshotter().Remove(ctx, key))
	}, err
}

// boundIn returns the source of the view's single bind mount.
func boundIn(mounts []mount.Mount) (string, error) {
	if len(mounts) != 1 {
		return "", fmt.Errorf("the view has the mounts %+v, want one", mounts)
	}
	return bound(mounts[0].Type, mounts[0].Source, mounts[0].Options)
}

// bound returns the source of a read-only bind. The mount below it must be read-only,
// nosuid and nodev too.
func bound(kind, source string, options []string) (string, error) {
	if kind != "bind" || !slices.Contains(options, "ro") {
		return "", fmt.Errorf("%s is mounted as %s with %q, want a read-only bind", source, kind, options)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(source, &st); err != nil {
		return "", err
	}
	if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
		return "", fmt.Errorf("the mount %s has the flags %x, want ro, nosuid and nodev", source, st.Flags)
	}
	return source, nil
}

// layersFrontEnd unpacks layer by layer into a snapshotter, like containerd's own unpacker
// (core/unpack).
type layersFrontEnd struct {
	*process
	way Way
	to  snapshots.Snapshotter
	dir string // for a mount
}

func (d layersFrontEnd) Way() Way { return d.way }

// maxLayers is a number of lower layers that every overlay accepts.
const maxLayers = 100

func (d layersFrontEnd) Skip(c Case, a *Artifact) (why string) {
	switch {
	case a.Layers == nil:
		return "the oddity is not in the layers"
	case len(a.Layers) > maxLayers:
		return "more layers than an overlay supports"
	}
	// containerd measures the usage of a snapshot by path names, which are too long in this
	// case (core/snapshots/storage, fs.DiskUsage).
	if d.way == Files && strings.HasSuffix(c.Name, "a path of 4095 bytes") {
		return "containerd cannot measure a path of this length"
	}
	// A registry would not accept these manifests.
	if slices.ContainsFunc(a.Layers, func(l descriptor) bool {
		return !utf8Descriptor(l) || len(l.MediaType) > 1<<16 || len(fmt.Sprint(l.Annotations)) > 1<<20
	}) {
		return "gRPC cannot transport the descriptor"
	}
	return ""
}

func (d layersFrontEnd) Mount(ctx context.Context, a *Artifact) (_ string, _ func() error, err error) {
	ctx = namespaces.WithNamespace(ctx, hostileNamespace)
	n := d.count.Add(1)
	var undo []func() error
	done := func() (err error) {
		for _, f := range slices.Backward(undo) {
			err = errors.Join(err, f())
		}
		return err
	}
	defer func() {
		if err != nil {
			if uerr := done(); uerr != nil {
				err = fmt.Errorf("%w; cleaning up: %v", err, uerr)
			}
		}
	}()
	remove := func(name string) func() error { return func() error { return d.to.Remove(ctx, name) } }
	parent := ""
	for i, l := range a.Layers {
		key, name := fmt.Sprintf("%s-%d %d-%d", snapshots.UnpackKeyPrefix, n, n, i), fmt.Sprintf("hostile-%d-%d", n, i)
		mounts, err := d.to.Prepare(ctx, key, parent)
		if err != nil {
			return "", nil, err
		}
		if _, err := d.applier().Apply(ctx, l, mounts); err != nil {
			return "", nil, errors.Join(err, d.to.Remove(ctx, key))
		}
		if err := d.to.Commit(ctx, name, key); err != nil {
			return "", nil, errors.Join(err, d.to.Remove(ctx, key))
		}
		undo, parent = append(undo, remove(name)), name
	}
	view := fmt.Sprintf("view-%d", n)
	var mounts []mount.Mount
	err = again(func() (err error) {
		mounts, err = d.to.View(ctx, view, parent)
		return err
	})
	if err != nil {
		return "", nil, err
	}
	undo = append(undo, remove(view))
	if d.way == Layers {
		path, err := boundIn(mounts)
		return path, done, err
	}
	if err := mount.All(mounts, d.dir); err != nil {
		return "", nil, err
	}
	undo = append(undo, func() error { return mount.UnmountAll(d.dir, 0) })
	return d.dir, done, nil
}

// frontEnds starts every front end and mode that this kernel supports, each with its own
// daemon.
func frontEnds(t *testing.T, dir string, blobs shelf, ways []Way) (frontEnds []FrontEnd, daemons []*process) {
	t.Helper()
	for _, way := range ways {
		rawMode, tarMode, _ := strings.Cut(string(way), "+")
		modes := unpack.Modes{Raw: unpack.Mode(rawMode), Tar: unpack.Mode(tarMode)}
		works := true
		for _, r := range []unpack.Mode{modes.Raw, modes.Tar} {
			if err := unpack.Try(t.Context(), dir, r, false); err != nil {
				t.Logf("without %s: %v", way, err)
				works = false
			}
		}
		if works {
			d, err := start(t, dir, alone(dir, blobs, len(daemons) == 0), modes)
			if err != nil {
				t.Fatal(err)
			}
			daemons, frontEnds = append(daemons, d), append(frontEnds, treeFrontEnd{d})
		}
	}
	first := daemons[0]
	others, err := overlay.NewSnapshotter(filepath.Join(dir, "overlayfs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { others.Close() })
	mounted := filepath.Join(dir, "mounted")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		t.Fatal(err)
	}
	frontEnds = append(frontEnds, layersFrontEnd{first, Layers, first.snapshotter(), ""}, layersFrontEnd{first, Files, others, mounted})
	for _, way := range []Way{NRIOfContainerd, NRIOfCRIO} {
		d := startNRI(t, dir, blobs, way)
		daemons, frontEnds = append(daemons, d.process), append(frontEnds, d)
	}
	return frontEnds, daemons
}

// cleanup makes a daemon collect garbage.
func cleanup(t *testing.T, d *process) error {
	t.Helper()
	c, ok := d.snapshotter().(snapshots.Cleaner)
	if !ok {
		return errors.New("the snapshotter has no Cleanup")
	}
	err := c.Cleanup(namespaces.WithNamespace(t.Context(), hostileNamespace))
	if errdefs.IsUnavailable(err) {
		return nil
	}
	return err
}
