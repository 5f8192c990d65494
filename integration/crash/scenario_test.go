// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// scenario is a task of the daemon. The daemon is killed at each operation of the task.
type scenario struct {
	name string
	toml string // of the daemon's configuration
	// decompressOnPull enables decompress on pull. It is off otherwise, so that the order
	// of operations is known.
	decompressOnPull bool
	// apart puts containerd's content on another file system than the daemon's root.
	apart bool
	// before prepares the host while the daemon runs. With starting and without it, the
	// daemon only starts.
	before func(*host) error
	// starting kills the daemon from the first operation of its start.
	starting bool
	// act runs the task; nil means only a start. It fails when the daemon is killed.
	act func(*host) error
	// next are the models of pods that must run after the restart; again is another request
	// that must work then.
	next  []*model
	again func(*host) error
}

// modes returns the configuration of these modes.
func modes(raw, tar string) string { return fmt.Sprintf("raw_mode = %q\ntar_mode = %q\n", raw, tar) }

// scenarios returns all scenarios.
func scenarios(m *models) (all []*scenario) {
	mounted := func(name, toml string, of *model) *scenario {
		return &scenario{
			name: name, toml: toml, next: []*model{of},
			before: func(h *host) error { return h.pull(of) },
			act:    func(h *host) error { return h.run(of) },
		}
	}
	// Build and mount a tree of every kind by every mode.
	for _, of := range m.all()[:5] {
		all = append(all, quietly(mounted("mount "+of.name, "", of)))
	}
	for _, way := range [][2]string{{"overlay", "erofs-loop"}, {"overlay", "extract"}, {"link", "extract"}, {"copy", "erofs-buffered"}, {"copy", "extract"}} {
		all = append(all, quietly(mounted("mount mixed, "+way[0]+" and "+way[1], modes(way[0], way[1]), m.mixed)))
	}
	apart := quietly(mounted("mount mixed, whose blobs cannot be linked", "", m.mixed))
	apart.apart = true
	refused := quietly(mounted("refuse a wrong DiffID", "", m.refused))
	refused.act = func(h *host) error {
		if err := h.run(m.refused); err == nil || !strings.Contains(err.Error(), m.refused.refused) {
			return fmt.Errorf("the pod got the error %w", err)
		}
		return nil
	}
	shifted := mounted("mount mixed in a user namespace, and unmount it", "", m.mixed)
	shifted.act = func(h *host) error {
		if err := h.run(inUserns(m.mixed), userns); err != nil {
			return err
		}
		return do(h.end(h.pods[0]), h.cleanup)
	}
	copied := mounted("mount mixed in a user namespace, of a tree of files", modes("overlay", "extract"), m.mixed)
	copied.act = func(h *host) error { return h.run(inUserns(m.mixed), userns) }

	runs := func(of ...*model) func(*host) error {
		return func(h *host) error {
			err := h.pull(of...)
			for _, m := range of {
				err = do(err, func() error { return h.run(m) })
			}
			return err
		}
	}
	dropAll := func(h *host) error {
		for len(h.pods) > 0 {
			if err := h.end(h.pods[0]); err != nil {
				return err
			}
		}
		return nil
	}
	everything := []*model{m.raw, m.gzip, m.mixed}
	return append(all, apart, refused, quietly(shifted), quietly(copied),
		quietly(&scenario{
			name: "mount one that shares a compressed layer", next: []*model{m.half, m.otherHalf},
			before: func(h *host) error { return do(runs(m.half)(h), func() error { return h.pull(m.otherHalf) }) },
			act:    func(h *host) error { return h.run(m.otherHalf) },
		}),
		&scenario{
			name: "unmount one that shares a compressed layer, and delete it", next: []*model{m.half, m.otherHalf},
			before: runs(m.half, m.otherHalf),
			act: func(h *host) error {
				return do(h.end(h.pods[0]), func() error { return h.remove(m.half) }, h.cleanup)
			},
		},
		&scenario{
			name: "add and remove references", next: []*model{m.mixed},
			before: runs(m.mixed),
			act: func(h *host) error {
				for range 3 {
					if err := h.run(m.mixed); err != nil {
						return err
					}
				}
				for range 3 {
					if err := h.end(h.pods[1]); err != nil {
						return err
					}
				}
				return h.cleanup()
			},
		},
		&scenario{
			name: "remove the last reference", next: everything,
			before: runs(everything...),
			act:    func(h *host) error { return do(dropAll(h), h.cleanup) },
		},
		&scenario{
			name: "remove the last reference and delete the artifacts", next: everything,
			before: runs(everything...),
			act: func(h *host) error {
				return do(dropAll(h), func() error { return h.remove(everything...) }, h.cleanup)
			},
		},
		&scenario{
			name: "delete artifacts with pods, then remove these", next: everything,
			before: runs(everything...),
			act: func(h *host) error {
				return do(h.remove(everything...), h.cleanup, func() error { return dropAll(h) }, h.cleanup)
			},
		},
		&scenario{
			name: "pull an artifact again and mount it", next: []*model{m.mixed},
			before: func(h *host) error { return do(runs(m.mixed)(h), func() error { return dropAll(h) }) },
			act: func(h *host) error {
				return do(h.remove(m.mixed), func() error { return h.pull(m.mixed) }, h.cleanup, func() error { return h.run(m.mixed) })
			},
		},
		&scenario{
			name: "decompress during a pull", decompressOnPull: true, next: []*model{m.zstd},
			act: func(h *host) error {
				if err := h.pull(m.zstd); err != nil {
					return err
				}
				if err := h.await(func() bool { return exists(filepath.Join(h.root, "trees", treeOf(m.zstd), "tree.json")) }); err != nil {
					return err
				}
				return h.run(m.zstd)
			},
		},
		&scenario{
			name: "give up a pull", decompressOnPull: true, next: []*model{m.gzip},
			act: func(h *host) error {
				for _, blob := range m.gzip.files[:len(m.gzip.files)-1] {
					if err := m.gzip.deliver(h.content, blob, false); err != nil {
						return err
					}
				}
				trees := filepath.Join(h.root, "trees")
				if err := h.await(func() bool { return len(entries(trees)) > 0 }); err != nil {
					return err
				}
				if err := h.remove(m.gzip); err != nil {
					return err
				}
				if err := h.await(func() bool { return len(entries(trees)) == 0 }); err != nil {
					return err
				}
				return h.cleanup()
			},
		},
		&scenario{
			name: "unpack to a committed snapshot and view it", next: []*model{m.mixed},
			before: func(h *host) error { return h.pull(m.mixed) },
			act:    func(h *host) error { return h.record(m.mixed) },
			again:  func(h *host) error { return h.record(m.mixed) },
		},
		&scenario{
			name: "have containerd unpack layer by layer", next: []*model{m.mixed},
			before: func(h *host) error { return h.pull(m.mixed) },
			act:    func(h *host) error { return h.unpack(m.mixed) },
			again:  func(h *host) error { return h.unpack(m.mixed) },
		},
		&scenario{
			name: "delete what containerd unpacked", next: []*model{m.gzip},
			before: func(h *host) error { return do(h.pull(m.gzip), func() error { return h.unpack(m.gzip) }) },
			act:    func(h *host) error { return h.empty() },
		},
		&scenario{name: "snapshots of an image", act: (*host).image, again: (*host).image},
		&scenario{name: "start for the first time", starting: true, next: []*model{m.raw}, before: func(h *host) error { return h.pull(m.raw) }, act: (*host).cleanup},
		&scenario{
			name: "start while pods run", starting: true, next: everything,
			before: runs(everything...),
			act:    func(h *host) error { return do(h.run(m.raw), h.cleanup) },
		},
		&scenario{
			name: "start after pods and artifacts were removed", starting: true, next: everything,
			before: func(h *host) error {
				return do(runs(everything...)(h),
					func() error { return dropAll(h) },
					func() error { return h.stop(syscall.SIGKILL) },
					func() error { return h.remove(m.raw, m.gzip) })
			},
			act: (*host).cleanup,
		},
		&scenario{
			name: "start after a reboot", starting: true, next: everything,
			before: func(h *host) error { return do(runs(everything...)(h), h.reboot) },
			act: func(h *host) error {
				// containerd restarts the pods, whose snapshots it knows.
				for key, of := range h.must {
					ctx, cancel := h.context()
					mounts, err := h.Mounts(ctx, key)
					cancel()
					if err == nil {
						err = h.runWith(key, of, mounts)
					}
					if err != nil {
						return err
					}
				}
				return h.cleanup()
			},
		},
		&scenario{
			name: "start with another mode", starting: true, next: everything,
			before: func(h *host) error {
				if err := do(runs(everything...)(h), func() error { return h.end(h.pods[2]) }, h.cleanup); err != nil {
					return err
				}
				return h.configure(modes("overlay", "extract"))
			},
			act: (*host).cleanup,
		},
		&scenario{
			name: "start after a kill in the middle of a build", starting: true, next: []*model{m.mixed},
			before: func(h *host) error {
				return do(h.pull(m.mixed), func() error {
					return h.killedAt(Op{"renameat", filepath.Join("root/trees", treeOf(m.mixed)), 1}, m.mixed)
				})
			},
			act: (*host).cleanup,
		},
		&scenario{
			name: "start after a kill in the middle of a mount", starting: true, next: []*model{m.mixed},
			before: func(h *host) error {
				return do(h.pull(m.mixed), func() error {
					return h.killedAt(Op{"mount", filepath.Join("state/mounts", treeOf(m.mixed)), 1}, m.mixed)
				})
			},
			act: (*host).cleanup,
		},
		&scenario{
			name: "stop", next: []*model{m.mixed},
			before: runs(m.mixed),
			act:    func(h *host) error { return h.stop(syscall.SIGTERM) },
		},
	)
}

// do runs functions until one fails. err is the result of an earlier function.
func do(err error, steps ...func() error) error {
	for _, step := range steps {
		if err != nil {
			return err
		}
		err = step()
	}
	return err
}

// quietly adds a garbage collection to the end of a scenario, so that all its background
// work has ended.
func quietly(s *scenario) *scenario {
	act := s.act
	s.act = func(h *host) error {
		return do(act(h), h.cleanup)
	}
	return s
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func entries(dir string) []string {
	found, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil
	}
	return found
}

// treeOf returns the directory name of the model's tree below trees/ and mounts/.
func treeOf(m *model) string { return "sha256-" + m.manifest.Digest.Encoded() }

// errNotDone means that the daemon did not do its background work in time.
var errNotDone = errors.New("the daemon did not do its background work in time")

// afterFailure is how long await waits after an operation of the daemon has failed.
const afterFailure = 200 * time.Millisecond

// await waits for background work of the daemon. After a fault the daemon need not do it.
func (h *host) await(done func() bool) error {
	limit, failed := time.After(patience), false
	for !done() {
		select {
		case <-h.daemon.done:
			return errEnded
		case <-limit:
			return errNotDone
		case <-time.After(2 * time.Millisecond):
			if !failed && h.daemon.traced != nil && h.daemon.traced.Failed() {
				failed, limit = true, time.After(afterFailure)
			}
		}
	}
	return nil
}

// userns sets the labels that CRI sets for a pod with a user namespace.
func userns(i *snapshots.Info) error {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:200000:65536",
		snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
	})(i)
}

// inUserns returns the model as a pod with that user namespace sees it.
func inUserns(m *model) *model {
	shifted := *m
	shifted.want = slices.Clone(m.want)
	for i := range shifted.want {
		shifted.want[i].UID += 200000
		shifted.want[i].GID += 200000
	}
	return &shifted
}

// reboot simulates a reboot: pods, mounts and the state directory are gone, and the
// recorded boot ID differs from the kernel's. containerd still knows its snapshots.
func (h *host) reboot() error {
	if err := h.stop(syscall.SIGKILL); err != nil {
		return err
	}
	for _, p := range h.pods {
		if err := p.end(); err != nil {
			return err
		}
	}
	h.pods = nil
	if err := mount.UnmountRecursive(h.state, unix.MNT_DETACH); err != nil {
		return err
	}
	if err := os.RemoveAll(h.state); err != nil {
		return err
	}
	return h.bootedBefore()
}

// bootedBefore changes the recorded boot ID, as if an earlier boot had written it.
func (h *host) bootedBefore() error {
	name := filepath.Join(h.root, "boot")
	boot, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) || len(boot) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	boot[0] ^= 1 // changes one of its digits
	return os.WriteFile(name, boot, 0o600)
}

// killedAt starts the daemon and kills it at op while it mounts the model.
func (h *host) killedAt(op Op, m *model) error {
	if err := h.stop(syscall.SIGKILL); err != nil {
		return err
	}
	if err := h.start(true, true, &op, false); err != nil {
		return err
	}
	_ = h.run(m) // fails, because the daemon is killed
	traced := h.daemon.traced
	if err := h.stop(syscall.SIGKILL); err != nil {
		return err
	}
	if traced.Killed() == nil {
		return fmt.Errorf("the daemon was not killed at %v; operations: %v", op, traced.Disarm())
	}
	return nil
}

// record unpacks the model with the protocol of remote snapshotters and runs a pod on the
// committed snapshot.
func (h *host) record(m *model) error {
	key := h.key(snapshot.UnpackKey("crash", m.manifest.Digest))
	name := key + "/committed"
	h.may[name] = true
	ref := digest.FromString(key).String()
	_, err := h.ask(key, nil, func(ctx context.Context) ([]mount.Mount, error) {
		return h.Prepare(ctx, key, "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: ref}))
	})
	if !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("unpacking ends with %w", err)
	}
	delete(h.may, key)
	delete(h.may, name)
	h.must[name] = m
	h.note()
	return h.view(name, m)
}

// view runs a pod with a view of the committed snapshot.
func (h *host) view(parent string, m *model) error {
	key := h.key("view")
	mounts, err := h.ask(key, m, func(ctx context.Context) ([]mount.Mount, error) { return h.View(ctx, key, parent) })
	if err != nil {
		return err
	}
	return h.runWith(key, m, mounts)
}

// commit commits an active snapshot.
func (h *host) commit(name, key string, m *model) error {
	ctx, cancel := h.context()
	defer cancel()
	delete(h.must, key)
	h.may[key], h.may[name] = true, true
	h.note()
	if err := h.Commit(ctx, name, key); err != nil {
		return fmt.Errorf("commit %s: %w", key, err)
	}
	delete(h.may, key)
	delete(h.may, name)
	h.must[name] = m
	h.note()
	return nil
}

// unpack unpacks the model layer by layer, like containerd's own unpacker, and runs a pod
// on it.
func (h *host) unpack(m *model) error {
	parent := ""
	for i, layer := range m.layers {
		key := h.key(fmt.Sprintf(snapshots.UnpackKeyFormat, fmt.Sprint(h.number), layer.Digest))
		mounts, err := h.ask(key, nil, func(ctx context.Context) ([]mount.Mount, error) { return h.Prepare(ctx, key, parent) })
		if err != nil {
			return err
		}
		ctx, cancel := h.context()
		_, err = h.applier.Apply(ctx, layer, mounts)
		cancel()
		if err != nil {
			return fmt.Errorf("apply layer %d: %w", i, err)
		}
		name := h.key(fmt.Sprintf("layer-%d", i))
		if err := h.commit(name, key, m); err != nil {
			return err
		}
		parent = name
	}
	return h.view(parent, ofLayers(m))
}

// ofLayers returns the model as containerd's unpacker lays it out, without the creation
// time of the config.
func ofLayers(m *model) *model {
	alone := *m
	alone.want = slices.Clone(m.want)
	for i := range alone.want {
		if alone.want[i].Type == "dir" {
			alone.want[i].ModTime = 0
		}
	}
	return &alone
}

// image creates the snapshots of a container image and of a container on it.
func (h *host) image() error {
	key, name := h.key("extract-1 layer"), h.key("layer")
	mounts, err := h.ask(key, nil, func(ctx context.Context) ([]mount.Mount, error) { return h.Prepare(ctx, key, "") })
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(mounts[0].Source, "file"), []byte("of a layer"), 0o644); err != nil {
		return err
	}
	if err := h.commit(name, key, nil); err != nil {
		return err
	}
	container := h.key("container")
	if mounts, err = h.ask(container, nil, func(ctx context.Context) ([]mount.Mount, error) { return h.Prepare(ctx, container, name) }); err != nil {
		return err
	}
	root := filepath.Join(h.dir, "mounted")
	if err := errors.Join(os.MkdirAll(root, 0o755), mount.All(mounts, root)); err != nil {
		return err
	}
	got, err := treelist.List(root)
	if err := errors.Join(err, mount.UnmountAll(root, unix.MNT_DETACH)); err != nil {
		return err
	}
	if len(got) != 1 || got[0].Path != "file" || got[0].Size != 10 {
		return fmt.Errorf("the root of the container is %+v", got)
	}
	return do(h.forget(container), func() error { return h.forget(name) }, h.cleanup)
}
