// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// FuzzKey parses keys of snapshots. Images choose parts of them: the key of an extraction ends
// in a digest from the config. A key that begins like that of an extraction never asks for an
// artifact, and no key asks for two things.
func FuzzKey(f *testing.F) {
	hex := digest.FromString("x").Encoded()
	volume := "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/sandbox/" + hex
	for _, key := range []string{
		"k8s.io/7/" + volume, volume, "/image-volumes/s/" + hex, "k8s.io/7/extract-1-x sha256:" + hex, "k8s.io/7/extract-1-x " + volume,
		"extract-1-/image-volumes/s/" + hex, UnpackKey("caller", digest.FromString("x")), "k8s.io/7/" + MountKey("/a b/%2f"),
		MountKey(""), MountKey("/a") + "/" + hex, "artifact-mount/%zz/" + hex, "/image-volumes/../" + hex, "k8s.io/7/" + strings.Repeat("/image-volumes/s", 100) + "/" + hex,
	} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		v := parseVolume(key)
		asks := 0
		for _, asked := range []bool{v != nil, unpackKey.MatchString(key), mountKey.MatchString(key)} {
			if asked {
				asks++
			}
		}
		if asks > 1 || asks > 0 && extraction.MatchString(key) {
			t.Errorf("%q asks for %d things; an extraction: %v", key, asks, extraction.MatchString(key))
		}
		if v != nil {
			if len(v.Hex)%32 != 0 || strings.Trim(v.Hex, "0123456789abcdef") != "" || v.Sandbox == "" || strings.Contains(v.Sandbox+v.Namespace, "/") {
				t.Errorf("%q is the volume %+v", key, *v)
			}
		}
		path, ok := ParseMountKey(key)
		if !ok {
			return
		}
		if again, ok := ParseMountKey(MountKey(path)); !ok || again != path {
			t.Errorf("%q is of the path %q, whose key is of %q", key, path, again)
		}
	})
}
