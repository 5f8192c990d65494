// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package hostile is a corpus of artifacts that an attacker might publish, or that no
// packer would make. Each has a verdict: the exact content of the volume, or the reason
// for the refusal. It is for tests only.
//
// The verdicts are written by hand from docs/design.md and the specifications of OCI,
// ModelPack, tar (POSIX pax, GNU tar's manual), gzip (RFC 1952), Zstandard (RFC 8878)
// and JSON (RFC 8259), never from the snapshotter's output. Archives and manifests are
// built byte by byte, because no library writes invalid ones.
//
// A [FrontEnd] serves artifacts; [Check] tries a [Case] on it.
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
	// Name is unique and says what is odd: "group/what".
	Name string
	// Make returns the same artifact each time.
	Make func() *Artifact
	// Want is the verdict for every way. If want is set, it is called instead.
	Want Verdict
	want func() Verdict
	// Unlike overrides the verdict for single ways.
	Unlike map[Way]Verdict
	// Long marks cases that take minutes or gigabytes.
	Long bool
	// Ext4 marks verdicts whose files on disk are those of ext4.
	Ext4 bool
}

// For is the verdict of a way.
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
	// Entries is the whole volume by path, if Refused is nil. "." is compared only if it
	// is listed.
	Entries Listing
	// Refused is the kind of the error: one of errdefs, or artifact.ErrNotArtifact for a
	// container image.
	Refused error
	// Says is a text that the error must contain.
	Says []string
}

// Way is how a front end prepares a volume: by one of the store's modes, or without a
// tree.
type Way string

// The ways. With those of [Way.Links] a raw layer has its blob's attributes.
const (
	Index         Way = "overlay+erofs"
	IndexOnLoops  Way = "overlay+erofs-loop"
	IndexBuffered Way = "overlay+erofs-buffered"
	Extracted     Way = "overlay+extract"
	LinkedIndex   Way = "link+erofs"
	Linked        Way = "link+extract"
	Copied        Way = "copy+extract"
	// Layers stay in snapshots that containerd's own unpacker made, mounted as one
	// overlay.
	Layers Way = "layers"
	// Files are extracted by our differ into another snapshotter's snapshots.
	Files Way = "files"
	// NRIOfContainerd and NRIOfCRIO replace these runtimes' image volume mounts with
	// what Index mounts.
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
	// Layers are the descriptors for layer-by-layer unpacking; nil if the oddity is not
	// in the layers.
	Layers []ocispec.Descriptor
}

// FrontEnd mounts artifacts. It finds their blobs where it looks for them.
type FrontEnd interface {
	// Way is how it prepares volumes.
	Way() Way
	// Mount mounts the artifact at a path until done is called.
	Mount(ctx context.Context, a *Artifact) (path string, done func() error, err error)
}

// Skips is a [FrontEnd] that cannot receive some artifacts.
type Skips interface {
	FrontEnd
	// Skip is the reason, or "" if the artifact can be received.
	Skip(c Case, a *Artifact) (why string)
}

// Rules is a [FrontEnd] with its own rule for some artifacts.
type Rules interface {
	FrontEnd
	// Rule is its verdict for an artifact whose verdict elsewhere is v.
	Rule(v Verdict, a *Artifact) Verdict
}

// Check mounts a case's artifact and compares the result with its verdict.
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
		t.Errorf("%s, %s: it is mounted, and must be refused (%v, %q):\n%.1000s", c.Name, way, want.Refused, want.Says, fmt.Sprint(got))
	default:
		if diff := want.Diff(way, got); diff != "" {
			t.Errorf("%s, %s: the volume is not as it must be:\n%s", c.Name, way, diff)
		}
	}
}

// longest limits an error's length in bytes: Kubernetes truncates an event's message at
// 1024 bytes.
const longest = 4096

func (v Verdict) judge(way Way, err error) (problem string) {
	text := err.Error()
	switch {
	case v.Refused == nil:
		return fmt.Sprintf("it is refused, and must be mounted: %.1000v", err)
	case len(text) > longest || strings.ContainsAny(text, "\n\x00\x1b"):
		return fmt.Sprintf("the error is not one short line: %d bytes, %.500q", len(text), text)
	case !is(err, v.Refused):
		return fmt.Sprintf("the error is of another kind than %v: %.1000v", v.Refused, err)
	}
	for _, says := range v.Says {
		switch way {
		case Files: // of layers below it knows but the files
			return ""
		case Layers: // which is the how manieth is not always known
			says = number.ReplaceAllString(says, "")
		default:
		}
		if !strings.Contains(text, says) {
			return fmt.Sprintf("the error does not say %q: %.1000v", says, err)
		}
	}
	return ""
}

var number = regexp.MustCompile(`^layer \d+ `)

// is is errors.Is that also understands errors received by gRPC.
func is(err, kind error) bool {
	switch {
	case kind == artifact.ErrNotArtifact: //nolint:errorlint // it is a verdict, and not wrapped
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

// Cases is the corpus, in order.
func Cases() []Case {
	return slices.Concat(
		pathCases(), unicodeCases(), linkCases(), typeCases(), fieldCases(), paxCases(), gnuCases(), sparseCases(),
		xattrCases(), endCases(), streamCases(), manifestCases(), descriptorCases(), configCases(), metadataCases(),
		mediaTypeCases(), orasCases(), indexCases(), precedenceCases(), bombCases(),
	)
}

// mounts is the verdict that the volume has these entries, and the directories above
// them that no layer describes.
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

// sortCases sorts cases that come from a map.
func sortCases(cases []Case) {
	slices.SortFunc(cases, func(a, b Case) int { return strings.Compare(a.Name, b.Name) })
}

// Diff describes how a volume differs from the verdict.
func (v Verdict) Diff(w Way, got Listing) string { return v.Entries.on(w).diff(got.on(w), w) }
