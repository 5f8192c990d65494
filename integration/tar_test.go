// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// Artifacts with tar layers, and what the daemon retains of them.

// random returns n pseudorandom bytes, which depend on the seed.
func random(n int, seed string) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(seed))).Read(b)
	return b
}

// tarLayer returns a layer with an archive, compressed according to its media type.
func tarLayer(t *testing.T, mediaType string, archive []byte) pack.Layer {
	t.Helper()
	l := pack.Layer{MediaType: mediaType, Data: archive, DiffID: digest.FromBytes(archive)}
	var err error
	switch {
	case strings.HasSuffix(mediaType, "+gzip"):
		l.Data, err = pack.Gzip(archive)
	case strings.HasSuffix(mediaType, "+zstd"):
		l.Data, err = pack.Zstd(archive)
	}
	check(t, err)
	return l
}

func rawLayer(path string, content []byte) pack.Layer {
	return pack.Layer{
		MediaType: modelspec.MediaTypeModelWeightRaw, Data: content,
		Annotations: map[string]string{
			modelspec.AnnotationFilepath:     path,
			modelspec.AnnotationFileMetadata: fmt.Sprintf(`{"name":%q,"mode":416,"uid":1234,"gid":5678,"size":%d,"mtime":"2021-02-03T04:05:06.789Z","typeflag":0}`, filepath.Base(path), len(content)),
		},
	}
}

// archiveOf returns a tar of the members, all with the time pack.Created.
func archiveOf(t *testing.T, members ...pack.Member) []byte {
	t.Helper()
	for i := range members {
		members[i].ModTime, members[i].Format = pack.Created, tar.FormatPAX
	}
	archive, err := pack.TarOf(members...)
	check(t, err)
	return archive
}

// fileEntry returns the expected entry of a file in a tar of archiveOf.
func fileEntry(path string, content []byte) treelist.Entry {
	sum := sha256.Sum256(content)
	return treelist.Entry{Path: path, Type: "file", Mode: 0o644, Size: int64(len(content)), ModTime: pack.Created.UnixNano(), SHA256: hex.EncodeToString(sum[:])}
}

func dirEntry(path string, mode uint32) treelist.Entry {
	return treelist.Entry{Path: path, Type: "dir", Mode: mode, ModTime: pack.Created.UnixNano()}
}

// push pushes and pulls a model and returns its reference.
func push(t *testing.T, n *node.Node, name string, layers ...pack.Layer) string {
	t.Helper()
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Name: name, Layers: layers}
	_, err := model.Push(t.Context(), n.Registry, "tars/"+name, "latest")
	check(t, err)
	ref := n.Registry + "/tars/" + name + ":latest"
	_, err = n.Pull(ref)
	check(t, err)
	return ref
}

// mixture returns layers of every kind and the expected volume.
func mixture(t *testing.T) ([]pack.Layer, []treelist.Entry) {
	t.Helper()
	raw, plain, zipped, holed := random(70001, "raw"), random(5000, "plain"), random(1<<20+77, "zipped"), make([]byte, 3<<20)
	copy(holed[1<<20+123:], random(4567, "sparse"))
	sparse, err := pack.SparseMember("zstd/sparse", int64(len(holed)), 1<<20+123, random(4567, "sparse"))
	check(t, err)
	noted := pack.Member{Header: tar.Header{Name: "plain/a", Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "kept"}}, Data: plain}
	owned := file("gzip/owned")
	owned.Uid, owned.Gid, owned.Mode = 1234, 65535, 0o4751
	hard := hardLink("gzip/file")
	hard.Name = "gzip/hard"
	sticky := directory("plain")
	sticky.Mode = 0o1750
	layers := []pack.Layer{
		rawLayer("raw/weights", raw),
		rawLayer("replaced by a tar", []byte("raw")),
		tarLayer(t, modelspec.MediaTypeModelWeight, archiveOf(t, sticky, noted, symlink("plain/link", "../raw/weights"), file("replaced by a tar"), file("replaced by a file"))),
		tarLayer(t, modelspec.MediaTypeModelWeightGzip, archiveOf(t, pack.Member{Header: tar.Header{Name: "gzip/file", Mode: 0o644}, Data: zipped}, hard, owned, file("replaced by another tar"))),
		tarLayer(t, modelspec.MediaTypeModelWeightZstd, append(sparse, archiveOf(t, file("zstd/Wörter 语"), file("zstd/empty/"+strings.Repeat("n", 255)), pack.Member{Header: tar.Header{Name: "replaced by another tar", Mode: 0o644}, Data: []byte("zstd")})...)),
		rawLayer("replaced by a file", []byte("raw again")),
	}
	entry := func(e treelist.Entry, change func(*treelist.Entry)) treelist.Entry {
		change(&e)
		return e
	}
	asRaw := func(e *treelist.Entry) {
		e.Mode, e.UID, e.GID, e.ModTime = 0o640, 1234, 5678, 1612325106789000000
	}
	want := []treelist.Entry{
		dirEntry("raw", 0o755), entry(fileEntry("raw/weights", raw), asRaw),
		dirEntry("plain", 0o1750), entry(fileEntry("plain/a", plain), func(e *treelist.Entry) { e.Xattrs = map[string][]byte{"user.note": []byte("kept")} }),
		{Path: "plain/link", Type: "symlink", Mode: 0o777, ModTime: pack.Created.UnixNano(), Target: "../raw/weights"},
		dirEntry("gzip", 0o755), fileEntry("gzip/file", zipped), fileEntry("gzip/hard", zipped),
		entry(fileEntry("gzip/owned", []byte("gzip/owned")), func(e *treelist.Entry) { e.Mode, e.UID, e.GID = 0o751, 1234, 65535 }),
		dirEntry("zstd", 0o755), dirEntry("zstd/empty", 0o755), fileEntry("zstd/sparse", holed), fileEntry("zstd/Wörter 语", []byte("zstd/Wörter 语")),
		fileEntry("zstd/empty/"+strings.Repeat("n", 255), []byte("zstd/empty/"+strings.Repeat("n", 255))),
		fileEntry("replaced by a tar", []byte("replaced by a tar")), entry(fileEntry("replaced by a file", []byte("raw again")), asRaw),
		fileEntry("replaced by another tar", []byte("zstd")),
	}
	return layers, want
}

func TestEveryTarModeHasTheSameFiles(t *testing.T) {
	t.Parallel()
	for mode, loops := range map[string]bool{"auto": false, "erofs": false, "erofs-loop": true, "erofs-buffered": false, "extract": false} {
		t.Run(mode, func(t *testing.T) {
			n := node.ForTest(t, node.Options{DaemonConfig: fmt.Sprintf("tar_mode = %q", mode)})
			before := daemonUsage(t, n)
			layers, want := mixture(t)
			ref := push(t, n, "mixture", layers...)
			volumes := []node.Volume{{Image: ref, Path: "/model"}}
			var pods []*node.Pod
			for _, spec := range []node.PodSpec{{Volumes: volumes}, {OwnNetwork: true, UserNamespace: true, Volumes: volumes}} {
				pod, err := n.RunPod(spec)
				check(t, err)
				pods = append(pods, pod)
			}
			for _, pod := range pods {
				wantVolume(t, pod, "main", "/model", want)
			}
			if got := len(loopDevicesIn(t, n.DaemonRoot)); (got > 0) != loops {
				t.Errorf("there are %d loop devices, which is unexpected in this mode", got)
			}
			for _, pod := range pods {
				check(t, pod.Remove())
			}
			_, err := n.Crictl("rmi", ref)
			check(t, err)
			wantUsage(t, n, before)
			waitFor(t, "removal of the loop devices", func() bool { return len(loopDevicesIn(t, n.DaemonRoot)) == 0 })
		})
	}
}

// Archives with GNU tar's extensions to POSIX are mounted as the files they were made of.
// containerd and others cannot write some of them.
func TestArchivesOfGNUTarAreMounted(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	src := t.TempDir()
	none := func(mediaType string) pack.Layer {
		return pack.Layer{MediaType: mediaType, Data: []byte{}, DiffID: digest.FromBytes(nil)}
	}
	// Layers of no bytes and a compressed stream of no bytes are archives without members.
	layers := []pack.Layer{none(modelspec.MediaTypeModelWeight), none(modelspec.MediaTypeModelWeightGzip), tarLayer(t, modelspec.MediaTypeModelWeightZstd, nil)}
	for name, how := range map[string]struct {
		mediaType string
		options   []string
	}{
		"with a label":       {modelspec.MediaTypeModelWeight, []string{"--format=gnu", "--label=volume 1"}},
		"listed":             {modelspec.MediaTypeModelWeightGzip, []string{"--format=gnu", "--listed-incremental=" + filepath.Join(t.TempDir(), "snapshot")}},
		"in records of 2MiB": {modelspec.MediaTypeModelWeight, []string{"--blocking-factor=4096"}},
		"compressed records": {modelspec.MediaTypeModelWeightZstd, []string{"--blocking-factor=4096"}},
		"with no end":        {modelspec.MediaTypeModelWeight, nil},
		"absolute":           {modelspec.MediaTypeModelWeightGzip, []string{"--absolute-names", "--transform=s,^,/,S"}}, // transform the names, not the targets of symlinks
	} {
		dir := filepath.Join(src, name)
		check(t, os.Mkdir(dir, 0o750))
		check(t, os.Mkdir(filepath.Join(dir, "empty"), 0o700))
		check(t, os.WriteFile(filepath.Join(dir, "file"), random(5000, name), 0o640))
		check(t, os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "hard link")))
		check(t, os.Symlink("/file", filepath.Join(dir, "symlink")))
		check(t, os.Lchown(filepath.Join(dir, "symlink"), 1234, 5678))
		check(t, os.Link(filepath.Join(dir, "symlink"), filepath.Join(dir, "hard link to it")))
		for _, entry := range []string{"empty", "file", "symlink", ""} {
			at := unix.NsecToTimespec(pack.Created.Truncate(time.Second).UnixNano())
			check(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, entry), []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
		}
		archive, err := exec.CommandContext(t.Context(), "tar", slices.Concat([]string{"-c", "-C", src}, how.options, []string{name})...).Output()
		check(t, err)
		if name == "with no end" {
			for zeros := make([]byte, 512); bytes.HasSuffix(archive, zeros); {
				archive = archive[:len(archive)-len(zeros)]
			}
		}
		layers = append(layers, tarLayer(t, how.mediaType, archive))
	}
	want, err := treelist.List(src)
	check(t, err)
	ref := push(t, n, "gnu", layers...)
	for _, spec := range []node.PodSpec{{}, {OwnNetwork: true, UserNamespace: true}} {
		spec.Volumes = []node.Volume{{Image: ref, Path: "/model"}}
		pod, err := n.RunPod(spec)
		check(t, err)
		wantVolume(t, pod, "main", "/model", want)
		check(t, pod.Remove())
	}
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

func TestThreeHundredTarsAreOneMount(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	types := []string{modelspec.MediaTypeModelWeight, modelspec.MediaTypeModelWeightGzip, modelspec.MediaTypeModelWeightZstd}
	var layers []pack.Layer
	want := []treelist.Entry{fileEntry("last", []byte("299"))}
	for i := range 300 {
		name, content := fmt.Sprintf("shard-%03d", i), random(1000+i, fmt.Sprint(i))
		layers = append(layers, tarLayer(t, types[i%len(types)], archiveOf(t,
			pack.Member{Header: tar.Header{Name: name, Mode: 0o644}, Data: content},
			pack.Member{Header: tar.Header{Name: "last", Mode: 0o644}, Data: fmt.Append(nil, i)})))
		want = append(want, fileEntry(name, content))
	}
	ref := push(t, n, "many", layers...)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantVolume(t, pod, "main", "/model", want)
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 1 {
		t.Errorf("the daemon's mounts are %q, want one", mounts)
	}
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

// flatTars returns the shared tars by path.
func flatTars(t *testing.T, n *node.Node) map[string]unix.Stat_t {
	t.Helper()
	found := map[string]unix.Stat_t{}
	dir := filepath.Join(n.DaemonRoot, "blobs")
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err == nil && d.Type().IsRegular() {
			found[path] = stat(t, path)
		}
		return err
	}))
	return found
}

func TestArtifactsWithACompressedLayerInCommonHaveOneTar(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	common := archiveOf(t, pack.Member{Header: tar.Header{Name: "weights", Mode: 0o644}, Data: random(3<<20, "weights")})
	var refs []string
	var pods []*node.Pod
	for i, mediaType := range []string{modelspec.MediaTypeModelWeightGzip, modelspec.MediaTypeModelWeightGzip, modelspec.MediaTypeModelWeightZstd} {
		own := random(1000, fmt.Sprint(i))
		ref := push(t, n, fmt.Sprint("common", i), tarLayer(t, mediaType, common), rawLayer("own", own))
		pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		check(t, err)
		wantVolume(t, pod, "main", "/model", []treelist.Entry{
			fileEntry("weights", random(3<<20, "weights")),
			{Path: "own", Type: "file", Mode: 0o640, UID: 1234, GID: 5678, Size: 1000, ModTime: 1612325106789000000, SHA256: digest.FromBytes(own).Encoded()},
		})
		refs, pods = append(refs, ref), append(pods, pod)
	}
	flat := filepath.Join(n.DaemonRoot, "blobs/sha256", digest.FromBytes(common).Encoded())
	if tars := flatTars(t, n); len(tars) != 1 || tars[flat].Nlink != 4 { // its own link, and one in each tree
		t.Errorf("the tars are %v, want one with four links", tars)
	}
	if own := stat(t, flat).Blocks * 512; own < 3<<20 || own > 4<<20 {
		t.Errorf("the tar uses %d bytes", own)
	}
	for i, pod := range pods {
		_, err := n.Crictl("rmi", refs[i])
		check(t, err)
		check(t, pod.Remove())
		if i < len(pods)-1 {
			waitFor(t, "removal of a tree", func() bool { return len(trees(t, n, "")) == len(pods)-1-i })
			if _, err := os.Lstat(flat); err != nil {
				t.Errorf("the tar was removed before its last pod: %v", err)
			}
		}
	}
	wantUsage(t, n, before)
}

// Pods share one inode of one superblock and so one page cache. With direct I/O the tar
// itself is not cached.
func TestTwoPodsShareThePageCacheOfATar(t *testing.T) {
	n := node.ForTest(t, node.Options{DaemonConfig: `tar_mode = "erofs"`})
	content := random(4<<20, "cached")
	archive := archiveOf(t, pack.Member{Header: tar.Header{Name: "weights", Mode: 0o644}, Data: content})
	for name, mediaType := range map[string]string{"plain": modelspec.MediaTypeModelWeight, "gzip": modelspec.MediaTypeModelWeightGzip} {
		t.Run(name, func(t *testing.T) {
			ref := push(t, n, name, tarLayer(t, mediaType, archive))
			var files []unix.Stat_t
			var pods []*node.Pod
			for range 2 {
				pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
				check(t, err)
				pods = append(pods, pod)
			}
			var flat string
			for _, blob := range []string{blobPath(n, digest.FromBytes(archive).Encoded()), filepath.Join(n.DaemonRoot, "blobs/sha256", digest.FromBytes(archive).Encoded())} {
				if _, err := os.Stat(blob); err == nil && (name == "plain") == strings.HasPrefix(blob, n.ContentRoot) {
					flat = blob
				}
			}
			if flat == "" {
				t.Fatal("the tar was not found")
			}
			waitFor(t, "the tar to be dropped from the page cache", func() bool {
				f, err := os.Open(flat)
				check(t, err)
				defer f.Close()
				check(t, f.Sync()) // dirty pages cannot be dropped
				check(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
				return cached(t, f) == 0
			})
			for _, pod := range pods {
				wantVolume(t, pod, "main", "/model", []treelist.Entry{fileEntry("weights", content)})
				files = append(files, stat(t, filepath.Join("/proc", pid(t, n, pod), "root/model/weights")))
			}
			if files[0].Dev != files[1].Dev || files[0].Ino != files[1].Ino {
				t.Error("each pod has its own inode, want a shared one")
			}
			f, err := os.Open(flat)
			check(t, err)
			defer f.Close()
			if pages := cached(t, f); pages > 0 {
				t.Errorf("%d pages of the tar are in the page cache, in addition to those of the pods' file", pages)
			}
			for _, pod := range pods {
				check(t, pod.Remove())
			}
		})
	}
}

// cached returns the number of pages of f in the page cache.
func cached(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var st unix.Cachestat_t
	check(t, os.NewSyscallError("cachestat", unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0)))
	return st.Cache
}

// halfDone returns the files that builds have decompressed so far.
func halfDone(t *testing.T, n *node.Node) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.DaemonRoot, "trees", "new-*", "data", "*"))
	check(t, err)
	return slices.DeleteFunc(found, func(name string) bool {
		fi, err := os.Stat(name)
		return err != nil || fi.Size() == 0
	})
}

func TestADaemonThatIsKilledWhileItDecompressesLeavesNothing(t *testing.T) {
	t.Parallel()
	// Without decompress on pull, the build starts only when the pod needs it.
	n := node.ForTest(t, node.Options{DaemonConfig: "max_expansion = 100000\ndecompress_on_pull = false\n"})
	before := daemonUsage(t, n)
	layer, want := zeros(t, "zeros")
	ref := push(t, n, "killed", layer)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	started := make(chan error)
	go func() { started <- pod.Start(node.Container{}) }()
	waitFor(t, "the daemon to decompress", func() bool { return len(halfDone(t, n)) > 0 })
	check(t, n.KillDaemon())
	half := halfDone(t, n)
	if len(half) == 0 {
		t.Fatal("the build was complete before the daemon was killed")
	}
	if err := <-started; err == nil {
		t.Error("the container started")
	}
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	waitFor(t, "removal of the killed daemon's files", func() bool {
		_, err := os.Stat(half[0])
		return os.IsNotExist(err)
	})
	waitFor(t, "start of the container", func() bool { return pod.Start(node.Container{}) == nil })
	wantVolume(t, pod, "main", "/model", []treelist.Entry{want})
	if tars := flatTars(t, n); len(tars) != 1 {
		t.Errorf("the tars are %v, want one", tars)
	}
	check(t, pod.Remove())
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	wantUsage(t, n, before)
}

// A pod reads from a tar, compressed or not, while the daemon is killed and the image
// deleted.
func TestAPodGoesOnReadingFromATar(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	before := daemonUsage(t, n)
	layers, want := mixture(t)
	ref := push(t, n, "read", layers...)
	pod, err := n.RunPod(node.PodSpec{
		Volumes:    []node.Volume{{Image: ref, Path: "/model"}},
		Containers: []node.Container{{Name: "reader", Args: []string{"loop", "/model/gzip/hard"}}, {Name: "main"}},
	})
	check(t, err)
	check(t, n.KillDaemon())
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", want)
	check(t, n.StartDaemon())
	waitForDaemon(t, n)
	manifest := manifestOf(t, n, ref)
	_, err = n.Crictl("rmi", ref)
	check(t, err)
	waitFor(t, "containerd to delete the manifest", func() bool {
		_, err := os.Stat(blobPath(n, manifest))
		return os.IsNotExist(err)
	})
	wantReading(t, pod)
	wantVolume(t, pod, "main", "/model", want)
	check(t, pod.Remove())
	wantUsage(t, n, before)
	if tars := flatTars(t, n); len(tars) > 0 {
		t.Errorf("remaining tars: %v", tars)
	}
}
