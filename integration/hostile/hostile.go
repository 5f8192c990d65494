// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package hostile is a corpus of artifacts that an attacker might publish, or that no
// packer would make. Each has a verdict: the exact content of the volume, or the reason for
// the refusal. It is for tests only.
//
// The verdicts are written by hand from docs/design.md and the specifications of OCI,
// ModelPack, tar (POSIX pax, GNU tar's manual), gzip (RFC 1952), Zstandard (RFC 8878) and
// JSON (RFC 8259), never from the snapshotter's output. Archives and manifests are built
// byte by byte, because no library writes invalid ones.
//
// A [FrontEnd] mounts artifacts; [Check] tries a [Case] with it.
package hostile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// Case is one artifact and its verdict.
type Case struct {
	// Name is unique and describes the oddity: "group/oddity".
	Name string
	// Make returns the same artifact each time.
	Make func() *Artifact
	// Want is the verdict for every way. If want is set, its result is used instead.
	Want Verdict
	want func() Verdict
	// Unlike overrides the verdict for single ways.
	Unlike map[Way]Verdict
	// Long marks cases that take minutes or gigabytes.
	Long bool
	// Ext4 marks verdicts that are valid only if files are on ext4.
	Ext4 bool
}

// For returns the verdict for a way.
func (c Case) For(w Way) Verdict {
	if v, ok := c.Unlike[w]; ok {
		return v
	}
	if c.want != nil {
		return c.want()
	}
	return c.Want
}

// Verdict is the expected outcome for an artifact.
type Verdict struct {
	// Entries is the whole volume by path, if Refused is nil. "." is compared only if it is
	// listed.
	Entries Listing
	// Refused is the kind of the error: one of errdefs, or artifact.ErrNotArtifact for a
	// container image.
	Refused error
	// Says are texts that the error must contain.
	Says []string
}

// Way is how a front end prepares a volume: with one of the store's modes, or without a
// tree.
type Way string

// The ways. With those of [Way.Links] a raw layer has the attributes of its blob.
const (
	Index         Way = "overlay+erofs"
	IndexOnLoops  Way = "overlay+erofs-loop"
	IndexBuffered Way = "overlay+erofs-buffered"
	Extracted     Way = "overlay+extract"
	LinkedIndex   Way = "link+erofs"
	Linked        Way = "link+extract"
	Copied        Way = "copy+extract"
	// Layers are snapshots made by containerd's own unpacker and mounted as one overlay.
	Layers Way = "layers"
	// Files are extracted by our differ into snapshots of another snapshotter.
	Files Way = "files"
	// NRIOfContainerd and NRIOfCRIO replace the image volume mounts of these runtimes by
	// the mounts of Index.
	NRIOfContainerd Way = "nri-containerd"
	NRIOfCRIO       Way = "nri-cri-o"
)

// Links reports whether raw layers are hard links to their blobs.
func (w Way) Links() bool { return w == Linked || w == LinkedIndex || w == Files }

// Extracts reports whether tar members become files on disk.
func (w Way) Extracts() bool { return w == Extracted || w == Linked || w == Copied || w == Files }

// Artifact is a set of blobs, one of them the manifest or index.
type Artifact struct {
	// Blobs are the blobs that exist. A name need not match its digest.
	Blobs map[digest.Digest][]byte
	// Target is the manifest or index, MediaType its type as pushed to a registry.
	Target    digest.Digest
	MediaType string
	// Layers are the descriptors for unpacking layer by layer; nil if the oddity is not in
	// the layers.
	Layers []ocispec.Descriptor
}

// FrontEnd mounts artifacts whose blobs are in the store that it reads.
type FrontEnd interface {
	// Way returns how it prepares volumes.
	Way() Way
	// Mount mounts the artifact at path. done unmounts it.
	Mount(ctx context.Context, a *Artifact) (path string, done func() error, err error)
}

// Skips is a [FrontEnd] that cannot receive some artifacts.
type Skips interface {
	FrontEnd
	// Skip returns the reason, or "" if the artifact can be received.
	Skip(c Case, a *Artifact) (why string)
}

// Rules is a [FrontEnd] with additional rules.
type Rules interface {
	FrontEnd
	// Rule returns its verdict for an artifact whose general verdict is v.
	Rule(v Verdict, a *Artifact) Verdict
}

// Check mounts the artifact of a case and compares the result with the verdict.
func Check(ctx context.Context, t testing.TB, frontEnd FrontEnd, c Case, a *Artifact) {
	t.Helper()
	way := frontEnd.Way()
	want := c.For(way)
	if r, ok := frontEnd.(Rules); ok {
		want = r.Rule(want, a)
	}
	path, done, err := frontEnd.Mount(ctx, a)
	if err != nil {
		if problem := want.judge(way, err); problem != "" {
			t.Errorf("%s, %s: %s", c.Name, way, problem)
		}
		return
	}
	defer func() {
		if err := done(); err != nil {
			t.Errorf("%s, %s: %v", c.Name, way, err)
		}
	}()
	got, err := List(path)
	switch {
	case err != nil:
		t.Errorf("%s, %s: cannot be listed: %v", c.Name, way, err)
	case want.Refused != nil:
		t.Errorf("%s, %s: it was mounted, want a refusal (%v, %q):\n%.1000s", c.Name, way, want.Refused, want.Says, fmt.Sprint(got))
	default:
		if diff := want.Diff(way, got); diff != "" {
			t.Errorf("%s, %s: the volume differs:\n%s", c.Name, way, diff)
		}
	}
}

// longest limits the length of an error in bytes. Kubernetes truncates the message of an
// event at 1024 bytes, so the beginning of a longer error must be enough.
const longest = 4096

func (v Verdict) judge(way Way, err error) (problem string) {
	text := err.Error()
	switch {
	case v.Refused == nil:
		return fmt.Sprintf("it was refused, want it mounted: %.1000v", err)
	case len(text) > longest || strings.ContainsAny(text, "\n\x00\x1b"):
		return fmt.Sprintf("the error is not one short line: %d bytes, %.500q", len(text), text)
	case !is(err, v.Refused):
		return fmt.Sprintf("the error is not of the kind %v: %.1000v", v.Refused, err)
	}
	for _, says := range v.Says {
		switch way {
		case Files: // the differ knows only the files of the layers below
			return ""
		case Layers: // the number of the layer is not always known
			says = number.ReplaceAllString(says, "")
		default:
		}
		if !strings.Contains(text, says) {
			return fmt.Sprintf("the error does not contain %q: %.1000v", says, err)
		}
	}
	return ""
}

var number = regexp.MustCompile(`^layer \d+ `)

// is is errors.Is, but also understands errors that gRPC transported.
func is(err, kind error) bool {
	switch {
	case kind == artifact.ErrNotArtifact: //nolint:errorlint // kind is a verdict and never wrapped
		return strings.Contains(err.Error(), "is a container image") || strings.Contains(err.Error(), artifact.ErrNotArtifact.Error())
	case errdefs.IsInvalidArgument(kind):
		return errdefs.IsInvalidArgument(err)
	case errdefs.IsNotFound(kind):
		return errdefs.IsNotFound(err)
	case errdefs.IsFailedPrecondition(kind):
		return errdefs.IsFailedPrecondition(err)
	case errdefs.IsDataLoss(kind):
		return errdefs.IsDataLoss(err)
	case errdefs.IsResourceExhausted(kind):
		return errdefs.IsResourceExhausted(err)
	case errdefs.IsNotImplemented(kind):
		return errdefs.IsNotImplemented(err)
	}
	return false
}

// Cases returns the corpus, in a fixed order.
func Cases() []Case {
	return slices.Concat(
		pathCases(), unicodeCases(), linkCases(), typeCases(), fieldCases(), paxCases(), gnuCases(), sparseCases(),
		xattrCases(), endCases(), streamCases(), manifestCases(), descriptorCases(), configCases(), metadataCases(),
		mediaTypeCases(), orasCases(), indexCases(), precedenceCases(), bombCases(),
	)
}

// mounts returns the verdict that the volume has these entries, and parent directories that
// no layer describes.
func mounts(l Listing) Verdict {
	all := maps.Clone(l)
	if all == nil {
		all = Listing{}
	}
	for name := range l {
		for at := strings.LastIndexByte(name, '/'); at > 0; at = strings.LastIndexByte(name[:at], '/') {
			if _, ok := all[name[:at]]; !ok {
				all[name[:at]] = Entry{Type: Directory, Mode: 0o755}
			}
		}
	}
	return Verdict{Entries: all}
}

func refused(says ...string) Verdict {
	return Verdict{Refused: errdefs.ErrInvalidArgument, Says: says}
}

func ordinary() Verdict { return Verdict{Refused: artifact.ErrNotArtifact} }

func sum(content string) string {
	h := sha256.Sum256([]byte(content))
	return hex.EncodeToString(h[:])
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// sortCases sorts cases that were made from a map.
func sortCases(cases []Case) {
	slices.SortFunc(cases, func(a, b Case) int { return strings.Compare(a.Name, b.Name) })
}

// Diff describes the differences between a volume and the verdict.
func (v Verdict) Diff(w Way, got Listing) string { return v.Entries.on(w).diff(got.on(w), w) }
