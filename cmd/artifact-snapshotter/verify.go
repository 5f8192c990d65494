// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

func verifyCommand() *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "read all blobs of an artifact and compare them with their digests",
		ArgsUsage: "REF",
		Description: "Compressed layers are decompressed, too, and compared with the DiffIDs of the config. Pods read\n" +
			"the same files, except for layers that the daemon has decompressed. The exit code is 1 if\n" +
			"anything differs.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter verify registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter verify -n k8s.io --output json sha256:2474bb13…",
		Flags:         clientFlags(),
		ArgValidator:  arguments("REF"),
		ShellComplete: completeReference,
		Action:        clientAction(verify),
	}
}

// verified is the result of verify in JSON.
type verified struct {
	Reference string         `json:"reference"`
	OK        bool           `json:"ok"`
	Blobs     []verifiedBlob `json:"blobs"`
}

type verifiedBlob struct {
	Kind   string        `json:"kind"`
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	// Path is that from which the layer was packed, if known, and Paths are those of all
	// layers with this blob.
	Path   string        `json:"path,omitempty"`
	Paths  []string      `json:"paths,omitempty"`
	DiffID digest.Digest `json:"diff_id,omitempty"`
	// Problem says how the blob differs; absent if it does not.
	Problem string `json:"problem,omitempty"`
}

// status is a line on a terminal about the blob that is being read.
type status struct {
	w     io.Writer // nil without a terminal
	drawn time.Time
	shown bool
}

func (s *status) blob(k client.Checked, read int64) {
	if s.w == nil || time.Since(s.drawn) < redraw {
		return
	}
	s.drawn, s.shown = time.Now(), true
	_, _ = fmt.Fprintf(s.w, "\r\x1b[K%-8s  %s  %s of %s", k.Kind, short(k.Descriptor.Digest), plain.Size(read), plain.Size(k.Descriptor.Size))
}

func (s *status) clear() {
	if s.shown {
		_, _ = io.WriteString(s.w, "\r\x1b[K")
	}
	s.shown = false
}

func verify(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	cfg, err := loadConfig(command)
	if err != nil {
		return err
	}
	// It may take hours, so it prints line by line, in columns of fixed widths.
	const line = "%-8s  %-12s  %10s  %-6s  %s"
	out := command.Root().Writer
	v := verified{Reference: command.Args().First(), Blobs: []verifiedBlob{}}
	bad, advice := 0, map[string]bool{}
	printLine := func(columns ...any) {
		if !asJSON {
			_, _ = fmt.Fprintln(out, strings.TrimRight(fmt.Sprintf(line, columns...), " "))
		}
	}
	reading := &status{}
	if isTerminal() {
		reading.w = command.Root().ErrWriter
	}
	report := func(k client.Checked) {
		b := verifiedBlob{Kind: k.Kind, Digest: k.Descriptor.Digest, Size: k.Descriptor.Size, Path: packedAs(k.Layer), DiffID: k.DiffID}
		for _, l := range k.Layers {
			if path := packedAs(l); path != "" {
				b.Paths = append(b.Paths, path)
			}
		}
		result := "ok"
		if k.Err != nil {
			bad++
			missing := ocispec.Descriptor{} // a bad blob is not missing
			if errdefs.IsNotFound(k.Err) {
				missing = k.Descriptor
			}
			advice[artifact.Refetch(missing)] = true
			b.Problem = k.Err.Error()
			result = "BAD: " + printable(b.Problem)
		}
		reading.clear()
		if len(v.Blobs) == 0 {
			printLine("BLOB", "DIGEST", "SIZE", "RESULT", "PATH")
		}
		v.Blobs = append(v.Blobs, b)
		printLine(b.Kind, short(b.Digest), plain.Size(b.Size), result, printableList(b.Paths))
	}
	if err := c.Verify(ctx, v.Reference, cfg.Limits(), reading.blob, report); err != nil {
		reading.clear()
		return err
	}
	v.OK = bad == 0
	if asJSON {
		if err := printJSON(out, v); err != nil {
			return err
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d blobs of %q are missing or corrupt; %s", bad, len(v.Blobs), v.Reference, strings.Join(slices.Sorted(maps.Keys(advice)), "; "))
	}
	return nil
}
