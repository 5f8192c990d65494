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

	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// What install writes into the daemon's file, which may be an administrator's, begins with
// takenOverBegin and ends with takenOverEnd.
const (
	takenOverBegin = "\n# From containerd's configuration. `" + name + " install` keeps this up to date, and\n" +
		"# `uninstall` removes it, unless anything else is written before the last line. An\n" +
		"# [overlayfs] in its place is left alone.\n"
	takenOverEnd = "# The end of what install has written.\n"
)

// overlayfsTable is the table of the daemon's file that says o.
func overlayfsTable(o snapshot.Overlayfs) (string, error) {
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
func (n *installation) configChange(theirs snapshot.Overlayfs) (change, error) {
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
	if theirs.Equal(snapshot.Overlayfs{}) {
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

// withoutTakenOver is a daemon's file without what install has written into it. It is left
// as it is if somebody has written anything else between the lines of install.
func withoutTakenOver(text []byte) []byte {
	before, rest, found := bytes.Cut(text, []byte(takenOverBegin))
	between, after, ended := bytes.Cut(rest, []byte(takenOverEnd))
	if !found || !ended || !isTakenOver(between) {
		return text
	}
	return append(slices.Clip(before), after...) // not nil: an empty file stays
}

// isTakenOver reports whether install has written the text. An older version may have
// written fewer keys.
func isTakenOver(text []byte) bool {
	var said struct {
		Overlayfs snapshot.Overlayfs `toml:"overlayfs"`
	}
	if toml.Unmarshal(text, &said) != nil {
		return false
	}
	table, err := overlayfsTable(said.Overlayfs)
	for line := range strings.Lines(string(text)) {
		if err != nil || !slices.Contains(slices.Collect(strings.Lines(table)), line) {
			return false
		}
	}
	return true
}

// adviseOverlayfs says what to write if containerd's own overlayfs has options that the
// daemon will not have.
func (r *installRun) adviseOverlayfs(theirs snapshot.Overlayfs) error {
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
