// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func lsCommand() *cli.Command {
	return &cli.Command{
		Name:    "ls",
		Aliases: []string{"list"},
		Usage:   "list the artifacts of a namespace, and what uses them",
		Description: "MODE has the modes of the layers, or \"empty\" if the artifact has no files. With --wide, SHARED is\n" +
			"how many bytes are containerd's own files, without a copy. Both are \"-\" if the tree is not built,\n" +
			"or the daemon's root is not readable. CONFIG, with --wide, names artifacts with the same config:\n" +
			"CRI takes them for one image, and may mount one for another.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter ls -n k8s.io\n" +
			"  artifact-snapshotter ls -n k8s.io --wide --no-trunc\n" +
			"  artifact-snapshotter ls --mounts\n" +
			"  artifact-snapshotter ls --output json",
		Flags: append(clientFlags(), append(rootFlags(),
			&cli.BoolFlag{Name: "mounts", Usage: "list the mounts of the command mount instead"},
			&cli.BoolFlag{Name: "wide", Usage: "print all columns, and cut no name"},
			&cli.BoolFlag{Name: "no-trunc", Usage: "print complete digests, names and lists of names"},
		)...),
		ArgValidator: arguments(),
		Action: clientAction(func(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
			if command.Bool("mounts") {
				return listMounts(ctx, command, c, asJSON)
			}
			return listArtifacts(ctx, command, c, asJSON)
		}),
	}
}

// rootFlags are the directories of the daemon and of containerd.
func rootFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "root", Usage: "root of the daemon; overrides the configuration file"},
		&cli.StringFlag{Name: "content-root", Usage: "root of containerd's content store; overrides the file, too"},
	}
}

// roots are the directories of rootFlags.
func roots(command *cli.Command) (root string, content blobs.Source, err error) {
	cfg, err := loadConfig(command)
	if err != nil {
		return "", nil, err
	}
	if command.IsSet("root") {
		cfg.Root = command.String("root")
	}
	if command.IsSet("content-root") {
		cfg.ContentRoot = command.String("content-root")
	}
	return cfg.Root, cfg.Discover(context.Background()).Blobs(), nil
}

// listed is an artifact in JSON.
type listed struct {
	Reference string        `json:"reference"`
	Digest    digest.Digest `json:"digest"`
	Manifest  digest.Digest `json:"manifest"`
	Config    digest.Digest `json:"config"`
	Size      int64         `json:"size"`
	// Layout is null if the artifact is not unpacked.
	Layout    *layout  `json:"layout"`
	Snapshots []string `json:"snapshots"`
	Pods      []pod    `json:"pods"`
	Mounts    []string `json:"mounts"`
	// Containers are the IDs of the containers whose image it is.
	Containers []string `json:"containers"`
	// Conflicts are the first references of other artifacts with the same config.
	Conflicts []string `json:"conflicts"`

	moreConflicts int
}

// maxConflicts is the number of conflicting references listed for an artifact. If all
// artifacts have one config, each conflicts with all others.
const maxConflicts = 8

type layout struct {
	Raw    unpack.Mode `json:"raw_mode,omitempty"`
	Tar    unpack.Mode `json:"tar_mode,omitempty"`
	Shared int64       `json:"shared"`
}

type pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Sandbox   string `json:"sandbox"`
}

func (p pod) String() string {
	if p.Name == "" {
		return p.Sandbox
	}
	return p.Namespace + "/" + p.Name
}

func listArtifacts(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	root, content, err := roots(command)
	if err != nil {
		return err
	}
	sizes, layouts := map[digest.Digest]int64{}, map[digest.Digest]*layout{}
	all, err := c.Survey(ctx, content, func(a *artifact.Artifact) {
		sizes[a.Manifest.Digest] = client.Size(a)
		if how, err := client.LayoutOf(ctx, a, root, content); err == nil {
			layouts[a.Manifest.Digest] = &layout{how.Raw, how.Tar, how.Shared}
		}
	})
	if err != nil {
		return err
	}
	uses, err := c.Uses(ctx, all.Artifacts)
	if err != nil {
		return err
	}
	list := []listed{}
	for _, image := range images.Named(all.Artifacts) {
		l := describe(image, uses, all.Conflicts)
		l.Size, l.Layout = sizes[l.Manifest], layouts[l.Manifest]
		list = append(list, l)
	}
	if asJSON {
		return printJSON(command.Root().Writer, list)
	}
	return printArtifacts(command, list)
}

// printArtifacts prints a table of artifacts, and a hint if some of them cannot be used.
func printArtifacts(command *cli.Command, list []listed) error {
	wide, whole := command.Bool("wide"), command.Bool("no-trunc")
	cell := cells(whole)
	rows := [][]string{{"REFERENCE", "DIGEST", "SIZE", "MODE", "PODS"}}
	if wide {
		rows[0] = slices.Insert(rows[0], 4, "SHARED", "CONFIG")
	}
	conflicting := 0
	for _, l := range list {
		shared, mode, config := "-", "-", "own"
		if l.Layout != nil {
			shared = plain.Size(l.Layout.Shared)
			mode = cmp.Or(strings.Trim(fmt.Sprintf("%s %s", l.Layout.Raw, l.Layout.Tar), " "), "empty")
		}
		if len(l.Conflicts) > 0 {
			conflicting++
			config = "shared with " + conflictList(l.Conflicts, l.moreConflicts)
		}
		var pods []string
		for _, p := range l.Pods {
			pods = append(pods, p.String())
		}
		row := []string{printable(l.Reference), cell.digest(l.Digest), plain.Size(l.Size), mode, orNone(cell.names(pods))}
		if wide {
			row = slices.Insert(row, 4, shared, config)
		}
		rows = append(rows, row)
	}
	if !wide && !whole {
		fit(rows, flexible{4, 20, cutEnd}, flexible{0, 24, cutMiddle})
	}
	if err := printRows(command.Root().Writer, rows); err != nil || conflicting == 0 || wide {
		return err
	}
	_, err := fmt.Fprintf(command.Root().ErrWriter, "%d with the config of another: pods with them are refused, see --wide\n", conflicting)
	return err
}

// cells prints what may be long. It abbreviates unless it is set.
type cells bool

func (c cells) digest(d digest.Digest) string {
	if c {
		return d.String()
	}
	return short(d)
}

func (c cells) names(names []string) string {
	if c {
		return printableNames(names, len(names))
	}
	return printableList(names)
}

// describe describes an image, except for its layers.
func describe(image images.Image, uses map[digest.Digest]*client.Use, conflicts map[digest.Digest]*images.Sharing) listed {
	l := listed{
		Reference:  image.Name,
		Digest:     image.Target.Digest,
		Manifest:   image.Manifest,
		Config:     image.Config,
		Snapshots:  []string{},
		Pods:       []pod{},
		Mounts:     []string{},
		Containers: []string{},
	}
	if use := uses[image.Manifest]; use != nil {
		l.Snapshots = append(l.Snapshots, use.Snapshots...)
		l.Mounts = append(l.Mounts, use.Targets...)
		l.Containers = append(l.Containers, use.Containers...)
		for _, p := range use.Pods {
			l.Pods = append(l.Pods, pod(p))
		}
	}
	l.Conflicts, l.moreConflicts = conflictNames(conflicts, image)
	return l
}

// conflictNames are the first references that conflict with the image, and the number of
// the others.
func conflictNames(conflicts map[digest.Digest]*images.Sharing, image images.Image) (names []string, more int) {
	names = []string{}
	others, more := conflicts[image.Config].With(image, maxConflicts)
	for _, other := range others {
		names = append(names, other.Name)
	}
	return names, more
}

func conflictList(names []string, more int) string {
	if more == 0 {
		return printableList(names)
	}
	return fmt.Sprintf("%s and %d more", printableList(names), more)
}

// mountInfo is a mount in JSON.
type mountInfo struct {
	Target     string        `json:"target"`
	References []string      `json:"references"`
	Manifest   digest.Digest `json:"manifest"`
	Mounted    bool          `json:"mounted"`
}

func listMounts(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error {
	mounts, err := c.Mounts(ctx)
	if err != nil {
		return err
	}
	_, content, err := roots(command)
	if err != nil {
		return err
	}
	all, err := c.Survey(ctx, content, nil)
	if err != nil {
		return err
	}
	references := map[digest.Digest][]string{}
	for _, image := range images.Named(all.Artifacts) {
		references[image.Manifest] = append(references[image.Manifest], image.Name)
	}
	list := []mountInfo{}
	for _, m := range mounts {
		list = append(list, mountInfo{m.Target, append([]string{}, references[m.Manifest]...), m.Manifest, m.Mounted})
	}
	if asJSON {
		return printJSON(command.Root().Writer, list)
	}
	whole := command.Bool("no-trunc")
	cell := cells(whole)
	rows := [][]string{{"TARGET", "REFERENCE", "DIGEST", "STATE"}}
	for _, m := range list {
		state := "mounted"
		if !m.Mounted {
			state = "not mounted"
		}
		rows = append(rows, []string{printable(m.Target), orNone(cell.names(m.References)), cell.digest(m.Manifest), state})
	}
	if !whole && !command.Bool("wide") {
		fit(rows, flexible{1, 24, cutMiddle}, flexible{0, 24, cutMiddle})
	}
	return printRows(command.Root().Writer, rows)
}
