// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

// The values of --output.
const (
	outputText = "text"
	outputJSON = "json"
)

// clientFlags are the flags of all commands that talk to containerd, --output and
// --config among them. They are those of ctr, with its environment variables.
func clientFlags() []cli.Flag {
	return []cli.Flag{
		namespaceFlag(),
		addressFlag(),
		&cli.StringFlag{
			Name:  "snapshotter",
			Usage: "what containerd calls the snapshotter",
			Value: "artifact",
		},
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

// outputFlag is the form of what a command prints.
func outputFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:  "output",
		Usage: outputText + " or " + outputJSON,
		Value: outputText,
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

// connect connects to the containerd that clientFlags name. The caller closes the
// client.
func connect(ctx context.Context, command *cli.Command) (*client.Client, error) {
	if command.String("namespace") == "" {
		return nil, errors.New("the namespace is empty: give containerd's with -n, k8s.io say, or unset CONTAINERD_NAMESPACE")
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
	c.Waiting = hint(command.Root().ErrWriter)
	return c, nil
}

// hint says why somebody waits, once for each reason.
func hint(w io.Writer) func(why error) {
	said := ""
	return func(why error) {
		if line := oneLine(why); line != said {
			said = line
			_, _ = fmt.Fprintf(w, "waiting: %s\n", line)
		}
	}
}
