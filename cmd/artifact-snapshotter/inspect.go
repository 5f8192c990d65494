// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
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
		Usage:     "print the layers of an artifact",
		ArgsUsage: "REF",
		Description: "A digest is that of a manifest or an index, with or without its algorithm. If no image of the\n" +
			"namespace has it, or containerd does not run, it is looked up in containerd's content store.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter inspect registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter inspect -n k8s.io --output json sha256:2474bb13…",
		Flags:         append(clientFlags(), rootFlags()...),
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
	image, a, err := find(ctx, command)
	if err != nil {
		return err
	}
	out := command.Root().Writer
	if json {
		return printJSON(out, inspectedOf(image, a))
	}
	if image != nil {
		if err := printImage(out, image); err != nil {
			return err
		}
	}
	return printArtifact(out, a)
}

// find returns the artifact of the argument, and its image if it has one.
func find(ctx context.Context, command *cli.Command) (*inspectedImage, *artifact.Artifact, error) {
	ref := command.Args().First()
	isDigest := images.IsDigest(ref)
	_, content, err := roots(command)
	if err != nil {
		return nil, nil, err
	}
	c, err := connect(ctx, command)
	switch {
	case err == nil:
		defer func() { _ = c.Close() }()
		var image *inspectedImage
		var a *artifact.Artifact
		image, a, err = findImage(ctx, c, ref)
		if !isDigest || !errdefs.IsNotFound(err) {
			return image, a, err
		}
	case !isDigest:
		return nil, nil, err
	}
	a, missing := findBlob(ctx, content, ref)
	if errdefs.IsNotFound(missing) && c != nil {
		return nil, nil, err // which names the namespace
	}
	return nil, a, missing
}

func findImage(ctx context.Context, c *client.Client, ref string) (*inspectedImage, *artifact.Artifact, error) {
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
	settle(c.Context(ctx), image.Artifact, c.ContentStore())
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
		fmt.Fprintf(&text, "unknown whether it is unpacked: %s\n", oneLine(i.unknown))
	case i.Snapshot == "":
		fmt.Fprintln(&text, "not unpacked")
	default:
		fmt.Fprintf(&text, "unpacked as snapshot %s\n", printable(i.Snapshot))
	}
	if len(i.Conflicts) > 0 {
		fmt.Fprintf(&text, "has the same config as %s: CRI may mount one for another\n", conflictList(i.Conflicts, i.moreConflicts))
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func printArtifact(w io.Writer, a *artifact.Artifact) error {
	created := "unknown"
	if isKnown(a.Created) {
		created = a.Created.UTC().Format(time.RFC3339)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s  %s  created %s\n", a.Manifest.Digest, printable(a.Type), created)
	fmt.Fprintln(&text, "PATH\tSIZE\tMODE\tOWNER\tLAYER TYPE\tCOMPRESSION")
	for _, layer := range a.Layers {
		path, mode, owner := "(unpacked at the root)", "-", "-"
		switch layer.Format {
		case artifact.FormatEmpty:
			path = "(empty)"
		case artifact.FormatTarOrRaw: // its blob is missing
			path = printable(layer.File.Path) + " (or unpacked at the root, if it is an archive)"
		case artifact.FormatRaw:
			path = printable(layer.File.Path)
			mode = layer.File.Mode.String()
			owner = fmt.Sprintf("%d:%d", layer.File.UID, layer.File.GID)
		default:
		}
		fmt.Fprintf(&text, "%s\t%s\t%s\t%s\t%s\t%s\n", path, plain.Size(layer.Descriptor.Size),
			mode, owner, printable(layer.Descriptor.MediaType), cmp.Or(string(layer.Compression), "-"))
	}
	return printTable(w, text.String())
}

// printable quotes text that could disturb the table or the terminal: the author of the
// artifact wrote it.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}
