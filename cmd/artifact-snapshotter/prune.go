// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

func pruneCommand() *cli.Command {
	return &cli.Command{
		Name:  "prune",
		Usage: "delete the artifacts of a namespace that nothing uses",
		Description: "An artifact stays if a pod has it as a volume, if `mount` shows it, also where the mount has\n" +
			"gone with a reboot, if anything else has a view of it, if it is the image of a container, or if\n" +
			"one of its names is pinned. Of the others all names are deleted, and with them the bytes.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter prune -n k8s.io --dry-run\n" +
			"  artifact-snapshotter prune -n k8s.io",
		Flags: append(clientFlags(),
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be deleted"},
		),
		ArgValidator: arguments(),
		Action:       prune,
	}
}

// prunedArtifact and prunedAll are what prune deletes, in JSON.
type prunedArtifact struct {
	References []string      `json:"references"`
	Manifest   digest.Digest `json:"manifest"`
	Size       int64         `json:"size"`
}

type prunedAll struct {
	DryRun    bool             `json:"dry_run"`
	Artifacts []prunedArtifact `json:"artifacts"`
	// Freed is what has gone from the namespace, 0 with --dry-run.
	Freed int64 `json:"freed"`
}

func prune(ctx context.Context, command *cli.Command) error {
	json, err := wantsJSON(command)
	if err != nil {
		return err
	}
	c, err := connect(ctx, command)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	unused, err := c.Unused(ctx)
	if err != nil {
		return err
	}
	all := prunedAll{DryRun: command.Bool("dry-run"), Artifacts: []prunedArtifact{}}
	for _, u := range unused {
		p := prunedArtifact{[]string{}, u.Artifact.Manifest.Digest, client.Size(u.Artifact)}
		for _, image := range images.Named(u.Images) {
			p.References = append(p.References, image.Name)
		}
		all.Artifacts = append(all.Artifacts, p)
	}
	var kept int64
	if !all.DryRun {
		if all.Freed, kept, err = c.Remove(ctx, unused); err != nil {
			return err
		}
	}
	if json {
		return printJSON(command.Root().Writer, all)
	}
	var text strings.Builder
	fmt.Fprintln(&text, "REFERENCE\tDIGEST\tSIZE")
	for _, p := range all.Artifacts {
		fmt.Fprintf(&text, "%s\t%s\t%s\n", printableList(p.References), short(p.Manifest), progress.Bytes(p.Size))
	}
	if err := printTable(command.Root().Writer, text.String()); err != nil {
		return err
	}
	hint := fmt.Sprintf("%s freed", progress.Bytes(all.Freed))
	switch {
	case kept > 0:
		hint += fmt.Sprintf("; other images still need %s, or a lease keeps it, as one does for 24 hours after a pull that was killed", progress.Bytes(kept))
	case all.DryRun:
		hint = "nothing was deleted: that was a dry run"
	}
	_, err = fmt.Fprintln(command.Root().ErrWriter, hint)
	return err
}
