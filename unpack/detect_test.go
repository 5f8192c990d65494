// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	store "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack/internal/unpacktest"
)

var allCompressions = []artifact.Compression{artifact.CompressionNone, artifact.CompressionGzip, artifact.CompressionZstd}

const (
	orasUnpack = "io.deis.oras.content.unpack"
	orasDigest = "io.deis.oras.content.digest"
)

// wantRefused checks that the layers are refused, with an error that has these texts.
func (s site) wantRefused(t *testing.T, what string, layers []artifact.Layer, says ...string) {
	t.Helper()
	tree, err := s.buildAs("refused", best, layers...)
	if err == nil {
		t.Errorf("%s: it was built", what)
		os.RemoveAll(tree.dir)
		return
	}
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("%s: %v is no invalid argument", what, err)
	}
	for _, text := range says {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v does not say %q", what, err, text)
		}
	}
}

// `oras push REF docs/:TYPE` compresses the directory with gzip, whatever the type is.
func TestADirectoryPackedByORASIsUnpacked(t *testing.T) {
	a := archive(t, tar.Header{Name: "docs", Typeflag: tar.TypeDir, Mode: 0o755}, file("docs/a.md", "a"))
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			for _, c := range allCompressions {
				for _, mediaType := range []string{"application/vnd.acme.docs.layer.v1+tar", "application/vnd.acme.docs", ocispec.MediaTypeImageLayerGzip} {
					s := newSite(t)
					l := s.Described(t, mediaType, unpacktest.Compress(t, c, a), ocispec.AnnotationTitle, "docs", orasUnpack, "true", orasDigest, digest.FromBytes(a).String())
					wantVolume(t, s.mounted(t, mode, l), a)
				}
			}
		})
	}
}

func TestTheDigestInORASsAnnotationIsTheDiffID(t *testing.T) {
	a := archive(t, file("docs/a.md", "a"))
	for _, c := range allCompressions {
		s := newSite(t)
		other := digest.FromString("another")
		l := s.Described(t, "application/vnd.acme.docs+tar", unpacktest.Compress(t, c, a), orasUnpack, "true", orasDigest, other.String())
		s.wantRefused(t, string(c), []artifact.Layer{l}, "its content has the digest "+digest.FromBytes(a).String(), "the annotation "+orasDigest+" says the DiffID "+other.String())
	}
}

// `oras push REF hi.txt` gives every file this type.
func TestAFileWithAnImagesLayerTypeHasItsTitleAsName(t *testing.T) {
	text := []byte(strings.Repeat("text, and no archive ", 100))
	gz := unpacktest.Compress(t, artifact.CompressionGzip, text)
	names := digest.FromString("a").String() + " " + digest.FromString("b").String()
	for what, content := range map[string][]byte{
		"text":                      []byte("hi\n"),
		"more text than a header":   text,
		"no bytes":                  {},
		"one byte less than a tar":  archive(t, file("f", "x"))[:511],
		"zeros":                     make([]byte, 10240),
		"text in gzip":              gz,
		"text in zstd":              unpacktest.Compress(t, artifact.CompressionZstd, text),
		"nothing in gzip":           unpacktest.Compress(t, artifact.CompressionGzip, nil),
		"zeros in gzip":             unpacktest.Compress(t, artifact.CompressionGzip, make([]byte, 10240)),
		"an archive in gzip, twice": unpacktest.Compress(t, artifact.CompressionGzip, unpacktest.Compress(t, artifact.CompressionGzip, archive(t, file("f", "x")))),
		"gzip that is cut off":      gz[:12],
		"gzip without a header":     []byte("\x1f\x8b\x08"),
		"zstd with a wrong window":  []byte("\x28\xb5\x2f\xfd\x00\xff and more"),
		"xz":                        []byte("\xfd7zXZ\x00 and more"),
		"what names a chain":        []byte(names),
	} {
		t.Run(what, func(t *testing.T) {
			for _, mode := range everyPair {
				s := newSite(t)
				l := s.Described(t, ocispec.MediaTypeImageLayer, content, ocispec.AnnotationTitle, "./dir//hi.txt",
					modelspec.AnnotationFileMetadata, `{"mode": 384, "uid": 12, "gid": 34}`)
				l.DiffID = l.Descriptor.Digest
				dir := s.mounted(t, mode, l)
				got := listing(t, dir)
				if len(got) != 3 {
					t.Errorf("%s: it shows %v", mode, got)
				}
				if !bytes.Equal([]byte(read(t, dir, "dir/hi.txt")), content) {
					t.Errorf("%s: it has other bytes", mode)
				}
				if mode.Raw != Link && len(content) > 0 {
					wantAttrs(t, filepath.Join(dir, "dir/hi.txt"), 0o600, 12, 34, epoch)
				}
			}
		})
	}
}

func TestAnArchiveWithAnImagesLayerTypeIsUnpacked(t *testing.T) {
	long := file(strings.Repeat("n", 200)+"/"+strings.Repeat("m", 200), "x")
	gnu := long
	gnu.Format, gnu.ModTime = tar.FormatGNU, created
	for what, a := range map[string][]byte{
		"a file":                     archive(t, file("f", "x")),
		"an extended header":         archive(t, long),
		"a long name of GNU's":       archive(t, gnu),
		"a global header of git's":   archive(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, file("f", "x")),
		"a directory":                archive(t, tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o711}),
		"a header of the old format": slices.Concat(member512(0, "f", "x", func(h []byte) { clear(h[257:265]) }), endMark),
	} {
		for _, c := range allCompressions {
			// The title is not a valid path, and is not used.
			s := newSite(t)
			l := s.Described(t, ocispec.MediaTypeImageLayer, unpacktest.Compress(t, c, a), ocispec.AnnotationTitle, "/tmp/../x.tar")
			t.Run(what+string(c), func(t *testing.T) { wantVolume(t, s.mounted(t, best, l), a) })
		}
	}
	s := newSite(t)
	l := s.Described(t, ocispec.MediaTypeImageLayer, []byte("hi"), ocispec.AnnotationTitle, "/etc/passwd")
	s.wantRefused(t, "a file of an absolute title", []artifact.Layer{l}, "layer 0 (", "is absolute")
	broken := archive(t, file("f", strings.Repeat("x", 3000)))[:2000]
	s.wantRefused(t, "an archive that is cut off", []artifact.Layer{s.Described(t, ocispec.MediaTypeImageLayer, broken, ocispec.AnnotationTitle, "f")}, "truncated")
}

// typeOf returns a media type for tars with the compression.
func typeOf(c artifact.Compression) string {
	if c == artifact.CompressionNone {
		return "application/vnd.example.tar"
	}
	return "application/vnd.example.tar+" + string(c)
}

func TestTheBytesDecideTheCompression(t *testing.T) {
	a := archive(t, file("f", "x"))
	says := func(c artifact.Compression) string {
		if c == artifact.CompressionNone {
			return "not compressed"
		}
		return string(c)
	}
	for _, said := range allCompressions {
		for _, is := range allCompressions {
			t.Run(typeOf(said)+" over "+says(is), func(t *testing.T) {
				for what, id := range map[string]digest.Digest{"the right DiffID": digest.FromBytes(a), "none": ""} {
					s := newSite(t)
					l := s.Described(t, typeOf(said), unpacktest.Compress(t, is, a))
					l.DiffID = id
					t.Run(what, func(t *testing.T) {
						wantVolume(t, s.mounted(t, best, l), a)
						if settled, err := Settle(t.Context(), l, s.Content); err != nil || settled.Format != artifact.FormatTar || settled.Compression != is {
							t.Errorf("settled as %+v, %v", settled, err)
						}
					})
				}
				s := newSite(t)
				l := s.Described(t, typeOf(said), unpacktest.Compress(t, is, a))
				l.DiffID = digest.FromString("another")
				want := []string{"layer 0 (", "its content has the digest " + digest.FromBytes(a).String(), "the config lists the DiffID " + l.DiffID.String()}
				if said != is {
					want = append(want, "its media type says that it is "+says(said)+", and its bytes are "+says(is))
				}
				s.wantRefused(t, "a wrong DiffID", []artifact.Layer{l}, want...)
				l.DiffID = l.Descriptor.Digest // as of a packer that does not know that it compresses
				if is != artifact.CompressionNone {
					s.wantRefused(t, "the blob's own digest", []artifact.Layer{l}, "its bytes are "+says(is), "the config lists the DiffID "+l.DiffID.String(), "the digest of the compressed blob")
				}
				if said != is { // what is wrong within says so, too
					l := s.Described(t, typeOf(said), unpacktest.Compress(t, is, []byte(strings.Repeat("no archive", 100))))
					s.wantRefused(t, "text", []artifact.Layer{l}, "its media type says that it is "+says(said), "the archive cannot be read")
				}
			})
		}
	}
}

func TestAnArchiveInAnotherCompressionIsRefusedByItsName(t *testing.T) {
	for name, magic := range map[string]string{"xz": "\xfd7zXZ\x00", "bzip2": "BZh9", "lz4": "\x04\x22\x4d\x18", "zip": "PK\x03\x04"} {
		for _, said := range allCompressions {
			s := newSite(t)
			l := s.Described(t, typeOf(said), []byte(magic+strings.Repeat("x", 1000)))
			s.wantRefused(t, name, []artifact.Layer{l}, "layer 0 (", "its bytes are "+name+", which is not supported", "gzip or zstd")
			if _, err := Settle(t.Context(), l, s.Content); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: settled, %v", name, err)
			}
		}
	}
	s := newSite(t) // a name may begin so
	a := archive(t, file("BZh", "x"), file("PK\x03\x04", "x"))
	wantVolume(t, s.mounted(t, best, s.Described(t, typeOf(artifact.CompressionNone), a)), a)
}

func TestTwoRawLayersWithOnePathAreRefused(t *testing.T) {
	s := newSite(t)
	raw := func(path, data string) artifact.Layer { return s.Raw(t, path, data) }
	oras := func(path, data string) artifact.Layer {
		return s.Described(t, ocispec.MediaTypeImageLayer, []byte(data), ocispec.AnnotationTitle, path)
	}
	tarred := s.Tar(t, artifact.CompressionNone, archive(t, file("f", "tar")))
	one, two := digest.FromString("1").String(), digest.FromString("2").String()
	for what, layers := range map[string][]artifact.Layer{
		"raw layers":               {raw("f", "1"), raw("f", "2")},
		"files of ORAS":            {oras("f", "1"), oras("f", "2")},
		"one of each":              {raw("f", "1"), oras("f", "2")},
		"a path in two ways":       {oras("f", "1"), oras(".//f", "2")},
		"with an archive between":  {raw("f", "1"), tarred, raw("f", "2")},
		"with one of no bytes":     {oras("f", "1"), raw("f", "")},
		"with the same file again": {raw("f", "2"), raw("f", "2"), raw("f", "1")},
	} {
		says := []string{`"f"): layer `, "has the same path and other bytes", one, two}
		if what == "with one of no bytes" {
			says[3] = digest.FromString("").String()
		}
		s.wantRefused(t, what, layers, says...)
	}

	again := raw("f", "1")
	again.File.Mode = 0o400
	dir := s.mounted(t, best, raw("f", "1"), raw("g", "1"), again)
	if got := read(t, dir, "f"); got != "1" {
		t.Errorf("it is %q", got)
	}
	wantAttrs(t, filepath.Join(dir, "f"), 0o400, 1234, 5678, mtime) // the later's
}

func TestTheEmptyDescriptorHasNoFiles(t *testing.T) {
	for _, mode := range everyPair {
		t.Run(mode.String(), func(t *testing.T) {
			s := newSite(t)
			empty, err := artifact.NewLayer(ocispec.DescriptorEmptyJSON) // and no blob
			if err != nil {
				t.Fatal(err)
			}
			empty.DiffID = empty.Descriptor.Digest
			a := archive(t, file("f", "x"))
			o := s.options(mode)
			o.Await = func(_ context.Context, blob digest.Digest) error {
				if blob == empty.Descriptor.Digest {
					t.Error("its blob is waited for")
				}
				return nil
			}
			tree, err := Build(t.Context(), filepath.Join(s.Root, "beside"), numbered(empty, s.Tar(t, artifact.CompressionNone, a), empty), o)
			if err != nil {
				t.Fatal(err)
			}
			wantVolume(t, mountTree(t, tree), a)

			var said bytes.Buffer
			log.L.Logger.SetOutput(&said)
			defer log.L.Logger.SetOutput(os.Stderr)
			tree, err = Build(t.Context(), filepath.Join(s.Root, "alone"), numbered(empty), o)
			if err != nil {
				t.Fatal(err)
			}
			if got := listing(t, mountTree(t, tree)); len(got) != 1 {
				t.Errorf("it shows %v", got)
			}
			if !strings.Contains(said.String(), "its volume is empty") {
				t.Errorf("the log says %q", said.String())
			}
		})
	}
}

// A build that begins before all layers have arrived decompresses a layer without waiting
// for the others.
func TestALayerIsDecompressedBeforeTheNextOneArrives(t *testing.T) {
	s := newSite(t)
	first := s.Described(t, "text/plain", unpacktest.Compress(t, artifact.CompressionGzip, archive(t, file("f", "x"))), orasUnpack, "true")
	second := s.Described(t, ocispec.MediaTypeImageLayer, []byte("hi"), ocispec.AnnotationTitle, "hi.txt")
	decompressed := make(chan struct{})
	o := s.options(best)
	o.Counted = func(how Retention, _ int64) {
		if how == Decompressed {
			close(decompressed)
		}
	}
	o.Await = func(ctx context.Context, blob digest.Digest) error {
		if blob != second.Descriptor.Digest {
			return nil
		}
		select {
		case <-decompressed:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if _, err := Build(t.Context(), filepath.Join(s.Root, "tree"), numbered(second, first), o); err != nil {
		t.Fatal(err)
	}
}

// unreadable is a store of blobs of which only the first bytes can be read.
type unreadable struct {
	store.Provider
	from int64
	err  error
}

func (u unreadable) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (store.ReaderAt, error) {
	r, err := u.Provider.ReaderAt(ctx, desc)
	return unreadableBlob{r, u}, err
}

type unreadableBlob struct {
	store.ReaderAt
	unreadable
}

func (b unreadableBlob) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.from {
		return 0, b.err
	}
	return b.ReaderAt.ReadAt(p, off)
}

// An archive must not become a file because its store fails temporarily.
func TestABlobThatCannotBeReadIsNotSettled(t *testing.T) {
	s := newSite(t)
	text := noise(1 << 20) // which is read more than once
	for _, c := range allCompressions {
		l := s.Described(t, ocispec.MediaTypeImageLayer, unpacktest.Compress(t, c, archive(t, file("f", text))), ocispec.AnnotationTitle, "f")
		for _, from := range []int64{0, tarBlock} {
			if c == artifact.CompressionNone && from > 0 {
				continue // the header is enough
			}
			// The error of the content store of containerd's client, which has no path.
			settled, err := Settle(t.Context(), l, unreadable{s.Content, from, errdefs.ErrUnavailable})
			if !errdefs.IsUnavailable(err) {
				t.Errorf("%q, from %d: settled as %s, %v", c, from, settled.Format, err)
			}
		}
	}
}

func TestSettleNeedsTheBlobOnlyWhereItDecides(t *testing.T) {
	s := newSite(t)
	for _, l := range []artifact.Layer{
		s.Described(t, ocispec.MediaTypeImageLayer, []byte("hi"), ocispec.AnnotationTitle, "hi.txt"),
		s.Described(t, "text/plain", []byte("hi")),
		s.Described(t, ocispec.MediaTypeEmptyJSON, []byte("{}")),
		s.Described(t, ocispec.MediaTypeImageLayer, nil, ocispec.AnnotationTitle, "empty"),
	} {
		if err := os.Remove(s.Content.Path(l.Descriptor.Digest)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		_, err := Settle(t.Context(), l, s.Content)
		if decides := l.Format == artifact.FormatTarOrRaw && l.Descriptor.Size > 0; errdefs.IsNotFound(err) != decides || err != nil && !decides {
			t.Errorf("%s of %d bytes: %v", l.Format, l.Descriptor.Size, err)
		}
	}
}

// One of the layers decompresses the blob, and the limits use the sizes of all.
func TestEveryLayerOfABlobMustStateItsSize(t *testing.T) {
	s := newSite(t)
	for _, c := range allCompressions {
		l := s.Tar(t, c, archive(t, file("f", "x")))
		lie := l
		lie.Descriptor.Size = 1 << 50
		for what, layers := range map[string][]artifact.Layer{"the second": {l, lie}, "the first": {lie, l}} {
			tree, err := s.buildAs("lie", best, layers...)
			if err == nil {
				t.Errorf("%q: %s layer says another size, and it was built", c, what)
				os.RemoveAll(tree.dir)
			} else if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its descriptor says") {
				t.Errorf("%q, %s: %v", c, what, err)
			}
		}
	}
}

func TestAnEmptyLayerWithAWrongAnnotatedDigestIsRefused(t *testing.T) {
	s := newSite(t)
	l := s.Described(t, "text/plain", nil, orasUnpack, "true", orasDigest, digest.FromString("another").String())
	s.wantRefused(t, "no bytes", []artifact.Layer{l}, "it has no bytes", "the annotation "+orasDigest+" says the DiffID")
}
