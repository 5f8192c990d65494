// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"embed"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/images"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/install"
)

// scripts ask the program for candidates, one per line. The scripts of the cli library take
// what follows a colon for a description, but references have colons.
//
//go:embed completion
var scripts embed.FS

func completionCommand() *cli.Command {
	command := &cli.Command{
		Name:  "completion",
		Usage: "print a script for a shell that completes commands, flags and references",
		Description: "Examples:\n\n" +
			"  source <(artifact-snapshotter completion bash)\n" +
			"  source <(artifact-snapshotter completion zsh)\n" +
			"  artifact-snapshotter completion fish > ~/.config/fish/completions/artifact-snapshotter.fish",
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		command.Commands = append(command.Commands, &cli.Command{
			Name:  shell,
			Usage: "for " + shell,
			Action: func(_ context.Context, command *cli.Command) error {
				script, err := scripts.ReadFile("completion/" + shell)
				if err != nil {
					return err
				}
				_, err = command.Root().Writer.Write(script)
				return err
			},
		})
	}
	completable(command) // the library adds this command later than the others
	return command
}

// completable lets all commands from root on complete names, unless they have a completion
// of their own.
func completable(root *cli.Command) {
	if root.ShellComplete == nil {
		root.ShellComplete = func(_ context.Context, command *cli.Command) { completeNames(command) }
	}
	for _, sub := range root.Commands {
		completable(sub)
	}
}

// valuesOf are the values of the flags that have few.
var valuesOf = map[string][]string{
	"output":    {outputText, outputJSON},
	"scope":     {install.ScopeHandler, install.ScopeNode},
	"log-level": {"trace", "debug", "info", "warn", "error", "fatal", "panic"},
}

// completeNames prints the flags if the word begins with a dash, and the commands
// otherwise. It reports which. Behind a flag it prints the values of valuesOf; all others
// are the shell's to complete.
func completeNames(command *cli.Command) (flag bool) {
	var names []string
	// The last argument is --generate-shell-completion, the one before it the word.
	if n := len(os.Args); n > 2 && strings.HasPrefix(os.Args[n-2], "-") {
		flag = true
		for _, f := range command.Flags {
			value, ok := f.(interface{ TakesValue() bool })
			if ok && value.TakesValue() && slices.Contains(f.Names(), strings.TrimLeft(os.Args[n-2], "-")) {
				printCandidates(command, valuesOf[f.Names()[0]])
				return true
			}
			names = append(names, "--"+f.Names()[0])
		}
	} else {
		for _, sub := range command.VisibleCommands() {
			names = append(names, sub.Name)
		}
	}
	printCandidates(command, names)
	return flag
}

// shellWord matches what every shell reads as a word. An image may have any name, and bash
// does not quote what it inserts.
var shellWord = regexp.MustCompile(`^[A-Za-z0-9._:/@+-]+$`)

// printCandidates prints the candidates that are shell words. A completion has nobody to report errors
// to, here and below.
func printCandidates(command *cli.Command, candidates []string) {
	for _, c := range candidates {
		if shellWord.MatchString(c) {
			_, _ = fmt.Fprintln(command.Root().Writer, c)
		}
	}
}

// completeReference completes the first argument with the references of artifacts.
func completeReference(ctx context.Context, command *cli.Command) {
	completeFirst(ctx, command, func(ctx context.Context, c *client.Client) (names []string, err error) {
		all, err := c.Survey(ctx, nil, nil)
		if err != nil {
			return nil, err
		}
		for _, image := range images.Named(all.Artifacts) {
			names = append(names, image.Name)
		}
		return names, nil
	})
}

// completeTarget completes the first argument with the targets of mounts.
func completeTarget(ctx context.Context, command *cli.Command) {
	completeFirst(ctx, command, func(ctx context.Context, c *client.Client) (targets []string, err error) {
		mounts, err := c.Mounts(ctx)
		for _, m := range mounts {
			targets = append(targets, m.Target)
		}
		return targets, err
	})
}

// completeFirst completes the first argument with what list returns.
func completeFirst(ctx context.Context, command *cli.Command, list func(context.Context, *client.Client) ([]string, error)) {
	if completeNames(command) || command.Args().Present() {
		return
	}
	for _, f := range command.Flags { // the library has not read the environment yet
		if f.PostParse() != nil {
			return
		}
	}
	c, err := connect(ctx, command)
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	if names, err := list(ctx, c); err == nil {
		printCandidates(command, names)
	}
}
