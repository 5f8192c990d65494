// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/images"
)

// quietly makes the library return usage errors like others and not print the usage.
func quietly(command *cli.Command) {
	command.OnUsageError = func(_ context.Context, command *cli.Command, err error, _ bool) error {
		return usageError(command, err)
	}
	for _, sub := range command.Commands {
		quietly(sub)
	}
}

// see is the end of a usage error.
func see(command *cli.Command) string { return fmt.Sprintf("(see %s --help)", command.FullName()) }

// called is how a usage error names a command: without the program, which begins the line.
func called(command *cli.Command) string { return strings.TrimPrefix(command.FullName(), name+" ") }

// What the library says about flags. It writes every flag with one dash.
var (
	undefinedFlag = regexp.MustCompile(`^flag provided but not defined: -(.*)$`)
	missingValue  = regexp.MustCompile(`^flag needs an argument: -*(.*)$`)
	invalidValue  = regexp.MustCompile(`^invalid value (".*") for flag -(\S+?): (.*)$`)
)

// usageError says what is wrong with the flags as docker and kubectl do.
func usageError(command *cli.Command, err error) error {
	if len(command.Commands) > 0 && command.Args().Present() {
		return unknownCommand(command) // whose flags the library takes for those of command
	}
	text := err.Error()
	if m := undefinedFlag.FindStringSubmatch(text); m != nil {
		text = "unknown flag: " + dashed(m[1])
	} else if m := missingValue.FindStringSubmatch(text); m != nil {
		text = fmt.Sprintf("flag %s needs a value", dashed(m[1]))
	} else if m := invalidValue.FindStringSubmatch(text); m != nil {
		text = fmt.Sprintf("invalid value %s for %s: %s", m[1], dashed(m[2]), wanted(command, m[2], m[3]))
	}
	return fmt.Errorf("%s %s", text, see(command))
}

// dashed is the name of a flag as the user has written it.
func dashed(flag string) string {
	for _, word := range os.Args[1:] {
		word, _, _ = strings.Cut(word, "=")
		if flag != "" && strings.HasPrefix(word, "-") && strings.TrimLeft(word, "-") == flag {
			return word
		}
	}
	if utf8.RuneCountInString(flag) == 1 {
		return "-" + flag
	}
	return "--" + flag
}

// wanted says what a flag takes, or else why its value is not that.
func wanted(command *cli.Command, flag, why string) string {
	i := slices.IndexFunc(command.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), flag) })
	if i < 0 {
		return why
	}
	switch command.Flags[i].(type) {
	case *cli.BoolFlag:
		return "it is neither true nor false"
	case *cli.DurationFlag:
		return "it is no duration like 5s or 1m30s"
	}
	return why
}

// noArguments refuses arguments.
func noArguments(_ context.Context, command *cli.Command) error {
	if command.Args().Present() && len(command.Commands) > 0 {
		return unknownCommand(command)
	}
	return requireArguments(command)
}

func unknownCommand(command *cli.Command) error {
	return fmt.Errorf("no such command: %s %s %s", command.FullName(), command.Args().First(), see(command))
}

// arguments requires as many arguments as there are names. One called REF must look like a
// reference or a digest.
func arguments(names ...string) cli.ArgValidatorFunc {
	return func(_ context.Context, command *cli.Command) error {
		if err := requireArguments(command, names...); err != nil {
			return err
		}
		for i, name := range names {
			if name != "REF" {
				continue
			}
			if err := images.CheckRef(command.Args().Get(i)); err != nil {
				return err
			}
		}
		return nil
	}
}

func requireArguments(command *cli.Command, names ...string) error {
	got := command.Args().Len()
	if got == len(names) {
		return nil
	}
	want := fmt.Sprintf("accepts no arguments, got %q", command.Args().First())
	if len(names) > 0 {
		plural := "s"
		if len(names) == 1 {
			plural = ""
		}
		want = fmt.Sprintf("requires exactly %d argument%s (%s), got %d", len(names), plural, strings.Join(names, " "), got)
	}
	return fmt.Errorf("%s %s %s", called(command), want, see(command))
}

// atLeastOneRef requires at least one argument, which like all others is a REF.
func atLeastOneRef(_ context.Context, command *cli.Command) error {
	if !command.Args().Present() {
		return fmt.Errorf("%s requires at least 1 argument (REF), got 0 %s", called(command), see(command))
	}
	for _, ref := range command.Args().Slice() {
		if err := images.CheckRef(ref); err != nil {
			return err
		}
	}
	return nil
}

// helpCommand is that of docker and kubectl. The library's would be a command of every
// command, and an argument could not be called help.
func helpCommand() *cli.Command {
	return &cli.Command{
		Name:         "help",
		Usage:        "print the help of a command",
		ArgsUsage:    "[COMMAND]",
		ArgValidator: func(context.Context, *cli.Command) error { return nil },
		Action: func(_ context.Context, command *cli.Command) error {
			about, words := command.Root(), command.Args().Slice()
			for _, word := range words {
				sub := about.Command(word)
				if sub == nil {
					return fmt.Errorf("no such command: %s %s %s", about.FullName(), word, see(about))
				}
				about = sub
			}
			// The context has this command, of which the library would make a parent.
			return execute(context.Background(), slices.Concat([]string{name}, words, []string{"--help"}))
		},
	}
}
