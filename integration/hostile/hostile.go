// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package hostile is a corpus of artifacts that somebody might publish to do harm,
// or that no packer would make, each with the verdict that it must get: what the
// volume shows, to the last attribute, or why there is none. It is for tests only.
//
// The verdicts are written by hand, from docs/design.md and the specifications of
// OCI, ModelPack, tar (POSIX pax, GNU tar's manual), gzip (RFC 1952), Zstandard (RFC
// 8878) and JSON (RFC 8259), and not taken from what the snapshotter does. Archives and manifests
// are put together byte by byte, since no library writes what must be refused.
//
// Whoever serves artifacts is a [FrontEnd], at which [Check] knocks with a [Case].
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
	// Name says what is odd about it, and is its only name: "group/what".
	Name string
	// Make makes it. It is the same each time.
	Make func() *Artifact
	// Want is the verdict of every way, unless want says it, when it is asked for.
	Want Verdict
	want func() Verdict
	// Unlike are verdicts of single ways that cannot give the one of all.
	Unlike map[Way]Verdict
	// Long is of what takes minutes or gigabytes.
	Long bool
	// Ext4 tells that what becomes a file has the verdict of an ext4.
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

// Verdict is what is to become of an artifact.
type Verdict struct {
	// Shows is all that is in the volume, by its path, if Refused is nil. "." is
	// compared if it is there.
	Shows Listing
	// Refused is the kind of the error: of errdefs, or artifact.ErrNotArtifact of what
	// is a container image.
	Refused error
	// Says is what must stand in the error.
	Says []string
}

// Way is how a front end lays out what it shows: the modes of the ladder, or without a
// Tree.
type Way string

// The ways. On those of [Way.Links] a raw layer has its blob's attributes.
const (
	Index         Way = "overlay+erofs"
	IndexOnLoops  Way = "overlay+erofs-loop"
	IndexBuffered Way = "overlay+erofs-buffered"
	Extracted     Way = "overlay+extract"
	LinkedIndex   Way = "link+erofs"
	Linked        Way = "link+extract"
	Copied        Way = "copy+extract"
	// Layers are kept in snapshots by containerd's own unpacker, and shown as one.
	Layers Way = "layers"
	// Files are made by the same in the snapshots of another snapshotter.
	Files Way = "files"
	// NRIOfContainerd and NRIOfCRIO put what Index shows in the place of the mounts that
	// these runtimes make of an image volume.
	NRIOfContainerd Way = "nri-containerd"
	NRIOfCRIO       Way = "nri-cri-o"
)

// Links tells that raw layers are hard links to their blobs.
func (w Way) Links() bool { return w == Linked || w == LinkedIndex || w == Files }

// Extracts tells that members of tars become files of the disk's file system.
func (w Way) Extracts() bool { return w == Extracted || w == Linked || w == Copied || w == Files }

// Artifact is blobs, of which one is the manifest or index.
type Artifact struct {
	// Blobs are those that there are. Their names need not be their digests.
	Blobs map[digest.Digest][]byte
	// Target is the manifest or the index, MediaType what a registry is told of it.
	Target    digest.Digest
	MediaType string
	// Layers are the descriptors for who unpacks one at a time; nil if what is odd is
	// not in the layers.
	Layers []ocispec.Descriptor
}

// FrontEnd is somebody who shows artifacts. The blobs of the artifact are where it looks
// for them.
type FrontEnd interface {
	// Way is how it shows them.
	Way() Way
	// Show mounts the artifact at a path, until done is called.
	Show(ctx context.Context, a *Artifact) (path string, done func() error, err error)
}

// Skips is a [FrontEnd] that some artifacts cannot get to.
type Skips interface {
	FrontEnd
	// Skip says why the artifact cannot; "" if it can.
	Skip(c Case, a *Artifact) (why string)
}

// Rules is a [FrontEnd] with a rule of its own for some artifacts.
type Rules interface {
	FrontEnd
	// Rule is the verdict there of an artifact that has the verdict v elsewhere.
	Rule(v Verdict, a *Artifact) Verdict
}

// Check mounts the artifact of a case at a front end that it can get to, and compares with its
// verdict.
func Check(ctx context.Context, t testing.TB, frontEnd FrontEnd, c Case, a *Artifact) {
	t.Helper()
	way := frontEnd.Way()
	want := c.For(way)
	if r, ok := frontEnd.(Rules); ok {
		want = r.Rule(want, a)
	}
	path, done, err := frontEnd.Show(ctx, a)
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

// longest is how long an error may be: it becomes an event of Kubernetes, whose
// message is cut off at 1024 bytes, and a line of the log.
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

// is is errors.Is, for errors that have come by gRPC too.
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

// shows is the verdict that the volume has these entries and the directories above
// them, which no layer describes.
func shows(l Listing) Verdict {
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
	return Verdict{Shows: all}
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

// sortCases gives cases that were made from a map an order.
func sortCases(cases []Case) {
	slices.SortFunc(cases, func(a, b Case) int { return strings.Compare(a.Name, b.Name) })
}

// Diff says how a volume that is mounted on a way differs from what it must be.
func (v Verdict) Diff(w Way, got Listing) string { return v.Shows.on(w).diff(got.on(w), w) }
