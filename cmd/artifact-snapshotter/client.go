// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
)

// The values of --output.
const (
	outputText = "text"
	outputJSON = "json"
)

// clientFlags are the flags of the commands that talk to containerd. Those that ctr has,
// too, have its environment variables.
func clientFlags() []cli.Flag {
	return []cli.Flag{
		namespaceFlag(),
		addressFlag(),
		snapshotterFlag(),
		configFlag(),
		outputFlag(),
	}
}

func namespaceFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "namespace",
		Aliases: []string{"n"},
		Usage:   "containerd's namespace; Kubernetes uses k8s.io",
		Value:   "default",
		Sources: cli.EnvVars("CONTAINERD_NAMESPACE"),
	}
}

func addressFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:        "address",
		Aliases:     []string{"a"},
		Usage:       "containerd's Unix socket",
		Sources:     cli.EnvVars("CONTAINERD_ADDRESS"),
		DefaultText: "containerd_address of the configuration file",
	}
}

func snapshotterFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:  "snapshotter",
		Usage: "name of the snapshotter in containerd",
		Value: containerdconfig.Snapshotter,
	}
}

// outputFlag selects what a command prints.
func outputFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "output",
		Aliases: []string{"o"},
		Usage:   outputText + " or " + outputJSON,
		Value:   outputText,
	}
}

// wantsJSON reports whether --output is json.
func wantsJSON(command *cli.Command) (bool, error) {
	switch output := command.String("output"); output {
	case outputText, outputJSON:
		return output == outputJSON, nil
	default:
		return false, fmt.Errorf("--output %q is neither %s nor %s", output, outputText, outputJSON)
	}
}

// clientAction is the action of a command that talks to the containerd of clientFlags.
func clientAction(do func(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) error) cli.ActionFunc {
	return func(ctx context.Context, command *cli.Command) error {
		asJSON, err := wantsJSON(command)
		if err != nil {
			return err
		}
		// What containerd's packages log repeats their errors.
		if err := log.SetLevel("fatal"); err != nil {
			return err
		}
		c, err := connect(ctx, command)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		return do(ctx, command, c, asJSON)
	}
}

// connect connects to the containerd of clientFlags. The caller closes the client.
func connect(ctx context.Context, command *cli.Command) (*client.Client, error) {
	if command.String("namespace") == "" {
		return nil, errors.New("the namespace is empty: name one of containerd's with -n, for example k8s.io, or unset CONTAINERD_NAMESPACE")
	}
	if err := identifiers.Validate(command.String("namespace")); err != nil {
		return nil, fmt.Errorf("%q is no namespace of containerd: its name has letters, digits and single . _ - between them", command.String("namespace"))
	}
	if command.String("snapshotter") == "" {
		return nil, errors.New("--snapshotter is empty: leave it out for the snapshotter called " + containerdconfig.Snapshotter)
	}
	address := command.String("address")
	if address == "" {
		cfg, err := loadConfig(command)
		if err != nil {
			return nil, err
		}
		address = cfg.ContainerdAddress
	}
	c, err := client.Connect(ctx, address, command.String("namespace"), command.String("snapshotter"))
	if err != nil {
		return nil, err
	}
	c.Warning = func(text string) { _, _ = fmt.Fprintf(command.Root().ErrWriter, "warning: %s\n", harmless(text)) }
	c.Waiting = printWaiting(command.Root().ErrWriter)
	return c, nil
}

// printWaiting returns a function that prints why a command waits, if the reason is new.
func printWaiting(w io.Writer) func(why error) {
	last := ""
	return func(why error) {
		if line := oneLine(why); line != last {
			last = line
			_, _ = fmt.Fprintf(w, "waiting: %s\n", line)
		}
	}
}
