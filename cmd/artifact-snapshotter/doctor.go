// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

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
			"configuration. It is 0 if the daemon or containerd merely do not run, or if there is only advice,\n" +
			"unless --strict is set.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter doctor\n" +
			"  artifact-snapshotter doctor --containerd-config /etc/containerd/other.toml\n" +
			"  artifact-snapshotter doctor --strict --output json",
		Flags: append(daemonFlags(),
			&cli.StringFlag{Name: "containerd-config", Usage: "containerd's main configuration file", TakesFile: true, DefaultText: "that of containerd, k3s or RKE2, whichever exists"},
			&cli.BoolFlag{Name: "strict", Usage: "exit with 1 also if something is unknown, or if there is advice"},
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
	containerd := command.String("containerd-config")
	if containerd == "" {
		if containerd, err = containerdconfig.FindMain(); err != nil {
			return err
		}
	}
	node := doctor.Node{Config: cfg.Discover(ctx), ConfigFile: command.String("config"), ContainerdConfig: containerd}
	node.Containerd, node.Unanswered = client.Connect(ctx, cfg.ContainerdAddress, namespaces.Default, containerdconfig.Snapshotter)
	if node.Unanswered == nil {
		defer func() { _ = node.Containerd.Close() }()
	}
	findings, err := doctor.Examine(ctx, node)
	if err != nil {
		return err
	}
	verdict := doctor.Judge(findings)
	if asJSON {
		byKey := map[string]any{"verdict": verdict}
		for _, found := range findings {
			byKey[found.Key()] = found
		}
		err = printJSON(command.Root().Writer, byKey)
	} else if err = printFindings(command.Root().Writer, findings); err == nil {
		_, err = fmt.Fprintf(command.Root().Writer, "\nverdict: %s\n", verdict)
	}
	switch {
	case err != nil:
		return err
	case verdict.Result == doctor.ResultProblem:
		return fmt.Errorf("doctor has found problems: %s", strings.Join(verdict.Problems, ", "))
	case verdict.Result != doctor.ResultOK && command.Bool("strict"):
		return fmt.Errorf("--strict: %s", verdict)
	}
	return nil
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
