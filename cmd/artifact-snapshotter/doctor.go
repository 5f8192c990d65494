// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/doctor"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "examine the node, and advise what would improve it",
		Description: "It makes the same mounts as the daemon when it starts, in the same root and beside a running\n" +
			"daemon, asks the daemon and containerd what they have loaded, reads containerd's configuration,\n" +
			"and leaves nothing behind. The exit code is 1 if the daemon cannot mount artifacts with this\n" +
			"configuration. It is 0 if the daemon or containerd merely do not run.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter doctor\n" +
			"  artifact-snapshotter doctor --containerd-config /etc/containerd/other.toml\n" +
			"  artifact-snapshotter doctor --output json",
		Flags: append(daemonFlags(),
			&cli.StringFlag{Name: "containerd-config", Usage: "containerd's own configuration file", Value: filepath.Join(defaults.DefaultConfigDir, "config.toml"), TakesFile: true},
			outputFlag(),
		),
		Action: runDoctor,
	}
}

func runDoctor(ctx context.Context, command *cli.Command) error {
	asJSON, err := wantsJSON(command)
	if err != nil {
		return err
	}
	cfg, err := daemonConfig(command)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("doctor makes the same mounts as the daemon and needs root for them: run it as root")
	}
	// What packages log is meant for the daemon's log.
	if err := log.SetLevel("fatal"); err != nil {
		return err
	}
	node := doctor.Node{Config: cfg.Discover(ctx), ConfigFile: command.String("config"), ContainerdConfig: command.String("containerd-config")}
	node.Containerd, node.Unanswered = client.Connect(ctx, cfg.ContainerdAddress, namespaces.Default, containerdconfig.Snapshotter)
	if node.Unanswered == nil {
		defer func() { _ = node.Containerd.Close() }()
	}
	findings, err := doctor.Examine(ctx, node)
	if err != nil {
		return err
	}
	byKey := map[string]doctor.Finding{}
	var problems []string
	for _, found := range findings {
		byKey[found.Key()] = found
		if found.Problem != "" {
			problems = append(problems, found.Check)
		}
	}
	if asJSON {
		err = printJSON(command.Root().Writer, byKey)
	} else {
		err = printFindings(command.Root().Writer, findings)
	}
	if err == nil && problems != nil {
		err = fmt.Errorf("doctor has found problems: %s", strings.Join(problems, ", "))
	}
	return err
}

func printFindings(w io.Writer, findings []doctor.Finding) error {
	for i, found := range findings {
		var text strings.Builder
		if i > 0 {
			text.WriteByte('\n')
		}
		fmt.Fprintf(&text, "%s: %s\n", found.Check, found.Text[0])
		for _, row := range found.Table {
			for i, cell := range row {
				row[i] = printable(cell)
			}
			fmt.Fprintln(&text, strings.Join(row, "\t"))
		}
		for _, line := range found.Text[1:] {
			fmt.Fprintln(&text, line)
		}
		if found.Unknown != "" {
			fmt.Fprintf(&text, "unknown: %s\n", found.Unknown)
		}
		if found.Problem != "" {
			fmt.Fprintf(&text, "problem: %s\n", found.Problem)
		}
		for _, a := range found.Advice {
			fmt.Fprintf(&text, "advice: %s: %s\n", a.Do, a.Gain)
			for line := range strings.Lines(a.Lines) {
				if line != "\n" {
					text.WriteString("    ")
				}
				text.WriteString(line)
			}
		}
		if err := printTable(w, harmless(text.String())); err != nil {
			return err
		}
	}
	return nil
}
