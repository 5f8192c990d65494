// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/console"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

func pruneCommand() *cli.Command {
	return &cli.Command{
		Name:  "prune",
		Usage: "delete the artifacts of a namespace that nothing uses",
		Description: "An artifact is in use if a pod has it as a volume, if `mount` has mounted it (even if a reboot\n" +
			"has undone the mount), if anything else has a View snapshot of it, if it is the image of a\n" +
			"container, or if one of its names is pinned. All names of the others are deleted.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter prune -n k8s.io --dry-run\n" +
			"  artifact-snapshotter prune -n k8s.io --force --filter until=24h\n" +
			"  artifact-snapshotter prune -n k8s.io --filter 'reference=registry.example.com/models/*'",
		Flags: append(clientFlags(),
			&cli.BoolFlag{Name: "dry-run", Usage: "only print what would be deleted"},
			forceFlag("do not ask"),
			&cli.StringSliceFlag{Name: "filter", Usage: "delete only what was pulled before (until=24h, until=TIME), has a label (label=KEY[=VALUE]) or a name (reference=PATTERN); several must all hold"},
		),
		ArgValidator: arguments(),
		Action: func(ctx context.Context, command *cli.Command) error {
			filter, err := client.ParseFilters(command.StringSlice("filter"), time.Now())
			if err != nil {
				return err
			}
			return clientAction(func(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
				return prune(ctx, command, c, filter, asJSON)
			})(ctx, command)
		},
	}
}

func rmCommand() *cli.Command {
	return &cli.Command{
		Name:      "rm",
		Usage:     "delete artifacts",
		ArgsUsage: "REF [REF...]",
		Description: "An artifact that has other names loses only this one, unless REF is a digest. One that is in use\n" +
			"or pinned is refused, see `prune`. With --force it loses its names, and stays as long as it is used.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter rm registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter rm -n k8s.io 2474bb13",
		Flags:         append(clientFlags(), forceFlag("also if it is in use or pinned")),
		ArgValidator:  atLeastOneRef,
		ShellComplete: completeReference,
		Action:        clientAction(rm),
	}
}

func forceFlag(usage string) cli.Flag {
	return &cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: usage}
}

// prunedArtifact is an artifact that prune deletes, in JSON, and prunedAll are all of them.
type prunedArtifact struct {
	References []string      `json:"references"`
	Manifest   digest.Digest `json:"manifest"`
	Size       int64         `json:"size"`
}

type prunedAll struct {
	DryRun    bool             `json:"dry_run"`
	Artifacts []prunedArtifact `json:"artifacts"`
	// Size is that of all artifacts, each blob once.
	Size int64 `json:"size"`
	// Freed is the size of the blobs that have left the namespace; 0 with --dry-run.
	Freed int64 `json:"freed"`
}

func prune(ctx context.Context, command *cli.Command, c *client.Client, filter client.Filter, asJSON bool) error {
	unused, err := c.Unused(ctx, filter)
	if err != nil {
		return err
	}
	if len(unused) > 0 && !command.Bool("dry-run") && !command.Bool("force") {
		if err := confirm(ctx, command, unused, asJSON); err != nil {
			return err
		}
	}
	return remove(ctx, command, c, unused, command.Bool("dry-run"), asJSON)
}

func rm(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	var all []client.Unused
	for _, ref := range command.Args().Slice() {
		names, err := c.Names(ctx, ref, command.Bool("force"))
		if err != nil {
			return err
		}
		all = append(all, names)
	}
	return remove(ctx, command, c, all, false, asJSON)
}

// confirm asks on the terminal whether to delete the artifacts.
func confirm(ctx context.Context, command *cli.Command, unused []client.Unused, asJSON bool) error {
	if _, err := console.ConsoleFromFile(os.Stdin); err != nil || asJSON {
		return fmt.Errorf("prune would delete %s: use --force, or --dry-run to see them", counted(unused))
	}
	for _, u := range unused {
		_, _ = fmt.Fprintln(command.Root().ErrWriter, printableList(namesOf(u)))
	}
	_, _ = fmt.Fprintf(command.Root().ErrWriter, "Delete %s? [y/N] ", counted(unused))
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		answer <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case line := <-answer:
		if line == "y" || line == "yes" {
			return nil
		}
		return errors.New("nothing was deleted")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// counted is the number and the size of artifacts.
func counted(unused []client.Unused) string {
	noun := "artifacts"
	if len(unused) == 1 {
		noun = "artifact"
	}
	return fmt.Sprintf("%d %s (%s)", len(unused), noun, plain.Size(client.TotalSize(unused)))
}

// namesOf are the names of an artifact that are meant for people.
func namesOf(u client.Unused) []string {
	list := []string{}
	for _, image := range images.Named(u.Images) {
		list = append(list, image.Name)
	}
	return list
}

// remove deletes the artifacts and prints them.
func remove(ctx context.Context, command *cli.Command, c *client.Client, unused []client.Unused, dryRun, asJSON bool) error {
	all := prunedAll{DryRun: dryRun, Artifacts: []prunedArtifact{}, Size: client.TotalSize(unused)}
	for _, u := range unused {
		all.Artifacts = append(all.Artifacts, prunedArtifact{namesOf(u), u.Artifact.Manifest.Digest, client.Size(u.Artifact)})
	}
	var left int64
	if !dryRun {
		var err error
		if all.Freed, left, err = c.Remove(ctx, unused); err != nil {
			return err
		}
	}
	if asJSON {
		return printJSON(command.Root().Writer, all)
	}
	if len(unused) > 0 {
		var text strings.Builder
		fmt.Fprintln(&text, "REFERENCE\tDIGEST\tSIZE")
		for _, p := range all.Artifacts {
			fmt.Fprintf(&text, "%s\t%s\t%s\n", printableList(p.References), short(p.Manifest), plain.Size(p.Size))
		}
		if err := printTable(command.Root().Writer, text.String()); err != nil {
			return err
		}
	}
	hint := fmt.Sprintf("total: %s, %s freed", counted(unused), plain.Size(all.Freed))
	switch {
	case len(unused) == 0:
		hint = "nothing to delete"
	case left > 0:
		hint += fmt.Sprintf("; %s stays, since another name, a pod or a lease needs it (a killed pull leaves a lease of 24 hours)", plain.Size(left))
	case dryRun:
		hint = fmt.Sprintf("total: %s; nothing was deleted: this was a dry run", counted(unused))
	}
	_, err := fmt.Fprintln(command.Root().ErrWriter, hint)
	return err
}
