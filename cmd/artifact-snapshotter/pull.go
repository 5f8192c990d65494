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
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
)

func pullCommand() *cli.Command {
	return &cli.Command{
		Name:      "pull",
		Usage:     "have containerd pull an artifact, and unpack it",
		ArgsUsage: "REF",
		Description: "An ordinary image is refused, and so is an artifact that could not be shown; nothing is\n" +
			"pulled of either.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter pull registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter pull -n k8s.io -u reader registry.example.com/models/llama:v1\n" +
			"  artifact-snapshotter pull --plain-http 127.0.0.1:5000/models/llama:v1",
		Flags: append(clientFlags(),
			&cli.StringFlag{
				Name:    "user",
				Aliases: []string{"u"},
				Usage:   "user[:password] for the registry; a password that is missing is asked for",
			},
			&cli.StringFlag{
				Name:  "hosts-dir",
				Usage: "directory with HOST/hosts.toml, as config_path of containerd's CRI plugin",
				Value: "/etc/containerd/certs.d",
			},
			&cli.BoolFlag{Name: "plain-http", Usage: "use HTTP with hosts that have no hosts.toml"},
		),
		ArgValidator: arguments("REF"),
		Action:       pull,
	}
}

// pulled is what pull has pulled, in JSON.
type pulled struct {
	Reference string        `json:"reference"`
	Digest    digest.Digest `json:"digest"`
	Manifest  digest.Digest `json:"manifest"`
	Size      int64         `json:"size"`
	Snapshot  string        `json:"snapshot"`
}

func pull(ctx context.Context, command *cli.Command) error {
	json, err := wantsJSON(command)
	if err != nil {
		return err
	}
	// What containerd's packages log beside their errors.
	if err := log.SetLevel("fatal"); err != nil {
		return err
	}
	c, err := connect(ctx, command)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	registry := client.Registry{
		HostsDir:  command.String("hosts-dir"),
		PlainHTTP: command.Bool("plain-http"),
	}
	registry.User, registry.Password, _ = strings.Cut(command.String("user"), ":")
	if registry.User != "" && registry.Password == "" {
		if registry.Password, err = askPassword(ctx); err != nil {
			return err
		}
	}
	show := showLines(command.Root().ErrWriter)
	if isTerminal() {
		show = showBars(os.Stderr)
	}
	image, err := c.Pull(ctx, command.Args().First(), registry, show)
	if err != nil {
		return err
	}
	snapshot, err := c.Unpack(ctx, image)
	if err != nil {
		return err
	}
	p := pulled{image.Name, image.Target.Digest, image.Manifest, client.Size(image.Artifact), snapshot}
	if json {
		return printJSON(command.Root().Writer, p)
	}
	return printTable(command.Root().Writer, fmt.Sprintf("REFERENCE\tDIGEST\tSIZE\tSNAPSHOT\n%s\t%s\t%s\t%s\n",
		printable(p.Reference), p.Digest, progress.Bytes(p.Size), p.Snapshot))
}

// isTerminal reports whether bars can be shown: they go to standard error, and
// package progress asks standard input for the width.
func isTerminal() bool {
	for _, f := range []*os.File{os.Stdin, os.Stderr} {
		if _, err := console.ConsoleFromFile(f); err != nil {
			return false
		}
	}
	return true
}

// askPassword reads a password from the terminal, which does not show it. When ctx
// ends, the terminal is as it was.
func askPassword(ctx context.Context) (string, error) {
	c, err := console.ConsoleFromFile(os.Stdin)
	if err != nil {
		return "", errors.New("the password is missing: use -u USER:PASSWORD where there is no terminal to ask for it")
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

// showLines says which layers are there, one line each.
func showLines(w io.Writer) func([]client.Fetched) {
	return func(layers []client.Fetched) {
		for _, l := range layers {
			if !l.Done {
				continue
			}
			how := "pulled"
			if l.Present {
				how = "was there"
			}
			_, _ = fmt.Fprintf(w, "%s: %s (%d bytes)\n", layerName(l.Layer), how, l.Descriptor.Size)
		}
	}
}

// redraw is how often the bars are drawn at most.
const redraw = 100 * time.Millisecond

// The widths of a line of bars, which is not broken on a terminal with 80 columns.
const (
	nameWidth = 28
	barWidth  = 24
)

// showBars draws a bar for each layer, as many as there is room for, and one for
// all of them.
func showBars(f *os.File) func([]client.Fetched) {
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
		_ = w.Flush() // a terminal that has gone is no reason to stop
	}
}

// bars are at most room lines for layers, those that are on their way first, and
// one for all.
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
	shown := layers
	if len(layers) > room {
		shown = nil
		for _, wanted := range []func(client.Fetched) bool{
			func(l client.Fetched) bool { return !l.Done && l.Bytes > 0 },
			func(l client.Fetched) bool { return !l.Done && l.Bytes == 0 },
			func(l client.Fetched) bool { return l.Done },
		} {
			for _, l := range layers {
				if wanted(l) && len(shown) < room {
					shown = append(shown, l)
				}
			}
		}
	}
	for _, l := range shown {
		bar(&text, layerName(l.Layer), l.Bytes, l.Descriptor.Size, l.Done)
	}
	bar(&text, fmt.Sprintf("%d of %d layers", finished, len(layers)), got, all, finished == len(layers))
	return text.String()
}

// bar is one line. Package progress counts bytes to know where it is broken, so
// that a name is cut and padded by bytes, too.
func bar(w *strings.Builder, name string, got, all int64, done bool) {
	if len(name) > nameWidth {
		name = strings.ToValidUTF8(name[:nameWidth-3], "") + "..."
	}
	part := 1.0
	if !done && all > 0 {
		part = float64(got) / float64(all)
	}
	pad := strings.Repeat(" ", nameWidth-len(name))
	fmt.Fprintf(w, "%s%s %*r %9s/%s\n", name, pad, barWidth, progress.Bar(part), progress.Bytes(got), progress.Bytes(all))
}
