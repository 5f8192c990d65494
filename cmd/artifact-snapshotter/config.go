// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"regexp"
	"text/template"

	"github.com/containerd/platforms"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

const (
	scopeNode    = "node"
	scopeHandler = "runtime-handler"
)

var (
	//go:embed containerd.toml.tmpl
	containerdFile     string
	containerdTemplate = template.Must(template.New("containerd.toml").Parse(containerdFile))

	// The handler of a RuntimeClass is a DNS label (Kubernetes API, node.k8s.io/v1).
	dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

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
				Usage: "print what containerd's configuration needs",
				Description: "It is for a file of its own that containerd's configuration file has to import.\n\n" +
					"Examples:\n\n" +
					"  artifact-snapshotter config containerd > /etc/containerd/conf.d/artifact-snapshotter.toml\n" +
					"  artifact-snapshotter config containerd --snapshotter-scope runtime-handler --runtime-handler models",
				Flags: []cli.Flag{
					&cli.StringFlag{
						Name:  "snapshotter-scope",
						Usage: "who gets the snapshotter: every pod of the node (" + scopeNode + "), or the pods of one runtime handler (" + scopeHandler + ")",
						Value: scopeNode,
					},
					&cli.StringFlag{
						Name:  "runtime-handler",
						Usage: "the handler that a RuntimeClass names, with --snapshotter-scope " + scopeHandler,
						Value: "artifact",
					},
					&cli.BoolFlag{
						Name:  "native-unpack",
						Usage: "let containerd's own unpacker unpack artifacts, too; needs containerd 2.3",
					},
					configFlag(),
				},
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
	handler, err := handlerOf(command, "snapshotter-scope")
	if err != nil {
		return err
	}
	w := command.Root().Writer
	if err := writeContainerdConfig(w, cfg, handler, snapshot.MapsOwners()); err != nil || !command.Bool("native-unpack") {
		return err
	}
	return writeNativeConfig(w)
}

// writeContainerdConfig writes what containerd's configuration needs if the
// snapshotter is that of a runtime handler, or of the whole node if handler is "".
// mapsOwners says whether the kernel can do that for user namespaces.
func writeContainerdConfig(w io.Writer, cfg daemon.Config, handler string, mapsOwners bool) error {
	return containerdTemplate.Execute(w, map[string]any{
		"Address":      cfg.SocketAddress(),
		"Root":         cfg.Root,
		"Platform":     platforms.DefaultString(),
		"Handler":      handler,
		"Capabilities": cfg.Overlayfs.Capabilities(mapsOwners),
	})
}

// handlerOf is the runtime handler of the flags, "" for the whole node.
func handlerOf(command *cli.Command, scopeFlag string) (string, error) {
	scope, handler := command.String(scopeFlag), command.String("runtime-handler")
	switch scope {
	case scopeNode:
		if command.IsSet("runtime-handler") {
			return "", fmt.Errorf("--runtime-handler needs --%s %s", scopeFlag, scopeHandler)
		}
		return "", nil
	case scopeHandler:
		if !dnsLabel.MatchString(handler) {
			return "", fmt.Errorf("--runtime-handler %q is not a DNS label, as the handler of a RuntimeClass must be", handler)
		}
		return handler, nil
	default:
		return "", fmt.Errorf("--%s %q is neither %s nor %s", scopeFlag, scope, scopeNode, scopeHandler)
	}
}
