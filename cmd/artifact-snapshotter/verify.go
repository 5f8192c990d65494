// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

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
	// Path is that from which the layer was packed, if known.
	Path   string        `json:"path,omitempty"`
	DiffID digest.Digest `json:"diff_id,omitempty"`
	// Problem says how the blob differs; absent if it does not.
	Problem string `json:"problem,omitempty"`
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
	report := func(k client.Checked) {
		b := verifiedBlob{k.Kind, k.Descriptor.Digest, k.Descriptor.Size, packedAs(k.Layer), k.DiffID, ""}
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
		if len(v.Blobs) == 0 {
			printLine("BLOB", "DIGEST", "SIZE", "RESULT", "PATH")
		}
		v.Blobs = append(v.Blobs, b)
		printLine(b.Kind, short(b.Digest), plain.Size(b.Size), result, printable(b.Path))
	}
	if err := c.Verify(ctx, v.Reference, cfg.Limits(), report); err != nil {
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
