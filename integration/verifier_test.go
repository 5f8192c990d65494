// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// verifiers returns a directory for image verifiers, and containerd's configuration for it
// with a time-out for each verifier. The directory does not exist yet, so that every pull
// is allowed, including that of the test image.
func verifiers(t *testing.T, timeout string) (dir, config string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "bin")
	config = recipe(t, "verifiers", "version = 3\n", "", "/opt/containerd/image-verifier/bin", dir, "10s", timeout)
	return dir, config
}

// addVerifier writes a program into a directory, which it creates.
func addVerifier(t *testing.T, dir, name, text string) {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	draft := filepath.Join(filepath.Dir(dir), name) // containerd runs everything in dir
	check(t, os.WriteFile(draft, []byte(text), 0o755))
	check(t, os.Rename(draft, filepath.Join(dir, name)))
}

// keys are the keys of a signer.
type keys struct{ private *ecdsa.PrivateKey }

func newKeys(t *testing.T) keys {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return keys{private}
}

// public returns the public key in PEM.
func (k keys) public(t *testing.T) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&k.private.PublicKey)
	check(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// sign pushes a signature for the artifact target into the repository, like cosign. about
// is the digest in the signature; it differs from target in an attack.
func (k keys) sign(t *testing.T, n *node.Node, repository string, target, about digest.Digest) {
	t.Helper()
	payload, err := json.Marshal(map[string]any{"critical": map[string]any{
		"identity": map[string]string{"docker-reference": n.Registry + "/" + repository},
		"image":    map[string]string{"docker-manifest-digest": about.String()},
		"type":     "cosign container image signature",
	}})
	check(t, err)
	sum := sha256.Sum256(payload)
	signature, err := ecdsa.SignASN1(rand.Reader, k.private, sum[:])
	check(t, err)
	signed := pack.Artifact{ConfigType: ocispec.MediaTypeImageConfig, Config: []byte("{}"), Layers: []pack.Layer{{
		MediaType:   "application/vnd.dev.cosign.simplesigning.v1+json",
		Data:        payload,
		Annotations: map[string]string{"dev.cosignproject.cosign/signature": base64.StdEncoding.EncodeToString(signature)},
	}}}
	_, err = signed.Push(t.Context(), n.Registry, repository, strings.ReplaceAll(target.String(), ":", "-")+".sig")
	check(t, err)
}

// pushText pushes a model of one file with this text, and returns the expected volume.
func pushText(t *testing.T, n *node.Node, repository, text string) (ref string, manifest digest.Digest, expected []treelist.Entry) {
	t.Helper()
	layer := pack.Layer{MediaType: modelspec.MediaTypeModelWeightRaw, Data: []byte(text), Annotations: map[string]string{modelspec.AnnotationFilepath: "text"}}
	model := pack.Artifact{ArtifactType: modelspec.ArtifactTypeModelManifest, Layers: []pack.Layer{layer}}
	manifest, err := model.Push(t.Context(), n.Registry, repository, "latest")
	check(t, err)
	return n.Registry + "/" + repository + ":latest", manifest, []treelist.Entry{fileEntry("text", []byte(text))}
}

// wantBlocked checks that a pull is refused with all wanted texts, and that no pod gets the
// artifact.
func wantBlocked(t *testing.T, n *node.Node, ref string, wanted ...string) {
	t.Helper()
	_, err := n.Pull(ref)
	if err == nil {
		t.Fatalf("%s was pulled", ref)
	}
	t.Log(err)
	for _, want := range wanted {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the pull of %s ended with %v, want an error with %q", ref, err, want)
		}
	}
	if pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}); err == nil {
		t.Errorf("a pod started with %s", ref)
		check(t, pod.Remove())
	}
}

func TestVerifierChecksSignatures(t *testing.T) {
	t.Parallel()
	dir, config := verifiers(t, "2m")
	// Options of the transfer service do not disable verifiers.
	config += "[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_downloads = 5\n"
	n := node.ForTest(t, node.Options{ContainerdConfig: config})
	program := filepath.Join(t.TempDir(), "verifier")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./verifier").CombinedOutput()
	if err != nil {
		t.Fatalf("go build ./verifier: %v\n%s", err, out)
	}
	ours, others := newKeys(t), newKeys(t)
	key := filepath.Join(t.TempDir(), "key.pem")
	check(t, os.WriteFile(key, ours.public(t), 0o600))
	addVerifier(t, dir, "signature", "#!/bin/sh\nexec '"+program+"' -key '"+key+"' \"$@\"\n")

	signed, manifest, expected := pushText(t, n, "models/signed", "signed")
	ours.sign(t, n, "models/signed", manifest, manifest)
	_, err = n.Pull(signed)
	check(t, err)
	wantServed(t, n, signed, expected)

	unsigned, _, shownUnsigned := pushText(t, n, "models/unsigned", "unsigned")
	wantBlocked(t, n, unsigned, "image verifier bindir blocked pull of "+unsigned, "verifier signature rejected image (exit code 1)", "no signature")
	foreign, manifest, _ := pushText(t, n, "models/foreign", "foreign")
	others.sign(t, n, "models/foreign", manifest, manifest)
	wantBlocked(t, n, foreign, "no signature was made with the key")
	// A valid signature of another artifact.
	exchanged, target, _ := pushText(t, n, "models/exchanged", "exchanged")
	ours.sign(t, n, "models/exchanged", target, manifest)
	wantBlocked(t, n, exchanged, "no signature was made with the key")

	// The tag moves to an artifact without a signature: the pull is refused, and the old
	// artifact stays.
	pushText(t, n, "models/signed", "moved")
	if _, err := n.Pull(signed); err == nil || !strings.Contains(err.Error(), "no signature") {
		t.Errorf("the pull of the moved tag: %v", err)
	}
	wantServed(t, n, signed, expected)

	// `pull` uses the transfer service too.
	if _, _, err := n.Artifact("pull", "--plain-http", unsigned); err == nil || !strings.Contains(err.Error(), "no signature") {
		t.Errorf("pull accepted an artifact without a signature: %v", err)
	}

	t.Run("what is not covered", func(t *testing.T) { testNotVerified(t, n, dir, unsigned, shownUnsigned) })
}

// The limits of verifiers in docs/kubernetes.md.
func testNotVerified(t *testing.T, n *node.Node, dir, unsigned string, expected []treelist.Entry) {
	// An import.
	_, err := n.Ctr("images", "pull", "--plain-http", "--local", unsigned)
	check(t, err)
	archive := filepath.Join(t.TempDir(), "model.tar")
	_, err = n.Ctr("images", "export", archive, unsigned)
	check(t, err)
	removeByNameAndWait(t, n, unsigned)
	_, err = n.Ctr("images", "import", archive)
	check(t, err)
	wantEventuallyServed(t, n, unsigned, expected)
	removeByNameAndWait(t, n, unsigned)

	// Pulls for which containerd does not use its transfer service.
	check(t, os.WriteFile(filepath.Join(n.Dir, "containerd.d", "30-local.toml"),
		[]byte("version = 3\n[plugins.'io.containerd.cri.v1.images']\n  max_concurrent_downloads = 5\n"), 0o600))
	check(t, n.RestartContainerd())
	_, err = n.Pull(unsigned)
	check(t, err)
	wantServed(t, n, unsigned, expected)
	log, err := os.ReadFile(filepath.Join(n.Dir, "logs", "containerd"))
	check(t, err)
	if !strings.Contains(string(log), "Falling back to local image pull mode") {
		t.Error("containerd's log has no message about the local pull mode")
	}
	check(t, os.Remove(filepath.Join(n.Dir, "containerd.d", "30-local.toml")))
	check(t, n.RestartContainerd())

	// Without the directory no verifier runs.
	removeByNameAndWait(t, n, unsigned)
	wantBlocked(t, n, unsigned, "no signature")
	check(t, os.Rename(dir, dir+"-away"))
	_, err = n.Pull(unsigned)
	check(t, err)
}

// removeByNameAndWait deletes all names of an image that CRI knows.
func removeByNameAndWait(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	waitFor(t, "CRI to know "+ref, func() bool {
		_, err := n.Crictl("rmi", ref)
		return err == nil
	})
}

func TestVerifierAllowsDigests(t *testing.T) {
	t.Parallel()
	dir, config := verifiers(t, "10s")
	n := node.ForTest(t, node.Options{ContainerdConfig: config})
	list := filepath.Join(t.TempDir(), "allowed-digests")
	check(t, os.WriteFile(list, nil, 0o600))
	addVerifier(t, dir, "allowed-digests", recipe(t, "allowed digests", "/etc/containerd/allowed-digests", list))

	ref, manifest, expected := pushText(t, n, "models/listed", "listed")
	wantBlocked(t, n, ref, "verifier allowed-digests rejected image (exit code 1): "+manifest.String()+" is not in "+list)
	check(t, os.WriteFile(list, []byte(manifest.String()+"\n"), 0o600))
	_, err := n.Pull(ref) // without a restart of containerd
	check(t, err)
	wantServed(t, n, ref, expected)

	// If a verifier cannot run or does not end, containerd blocks the pull.
	other, _, _ := pushText(t, n, "models/other", "other")
	addVerifier(t, dir, "allowed-digests", "#!/bin/sh\nexec sleep 60\n")
	wantBlocked(t, n, other, "image verifier bindir returned error", "failed to call verifier allowed-digests")
	check(t, os.Chmod(filepath.Join(dir, "allowed-digests"), 0o644))
	wantBlocked(t, n, other, "failed to call verifier allowed-digests", "permission denied")
}
