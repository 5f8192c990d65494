// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// sparse returns a blob of holes, with some text written at offsets.
func (s site) sparse(t *testing.T, size int64, written map[int64]string) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: "application/test", Digest: digest.FromString(itoa(int(size))), Size: size}
	f, err := os.Create(s.Content.Path(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	errs := []error{f.Truncate(size)}
	for at, text := range written {
		errs = append(errs, writeAt(f, text, at))
	}
	if err := errors.Join(append(errs, f.Close())...); err != nil {
		t.Fatal(err)
	}
	return d
}

func writeAt(f *os.File, s string, at int64) error {
	_, err := f.WriteAt([]byte(s), at)
	return err
}

// huge returns a layer with the member weights, of size bytes, and weights.index after it.
// The last bytes of both are end.
func (s site) huge(t *testing.T, size int64, end string) artifact.Layer {
	t.Helper()
	header := hugeHeader(tar.TypeReg, "weights", size)
	index := string(member512(tar.TypeReg, "weights.index", end, nil))
	begin := int64(len(header))
	return artifact.Layer{Format: artifact.FormatTar, Descriptor: s.sparse(t, begin+roundUp(size)+int64(len(index))+1024, map[int64]string{
		0: header, begin + 5<<30: "middle", begin + size - int64(len(end)): end, begin + roundUp(size): index,
	})}
}

// hugeHeader returns the header of a member whose size needs a PAX record.
func hugeHeader(flag byte, name string, size int64) string {
	return string(slices.Concat(member512(tar.TypeXHeader, "pax", record("size", itoa(int(size))), nil), member512(flag, name, "", nil)))
}

func TestAMemberBeyondTheLimitOfOctalSizesIsMounted(t *testing.T) {
	for _, mode := range []Modes{best, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}} {
		for _, size := range []int64{9<<30 + 1, 9<<30 + 4096, 1 << 40} {
			t.Run(mode.String()+"/"+itoa(int(size)), func(t *testing.T) {
				requireModes(t, Overlay, EROFS) // whoever extracts it needs the space
				s := newSite(t)
				dir := s.mounted(t, mode, s.huge(t, size, "the end"))
				f, err := os.Open(filepath.Join(dir, "weights"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if fi, err := f.Stat(); err != nil || fi.Size() != size {
					t.Errorf("it says %d bytes (%v)", fi.Size(), err)
				}
				for want, at := range map[string]int64{"\x00\x00\x00": 0, "middle": 5 << 30, "the end": size - 7} {
					got := make([]byte, len(want))
					if _, err := f.ReadAt(got, at); err != nil || string(got) != want {
						t.Errorf("%q at %d, want %q (%v)", got, at, want, err)
					}
				}
				if got := read(t, dir, "weights.index"); got != "the end" {
					t.Errorf("the member behind it holds %q", got)
				}
			})
		}
	}
}

func TestWhichTarsAreTooLargeForAnImage(t *testing.T) {
	const GiB, TiB = 1 << 30, 1 << 40
	for _, c := range []struct {
		members []int64 // sizes; a label's is negative, which is in the archive alone
		want    bool
	}{
		{[]int64{1}, false},
		{[]int64{TiB}, false},
		{[]int64{TiB + 1}, true},
		{[]int64{1200 * GiB}, true},
		{[]int64{3 * TiB}, true},
		{[]int64{TiB, 500 * GiB, 1}, false},
		{[]int64{TiB, 512 * GiB}, false},
		{[]int64{TiB, 512*GiB + 1}, true},
		{[]int64{-TiB, TiB - 4*GiB}, true},
		{[]int64{-2 * TiB, 1}, true},
		{[]int64{1, -2 * TiB}, true},
		{[]int64{-2*TiB + 16384, 1}, false},
		{[]int64{-2*TiB + 6656, 1}, true}, // whose chunk of 4 KiB does not fit
	} {
		s := newSite(t)
		var size int64
		written := map[int64]string{}
		for i, member := range c.members {
			flag := byte(tar.TypeReg)
			if member < 0 {
				flag, member = typeLabel, -member
			}
			written[size] = hugeHeader(flag, itoa(i), member)
			size += int64(len(written[size])) + roundUp(member)
		}
		blob := s.sparse(t, size+1024, written)
		p := newPlan(created, nil)
		if err := p.addArchive(t.Context(), &content{path: s.Content.Path(blob.Digest)}, 0, nil); err != nil {
			t.Errorf("members of %d bytes: %v", c.members, err)
		}
		if p.tooLarge != c.want {
			t.Errorf("members of %d bytes: %t", c.members, p.tooLarge)
		}
	}
}

func TestATarThatIsTooLargeForAnImageIsExtracted(t *testing.T) {
	for _, mode := range []Modes{best, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}} {
		for _, size := range []int64{1<<40 + 1, 3 << 40} {
			t.Run(mode.String()+"/"+itoa(int(size)), func(t *testing.T) {
				requireModes(t, Overlay, EROFS)
				s := newSite(t)
				// The next layer replaces the member that is too large for the disk.
				l := s.huge(t, size, "the end")
				dir := s.mounted(t, mode, l, s.Tar(t, artifact.CompressionNone, archive(t, file("weights", "small"))))
				for name, want := range map[string]string{"weights": "small", "weights.index": "the end"} {
					if got := read(t, dir, name); got != want {
						t.Errorf("%s holds %q, want %q", name, got, want)
					}
				}
				o := s.options(mode)
				o.Budget = NewBudget(Limits{Memory: 1 << 30, Expansion: 50, Reserve: 100}) // never room
				_, err := Build(context.Background(), filepath.Join(s.Root, "none"), numbered(l), o)
				for _, want := range []string{"larger than 1 TiB and EROFS cannot address", "pack its files as raw layers", "layer 0", `"weights": ` + itoa(int(size)) + " bytes are needed"} {
					if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), want) {
						t.Errorf("where it does not fit: %v, want %q", err, want)
					}
				}
			})
		}
	}
}

func TestARawFileOfAnySizeIsMounted(t *testing.T) {
	const size = 3 << 40
	for _, mode := range []Modes{best, {Overlay, EROFSLoop}, {Overlay, EROFSBuffered}, {Overlay, Extract}, {Link, Extract}} {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			raw := artifact.Layer{
				Format: artifact.FormatRaw, File: artifact.File{Path: "weights", Mode: 0o644, ModTime: mtime},
				Descriptor: s.sparse(t, size, map[int64]string{size - 7: "the end"}),
			}
			dir := s.mounted(t, mode, raw, s.Tar(t, artifact.CompressionNone, archive(t, file("index", "small"))))
			f, err := os.Open(filepath.Join(dir, "weights"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got := make([]byte, 8)
			if n, err := f.ReadAt(got, size-7); string(got[:n]) != "the end" {
				t.Errorf("its end is %q (%v)", got[:n], err)
			}
		})
	}
}
