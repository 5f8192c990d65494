// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/urfave/cli/v3"
)

// globalFlags are the flags that may stand before the command, too, as with ctr and kubectl.
// A flag after the command takes precedence over one before it, and both over the
// environment.
func globalFlags() (flags []cli.Flag) {
	for _, flag := range []*cli.StringFlag{namespaceFlag(), addressFlag(), snapshotterFlag(), configFlag(), outputFlag()} {
		flag.Local = true                     // otherwise every command would have it
		flag.Sources = cli.ValueSourceChain{} // the command's own flag reads the environment
		flags = append(flags, flag)
	}
	return flags
}

// before is the value of a flag before the command.
type before struct{ *cli.StringFlag }

func (b before) Lookup() (string, bool) { return b.Get().(string), b.IsSet() }
func (b before) String() string         { return "--" + b.Name + " before the command" }
func (b before) GoString() string       { return fmt.Sprintf("before{%q}", b.Name) }

// inherit passes the global flags on to the commands from command on that have the same
// flag. Other commands refuse the flag. If only the long name is the same, the flag is
// another one: --address of serve is the daemon's socket.
func inherit(globals []cli.Flag, command *cli.Command) {
	for _, sub := range command.Commands {
		inherit(globals, sub)
	}
	if len(command.Commands) > 0 {
		return
	}
	var others []cli.Flag
	for _, global := range globals {
		own := slices.IndexFunc(command.Flags, func(f cli.Flag) bool { return slices.Equal(f.Names(), global.Names()) })
		if own < 0 {
			others = append(others, global)
			continue
		}
		sources := &command.Flags[own].(*cli.StringFlag).Sources
		sources.Chain = append([]cli.ValueSource{before{global.(*cli.StringFlag)}}, sources.Chain...)
	}
	command.Before = func(ctx context.Context, command *cli.Command) (context.Context, error) {
		for _, global := range others {
			if global.IsSet() {
				return ctx, fmt.Errorf("%s does not take %s, which is before the command %s", called(command), dashed(global.Names()[0]), see(command))
			}
		}
		return ctx, nil
	}
}
