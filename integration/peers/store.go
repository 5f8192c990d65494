// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// forms are the forms of an artifact's layers. Container images have no counterpart to the
// raw form.
var forms = []pack.Form{pack.Raw, pack.Tar, pack.TarGzip, pack.TarZstd}

// The tags of artifacts and images. All are in one repository, so that each blob is pushed
// once.
const (
	repository = "peers/model"
	artifact   = "artifact" // a ModelPack model, one layer per file
	titled     = "titled"   // the same blobs with titles for oras
	image      = "image"    // a container image
	erofsImage = "erofs"    // a container image whose layers are EROFS already
	erofsGuest = "guest"    // the test image with EROFS layers
)

// maxImageLayers is the number of files up to which an image has one layer per file, with
// the blobs of the artifact. With more files it has one layer, because overlayfs does not
// stack thousands.
const maxImageLayers = 100

// store is a registry on its own disk, with one data set in one form.
type store struct {
	disk measure.Disk
	*node.Node
	sums map[string]string // of the files, by path

	compressed, uncompressed int64 // bytes of the layers, as pushed and as tars

	notErofs error // the reason why there are no images with EROFS layers
}

// newStore packs and pushes everything. Only the registry's files remain.
func newStore(ctx context.Context, dir string, d *dataset, form pack.Form) (_ *store) {
	s := &store{disk: measure.NewDisk(ctx, dir, diskSize)}
	complete := false
	defer func() {
		if !complete {
			s.close()
		}
	}()
	measure.Check(os.Setenv("TMPDIR", s.disk.Root()))
	s.Node = measure.Must(node.Start(ctx, node.Options{Stock: true}))
	files := filepath.Join(s.disk.Root(), "files")
	s.sums = d.write(ctx, files, d.files)
	scratch := filepath.Join(s.disk.Root(), "scratch")
	measure.Check(os.Mkdir(scratch, 0o755))

	model := measure.Must(pack.Model(files, pack.Options{}))
	s.uncompressed = d.bytes()
	if form == pack.Raw {
		s.compressed = s.uncompressed
		generic := measure.Must(pack.Model(files, pack.Options{Form: pack.Generic}))
		s.push(ctx, generic, titled)
	} else {
		s.uncompressed = pax(ctx, form, scratch, files, model)
		s.compressed = bytesOf(model)
		s.push(ctx, imageOf(ctx, form, scratch, files, model), image)
	}
	s.push(ctx, model, artifact)
	measure.Check(os.RemoveAll(scratch))
	if form != pack.Raw {
		s.notErofs = measure.Try(func() {
			measure.Check(s.mkfsTooOld())
			guest := filepath.Join(s.disk.Root(), "guest")
			measure.Check(os.Mkdir(guest, 0o755))
			measure.Check(os.Link(filepath.Join(s.Dir, "guest"), filepath.Join(guest, "guest")))
			s.pushErofs(ctx, guest, erofsGuest, ocispec.ImageConfig{Entrypoint: []string{node.Guest}, Cmd: []string{"pause"}})
			if form == pack.Tar {
				s.pushErofs(ctx, files, erofsImage, ocispec.ImageConfig{})
			}
		})
		measure.Check(ctx.Err())
	}
	measure.Check(os.RemoveAll(files))
	s.disk.Sync()
	complete = true
	return s
}

func (s *store) close() {
	if s.Node != nil {
		measure.Tidy(s.Stop)
	}
	measure.Tidy(s.disk.Remove)
}

func (s *store) push(ctx context.Context, a *pack.Artifact, tag string) {
	measure.Must(a.Push(ctx, s.Registry, repository, tag))
}

// ref returns the reference of a tag.
func (s *store) ref(tag string) string { return s.Registry + "/" + repository + ":" + tag }

// warm reads the registry's files, so that every pull finds them in the page cache.
// Otherwise the registry's disk would be measured.
func (s *store) warm() {
	blobs := filepath.Join(s.Dir, "registry", "docker", "registry", "v2", "blobs")
	measure.Check(filepath.WalkDir(blobs, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			measure.Read(path, 0)
		}
		return err
	}))
}

// pax replaces the raw layers of a model by tars of one file each, like the reference
// packer. It returns the number of bytes of the tars before compression.
func pax(ctx context.Context, form pack.Form, scratch, dir string, model *pack.Artifact) (size int64) {
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(runtime.GOMAXPROCS(0))
	sizes := make([]int64, len(model.Layers))
	for i := range model.Layers {
		work.Go(func() error {
			l := &model.Layers[i]
			rel, err := filepath.Rel(dir, l.Path)
			if err != nil {
				return err
			}
			l.Path = filepath.Join(scratch, fmt.Sprint(i))
			l.MediaType = strings.TrimSuffix(l.MediaType, string(pack.Raw)) + string(form)
			l.DiffID, sizes[i], err = writeTar(ctx, form, l.Path, dir, rel)
			return err
		})
	}
	measure.Check(work.Wait())
	for _, n := range sizes {
		size += n
	}
	return size
}

// writeTar writes a tar of dir/rel, which is a file or a directory, to name.
func writeTar(ctx context.Context, form pack.Form, name, dir, rel string) (diffID digest.Digest, size int64, err error) {
	file, err := os.Create(name)
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	out := io.WriteCloser(file)
	if form == pack.TarGzip {
		out = gzip.NewWriter(file)
	}
	if form == pack.TarZstd {
		// The zstd program does the same: weights have no repetitions, so only entropy
		// coding compresses them.
		if out, err = zstd.NewWriter(file, zstd.WithAllLitEntropyCompression(true)); err != nil {
			return "", 0, err
		}
	}
	sum := digest.Canonical.Digester()
	counted := &counter{w: io.MultiWriter(out, sum.Hash())}
	w := tar.NewWriter(counted)
	err = filepath.WalkDir(filepath.Join(dir, rel), func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		header, err := tar.FileInfoHeader(info, "")
		if err != nil {
			return err
		}
		member, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		*header = tar.Header{Typeflag: header.Typeflag, Name: member, Mode: header.Mode, Size: header.Size, ModTime: pack.Created}
		if err := w.WriteHeader(header); err != nil || d.IsDir() {
			return err
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(w, contextReader{ctx, in})
		return err
	})
	if err != nil {
		return "", 0, fmt.Errorf("tar of %s: %w", rel, err)
	}
	if err := w.Close(); err != nil {
		return "", 0, err
	}
	if form != pack.Tar {
		if err := out.Close(); err != nil {
			return "", 0, err
		}
	}
	return sum.Digest(), counted.n, nil
}

// counter counts the bytes that are written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// imageOf returns a container image with the files of a model in tars.
func imageOf(ctx context.Context, form pack.Form, scratch, dir string, model *pack.Artifact) *pack.Artifact {
	mediaType := map[pack.Form]string{
		pack.Tar:     ocispec.MediaTypeImageLayer,
		pack.TarGzip: ocispec.MediaTypeImageLayerGzip,
		pack.TarZstd: ocispec.MediaTypeImageLayerZstd,
	}[form]
	if len(model.Layers) > maxImageLayers {
		all := pack.Layer{MediaType: mediaType, Path: filepath.Join(scratch, "all")}
		var err error
		all.DiffID, _, err = writeTar(ctx, form, all.Path, dir, ".")
		measure.Check(err)
		return imageWith(ocispec.ImageConfig{}, all)
	}
	var layers []pack.Layer
	for _, l := range model.Layers {
		layers = append(layers, pack.Layer{MediaType: mediaType, Path: l.Path, DiffID: l.DiffID})
	}
	return imageWith(ocispec.ImageConfig{}, layers...)
}

func imageWith(config ocispec.ImageConfig, layers ...pack.Layer) *pack.Artifact {
	all := ocispec.Image{
		Config:   config,
		Created:  &pack.Created,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	for _, l := range layers {
		all.RootFS.DiffIDs = append(all.RootFS.DiffIDs, l.DiffID)
	}
	return &pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: measure.Must(json.Marshal(all)), Layers: layers}
}

// pushErofs pushes a container image with one layer that is EROFS already, as after
// containerd's conversion ahead of time.
func (s *store) pushErofs(ctx context.Context, files, tag string, config ocispec.ImageConfig) {
	blob := filepath.Join(s.disk.Root(), "layer.erofs")
	measure.Must(s.Tool("mkfs.erofs", "--quiet", "-b4096", "-T0", "--mkfs-time", "-Enoinline_data", blob, files))
	f := measure.Must(os.Open(blob))
	defer f.Close()
	diffID := measure.Must(digest.FromReader(contextReader{ctx, f}))
	s.push(ctx, imageWith(config, pack.Layer{MediaType: "application/vnd.erofs.layer.v1", Path: blob, DiffID: diffID}), tag)
	measure.Check(os.Remove(blob))
}

// mkfsTooOld returns an error if mkfs.erofs lacks options that containerd's erofs differ
// uses.
func (s *store) mkfsTooOld() error {
	help, err := s.Tool("mkfs.erofs", "--help")
	for _, option := range []string{"--tar=", "--mkfs-time", "--sort="} {
		if err == nil && !strings.Contains(help, option) {
			err = fmt.Errorf("mkfs.erofs has no option %s, which containerd's erofs differ uses: install erofs-utils 1.8.2 or newer", option)
		}
	}
	return err
}

// bytesOf returns the total size of the layers.
func bytesOf(a *pack.Artifact) (sum int64) {
	for _, l := range a.Layers {
		sum += measure.Must(os.Stat(l.Path)).Size()
	}
	return sum
}
