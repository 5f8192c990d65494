// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

var compressed = []artifact.Compression{artifact.CompressionGzip, artifact.CompressionZstd}

// inode returns the inode of a content of the tree name.
func (s site) inode(t *testing.T, name, content string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(s.Root, name, dataDir, content), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// left returns everything below the root of the trees.
func (s site) left(t *testing.T) (names []string) {
	t.Helper()
	err := filepath.WalkDir(s.Root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestTreesWithOneBlobShareItsDecompressedContent(t *testing.T) {
	for _, c := range compressed {
		t.Run(string(c), func(t *testing.T) {
			requireModes(t, Overlay, EROFS)
			s := newSite(t)
			l := s.Tar(t, c, archive(t, file("f", noise(1<<20))))
			first, err := s.buildAs("first", best, l)
			if err != nil {
				t.Fatal(err)
			}
			second, err := s.buildAs("second", best, s.Raw(t, "other", "x"), l)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := s.inode(t, "first", "0"), s.inode(t, "second", "1"); a != b {
				t.Error("the tar was decompressed twice")
			}
			if first.Size < 1<<20 || second.Size > 64<<10 {
				t.Errorf("the trees say that they take %d and %d bytes", first.Size, second.Size)
			}
			if err := os.RemoveAll(first.dir); err != nil {
				t.Fatal(err)
			}
			if got := read(t, mountTree(t, second), "f"); got != noise(1<<20) {
				t.Error("wrong content when the first tree is gone")
			}
		})
	}
}

// Otherwise other artifacts would get the corrupt content.
func TestTheContentOfACorruptBlobIsNotShared(t *testing.T) {
	for _, c := range compressed {
		for _, config := range []string{"with a DiffID", "without"} {
			t.Run(string(c)+", "+config, func(t *testing.T) {
				s := newSite(t)
				l, other := s.Tar(t, c, archive(t, file("f", noise(5000)))), s.Tar(t, c, archive(t, file("f", strings.ToUpper(noise(5000)))))
				if config == "without" {
					l.DiffID = ""
				}
				l.Descriptor.Size = other.Descriptor.Size
				if err := os.Rename(s.Content.Path(other.Descriptor.Digest), s.Content.Path(l.Descriptor.Digest)); err != nil {
					t.Fatal(err)
				}
				if _, err := s.build(best, l); !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
					t.Errorf("%v, want a failed precondition or an invalid argument", err)
				}
				if left := s.left(t); len(left) > 0 {
					t.Errorf("it left %q", left)
				}
			})
		}
	}
}

func TestATarCompressedInTwoWaysIsOnTheDiskOnce(t *testing.T) {
	requireModes(t, Overlay, EROFS)
	s := newSite(t)
	a := archive(t, file("f", noise(1<<20)))
	gz, zst := s.Tar(t, artifact.CompressionGzip, a), s.Tar(t, artifact.CompressionZstd, a)
	if _, err := s.buildAs("first", best, gz); err != nil {
		t.Fatal(err)
	}
	second, err := s.buildAs("second", best, zst)
	if err != nil {
		t.Fatal(err)
	}
	if s.inode(t, "first", "0") != s.inode(t, "second", "0") {
		t.Error("the tar is on the disk twice")
	}
	if second.Size > 64<<10 {
		t.Errorf("the second tree says that it takes %d bytes", second.Size)
	}
	both, err := s.buildAs("both", best, gz, zst) // the second shows what the first does
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadDir(filepath.Join(both.dir, dataDir))
	if err != nil || len(data) == 0 {
		t.Errorf("the tree of both has the data %v (%v)", data, err)
	}
	for _, d := range data {
		if s.inode(t, "both", d.Name()) != s.inode(t, "first", "0") {
			t.Errorf("the tree of both has a tar %s of its own", d.Name())
		}
	}
	wantVolume(t, mountTree(t, both), a, a)
}

// Whoever knows the DiffID of a layer must not be able to read the layer by a blob of their
// own.
func TestADiffIDDoesNotGiveAccessToAnotherBlob(t *testing.T) {
	for _, c := range compressed {
		t.Run(string(c), func(t *testing.T) {
			s := newSite(t)
			secret := s.Tar(t, c, archive(t, file("secret", "x")))
			if _, err := s.buildAs("owner", best, secret); err != nil {
				t.Fatal(err)
			}
			for what, a := range map[string]artifact.Layer{
				"another tar":  s.Tar(t, c, archive(t, file("f", "x"))),
				"not even one": {Descriptor: s.Blob(t, []byte("nothing compressed")), Format: artifact.FormatTar, Compression: c},
			} {
				a.DiffID = secret.DiffID
				if _, err := s.buildAs("thief", best, a); !errdefs.IsInvalidArgument(err) {
					t.Errorf("%s with the DiffID of the secret: %v", what, err)
				}
				if _, err := os.Stat(filepath.Join(s.Root, "thief")); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("something is left: %v", err)
				}
			}
			wrong := secret
			wrong.DiffID = digest.FromString("another")
			if _, err := s.buildAs("mistaken", best, wrong); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "DiffID") {
				t.Errorf("a wrong DiffID of a tar that is there: %v", err)
			}
		})
	}
}

func TestADiffIDOfAnotherAlgorithmIsChecked(t *testing.T) {
	for _, c := range []artifact.Compression{artifact.CompressionNone, artifact.CompressionGzip, artifact.CompressionZstd} {
		s := newSite(t)
		a := archive(t, file("f", "x"))
		l := s.Tar(t, c, a)
		if _, err := s.buildAs("sha256", best, l); err != nil {
			t.Fatal(err)
		}
		l.DiffID = digest.SHA512.FromBytes(a)
		if _, err := s.buildAs("right", best, l); err != nil {
			t.Errorf("compression %q: %v", c, err)
		}
		l.DiffID = digest.SHA512.FromString("another")
		if _, err := s.buildAs("wrong", best, l); !errdefs.IsInvalidArgument(err) {
			t.Errorf("compression %q, a wrong DiffID: %v", c, err)
		}
	}
}

func TestExpansionIsLimited(t *testing.T) {
	bomb := archive(t, file("zeros", strings.Repeat("\x00", alwaysAllowed+1<<20)))
	small := archive(t, file("zeros", strings.Repeat("\x00", alwaysAllowed-1<<20)))
	for _, c := range compressed {
		t.Run(string(c), func(t *testing.T) {
			s := newSite(t)
			_, err := s.build(best, s.Tar(t, c, bomb))
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "max_expansion") || !strings.Contains(err.Error(), "layer 0") {
				t.Errorf("17 MiB of zeros: %v", err)
			}
			if left := s.left(t); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
			if _, err := s.buildAs("small", best, s.Tar(t, c, small)); err != nil {
				t.Errorf("15 MiB of zeros: %v", err)
			}
			o := s.options(best)
			o.Budget = NewBudget(Limits{Memory: 1 << 30, Expansion: 1 << 40, Reserve: 0})
			tree, err := Build(context.Background(), filepath.Join(s.Root, "tree"), numbered(s.Tar(t, c, bomb)), o)
			if err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Stat(filepath.Join(mountTree(t, tree), "zeros")); err != nil || fi.Size() != alwaysAllowed+1<<20 {
				t.Errorf("17 MiB of zeros where they are allowed: %v", err)
			}
		})
	}
}

func TestTheReserveOfTheDiskStaysFree(t *testing.T) {
	const data = 20 << 20
	for _, c := range compressed {
		s := newSite(t)
		tmpfs(t, s.Root, "size=64m")
		l := s.Tar(t, c, archive(t, file("f", noise(data))))
		o := s.options(best)
		for reserve, fits := range map[int]bool{80: false, 40: true} {
			o.Budget = NewBudget(Limits{Memory: 1 << 30, Expansion: 50, Reserve: reserve})
			tree := filepath.Join(s.Root, "tree")
			_, err := Build(context.Background(), tree, numbered(l), o)
			if fits {
				if err != nil {
					t.Errorf("compression %q with a reserve of %d %%: %v", c, reserve, err)
				}
				if err := errors.Join(os.RemoveAll(tree), os.RemoveAll(filepath.Join(s.Root, "blobs"))); err != nil {
					t.Fatal(err)
				}
				continue
			}
			if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "reserve") {
				t.Errorf("compression %q with a reserve of %d %%: %v", c, reserve, err)
			}
			if left := s.left(t); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		}
	}
}

func TestLayersAreDecompressedWithinAnyBudget(t *testing.T) {
	var archives [][]byte
	for i := range 12 {
		archives = append(archives, archive(t, file(itoa(i), noise(300000+i)), file("last", itoa(i))))
	}
	for _, memory := range []int64{0, 1, 5 << 20, 200 << 20, 10 << 30} {
		t.Run(itoa(int(memory)), func(t *testing.T) {
			s := newSite(t)
			var layers []artifact.Layer
			for i, a := range archives {
				layers = append(layers, s.Tar(t, compressed[i%2], a))
			}
			o := s.options(best)
			o.Budget = NewBudget(Limits{Memory: memory, Expansion: 50, Reserve: 5})
			tree, err := Build(context.Background(), filepath.Join(s.Root, "tree"), numbered(layers...), o)
			if err != nil {
				t.Fatal(err)
			}
			wantVolume(t, mountTree(t, tree), archives...)
		})
	}
}

// Two artifacts that share layers are built at the same time.
func TestTwoBuildsAtOneTimeDecompressABlobOnce(t *testing.T) {
	requireModes(t, Overlay, EROFS)
	for range 10 {
		s := newSite(t)
		var layers []artifact.Layer
		var archives [][]byte
		for i := range 6 {
			archives = append(archives, archive(t, file(itoa(i), noise(100000+i))))
			layers = append(layers, s.Tar(t, compressed[i%2], archives[i]))
		}
		o := s.options(best)
		var g errgroup.Group
		trees := make([]*Tree, 4)
		for i := range trees {
			g.Go(func() (err error) {
				trees[i], err = Build(context.Background(), filepath.Join(s.Root, itoa(i)), numbered(append([]artifact.Layer{}, layers...)...), o)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		for i, tree := range trees {
			wantVolume(t, mountTree(t, tree), archives...)
			for c := range layers {
				if s.inode(t, "0", itoa(c)) != s.inode(t, itoa(i), itoa(c)) {
					t.Errorf("tree %d has a tar %d of its own", i, c)
				}
			}
			data, err := os.ReadDir(filepath.Join(tree.dir, dataDir))
			if err != nil || len(data) != len(layers) {
				t.Errorf("tree %d has the data %v (%v)", i, data, err)
			}
		}
	}
}

func TestACancelledBuildEndsWhileItDecompresses(t *testing.T) {
	for _, c := range compressed {
		t.Run(string(c), func(t *testing.T) {
			s := newSite(t)
			before := runtime.NumGoroutine()
			l := s.Tar(t, c, archive(t, file("f", noise(16<<20))))
			ctx, cancel := context.WithCancel(context.Background())
			o := s.options(best)
			var done atomic.Int64
			o.Progress = func(n int64) {
				if done.Add(n) > 2<<20 { // in the middle
					cancel()
				}
			}
			_, err := Build(ctx, filepath.Join(s.Root, "tree"), numbered(l), o)
			if !errors.Is(err, context.Canceled) || errdefs.IsInvalidArgument(err) {
				t.Errorf("%v, want only that it was cancelled", err)
			}
			if done.Load() > 15<<20 {
				t.Errorf("it has read %d bytes all the same", done.Load())
			}
			if left := s.left(t); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
			waitForGoroutines(t, before)
			o.Progress = nil
			if _, err := Build(context.Background(), filepath.Join(s.Root, "tree"), numbered(l), o); err != nil {
				t.Errorf("the next build: %v", err)
			}
		})
	}
}

// waitForGoroutines waits until there are at most that many.
func waitForGoroutines(t *testing.T, most int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	for runtime.NumGoroutine() > most {
		if ctx.Err() != nil {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, and there were %d:\n%s", runtime.NumGoroutine(), most, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

// A killed build leaves in the shared directory a tar without its symlink and, after a
// garbage collection, a symlink without its tar.
func TestABuildRecoversFromAKilledOne(t *testing.T) {
	requireModes(t, Overlay, EROFS)
	for what, kill := range map[string]func(t *testing.T, s site, blob, flat string){
		"a tar without its symlink": func(t *testing.T, _ site, blob, _ string) {
			if err := os.Remove(blob + ".tar"); err != nil {
				t.Fatal(err)
			}
		},
		"a symlink without its tar": func(t *testing.T, _ site, _, flat string) {
			if err := os.Remove(flat); err != nil {
				t.Fatal(err)
			}
		},
		"half a tree": func(t *testing.T, s site, _, flat string) {
			if err := errors.Join(os.RemoveAll(filepath.Join(s.Root, "blobs")),
				os.MkdirAll(filepath.Join(s.Root, "new-killed", dataDir), 0o700),
				os.WriteFile(filepath.Join(s.Root, "new-killed", dataDir, "0"), []byte("half"), 0o400)); err != nil {
				t.Fatal(err)
			}
			_ = flat
		},
	} {
		for _, c := range compressed {
			t.Run(what+"/"+string(c), func(t *testing.T) {
				s := newSite(t)
				a := archive(t, file("f", noise(100000)))
				l := s.Tar(t, c, a)
				first, err := s.buildAs("first", best, l)
				if err != nil {
					t.Fatal(err)
				}
				kill(t, s, filepath.Join(s.Root, "blobs/sha256", l.Descriptor.Digest.Encoded()), filepath.Join(s.Root, "blobs/sha256", l.DiffID.Encoded()))
				if err := os.RemoveAll(first.dir); err != nil {
					t.Fatal(err)
				}
				for _, name := range []string{"second", "third"} {
					tree, err := s.buildAs(name, best, l)
					if err != nil {
						t.Fatal(err)
					}
					wantVolume(t, mountTree(t, tree), a)
				}
				if s.inode(t, "second", "0") != s.inode(t, "third", "0") {
					t.Error("nothing is shared any more")
				}
			})
		}
	}
}

func TestProgressCountsAllBytesOfEveryKindOfLayer(t *testing.T) {
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			same := s.layerOf(t, "gzip", "same", "x")
			a := numbered(s.layerOf(t, "raw", "1", "x"), s.layerOf(t, "tar", "2", "x"), same, s.layerOf(t, "zstd", "3", "x"), same, s.layerOf(t, "raw", "4", "x"))
			var mu sync.Mutex
			var done, total int64
			for _, l := range a.Layers {
				total += l.Descriptor.Size
			}
			o := s.options(mode)
			for _, name := range []string{"first", "second"} {
				done = 0
				o.Progress = func(n int64) {
					mu.Lock()
					defer mu.Unlock()
					done += n
				}
				if _, err := Build(context.Background(), filepath.Join(s.Root, name), a, o); err != nil {
					t.Fatal(err)
				}
				if done != total {
					t.Errorf("%s build: %d bytes are done of %d", name, done, total)
				}
			}
		})
	}
}
