// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// refusal is an artifact that must be refused. Its layers follow a good layer, layer 0.
type refusal struct {
	layers []pack.Layer
	// reason is a part of the error. The error names the last layer, unless elsewhere is
	// set.
	reason    string
	elsewhere bool
	// pull is containerd's error if containerd itself refuses the pull; earlier is its
	// error before 2.3, if that differs.
	pull, earlier string

	// pushed is a layer whose blob the registry gets first, as part of another artifact,
	// because a layer with a false descriptor is pushed without its blob.
	pushed pack.Layer
	config []byte // instead of a good one
}

// hostile makes layers for refusals. Names that leave the volume lead to the directory
// outside.
type hostile struct {
	t       *testing.T
	outside string
}

// escape returns a path from the root of any volume to a file in outside. ".." in the root
// directory is the root directory itself.
func (h hostile) escape(name string) string {
	return strings.Repeat("../", 30) + filepath.Join(h.outside, name)[1:]
}

func (hostile) raw(path string) pack.Layer {
	return pack.Layer{
		MediaType:   modelspec.MediaTypeModelWeightRaw,
		Data:        []byte("raw " + path),
		Annotations: map[string]string{modelspec.AnnotationFilepath: path},
	}
}

func (h hostile) described(metadata string) []pack.Layer {
	layer := h.raw("described.txt")
	layer.Annotations[modelspec.AnnotationFileMetadata] = metadata
	return []pack.Layer{layer}
}

func file(name string) pack.Member {
	return pack.Member{Header: tar.Header{Name: name, Mode: 0o644}, Data: []byte(name)}
}

func directory(name string) pack.Member {
	return pack.Member{Header: tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o777}}
}

func symlink(name, target string) pack.Member {
	return pack.Member{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}}
}

func hardLink(target string) pack.Member {
	return pack.Member{Header: tar.Header{Name: "link", Typeflag: tar.TypeLink, Linkname: target}}
}

func special(flag byte) pack.Member {
	return pack.Member{Header: tar.Header{Name: "special", Typeflag: flag, Mode: 0o666, Devmajor: 1, Devminor: 3}}
}

func (h hostile) archive(members ...pack.Member) []byte {
	h.t.Helper()
	data, err := pack.TarOf(members...)
	check(h.t, err)
	return data
}

func (h hostile) tar(members ...pack.Member) pack.Layer {
	h.t.Helper()
	return pack.Layer{MediaType: modelspec.MediaTypeModelWeight, Data: h.archive(members...)}
}

// stream describes a layer of one file with changed bytes: inner changes the tar before
// compression, outer changes the blob. The DiffID is that of the changed tar; wrong makes
// it another one.
type stream struct {
	mediaType    string
	inner, outer func([]byte) []byte
	wrong        bool
}

func (h hostile) stream(s stream) []pack.Layer {
	h.t.Helper()
	data := h.archive(file("streamed.txt"))
	if s.inner != nil {
		data = s.inner(data)
	}
	layer := pack.Layer{MediaType: s.mediaType, DiffID: digest.FromBytes(data)}
	if s.wrong {
		layer.DiffID = digest.FromString("something else")
	}
	var err error
	switch s.mediaType {
	case modelspec.MediaTypeModelWeightGzip:
		data, err = pack.Gzip(data)
	case modelspec.MediaTypeModelWeightZstd:
		data, err = pack.Zstd(data)
	}
	check(h.t, err)
	if s.outer != nil {
		data = s.outer(data)
	}
	if s.mediaType == modelspec.MediaTypeModelWeight && !s.wrong {
		layer.DiffID = "" // means the blob's own digest
	}
	layer.Data = data
	return []pack.Layer{layer}
}

// cut returns a function that removes the last n bytes.
func cut(n int) func([]byte) []byte {
	return func(data []byte) []byte { return data[:len(data)-n] }
}

func withGarbage(data []byte) []byte { return append(slices.Clip(data), "garbage after the end"...) }

// modelConfig returns a config with the DiffIDs.
func modelConfig(t *testing.T, ids ...digest.Digest) []byte {
	t.Helper()
	text, err := json.Marshal(modelspec.Model{ModelFS: modelspec.ModelFS{Type: "layers", DiffIDs: ids}})
	check(t, err)
	return text
}

// refusals are the artifacts that a node must refuse, one per rule.
func refusals(h hostile) map[string]refusal {
	const (
		tarType  = modelspec.MediaTypeModelWeight
		gzipType = modelspec.MediaTypeModelWeightGzip
		zstdType = modelspec.MediaTypeModelWeightZstd

		// containerd's error for an artifact with layers of an image.
		imageLayer = "failed to unpack image volume: mismatched image rootfs and manifest layers"
	)
	raw := func(path string) []pack.Layer { return []pack.Layer{h.raw(path)} }
	members := func(m ...pack.Member) []pack.Layer { return []pack.Layer{h.tar(m...)} }
	typed := func(mediaType string) []pack.Layer {
		layer := h.raw("typed.bin")
		layer.MediaType = mediaType
		return []pack.Layer{layer}
	}
	outside := filepath.Join(h.outside, "written")
	canary := filepath.Join(h.outside, "canary")
	long := strings.Repeat("n", 256)
	empty := h.raw("good copy.txt")
	empty.Data, empty.Digest = nil, digest.FromBytes(goodLayer().Data) // its descriptor says 0 bytes
	other := h.raw("same.txt")
	other.Data = []byte("other bytes")
	unknown := h.raw("unknown.bin") // not in containerd's content store
	lying := func(size int64) []pack.Layer {
		layer := unknown
		layer.Data, layer.Digest, layer.Size = nil, digest.FromBytes(unknown.Data), size
		return []pack.Layer{layer}
	}

	return map[string]refusal{
		"absolute path, raw":                            {layers: raw(outside), reason: "is absolute"},
		"absolute path with dot dot, tar":               {layers: members(file("/" + h.escape("written"))), reason: `contains ".."`},
		"dot dot that leaves the volume, raw":           {layers: raw(h.escape("written")), reason: `contains ".."`},
		"dot dot that leaves the volume, tar":           {layers: members(file(h.escape("written"))), reason: `contains ".."`},
		"dot dot that leaves the volume, tar directory": {layers: members(directory(h.escape("written"))), reason: `contains ".."`},
		"dot dot that stays inside, raw":                {layers: raw("a/../b"), reason: `path "a/../b" contains ".."`},
		"dot dot that stays inside, tar":                {layers: members(file("a/../b")), reason: `path "a/../b" contains ".."`},
		"dot dot that is the volume, tar directory":     {layers: members(directory("a/..")), reason: `contains ".."`},

		"NUL, raw": {layers: raw("a\x00b"), reason: `path "a\x00b" contains a NUL byte`},
		"NUL, tar": {layers: []pack.Layer{{MediaType: tarType, Data: h.withNULInPath(h.archive(file("a-b")))}}, reason: "archive/tar: invalid tar header"},

		"a name over 255 bytes, raw":        {layers: raw("a/" + long), reason: "has a name of 256 bytes, over the limit of 255"},
		"a name over 255 bytes, tar":        {layers: members(file("a/" + long)), reason: "has a name of 256 bytes, over the limit of 255"},
		"a path over 4095 bytes, raw":       {layers: raw(strings.Repeat(long[:199]+"/", 20) + long[:96]), reason: "has 4096 bytes, over the limit of 4095"},
		"a path over 4095 bytes, tar":       {layers: members(file(strings.Repeat(long[:199]+"/", 20) + long[:96])), reason: "has 4096 bytes, over the limit of 4095"},
		"a path far over all limits, tar":   {layers: members(file(strings.Repeat("n/", 1<<18) + "n")), reason: "over the limit of"},
		"a path below too many directories": {layers: raw(strings.Repeat("d/", 129) + "f"), reason: "is below 129 directories, over the limit of 128"},

		"file through a symlink":           {layers: members(symlink("link", h.outside), file("link/written")), reason: `member "link/written": "link" passes through a symlink of layer 1`},
		"directory through a symlink":      {layers: members(symlink("link", h.outside), directory("link/written")), reason: `"link" passes through a symlink of layer 1`},
		"symlink through a symlink":        {layers: members(symlink("link", h.outside), symlink("link/written", "x")), reason: `"link" passes through a symlink of layer 1`},
		"raw file through a layer's link":  {layers: append(members(symlink("link", h.outside)), h.raw("link/written")), reason: `"link" passes through a symlink of layer 1`},
		"directory in the place of a link": {layers: members(symlink("link", h.outside), directory("link")), reason: `"link" passes through a symlink of layer 1`},

		"hard link to an absolute path":     {layers: members(hardLink(canary)), reason: fmt.Sprintf("hard link to %q, which is neither a regular file nor a symlink before it", canary)},
		"hard link with dot dot":            {layers: members(hardLink(h.escape("canary"))), reason: `contains ".."`},
		"file through a link to a symlink":  {layers: members(symlink("s", h.outside), hardLink("s"), file("link/written")), reason: `"link" passes through a symlink of layer 1`},
		"hard link to another layer's file": {layers: members(hardLink("good.txt")), reason: `hard link to "good.txt", which is neither a regular file nor a symlink before it in the same layer`},
		"hard link through a symlink":       {layers: members(symlink("s", h.outside), hardLink("s/canary")), reason: `hard link to "s/canary", which is neither`},

		"character device": {layers: members(special(tar.TypeChar)), reason: `member "special": a character device cannot be in a volume`},
		"whiteout":         {layers: members(pack.Member{Header: tar.Header{Name: "good.txt", Typeflag: tar.TypeChar}}), reason: `member "good.txt": a character device`},
		"block device":     {layers: members(special(tar.TypeBlock)), reason: `member "special": a block device cannot`},
		"FIFO":             {layers: members(special(tar.TypeFifo)), reason: `member "special": a FIFO cannot`},
		"socket":           {layers: members(special('s')), reason: `member "special": a member of type 's' cannot`},

		"metadata that is not JSON":         {layers: h.described("mode=0644"), reason: "annotation org.cncf.model.file.metadata+json: malformed file metadata"},
		"metadata that is cut off":          {layers: h.described(`{"mode": 420`), reason: "malformed file metadata"},
		"metadata that is null":             {layers: h.described("null"), reason: "malformed file metadata: null"},
		"metadata with a mode that is text": {layers: h.described(`{"mode": "0644"}`), reason: "malformed file metadata"},
		"metadata with a mode out of range": {layers: h.described(`{"mode": 65536}`), reason: "mode 65536 is not a Unix file mode"},
		"metadata with the user -1":         {layers: h.described(`{"uid": 4294967295}`), reason: "owner 4294967295:0"},
		"metadata with the group -1":        {layers: h.described(`{"gid": 4294967295}`), reason: "owner 0:4294967295"},
		"metadata with a user out of range": {layers: h.described(`{"uid": 4294967296}`), reason: "malformed file metadata"},
		"metadata of a symlink":             {layers: h.described(`{"typeflag": 50}`), reason: "type flag 50 is not a regular file"},
		"metadata with a malformed time":    {layers: h.described(`{"mtime": "yesterday"}`), reason: "malformed file metadata"},
		"metadata with a negative size":     {layers: h.described(`{"size": -1}`), reason: "negative size -1"},
		"tar member with the user -1":       {layers: members(pack.Member{Header: tar.Header{Name: "f", Uid: 1<<32 - 1}}), reason: "owner 4294967295:0 is not a valid user and group"},

		"wrong DiffID, plain":       {layers: h.stream(stream{mediaType: tarType, wrong: true}), reason: "the config lists the DiffID " + digest.FromString("something else").String()},
		"wrong DiffID, gzip":        {layers: h.stream(stream{mediaType: gzipType, wrong: true}), reason: "the config lists the DiffID " + digest.FromString("something else").String()},
		"wrong DiffID, zstd":        {layers: h.stream(stream{mediaType: zstdType, wrong: true}), reason: "the config lists the DiffID " + digest.FromString("something else").String()},
		"malformed DiffID":          {layers: raw("f"), config: modelConfig(h.t, digest.FromBytes(goodLayer().Data), "sha256:x"), reason: "DiffID in the config"},
		"fewer DiffIDs than layers": {layers: raw("f"), config: modelConfig(h.t, digest.FromBytes(goodLayer().Data)), elsewhere: true, reason: "lists 1 DiffIDs for 2 layers"},
		"more DiffIDs than layers":  {config: modelConfig(h.t, digest.FromBytes(goodLayer().Data), digest.FromString("")), reason: "lists 2 DiffIDs for 1 layers"},

		"truncated tar, in a member":      {layers: h.stream(stream{mediaType: tarType, outer: cut(1024 + 502)}), reason: "the archive is truncated"},
		"truncated tar, in the padding":   {layers: h.stream(stream{mediaType: tarType, outer: cut(1025)}), reason: "the archive is truncated"},
		"truncated tar in gzip":           {layers: h.stream(stream{mediaType: gzipType, inner: cut(1025)}), reason: "the archive is truncated"},
		"truncated gzip":                  {layers: h.stream(stream{mediaType: gzipType, outer: cut(10)}), reason: "the archive is truncated"},
		"truncated gzip, in the checksum": {layers: h.stream(stream{mediaType: gzipType, outer: cut(3)}), reason: "the archive is truncated"},
		"truncated zstd":                  {layers: h.stream(stream{mediaType: zstdType, outer: cut(10)}), reason: "the archive is truncated"},
		"garbage after a tar":             {layers: h.stream(stream{mediaType: tarType, outer: withGarbage}), reason: "garbage follows the end of the archive"},
		"garbage after a tar in gzip":     {layers: h.stream(stream{mediaType: gzipType, inner: withGarbage}), reason: "garbage follows the end of the archive"},
		"garbage after a tar in zstd":     {layers: h.stream(stream{mediaType: zstdType, inner: withGarbage}), reason: "garbage follows the end of the archive"},
		"garbage after gzip":              {layers: h.stream(stream{mediaType: gzipType, outer: withGarbage}), reason: "bytes follow the end of the gzip stream that are not gzip"},
		"garbage after zstd":              {layers: h.stream(stream{mediaType: zstdType, outer: withGarbage}), reason: "bytes follow the end of the zstd stream that are not zstd"},
		"no gzip at all":                  {layers: h.stream(stream{mediaType: gzipType, outer: func([]byte) []byte { return []byte("text") }}), reason: "its media type says that it is gzip, and its bytes are not compressed"},
		"no zstd at all":                  {layers: h.stream(stream{mediaType: zstdType, outer: func([]byte) []byte { return []byte("text") }}), reason: "its media type says that it is zstd, and its bytes are not compressed"},
		"xz":                              {layers: []pack.Layer{{MediaType: gzipType, Data: []byte("\xfd7zXZ\x00 and more"), DiffID: digest.FromString("a tar")}}, reason: "its bytes are xz, which is not supported"},
		"two files of one path":           {layers: []pack.Layer{h.raw("same.txt"), other}, reason: "has the same path and other bytes"},

		"file where a directory is needed": {layers: []pack.Layer{h.raw("a"), h.tar(file("a/b"))}, reason: `"a" must be a directory but is a file of layer 1`},
		"file where a raw layer needs one": {layers: []pack.Layer{h.tar(file("a")), h.raw("a/b")}, reason: `"a" must be a directory but is a file of layer 1`},
		"directory where a file is to be":  {layers: []pack.Layer{h.tar(file("a/b")), h.raw("a")}, reason: `file "a" is a directory of layer 1`},
		"directory where a tar has a file": {layers: []pack.Layer{h.raw("a/b"), h.tar(file("a"))}, reason: `file "a" is a directory of layer 1`},

		"encrypted layer":             {layers: typed(tarType + "+encrypted"), reason: "an encrypted layer is not supported"},
		"encrypted layer of an image": {layers: typed(ocispec.MediaTypeImageLayerGzip + "+encrypted"), elsewhere: true, reason: imageLayer},
		"non-distributable layer":     {layers: typed("application/vnd.oci.image.layer.nondistributable.v1.tar"), elsewhere: true, reason: imageLayer},

		"layer declared empty":         {layers: []pack.Layer{empty}, reason: "its descriptor says 0 bytes, but its digest is not the digest of no bytes"},
		"unknown layer declared empty": {pushed: unknown, layers: lying(0), pull: "reports content size of zero"},
		"layer declared shorter":       {pushed: unknown, layers: lying(3), pull: "read past expected size 3", earlier: "failed size validation"},
		"layer declared longer":        {pushed: unknown, layers: lying(1 << 40), pull: "short read: expected 1099511627776 bytes"},
		"layer of a negative size":     {pushed: unknown, layers: lying(-1), pull: "negative content size", earlier: "failed size validation"},

		"config that is not JSON":   {config: []byte("{"), pull: "unexpected end of JSON input"},
		"config of the wrong shape": {config: []byte(`{"modelfs": []}`), reason: "malformed model config: modelfs"},
		"artifact without layers":   {reason: "the artifact has no layers"},
	}
}

// withNULInPath gives the first member of a tar the path "a\x00b" with an extended header.
// In an ordinary header the NUL ends the name, and archive/tar does not write it in an
// extended one.
func (h hostile) withNULInPath(data []byte) []byte {
	h.t.Helper()
	head := h.archive(pack.Member{Header: tar.Header{Name: "pax", Mode: 0o644}, Data: []byte("12 path=a\x00b\n")})
	head = head[:1024] // without the end of the archive
	head[156] = tar.TypeXHeader
	copy(head[148:156], "        ")
	sum := 0
	for _, b := range head[:512] {
		sum += int(b)
	}
	copy(head[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return append(head, data...)
}

func goodLayer() pack.Layer {
	return pack.Layer{
		MediaType:   modelspec.MediaTypeModelDocRaw,
		Data:        []byte("a good file\n"),
		Annotations: map[string]string{modelspec.AnnotationFilepath: "good.txt"},
	}
}

// artifact returns the artifact with its good layer. The one that is refused for having no
// layers has none.
func (r refusal) artifact() *pack.Artifact {
	a := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Config: r.config}
	if r.layers != nil || r.config != nil {
		a.Layers = append([]pack.Layer{goodLayer()}, r.layers...)
	}
	return a
}

// wantRefused tries twice to start a container of pod with the volume ref, and expects the
// same error both times.
func wantRefused(t *testing.T, pod *node.Pod, ref string, wanted ...string) {
	t.Helper()
	var errs []string
	for range 2 {
		err := pod.Start(node.Container{Name: "refused", Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
		if err == nil {
			t.Fatal("the container started")
		}
		errs = append(errs, answer(t, err))
	}
	// The error becomes an event of Kubernetes, so it must be one short line whatever the
	// artifact contains.
	const longest = 4096
	if len(errs[0]) > longest || strings.Contains(errs[0], "\n") {
		t.Errorf("the error is not one short line: %d bytes: %.1000q", len(errs[0]), errs[0])
	}
	if pod.Node().Minor >= 2 {
		wanted = append(wanted, "ImageVolumeMountFailed") // kubelet uses it as the reason
	}
	for _, want := range append(wanted, "failed to mount image volume: ") {
		if !strings.Contains(errs[0], want) {
			t.Errorf("the error does not contain %q: %.4096s", want, errs[0])
		}
	}
	if errs[0] != errs[1] {
		t.Errorf("the second error differs: %.4096s; the first was %.4096s", errs[1], errs[0])
	}
}

// answer returns containerd's error, which crictl prints last, as the quoted message of a
// log line.
func answer(t *testing.T, err error) string {
	t.Helper()
	text := strings.TrimSpace(err.Error())
	if at := strings.LastIndex(text, "level=fatal msg="); at >= 0 {
		message, err := strconv.Unquote(text[at+len("level=fatal msg="):])
		check(t, err)
		if at := strings.Index(message, "rpc error:"); at >= 0 {
			return message[at:]
		}
	}
	t.Fatalf("no error of containerd in: %v", err)
	return ""
}

// daemonKeys returns the keys of the daemon's own snapshots, whether or not containerd
// knows them: namespace, number and containerd's key, with slashes between.
func daemonKeys(t *testing.T, n *node.Node) (keys []string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(n.Dir, "daemon.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	defer conn.Close()
	daemon := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "artifact")
	check(t, daemon.Walk(namespaces.WithNamespace(t.Context(), "k8s.io"), func(_ context.Context, info snapshots.Info) error {
		keys = append(keys, info.Name)
		return nil
	}))
	return keys
}

// daemonVolumes returns the keys of image volumes.
func daemonVolumes(t *testing.T, n *node.Node) (keys []string) {
	t.Helper()
	for _, key := range daemonKeys(t, n) {
		if strings.Contains(key, "/image-volumes/") {
			keys = append(keys, key)
		}
	}
	return keys
}

func TestAnArtifactThatBreaksARuleIsRefused(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	outside := t.TempDir()
	check(t, os.WriteFile(filepath.Join(outside, "canary"), []byte("untouched"), 0o600))
	canaries, err := treelist.List(outside)
	check(t, err)

	// containerd knows the good layer of all artifacts already.
	src := t.TempDir()
	check(t, os.WriteFile(filepath.Join(src, "good.txt"), goodLayer().Data, 0o644))
	good := pulled(t, n, src, pack.Raw)

	// One pod is enough, because refusing a container does not change its pod.
	pod, err := n.RunSandbox(node.PodSpec{})
	check(t, err)
	before := daemonUsage(t, n)
	all := refusals(hostile{t, outside})
	for i, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			r := all[name]
			repo := fmt.Sprintf("bad/%d", i)
			if r.pushed.Data != nil {
				other := pack.Artifact{Layers: []pack.Layer{r.pushed}}
				_, err := other.Push(t.Context(), n.Registry, repo, "other")
				check(t, err)
			}
			_, err := r.artifact().Push(t.Context(), n.Registry, repo, "latest")
			check(t, err)
			ref := n.Registry + "/" + repo + ":latest"
			_, err = n.Pull(ref)
			if r.pull != "" {
				if r.earlier != "" && n.Minor < 3 {
					r.pull = r.earlier
				}
				if err == nil || !strings.Contains(err.Error(), r.pull) {
					t.Fatalf("pull: %v, want an error about %q", err, r.pull)
				}
			} else {
				check(t, err)
				t.Cleanup(func() {
					if t.Failed() { // leftovers must not fail the other cases
						check(t, pod.Remove())
						pod, err = n.RunSandbox(node.PodSpec{})
						check(t, err)
					}
					_, err = n.Crictl("rmi", ref)
					check(t, err)
					wantUsage(t, n, before)
				})
				wanted := []string{r.reason}
				if last := len(r.layers); last > 0 && !r.elsewhere {
					wanted = append(wanted, fmt.Sprintf("layer %d (%s, sha256:", last, r.layers[last-1].MediaType))
				}
				wantRefused(t, pod, ref, wanted...)
			}
			wantUsage(t, n, before)
			if volumes := daemonVolumes(t, n); volumes != nil {
				t.Errorf("the daemon has the volumes %q, want none", volumes)
			}
			got, err := treelist.List(outside)
			check(t, err)
			if diff := treelist.Diff(canaries, got); diff != "" {
				t.Errorf("something was written outside of the volume:\n%s", diff)
			}
		})
	}

	// Afterwards the node works as before.
	listed, err := n.Ctr("snapshots", "--snapshotter", "artifact", "ls")
	check(t, err)
	if strings.Contains(listed, "image-volumes") {
		t.Errorf("containerd has snapshots of image volumes:\n%s", listed)
	}
	containers, err := n.Crictl("ps", "--all", "--quiet")
	check(t, err)
	if containers != "" {
		t.Errorf("containers were created: %s", containers)
	}
	check(t, pod.Start(node.Container{Volumes: []node.Volume{{Image: good, Path: "/model"}}}))
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	if volumes := daemonVolumes(t, n); len(volumes) != 1 {
		t.Errorf("the daemon has the volumes %q, want one", volumes)
	}
	check(t, pod.Remove())
	mounts, err := node.Mounts(n.State)
	check(t, err)
	if len(mounts) != 0 {
		t.Errorf("containerd has not removed the mounts %q", mounts)
	}
}

func TestAPodRecoversWhenAGoodArtifactTakesTheTag(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	bad := refusals(hostile{t, t.TempDir()})["wrong DiffID, gzip"]
	_, err := bad.artifact().Push(t.Context(), n.Registry, "models/tiny", "raw")
	check(t, err)
	ref := n.Registry + "/models/tiny:raw"
	_, err = n.Pull(ref)
	check(t, err)
	pod, err := n.RunSandbox(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	wantRefused(t, pod, ref, bad.reason)

	src := writeModel(t)
	if good := pulled(t, n, src, pack.Raw); good != ref {
		t.Fatalf("the good artifact is %s, want %s", good, ref)
	}
	check(t, pod.Start(node.Container{}))
	wantVolume(t, pod, "main", "/model", wantTree(t, src, pack.Raw))
	check(t, pod.Remove())
}

// Attributes that affect the node and mean nothing to a reader are cleared and not refused,
// because packers copy them unintentionally.
func TestSpecialBitsAndPrivilegedXattrsAreCleared(t *testing.T) {
	n := node.ForTest(t, node.Options{})
	xattrs := map[string]string{"SCHILY.xattr.user.kept": "kept"}
	for _, name := range []string{
		"security.capability", "security.selinux", "security.ima", "trusted.any",
		"trusted.overlay.metacopy", "trusted.overlay.opaque", "trusted.overlay.redirect",
	} {
		value := "/etc/shadow"
		if name == "security.capability" { // VFS_CAP_REVISION_2 with CAP_NET_RAW, see linux/capability.h
			value = "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12)
		}
		xattrs["SCHILY.xattr."+name] = value
	}
	layer, err := pack.TarOf(
		pack.Member{Header: tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o3777, ModTime: pack.Created, PAXRecords: xattrs}},
		pack.Member{Header: tar.Header{Name: "bin/special", Mode: 0o7755, Uid: 12, Gid: 34, ModTime: pack.Created, PAXRecords: xattrs}, Data: []byte("x")},
	)
	check(t, err)
	raw := goodLayer()
	raw.Annotations[modelspec.AnnotationFileMetadata] = `{"mode": 36333, "uid": 12, "gid": 34}` // 0o106755
	model := &pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{
		{MediaType: modelspec.MediaTypeModelCode, Data: layer}, raw,
	}}
	_, err = model.Push(t.Context(), n.Registry, "models/special", "latest")
	check(t, err)
	ref := n.Registry + "/models/special:latest"
	_, err = n.Pull(ref)
	check(t, err)
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)

	created, kept := pack.Created.UnixNano(), map[string][]byte{"user.kept": []byte("kept")}
	want := []treelist.Entry{
		{Path: "bin", Type: "dir", Mode: 0o3777, ModTime: created, Xattrs: kept},
		{Path: "bin/special", Type: "file", Mode: 0o755, UID: 12, GID: 34, Size: 1, ModTime: created, SHA256: digest.FromString("x").Encoded(), Xattrs: kept},
		{Path: "good.txt", Type: "file", Mode: 0o755, UID: 12, GID: 34, Size: int64(len(raw.Data)), ModTime: created, SHA256: digest.FromBytes(raw.Data).Encoded()},
	}
	wantVolume(t, pod, "main", "/model", want)
	// The container may not list the trusted attributes; the node may.
	mounts, err := node.Mounts(n.DaemonState)
	check(t, err)
	if len(mounts) != 1 {
		t.Fatalf("the daemon's mounts are %q, want one", mounts)
	}
	got, err := treelist.List(mounts[0])
	check(t, err)
	if diff := treelist.Diff(want, got); diff != "" {
		t.Errorf("the volume differs on the node:\n%s", diff)
	}
	check(t, pod.Remove())
}
