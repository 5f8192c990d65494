// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

func pullCommand() *cli.Command {
	return &cli.Command{
		Name:      "pull",
		Usage:     "pull an artifact into containerd, and unpack it",
		ArgsUsage: "REF",
		Description: "A container image is refused, and so is an artifact that cannot be mounted, before anything is\n" +
			"pulled.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter pull registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter pull -n k8s.io -u reader registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter pull --plain-http 127.0.0.1:5000/models/llama:v1",
		Flags: append(clientFlags(),
			&cli.StringFlag{
				Name:    "user",
				Aliases: []string{"u"},
				Usage:   "user[:password] for the registry; asks for the password if it is missing",
			},
			&cli.StringFlag{
				Name:  "hosts-dir",
				Usage: "directory with HOST/hosts.toml, like config_path of containerd's CRI plugin",
				Value: "/etc/containerd/certs.d",
			},
			&cli.BoolFlag{Name: "plain-http", Usage: "use HTTP for hosts without a hosts.toml"},
		),
		ArgValidator: func(ctx context.Context, command *cli.Command) error {
			if err := arguments("REF")(ctx, command); err != nil {
				return err
			}
			if err := client.ValidReference(command.Args().First()); err != nil {
				return err
			}
			return checkHostsDir(command)
		},
		Action: clientAction(pull),
	}
}

// checkHostsDir refuses a --hosts-dir that is no directory. The default one need not exist.
func checkHostsDir(command *cli.Command) error {
	dir := command.String("hosts-dir")
	if info, err := os.Stat(dir); command.IsSet("hosts-dir") && (err != nil || !info.IsDir()) {
		return fmt.Errorf("--hosts-dir %s is not a directory", dir)
	}
	return nil
}

// pulled is the result of pull in JSON.
type pulled struct {
	Reference string        `json:"reference"`
	Digest    digest.Digest `json:"digest"`
	Manifest  digest.Digest `json:"manifest"`
	Size      int64         `json:"size"`
	Snapshot  string        `json:"snapshot"`
}

func pull(ctx context.Context, command *cli.Command, c *client.Client, asJSON bool) (err error) {
	registry := client.Registry{HostsDir: command.String("hosts-dir"), PlainHTTP: command.Bool("plain-http")}
	registry.User, registry.Password, _ = strings.Cut(command.String("user"), ":")
	if registry.User != "" && registry.Password == "" {
		if registry.Password, err = askPassword(ctx); err != nil {
			return err
		}
	}
	progressed := printLines(command.Root().ErrWriter)
	if isTerminal() {
		progressed = drawBars(os.Stderr)
	}
	image, err := c.Pull(ctx, command.Args().First(), registry, progressed)
	if err != nil {
		return err
	}
	snapshot, err := c.Unpack(ctx, image)
	if err != nil {
		return err
	}
	p := pulled{image.Name, image.Target.Digest, image.Manifest, client.Size(image.Artifact), snapshot}
	if asJSON {
		return printJSON(command.Root().Writer, p)
	}
	return printTable(command.Root().Writer, fmt.Sprintf("REFERENCE\tDIGEST\tSIZE\n%s\t%s\t%s\n",
		printable(p.Reference), short(p.Digest), plain.Size(p.Size)))
}

// isTerminal reports whether bars can be drawn: they go to standard error, and package
// progress gets the width of standard input.
func isTerminal() bool {
	for _, f := range []*os.File{os.Stdin, os.Stderr} {
		if _, err := console.ConsoleFromFile(f); err != nil {
			return false
		}
	}
	return true
}

// askPassword reads a password from the terminal without echo. It restores the terminal,
// even when ctx ends.
func askPassword(ctx context.Context) (string, error) {
	c, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return "", errors.New("there is no terminal to ask for the password: use -u USER:PASSWORD")
	}
	if err := c.DisableEcho(); err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	_, _ = fmt.Fprint(os.Stderr, "Password: ")
	var line string
	read := make(chan error, 1)
	go func() {
		var err error
		line, err = bufio.NewReader(os.Stdin).ReadString('\n')
		read <- err
	}()
	select {
	case err = <-read:
	case <-ctx.Done():
		err = ctx.Err()
	}
	_, _ = fmt.Fprintln(os.Stderr)
	if reset := c.Reset(); err == nil {
		err = reset
	}
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// printLines prints a line for each layer that has arrived.
func printLines(w io.Writer) func([]client.Fetched) {
	return func(layers []client.Fetched) {
		for _, l := range layers {
			if !l.Done {
				continue
			}
			how := "pulled"
			if l.Present {
				how = "already present"
			}
			_, _ = fmt.Fprintf(w, "%s: %s (%s)\n", layerName(l.Layer), how, plain.Size(l.Descriptor.Size))
		}
	}
}

// redraw is the least time between two drawings of the bars.
const redraw = 100 * time.Millisecond

// The widths of names and bars, for lines of at most 80 columns.
const (
	nameWidth = 28
	barWidth  = 24
)

// drawBars draws a bar for each layer, as many as fit, and one for all layers.
func drawBars(f *os.File) func([]client.Fetched) {
	w := progress.NewWriter(f)
	var layers []client.Fetched
	var drawn time.Time
	done := 0
	return func(changed []client.Fetched) {
		if layers == nil {
			layers = changed
		}
		for _, l := range changed {
			layers[l.Index] = l
			if l.Done {
				done++
			}
		}
		if time.Since(drawn) < redraw && done < len(layers) {
			return
		}
		drawn = time.Now()
		rows := 24
		if c, err := console.ConsoleFromFile(f); err == nil {
			if size, err := c.Size(); err == nil && size.Height > 0 {
				rows = int(size.Height)
			}
		}
		_, _ = io.WriteString(w, bars(layers, max(rows-2, 1)))
		_ = w.Flush() // the pull goes on without a terminal
	}
}

// bars are at most room lines for layers, those in transit first, and one for all layers.
func bars(layers []client.Fetched, room int) string {
	var text strings.Builder
	var got, all int64
	finished := 0
	for _, l := range layers {
		got, all = got+l.Bytes, all+l.Descriptor.Size
		if l.Done {
			finished++
		}
	}
	drawn := layers
	if len(layers) > room {
		drawn = nil
		for _, wanted := range []func(client.Fetched) bool{
			func(l client.Fetched) bool { return !l.Done && l.Bytes > 0 },
			func(l client.Fetched) bool { return !l.Done && l.Bytes == 0 },
			func(l client.Fetched) bool { return l.Done },
		} {
			for _, l := range layers {
				if wanted(l) && len(drawn) < room {
					drawn = append(drawn, l)
				}
			}
		}
	}
	for _, l := range drawn {
		bar(&text, layerName(l.Layer), l.Bytes, l.Descriptor.Size, l.Done)
	}
	bar(&text, fmt.Sprintf("%d of %d layers", finished, len(layers)), got, all, finished == len(layers))
	return text.String()
}

// bar is one line. A name is cut and padded by bytes, since package progress takes bytes for
// columns.
func bar(w *strings.Builder, name string, got, all int64, done bool) {
	if len(name) > nameWidth {
		name = strings.ToValidUTF8(name[:nameWidth-3], "") + "..."
	}
	part := 1.0
	if !done && all > 0 {
		part = float64(got) / float64(all)
	}
	pad := strings.Repeat(" ", nameWidth-len(name))
	fmt.Fprintf(w, "%s%s %*r %9s/%s\n", name, pad, barWidth, progress.Bar(part), plain.Size(got), plain.Size(all))
}
