// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// namespace is a containerd namespace without images, so that the tests do not affect each
// other through containerd.
const namespace = "crash"

// patience is the time limit for the daemon. A busy machine may stall for many seconds.
const patience = 2 * time.Minute

// host is the daemon's part of a node: its directories, containerd's content, the snapshots
// that containerd knows, and pods.
type host struct {
	dir        string // a reboot removes it
	containerd string // its socket
	program    string // the daemon
	flags      []string
	content    string
	root       string
	state      string
	exact      bool // volumes have the packed attributes

	daemon *daemon
	// The daemon's services, through containerd's proxy plugin clients.
	snapshots.Snapshotter
	applier diff.Applier

	number int // of keys and of pods
	pods   []*pod
	there  map[*model]bool // models whose blobs are in content
	// must are the acknowledged snapshots whose removal was not requested, by key; may are
	// those whose request was not answered.
	must map[string]*model
	may  map[string]bool
	// noted, if not nil, is called after each change of must and may.
	noted func()
	// synced makes the emulated containerd sync fetched content.
	synced bool
	// reads also stops the traced daemon at reads, including those of containerd's content;
	// clock makes its clock adjustable; fault is injected into a daemon that starts armed.
	reads, clock bool
	fault        *Fault
}

// daemon is a running daemon.
type daemon struct {
	traced *Process  // nil if it is not traced
	cmd    *exec.Cmd // nil if it is traced
	done   chan struct{}
	conn   *grpc.ClientConn
}

// newHost makes a host. Everything that survives a reboot is below disk.
func newHost(dir, disk, program, containerd string, toml string) (*host, error) {
	h := &host{
		dir: dir, containerd: containerd, program: program,
		content: filepath.Join(disk, "content"), root: filepath.Join(disk, "root"), state: filepath.Join(dir, "state"),
		exact: !strings.Contains(toml, `"link"`),
		there: map[*model]bool{}, must: map[string]*model{}, may: map[string]bool{},
	}
	for _, d := range []string{filepath.Join(h.content, "blobs", "sha256"), filepath.Join(dir, "pods")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return h, h.configure(toml)
}

// configure writes the daemon's configuration.
func (h *host) configure(toml string) error {
	return os.WriteFile(filepath.Join(h.dir, "daemon.toml"), []byte("reserved_space = 0\n"+toml), 0o644)
}

func (h *host) args() []string {
	return append([]string{
		h.program, "serve",
		"--config", filepath.Join(h.dir, "daemon.toml"),
		"--root", h.root,
		"--state", h.state,
		"--content-root", h.content,
		"--containerd-address", h.containerd,
		"--log-level", "debug",
	}, h.flags...)
}

func (h *host) logPath() string { return filepath.Join(h.dir, "log") }

// errEnded means that the daemon ended before it was ready.
var errEnded = errors.New("the daemon has ended")

// start starts the daemon and returns when it is ready. With arm, a traced daemon counts
// from its first operation and is killed at target if that is not nil.
func (h *host) start(traced, arm bool, target *Op, after bool) error {
	log, err := os.OpenFile(h.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	socket := filepath.Join(h.dir, "notify")
	if err := os.RemoveAll(socket); err != nil {
		return err
	}
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer ready.Close()
	env := append(os.Environ(), "NOTIFY_SOCKET="+socket, "OTEL_TRACES_EXPORTER=none")
	d := &daemon{done: make(chan struct{})}
	if traced {
		program := Program{Args: h.args(), Env: env, Log: log, Dirs: []string{h.root, h.state}, Armed: arm, Target: target, After: after, Reads: h.reads, Clock: h.clock}
		if h.reads {
			program.Dirs = append(program.Dirs, h.content)
		}
		if arm {
			program.Fault = h.fault
		}
		d.traced, err = program.Start()
		if err != nil {
			return err
		}
		go func() {
			<-d.traced.Done()
			close(d.done)
		}()
	} else {
		d.cmd = exec.Command(h.args()[0], h.args()[1:]...)
		d.cmd.Stdout, d.cmd.Stderr, d.cmd.Env = log, log, env
		d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := d.cmd.Start(); err != nil {
			return err
		}
		go func() {
			_ = d.cmd.Wait() // ProcessState has the result
			close(d.done)
		}()
	}
	h.daemon = d
	if err := d.waitReady(ready); err != nil {
		return err
	}
	d.conn, err = grpc.NewClient("unix://"+filepath.Join(h.state, "artifact-snapshotter.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	h.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(d.conn), "artifact")
	h.applier, _ = diffproxy.NewDiffApplier(diffapi.NewDiffClient(d.conn)).(diff.Applier)
	return nil
}

func (d *daemon) waitReady(ready *net.UnixConn) error {
	heard := make(chan struct{})
	defer close(heard)
	go func() {
		select {
		case <-d.done:
			_ = ready.SetReadDeadline(time.Now())
		case <-heard:
		}
	}()
	_ = ready.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 4096)
	for {
		n, err := ready.Read(buf)
		switch {
		case err == nil && strings.Contains(string(buf[:n]), "READY=1"):
			return nil
		case err != nil:
			select {
			case <-d.done:
				return errEnded
			default:
				return fmt.Errorf("the daemon is not ready: %w", err)
			}
		}
	}
}

// stop sends the daemon a signal and waits for its end.
func (h *host) stop(s syscall.Signal) error {
	d := h.daemon
	if d == nil {
		return nil
	}
	h.daemon = nil
	if d.conn != nil {
		_ = d.conn.Close()
	}
	if d.traced != nil {
		_ = d.traced.Signal(s)
	} else {
		_ = d.cmd.Process.Signal(s)
	}
	select {
	case <-d.done:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("the daemon did not end after the signal %q", s)
	}
}

func (h *host) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(namespaces.WithNamespace(context.Background(), namespace), patience)
}

// key returns a new snapshot key in the form that containerd passes on.
func (h *host) key(rest string) string {
	h.number++
	return fmt.Sprintf("%s/%d/%s", namespace, h.number, rest)
}

// pull adds the model's blobs to the content store, as a pull of containerd does.
func (h *host) pull(all ...*model) error {
	for _, m := range all {
		for _, blob := range m.files {
			if err := m.deliver(h.content, blob, h.synced); err != nil {
				return err
			}
		}
		h.there[m] = true
	}
	return nil
}

// remove deletes the blobs of the models, as containerd does after their images are
// deleted.
func (h *host) remove(all ...*model) error {
	for _, m := range all {
		delete(h.there, m)
		for _, blob := range m.files {
			if slices.ContainsFunc(slices.Collect(maps.Keys(h.there)), func(other *model) bool { return slices.Contains(other.files, blob) }) {
				continue
			}
			if err := os.Remove(filepath.Join(h.content, blob)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// ask prepares a snapshot and records the result in must or may.
func (h *host) ask(key string, m *model, call func(ctx context.Context) ([]mount.Mount, error)) ([]mount.Mount, error) {
	ctx, cancel := h.context()
	defer cancel()
	h.may[key] = true
	h.note()
	mounts, err := call(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	delete(h.may, key)
	h.must[key] = m
	h.note()
	return mounts, nil
}

func (h *host) note() {
	if h.noted != nil {
		h.noted()
	}
}

// forget removes a snapshot.
func (h *host) forget(key string) error {
	ctx, cancel := h.context()
	defer cancel()
	delete(h.must, key)
	h.may[key] = true
	h.note()
	if err := h.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", key, err)
	}
	delete(h.may, key)
	h.note()
	return nil
}

// volumeKey returns the snapshot key of an image volume in a new pod.
func (h *host) volumeKey(m *model) string {
	return h.key(filepath.Join(h.dir, "io.containerd.grpc.v1.cri/image-volumes", fmt.Sprintf("sandbox-%d", h.number), m.manifest.Digest.Encoded()))
}

// run runs a pod with a volume of the model.
func (h *host) run(m *model, opts ...snapshots.Opt) error {
	key := h.volumeKey(m)
	mounts, err := h.ask(key, m, func(ctx context.Context) ([]mount.Mount, error) { return h.Prepare(ctx, key, "", opts...) })
	if err != nil {
		return err
	}
	return h.runWith(key, m, mounts)
}

// runWith runs a pod with these mounts, which must have the model's files.
func (h *host) runWith(key string, m *model, mounts []mount.Mount) error {
	h.number++
	p, err := startPod(filepath.Join(h.dir, "pods", fmt.Sprint(h.number)), key, m, mounts, h.exact)
	if err != nil {
		return err
	}
	h.pods = append(h.pods, p)
	return nil
}

// end ends a pod and removes its snapshot.
func (h *host) end(p *pod) error {
	h.pods = slices.DeleteFunc(h.pods, func(other *pod) bool { return other == p })
	if err := p.end(); err != nil {
		return err
	}
	return h.forget(p.key)
}

// cleanup calls Cleanup, as containerd does after a garbage collection.
func (h *host) cleanup() error {
	ctx, cancel := h.context()
	defer cancel()
	cleaner, ok := h.Snapshotter.(snapshots.Cleaner)
	if !ok {
		return errors.New("no Cleaner")
	}
	return unlessEmpty(cleaner.Cleanup(ctx))
}

// unlessEmpty ignores the error of a database that never had a snapshot. Its kind is lost
// in containerd's gRPC service.
func unlessEmpty(err error) error {
	if err != nil && strings.HasPrefix(err.Error(), "bucket does not exist") {
		return nil
	}
	return err
}

// list returns all snapshots by key.
func (h *host) list() (map[string]snapshots.Info, error) {
	ctx, cancel := h.context()
	defer cancel()
	found := map[string]snapshots.Info{}
	err := h.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		found[i.Name] = i
		return nil
	})
	return found, unlessEmpty(err)
}

// empty removes everything, as containerd does when all pods and images are deleted.
func (h *host) empty() error {
	for len(h.pods) > 0 {
		if err := h.end(h.pods[0]); err != nil {
			return err
		}
	}
	if err := h.remove(slices.Collect(maps.Keys(h.there))...); err != nil {
		return err
	}
	// Remove children first.
	for {
		found, err := h.list()
		if err != nil {
			return err
		}
		if len(found) == 0 {
			break
		}
		parents := map[string]bool{}
		for _, i := range found {
			parents[i.Parent] = true
		}
		for key := range found {
			if !parents[key] {
				if err := h.forget(key); err != nil {
					return err
				}
			}
		}
	}
	return h.cleanup()
}

// idle is the disk state of an idle daemon. The database is checked separately, because it
// has free pages.
var idle = []string{
	"root", "root/blobs", "root/blobs/sha256", "root/boot, 37 bytes", "root/lock, 0 bytes", "root/overlayfs",
	"root/overlayfs/metadata.db", "root/overlayfs/snapshots", "root/trees", "state", "state/mounts", "state/state.lock, 0 bytes",
}

// clear ends and removes everything, for the next run or after a failure.
func (h *host) clear() error {
	errs := []error{h.stop(syscall.SIGKILL)}
	for _, p := range h.pods {
		errs = append(errs, p.end())
	}
	mounts, err := node.Mounts(h.dir)
	errs = append(errs, err)
	for _, m := range slices.Backward(mounts) {
		errs = append(errs, unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(h.dir)
}
