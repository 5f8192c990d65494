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
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/blobdir"
	"github.com/artifact-snapshotter/artifact-snapshotter/plugin"
)

func inspectCommand() *cli.Command {
	return &cli.Command{
		Name:      "inspect",
		Usage:     "print what an artifact in containerd's content store has in it",
		ArgsUsage: "DIGEST",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name:  "content-root",
				Usage: "root of containerd's content store",
				Value: plugin.Default().ContentRoot,
			},
		},
		ArgValidator: func(_ context.Context, command *cli.Command) error {
			if command.Args().Len() != 1 {
				return errors.New("inspect takes one argument: the digest of a manifest or an index")
			}
			return nil
		},
		Action: inspect,
	}
}

func inspect(ctx context.Context, command *cli.Command) error {
	hex := command.Args().First()
	if strings.Contains(hex, ":") {
		parsed, err := digest.Parse(hex)
		if err != nil {
			return fmt.Errorf("%q: %w", hex, err)
		}
		hex = parsed.Encoded()
	}
	blobs := blobdir.Dir(command.String("content-root"))
	target, err := blobs.Find(hex)
	if err != nil {
		return err
	}
	found, err := artifact.Read(ctx, blobs, target)
	if errors.Is(err, artifact.ErrNotArtifact) {
		return fmt.Errorf("%s is an ordinary image, not an artifact", target.Digest)
	}
	if err != nil {
		return err
	}
	return printArtifact(command.Root().Writer, found)
}

func printArtifact(w io.Writer, a *artifact.Artifact) error {
	created := "unknown"
	if !a.Created.Equal(time.Unix(0, 0)) {
		created = a.Created.UTC().Format(time.RFC3339)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s  %s  created %s\n", a.Manifest.Digest, printable(a.Type), created)
	fmt.Fprintln(&text, "PATH\tSIZE\tMODE\tOWNER\tLAYER TYPE\tCOMPRESSION")
	for _, layer := range a.Layers {
		path, mode, owner := "(unpacked at the root)", "-", "-"
		if layer.Format == artifact.FormatRaw {
			path = printable(layer.File.Path)
			mode = layer.File.Mode.String()
			owner = fmt.Sprintf("%d:%d", layer.File.UID, layer.File.GID)
		}
		fmt.Fprintf(&text, "%s\t%s\t%s\t%s\t%s\t%s\n", path, progress.Bytes(layer.Descriptor.Size),
			mode, owner, printable(layer.Descriptor.MediaType), cmp.Or(string(layer.Compression), "-"))
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if _, err := io.WriteString(table, text.String()); err != nil {
		return err
	}
	return table.Flush()
}

// printable quotes what could disturb the table or the terminal: the text is
// that of whoever made the artifact.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return text
}
