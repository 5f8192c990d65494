// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// The manifest states the size of a raw layer, whose blob may not even exist yet. Each 32
// MiB take memory in the writer of the image.
func TestAFalseSizeTakesNoMemory(t *testing.T) {
	requireModes(t, Overlay)
	s := newSite(t)
	raw := s.Raw(t, "f", "x")
	raw.Descriptor.Size = 1 << 51
	o := s.options(best)
	arrived := make(chan struct{})
	o.Await = func(_ context.Context, blob digest.Digest) error {
		if blob == raw.Descriptor.Digest {
			<-arrived
		}
		return nil
	}
	time.AfterFunc(time.Second, func() { close(arrived) })
	a := numbered(s.Tar(t, artifact.CompressionGzip, archive(t, file("g", "x"))), raw)
	if _, err := Build(context.Background(), filepath.Join(s.Root, "tree"), a, o); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "layer 1") {
		t.Errorf("%v, want a refusal of layer 1", err)
	}
}

func TestLinksToALargeMemberCountLikeIt(t *testing.T) {
	p := newPlan(created, nil)
	n := &node{kind: regular, bytes: extent{content: &content{}, member: true, size: 100 << 30}}
	for i := range 1000 {
		if err := p.place(fmt.Sprint(i), n); errdefs.IsInvalidArgument(err) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Error("a thousand names of a file of 100 GiB are allowed")
}

func TestHeadersThatAddNoFileCount(t *testing.T) {
	for name, h := range map[string]tar.Header{
		"the root":                  {Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		"a directory, once more":    {Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755},
		"an extended global header": {Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			l := s.Tar(t, artifact.CompressionNone, archive(t, h, h, h))
			p := newPlan(created, nil)
			p.entries = maxEntries - 2
			c := &content{path: s.Content.Path(l.Descriptor.Digest)}
			if err := p.addArchive(context.Background(), c, 0, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "files and directories") {
				t.Errorf("%v, want too many entries", err)
			}
		})
	}
}

func TestTargetsAndAttributesCountAsNames(t *testing.T) {
	long := strings.Repeat("x", 1000)
	noted := file("f", "")
	noted.Format = tar.FormatPAX
	noted.PAXRecords = map[string]string{"SCHILY.xattr.user.note": long}
	for name, h := range map[string]tar.Header{
		"a target":     {Name: "l", Typeflag: tar.TypeSymlink, Linkname: long},
		"an attribute": noted,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			l := s.Tar(t, artifact.CompressionNone, archive(t, h))
			p := newPlan(created, nil)
			p.names = maxNames - 1000
			c := &content{path: s.Content.Path(l.Descriptor.Digest)}
			if err := p.addArchive(context.Background(), c, 0, nil); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v, want too many names", err)
			}
		})
	}
}

// The bytes of holes are not read from the archive, so that nothing else looks at ctx.
func TestReadingHolesEndsWithTheContext(t *testing.T) {
	s := newSite(t)
	cs := newContents(t.TempDir(), nil, s.options(best))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := cs.sparse(ctx, strings.NewReader("abc"), memberKey{}, 3); err == nil {
		t.Error("it was read")
	}
}

func TestATreeOfAnotherVersionIsNotLoaded(t *testing.T) {
	dir := t.TempDir()
	for _, tree := range []string{
		`{"manifest": "sha256:00", "mode": "overlay"}`,
		`{"manifest": "sha256:00", "modes": {"raw": "overlay", "tar": "erofs"}, "format": 2}`, // of other rules for names
	} {
		if err := os.WriteFile(filepath.Join(dir, metaFile), []byte(tree), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v, want a failed precondition", tree, err)
		}
	}
}

func TestAnArchiveWithoutVisibleFilesIsNotRetained(t *testing.T) {
	for _, modes := range everyPair {
		t.Run(modes.String(), func(t *testing.T) {
			s := newSite(t)
			tree, err := s.build(modes,
				s.Tar(t, artifact.CompressionNone, archive(t, file("a", "first"), tar.Header{Name: "d/", Typeflag: tar.TypeDir})),
				s.Tar(t, artifact.CompressionNone, sparse(t, 1<<20)),
				s.Tar(t, artifact.CompressionGzip, archive(t, file("a", "second"), file("sparse", "x"))))
			if err != nil {
				t.Fatal(err)
			}
			dir := mountTree(t, tree)
			if got := read(t, dir, "a") + read(t, dir, "sparse"); got != "secondx" {
				t.Errorf("the files hold %q", got)
			}
			want := 0
			if tree.Image {
				want = 1
			}
			if left, err := os.ReadDir(filepath.Join(tree.dir, dataDir)); len(left) != want || err != nil {
				t.Errorf("retained: %v (%v), want %d", left, err, want)
			}
		})
	}
}

// Each fragment of one byte takes a block of the file.
func TestASparseMemberDoesNotGrowWithoutBounds(t *testing.T) {
	s := newSite(t)
	o := s.options(best)
	o.Budget = NewBudget(Limits{Memory: 1 << 20, Expansion: 1, Reserve: 1})
	cs := newContents(t.TempDir(), nil, o)
	data := strings.Repeat("x"+strings.Repeat("\x00", 1<<20-1), 128)
	if _, err := cs.sparse(context.Background(), strings.NewReader(data[:64<<20]), memberKey{}, 64<<20); err != nil {
		t.Error(err)
	}
	cs.written = alwaysAllowed - 100*sparseBlock
	if _, err := cs.sparse(context.Background(), strings.NewReader(data[:128<<20]), memberKey{offset: 1}, 128<<20); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "max_expansion") {
		t.Errorf("%v, want a refusal", err)
	}
}

func TestSparseMembersAreCountedAndReadOnce(t *testing.T) {
	requireModes(t, Overlay, EROFS)
	s := newSite(t)
	l := s.Tar(t, artifact.CompressionNone, sparse(t, 1<<20))
	tree, err := s.build(best, l, l, l)
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(tree.dir, dataDir))
	if len(left) != 1 || err != nil {
		t.Errorf("retained: %v (%v), want one content", left, err)
	}
	if tree.Inodes != 2 {
		t.Errorf("%d inodes, want the image and the content", tree.Inodes)
	}
}

// A name with many "./" is short in the plan, but may be part of an extended header of 1
// MiB.
func TestALongNameOfAHardLinkDoesNotStayInMemory(t *testing.T) {
	long := tar.Header{Name: strings.Repeat("./", 100_000) + "h", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o600, Format: tar.FormatPAX}
	s := newSite(t)
	l := s.Tar(t, artifact.CompressionNone, archive(t, file("f", ""), long))
	p := newPlan(created, nil)
	if err := p.addArchive(context.Background(), &content{path: s.Content.Path(l.Descriptor.Digest)}, 0, nil); err != nil {
		t.Fatal(err)
	}
	if got := p.relinked[p.nodes["f"]]; got != "h" {
		t.Errorf("the plan holds a name of %d bytes for the hard link", len(got))
	}
}
