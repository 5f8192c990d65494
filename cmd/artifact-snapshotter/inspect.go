// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "print the layers of an artifact, and what is in its archives",
		ArgsUsage: "REF",
		Description: "A digest is that of a manifest or an index, with or without its algorithm. If no image of the\n" +
			"namespace has it, or containerd does not run, it is looked up in containerd's content store.\n" +
			"Compressed archives are decompressed for the list of their members, which takes time.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter inspect registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter inspect -n k8s.io --output json sha256:2474bb13…",
		Flags: append(clientFlags(), append(rootFlags(),
			&cli.BoolFlag{Name: "layers", Usage: "do not list the members of archives"},
			&cli.BoolFlag{Name: "no-trunc", Usage: fmt.Sprintf("list all members of an archive, and not only %d", maxMembers)},
		)...),
		ArgValidator:  arguments("REF"),
		ShellComplete: completeReference,
		Action:        inspect,
	}
}

// inspected is an artifact with its layers, in JSON.
type inspected struct {
	// Image is null if the artifact was found by its digest and has no image.
	Image    *inspectedImage  `json:"image"`
	Manifest digest.Digest    `json:"manifest"`
	Config   digest.Digest    `json:"config"`
	Type     string           `json:"type"`
	Created  *time.Time       `json:"created"`
	Layers   []inspectedLayer `json:"layers"`
}

type inspectedImage struct {
	Reference string        `json:"reference"`
	Digest    digest.Digest `json:"digest"`
	// Snapshot is empty if the artifact is not unpacked, or if that is unknown.
	Snapshot string `json:"snapshot"`
	// unknown says why Snapshot is unknown.
	unknown error
	// Conflicts are the first references of other artifacts with the same config.
	Conflicts     []string `json:"conflicts"`
	moreConflicts int
}

type inspectedLayer struct {
	Digest      digest.Digest        `json:"digest"`
	Size        int64                `json:"size"`
	MediaType   string               `json:"media_type"`
	Format      artifact.Format      `json:"format"`
	Compression artifact.Compression `json:"compression"`
	DiffID      digest.Digest        `json:"diff_id,omitempty"`
	// File is absent if the layer is an archive or empty.
	File *inspectedFile `json:"file,omitempty"`
	// Members are absent if the layer is no archive, or with --layers.
	Members []inspectedMember `json:"members,omitempty"`
	// Unlisted is why the members of an archive are not known.
	Unlisted string `json:"unlisted,omitempty"`
}

// inspectedMember is a member of an archive as it is in the archive.
type inspectedMember struct {
	inspectedFile
	Type string `json:"type"`
	Size int64  `json:"size"`
	// Link is the target of a symlink or a hard link.
	Link string `json:"link,omitempty"`

	mode fs.FileMode
}

type inspectedFile struct {
	Path    string    `json:"path"`
	Mode    string    `json:"mode"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	ModTime time.Time `json:"mtime"`
}

func inspect(ctx context.Context, command *cli.Command) error {
	json, err := wantsJSON(command)
	if err != nil {
		return err
	}
	image, a, blobs, err := find(ctx, command)
	if err != nil {
		return err
	}
	if blobs.client != nil {
		defer func() { _ = blobs.client.Close() }()
	}
	i := inspectedOf(image, a)
	if created := artifact.AnnotatedTime(ctx, blobs, a.Manifest); i.Created == nil && !created.IsZero() {
		i.Created = &created
	}
	if !command.Bool("layers") {
		if err := listMembers(ctx, command, a, blobs, i.Layers); err != nil {
			return err
		}
	}
	out := command.Root().Writer
	if json {
		return printJSON(out, i)
	}
	if image != nil {
		if err := printImage(out, image); err != nil {
			return err
		}
	}
	shown := maxMembers
	if command.Bool("no-trunc") {
		shown = math.MaxInt
	}
	return printArtifact(out, a, i, shown)
}

// maxMembers of an archive are printed.
const maxMembers = 20

// listMembers lists what is in the archives, as far as they can be read.
func listMembers(ctx context.Context, command *cli.Command, a *artifact.Artifact, blobs nodeBlobs, layers []inspectedLayer) error {
	cfg, err := loadConfig(command)
	if err != nil {
		return err
	}
	budget := unpack.NewBudget(cfg.Limits())
	for n, l := range a.Layers {
		err := unpack.Members(ctx, l, blobs, budget, func(h *tar.Header) error {
			layers[n].Members = append(layers[n].Members, memberOf(h))
			return nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			layers[n].Unlisted = plain.Error(err)
		}
	}
	return nil
}

func memberOf(h *tar.Header) inspectedMember {
	mode := h.FileInfo().Mode()
	m := inspectedMember{
		inspectedFile: inspectedFile{h.Name, fmt.Sprintf("%04o", h.Mode&0o7777), uint32(h.Uid), uint32(h.Gid), h.ModTime.UTC()},
		Link:          h.Linkname,
		mode:          mode,
	}
	switch {
	case h.Typeflag == tar.TypeLink:
		m.Type = "hard link"
	case mode.IsRegular():
		m.Type, m.Size = "file", h.Size
	case mode.IsDir():
		m.Type = "directory"
	case mode&fs.ModeSymlink != 0:
		m.Type = "symlink"
	default:
		m.Type = "other"
	}
	return m
}

// nodeBlobs provides the blobs that are in containerd's content store: its files, if they can
// be read, which is many times as fast, or through the API if client is not nil.
type nodeBlobs struct {
	blobs.Source
	client *client.Client
}

// ReaderAt implements content.Provider.
func (b nodeBlobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := b.Source.ReaderAt(ctx, desc)
	if err == nil || b.client == nil {
		return ra, err
	}
	return b.client.ContentStore().ReaderAt(b.client.Context(ctx), desc)
}

// find returns the artifact of the argument, its image if it has one, and the blobs. The caller
// closes their client.
func find(ctx context.Context, command *cli.Command) (*inspectedImage, *artifact.Artifact, nodeBlobs, error) {
	ref := command.Args().First()
	isDigest := images.IsDigest(ref)
	_, content, err := roots(command)
	if err != nil {
		return nil, nil, nodeBlobs{}, err
	}
	c, err := connect(ctx, command)
	if err != nil && !isDigest {
		return nil, nil, nodeBlobs{}, err
	}
	blobs := nodeBlobs{content, c}
	if err == nil {
		var image *inspectedImage
		var a *artifact.Artifact
		if image, a, err = findImage(ctx, blobs, ref); !isDigest || !errdefs.IsNotFound(err) {
			return image, a, blobs, err
		}
	}
	a, missing := findBlob(ctx, content, ref)
	if errdefs.IsNotFound(missing) && c != nil {
		missing = err // which names the namespace
	}
	return nil, a, blobs, missing
}

func findImage(ctx context.Context, blobs nodeBlobs, ref string) (*inspectedImage, *artifact.Artifact, error) {
	c := blobs.client
	image, err := c.Image(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	conflicts, err := c.Conflicts(ctx)
	if err != nil {
		return nil, nil, err
	}
	i := &inspectedImage{Reference: image.Name, Digest: image.Target.Digest}
	i.Snapshot, i.unknown = c.Unpacked(ctx, image) // the daemon need not run
	if i.unknown == nil && i.Snapshot == "" {
		i.Snapshot, i.unknown = c.Chain(ctx, image)
	}
	i.Conflicts, i.moreConflicts = conflictNames(conflicts, image)
	settle(ctx, image.Artifact, blobs)
	return i, image.Artifact, nil
}

// settle settles the formats of the layers whose blobs are on the node and can be mounted.
func settle(ctx context.Context, a *artifact.Artifact, blobs content.Provider) {
	for i, l := range a.Layers {
		if settled, err := unpack.Settle(ctx, l, blobs); err == nil {
			a.Layers[i] = settled
		}
	}
}

// findBlob returns an artifact without asking containerd.
func findBlob(ctx context.Context, blobs blobs.Source, ref string) (*artifact.Artifact, error) {
	hex, err := images.Complete(ref, blobs)
	if err != nil {
		return nil, err
	}
	target, err := blobs.Find(hex)
	if err != nil {
		return nil, err
	}
	found, err := artifact.Read(ctx, blobs, target)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return nil, fmt.Errorf("%s is a container image, not an artifact", target.Digest)
	}
	if err == nil {
		settle(ctx, found, blobs)
	}
	return found, err
}

func inspectedOf(image *inspectedImage, a *artifact.Artifact) inspected {
	i := inspected{Image: image, Manifest: a.Manifest.Digest, Config: a.Config, Type: a.Type, Layers: []inspectedLayer{}}
	if created := a.Created.UTC(); isKnown(created) {
		i.Created = &created
	}
	for _, l := range a.Layers {
		layer := inspectedLayer{
			Digest:      l.Descriptor.Digest,
			Size:        l.Descriptor.Size,
			MediaType:   l.Descriptor.MediaType,
			Format:      l.Format,
			Compression: l.Compression,
			DiffID:      l.DiffID,
		}
		if f := l.File; f.Path != "" {
			layer.File = &inspectedFile{f.Path, fmt.Sprintf("%04o", f.Mode.Perm()), f.UID, f.GID, f.ModTime.UTC()}
		}
		i.Layers = append(i.Layers, layer)
	}
	return i
}

// isKnown reports whether an artifact names its creation time.
func isKnown(created time.Time) bool { return !created.Equal(time.Unix(0, 0)) }

func printImage(w io.Writer, i *inspectedImage) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s  %s\n", printable(i.Reference), i.Digest)
	switch {
	case i.unknown != nil:
		fmt.Fprintf(&text, "unknown whether it has a committed snapshot: %s\n", oneLine(i.unknown))
	case i.Snapshot == "":
		fmt.Fprintln(&text, "no committed snapshot (pods do not need one)")
	default:
		fmt.Fprintf(&text, "committed snapshot %s\n", printable(i.Snapshot))
	}
	if len(i.Conflicts) > 0 {
		fmt.Fprintf(&text, "has the same config as %s: CRI may mount one for another\n", conflictList(i.Conflicts, i.moreConflicts))
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// printArtifact prints the layers, and at most so many members of each archive.
func printArtifact(w io.Writer, a *artifact.Artifact, i inspected, shown int) error {
	created := "unknown"
	if i.Created != nil {
		created = i.Created.UTC().Format(time.RFC3339)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s  %s  created %s\n", a.Manifest.Digest, printable(a.Type), created)
	fmt.Fprintln(&text, "PATH\tSIZE\tMODE\tOWNER\tLAYER TYPE\tCOMPRESSION")
	for n, layer := range a.Layers {
		path, mode, owner := "(unpacked at the root)", "-", "-"
		switch layer.Format {
		case artifact.FormatEmpty:
			path = "(empty)"
		case artifact.FormatTarOrRaw: // its blob is missing
			path = printable(layer.File.Path) + " (or an archive)"
		case artifact.FormatRaw:
			path = printable(layer.File.Path)
			mode = layer.File.Mode.String()
			owner = fmt.Sprintf("%d:%d", layer.File.UID, layer.File.GID)
		default:
		}
		fmt.Fprintf(&text, "%s\t%s\t%s\t%s\t%s\t%s\n", path, plain.Size(layer.Descriptor.Size),
			mode, owner, printable(layer.Descriptor.MediaType), cmp.Or(string(layer.Compression), "-"))
		printMembers(&text, i.Layers[n], shown)
	}
	return printTable(w, text.String())
}

func printMembers(w *strings.Builder, l inspectedLayer, shown int) {
	for n, m := range l.Members {
		if n == shown {
			fmt.Fprintf(w, "  and %d more (--no-trunc)\t\t\t\t\t\n", len(l.Members)-n)
			break
		}
		path := printable(m.Path)
		if m.Link != "" {
			path += " -> " + printable(m.Link)
		}
		size := "-"
		if m.Type == "file" {
			size = plain.Size(m.Size)
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t%d:%d\t\t\n", path, size, m.mode, m.UID, m.GID)
	}
	if l.Unlisted != "" {
		fmt.Fprintf(w, "  (not listed)\t-\t-\t-\t%s\n", printable(strings.ReplaceAll(l.Unlisted, "\n", "; ")))
	}
}

// printable quotes text that could disturb the table or the terminal: the author of the
// artifact wrote it.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}
