// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/plugin"
)

// What install writes into the daemon's file, which may be an administrator's, is between
// these lines, and the newline before them.
const (
	takenOverBegin = "\n# From containerd's configuration, by `" + name + " install`, which keeps it up to date and\n" +
		"# `uninstall` takes it away. An [overlayfs] in its place is left alone.\n"
	takenOverEnd = "# The end of what install has written.\n"
)

// overlayfsTable is the table of the daemon's file that says o.
func overlayfsTable(o plugin.Overlayfs) (string, error) {
	if o.MountOptions == nil {
		o.MountOptions = []string{}
	}
	text, err := toml.Marshal(map[string]any{"overlayfs": o})
	return string(text), err
}

// daemonFile is the daemon's configuration file.
func (n *installation) daemonFile() string { return cmp.Or(n.configFile, defaultConfigFile) }

// configChange is what becomes of the daemon's file: containerd's options of overlayfs are
// taken over, unless the file says something of them. n.cfg has them then, too.
func (n *installation) configChange(theirs plugin.Overlayfs) (change, error) {
	config, err := changed(n.daemonFile(), nil, 0o644)
	if err != nil {
		return config, err
	}
	text := withoutTakenOver(config.before)
	if n.configText != nil {
		if config.before != nil && !ours(config.before) {
			return config, fmt.Errorf("%s was not written by install, which would replace it: move it away: %w", config.path, errdefs.ErrAlreadyExists)
		}
		text = n.configText
	}
	var own map[string]any
	if err := toml.Unmarshal(text, &own); err != nil {
		return config, fmt.Errorf("%s: %w", config.path, err)
	}
	if own["overlayfs"] != nil {
		config.after = config.before
		if n.configText != nil {
			config.after = text
		}
		return config, nil
	}
	n.cfg.Overlayfs = theirs
	if theirs.Equal(plugin.Overlayfs{}) {
		if string(text) != writtenBy { // nothing else was in it
			config.after = text
		}
		return config, nil
	}
	table, err := overlayfsTable(theirs)
	if text == nil {
		text = []byte(writtenBy)
	}
	config.after = slices.Concat(text, []byte(takenOverBegin+table+takenOverEnd))
	return config, err
}

// withoutTakenOver is a daemon's file without what install has written into it.
func withoutTakenOver(text []byte) []byte {
	before, rest, found := bytes.Cut(text, []byte(takenOverBegin))
	_, after, ended := bytes.Cut(rest, []byte(takenOverEnd))
	if !found || !ended {
		return text
	}
	return slices.Concat(before, after)
}

// adviseOverlayfs says what to write if containerd's own overlayfs has options that the
// daemon will not have.
func (r *installRun) adviseOverlayfs(theirs plugin.Overlayfs) error {
	both := r.cfg.Overlayfs.With(theirs)
	if both.Equal(r.cfg.Overlayfs) {
		return nil
	}
	table, err := overlayfsTable(both)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.out, "containerd's own overlayfs has options that the daemon has not: write this into %s, in place of an [overlayfs] there, unless that is meant\n    %s\n",
		r.daemonFile(), strings.ReplaceAll(strings.TrimSpace(table), "\n", "\n    "))
	return err
}
