// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/install"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// The handler of a RuntimeClass is a DNS label (Kubernetes API, node.k8s.io/v1).
var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// scopeFlags say which pods use the snapshotter.
func scopeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name:  "scope",
			Usage: "which pods use the snapshotter: those of one runtime handler (" + install.ScopeHandler + "), or all pods of the node (" + install.ScopeNode + ")",
			Value: install.ScopeHandler,
		},
		&cli.StringFlag{
			Name:  "runtime-handler",
			Usage: "the handler that a RuntimeClass names, with --scope " + install.ScopeHandler,
			Value: "artifact",
		},
	}
}

func configCommand() *cli.Command {
	return &cli.Command{
		Name:  "config",
		Usage: "print configuration",
		Commands: []*cli.Command{
			{
				Name:  "default",
				Usage: "print the daemon's configuration file with its defaults",
				Description: "Examples:\n\n" +
					"  artifact-snapshotter config default > /etc/artifact-snapshotter/config.toml",
				Action: func(_ context.Context, command *cli.Command) error {
					_, err := fmt.Fprint(command.Root().Writer, daemon.DefaultFile)
					return err
				},
			},
			{
				Name:  "containerd",
				Usage: "print what containerd's configuration needs for the snapshotter",
				Description: "Write it into a file of its own that containerd's configuration file imports.\n\n" +
					"Examples:\n\n" +
					"  artifact-snapshotter config containerd > /etc/containerd/conf.d/artifact-snapshotter.toml\n" +
					"  artifact-snapshotter config containerd --scope node",
				Flags: append(scopeFlags(),
					&cli.BoolFlag{
						Name:  "native-unpack",
						Usage: "let containerd's own unpacker unpack artifacts, too; requires containerd 2.3",
					},
					configFlag(),
				),
				Action: configContainerd,
			},
		},
	}
}

func configContainerd(_ context.Context, command *cli.Command) error {
	cfg, err := loadConfig(command)
	if err != nil {
		return err
	}
	if err := cfg.Validate(); err != nil {
		return err
	}
	handler, err := handlerOf(command)
	if err != nil {
		return err
	}
	w := command.Root().Writer
	needs := containerdconfig.Needs{Daemon: cfg, Handler: handler, MapsOwners: snapshot.MapsOwners()}
	if err := needs.Write(w); err != nil || !command.Bool("native-unpack") {
		return err
	}
	return containerdconfig.WriteNative(w)
}

// handlerOf returns the runtime handler of scopeFlags, "" for the whole node.
func handlerOf(command *cli.Command) (string, error) {
	scope, handler := command.String("scope"), command.String("runtime-handler")
	switch scope {
	case install.ScopeNode:
		if command.IsSet("runtime-handler") {
			return "", errors.New("--runtime-handler needs --scope " + install.ScopeHandler)
		}
		return "", nil
	case install.ScopeHandler:
		if !dnsLabel.MatchString(handler) {
			return "", fmt.Errorf("--runtime-handler %q is not a DNS label, as the handler of a RuntimeClass must be", handler)
		}
		return handler, nil
	default:
		return "", fmt.Errorf("--scope %q is neither %s nor %s", scope, install.ScopeHandler, install.ScopeNode)
	}
}
