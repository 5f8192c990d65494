// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/snapshot"
)

// adoptedBegin and adoptedEnd enclose what install writes into the daemon's file, which may
// be an administrator's.
const (
	adoptedBegin = "\n# From containerd's configuration. `" + program + " install` updates this, and `uninstall`\n" +
		"# removes it, unless anything else is added before the last line. An [overlayfs] outside\n" +
		"# these lines is left alone.\n"
	adoptedEnd = "# End of what install has written.\n"
)

// daemonFile is the daemon's configuration file.
func (r *run) daemonFile() string { return cmp.Or(r.configFile, ConfigFile) }

// configChange is the change of the daemon's file. It adopts containerd's options of
// overlayfs, unless the file has an [overlayfs] of its own. r.Daemon has them then, too.
func (r *run) configChange(theirs snapshot.Overlayfs) (change, error) {
	config, err := changed(r.daemonFile(), nil, 0o644)
	if err != nil {
		return config, err
	}
	text := withoutAdopted(config.before)
	if r.configText != nil {
		if config.before != nil && !ours(config.before) {
			return config, errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("%s was not written by install, which would replace it: move it away", config.path))
		}
		text = r.configText
	}
	var own map[string]any
	if err := toml.Unmarshal(text, &own); err != nil {
		return config, fmt.Errorf("%s: %w", config.path, err)
	}
	if own["overlayfs"] != nil {
		config.after = config.before
		if r.configText != nil {
			config.after = text
		}
		return config, nil
	}
	r.Daemon.Overlayfs = theirs
	if theirs.Equal(snapshot.Overlayfs{}) {
		if string(text) != header { // it had something else
			config.after = text
		}
		return config, nil
	}
	table, err := containerdconfig.OverlayfsTable(theirs)
	if text == nil {
		text = []byte(header)
	}
	config.after = slices.Concat(text, []byte(adoptedBegin+table+adoptedEnd))
	return config, err
}

// withoutAdopted removes what install has written into the daemon's file. It removes nothing
// if somebody has written anything else between the lines of install.
func withoutAdopted(text []byte) []byte {
	before, rest, found := bytes.Cut(text, []byte(adoptedBegin))
	between, after, ended := bytes.Cut(rest, []byte(adoptedEnd))
	if !found || !ended || !isAdopted(between) {
		return text
	}
	return append(slices.Clip(before), after...) // not nil: an empty file stays a file
}

// isAdopted reports whether install has written the text. An older version may have
// written fewer keys.
func isAdopted(text []byte) bool {
	var said struct {
		Overlayfs snapshot.Overlayfs `toml:"overlayfs"`
	}
	if toml.Unmarshal(text, &said) != nil {
		return false
	}
	table, err := containerdconfig.OverlayfsTable(said.Overlayfs)
	for line := range strings.Lines(string(text)) {
		if err != nil || !slices.Contains(slices.Collect(strings.Lines(table)), line) {
			return false
		}
	}
	return true
}

// adviseOverlayfs reports what to write if containerd's own overlayfs has options that the
// daemon will not have.
func (r *run) adviseOverlayfs(theirs snapshot.Overlayfs) error {
	both := r.Daemon.Overlayfs.With(theirs)
	if both.Equal(r.Daemon.Overlayfs) {
		return nil
	}
	table, err := containerdconfig.OverlayfsTable(both)
	if err != nil {
		return err
	}
	r.Report(fmt.Sprintf("the daemon lacks options of containerd's own overlayfs: unless that is intended, write this into %s, in place of its [overlayfs] if it has one\n    %s",
		r.daemonFile(), strings.ReplaceAll(strings.TrimSpace(table), "\n", "\n    ")))
	return nil
}
