// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Rung is a way to lay out raw layers. Each needs less of the node than the
// one before it, and gives less.
type Rung string

const (
	// Overlay makes each file an empty, sparse one with the right attributes,
	// whose content overlayfs takes from the blob. It needs Linux 6.5.
	Overlay Rung = "overlay"
	// Link makes each file a hard link to the blob. No byte is copied either,
	// but mode, owner and time are the blob's: 0444, root, the time of the
	// pull.
	Link Rung = "link"
	// Copy makes each file a reflink where the file system can, else a copy.
	Copy Rung = "copy"
)

// Rungs are all rungs, the best first.
var Rungs = []Rung{Overlay, Link, Copy}

// probes try a rung in an empty directory.
var probes = map[Rung]func(dir string) error{
	Overlay: probeOverlay,
	Link:    probeLink,
	Copy:    func(string) error { return nil },
}

// Probe returns the best rung that works in root, by trying each with a real
// mount, and why the better ones do not (nil if the first works). What is
// lacking for the moment, such as disk space, says nothing of a rung: then there
// is none.
func Probe(root string) (Rung, error) {
	var why error
	for _, r := range Rungs {
		err := Try(root, r)
		if err == nil {
			return r, why
		}
		why = errors.Join(why, err)
		for _, passing := range []error{errdefs.ErrResourceExhausted, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
			if errors.Is(err, passing) {
				return "", why
			}
		}
	}
	return "", why
}

// Try reports whether r works in root: nil, or why it does not.
func Try(root string, r Rung) error {
	probe, ok := probes[r]
	if !ok {
		return fmt.Errorf("no rung is called %q, only %v: %w", r, Rungs, errdefs.ErrInvalidArgument)
	}
	dir, err := os.MkdirTemp(root, "probe-")
	if err != nil {
		return fmt.Errorf("rung %q cannot be tried in %s: %w", r, root, outOfSpace(err))
	}
	defer os.RemoveAll(dir)
	if err := probe(dir); err != nil {
		return fmt.Errorf("rung %q does not work in %s: %w", r, root, outOfSpace(err))
	}
	return nil
}

// probeOverlay reads a file through an overlay as Build makes them.
func probeOverlay(dir string) error {
	const content = "artifact"
	lower, data, target := filepath.Join(dir, "lower"), filepath.Join(dir, "data"), filepath.Join(dir, "target")
	for _, d := range []string{lower, data, target} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(data, "blob"), []byte(content), 0o600); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(lower, "file"))
	if err != nil {
		return err
	}
	err = makeMetacopy(f, "blob", int64(len(content)))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := mountOverlay(lower, data, target); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(target, "file"))
	if err := errors.Join(err, mount.UnmountAll(target, 0)); err != nil {
		return err
	}
	if string(got) != content {
		return errors.New("overlayfs did not follow the redirect to the data-only layer")
	}
	return nil
}

func mountOverlay(lower, data, target string) error {
	m := overlayMount(lower, data)
	if err := m.Mount(target); err != nil {
		return fmt.Errorf("data-only lower layers need Linux 6.5 and a file system that overlayfs takes as a lower layer: %w", err)
	}
	return nil
}

func probeLink(dir string) error {
	blob := filepath.Join(dir, "blob")
	if err := os.WriteFile(blob, nil, 0o600); err != nil {
		return err
	}
	return os.Link(blob, filepath.Join(dir, "link"))
}
