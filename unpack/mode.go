// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/kernelversion"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mode is a way to prepare the layers of one format. In RawModes and TarModes the best mode
// is first; each following one is a fallback that needs less of the node and gives less.
type Mode string

// The modes for raw layers.
const (
	// Overlay makes each file an empty, sparse file with the right attributes, whose
	// content overlayfs takes from the blob. It needs Linux 6.5.
	Overlay Mode = "overlay"
	// Link makes each file a hard link to the blob. No byte is copied either, but mode,
	// owner and time are the blob's: 0444, root, the time of the pull.
	Link Mode = "link"
	// Copy makes each file a reflink where the file system can, else a copy.
	Copy Mode = "copy"
)

// The modes for tar layers. With the first three the metadata of an artifact are one EROFS
// image, and its tars are extra devices of the image: no byte is copied.
const (
	// EROFS mounts the files of image and tars directly, with direct I/O to them, so that
	// the page cache has each byte once. It needs Linux 6.13, or a 6.12 with its fixes
	// (6422cde1b0d5, "erofs: use buffered I/O for file-backed mounts by default", which
	// adds the option).
	EROFS Mode = "erofs"
	// EROFSLoop mounts them as loop devices, also with direct I/O. It needs Linux 6.4, and
	// a loop device for each tar.
	EROFSLoop Mode = "erofs-loop"
	// EROFSBuffered mounts the files without direct I/O: the page cache has every byte that
	// is read twice.
	EROFSBuffered Mode = "erofs-buffered"
	// Extract copies the members out of the tar.
	Extract Mode = "extract"
)

// RawModes and TarModes are all modes of a format, the best first.
var (
	RawModes = []Mode{Overlay, Link, Copy}
	TarModes = []Mode{EROFS, EROFSLoop, EROFSBuffered, Extract}
)

// Modes has a mode for each format. "" means that it is to be chosen.
type Modes struct {
	Raw Mode `json:"raw"`
	Tar Mode `json:"tar"`
}

// traits are what distinguishes a mode, beside the code that builds and mounts its trees.
type traits struct {
	// tried says what probe tries: to use the mode in an empty directory.
	tried string
	probe func(ctx context.Context, dir string, direct bool) error
	// kernel is the first Linux with everything that the mode needs.
	kernel kernelversion.KernelVersion
	// devices is how many archives an EROFS image may refer to; -1 if there is no image. An
	// artifact with more is extracted.
	devices int
}

var modes = map[Mode]traits{
	Overlay: {tried: "overlayfs over a data-only lower layer", probe: probeOverlay, kernel: kernelversion.KernelVersion{Kernel: 6, Major: 5}},
	Link:    {tried: "a hard link", probe: probeLink},
	Copy:    {tried: "nothing but writing", probe: probeCopy},
	EROFS: {
		tried:  "an EROFS image over files, with direct I/O",
		probe:  probeImage(EROFS, "EROFS over files with direct I/O needs Linux 6.13, the erofs module, and a file system that can do direct I/O in units of 512 bytes"),
		kernel: kernelversion.KernelVersion{Kernel: 6, Major: 13}, devices: maxDevices,
	},
	EROFSLoop: {
		tried:  "an EROFS image over loop devices, with direct I/O",
		probe:  probeImage(EROFSLoop, "EROFS over loop devices needs Linux 6.4, the erofs and loop modules, and /dev/loop-control"),
		kernel: kernelversion.KernelVersion{Kernel: 6, Major: 4}, devices: maxLoopDevices,
	},
	EROFSBuffered: {
		tried:  "an EROFS image over files",
		probe:  probeImage(EROFSBuffered, "EROFS over files needs Linux 6.12 and the erofs module"),
		kernel: kernelversion.KernelVersion{Kernel: 6, Major: 12}, devices: maxDevices,
	},
	Extract: {tried: "nothing but writing", probe: probeCopy, devices: -1},
}

// Probe returns the best modes that work in root, by trying each with a real mount, and why
// better ones do not work, nil if the best do. A mode that forced names is not chosen, but
// must work. direct restricts the choice to modes whose files can be read with O_DIRECT. If
// something is lacking temporarily, such as disk space, that says nothing about a mode:
// then Probe returns no modes and the error.
func Probe(ctx context.Context, root string, forced Modes, direct bool) (r Modes, why error) {
	var errs [2]error
	if r.Raw, errs[0] = probe(ctx, root, forced.Raw, direct, RawModes); r.Raw == "" {
		return Modes{}, errs[0]
	}
	if r.Tar, errs[1] = probe(ctx, root, forced.Tar, direct, TarModes); r.Tar == "" {
		return Modes{}, errs[1]
	}
	return r, errors.Join(errs[:]...)
}

func probe(ctx context.Context, root string, forced Mode, direct bool, all []Mode) (r Mode, why error) {
	if forced != "" {
		if !slices.Contains(all, forced) {
			return "", fmt.Errorf("there is no mode %q; the modes are %q: %w", forced, all, errdefs.ErrInvalidArgument)
		}
		all = []Mode{forced}
	}
	var unfit []error
	for _, r := range all {
		err := Try(ctx, root, r, direct)
		if errors.Is(err, unix.EIO) {
			// It may be a disk's temporary error, or the kernel's permanent answer. Tried
			// again, because the daemon would keep a fallback until it restarts.
			err = Try(ctx, root, r, direct)
		}
		if err == nil {
			return r, why
		}
		for _, passing := range []error{errdefs.ErrResourceExhausted, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
			if errors.Is(err, passing) {
				return "", errors.Join(why, err)
			}
		}
		if errors.Is(err, errNoDirectIO) { // the configuration asks for direct I/O, so this matters only if no mode is left
			unfit = append(unfit, err)
			continue
		}
		why = errors.Join(why, err)
	}
	return "", errors.Join(append(unfit, why)...)
}

// ProbeDirs is the pattern of the directories that Try leaves in root if the process is
// killed. Something may be mounted below them.
const ProbeDirs = "probe-*"

// Try returns nil if the mode works in root and, if direct is true, its files can be read
// with O_DIRECT. Otherwise it returns why not.
func Try(ctx context.Context, root string, r Mode, direct bool) error {
	mode, ok := modes[r]
	if !ok {
		return fmt.Errorf("there is no mode %q: %w", r, errdefs.ErrInvalidArgument)
	}
	dir, err := os.MkdirTemp(root, ProbeDirs)
	if err != nil {
		return fmt.Errorf("mode %q cannot be tried in %s: %w", r, root, outOfSpace(err))
	}
	defer os.RemoveAll(dir)
	if err := mode.probe(ctx, dir, direct); err != nil {
		return fmt.Errorf("mode %q does not work in %s: %w", r, root, outOfSpace(err))
	}
	return nil
}

// probeOverlay reads a file through an overlay like those of Build.
func probeOverlay(_ context.Context, dir string, direct bool) error {
	const content = "artifact"
	lower, data, target := filepath.Join(dir, "lower"), filepath.Join(dir, "data"), filepath.Join(dir, "target")
	for _, d := range []string{lower, data, target} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	if err := writeBlob(filepath.Join(data, "blob"), content); err != nil {
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
	m := overlayMount(lower, data)
	if err := m.Mount(target); err != nil {
		return fmt.Errorf("data-only lower layers need Linux 6.5 and a file system that overlayfs takes as a lower layer: %w", err)
	}
	if err := readBack(target, map[string]string{"file": content}, direct); err != nil {
		return fmt.Errorf("overlayfs did not follow the redirect to the data-only layer: %w", err)
	}
	return nil
}

func probeLink(ctx context.Context, dir string, direct bool) error {
	if err := probeCopy(ctx, dir, direct); err != nil {
		return err
	}
	return os.Link(filepath.Join(dir, "copy"), filepath.Join(dir, "link"))
}

func probeCopy(_ context.Context, dir string, direct bool) error {
	const content = "artifact"
	if err := os.WriteFile(filepath.Join(dir, "copy"), []byte(content), 0o600); err != nil {
		return err
	}
	return readFiles(dir, map[string]string{"copy": content}, direct)
}

// probeImage reads a member through an EROFS image like those of Build, directly and below
// an overlay. The member begins at a multiple of 512 bytes but not of 4096, where direct
// I/O can fail. needs says what the mount needs.
func probeImage(r Mode, needs string) func(context.Context, string, bool) error {
	return func(ctx context.Context, dir string, direct bool) error {
		member := strings.Repeat("artifact", 1000)
		c := &content{name: "archive", path: filepath.Join(dir, "archive")}
		if err := writeBlob(c.path, strings.Repeat("x", tarBlock)+member+strings.Repeat("x", 2*tarBlock)); err != nil {
			return err
		}
		blob := &content{name: "blob", path: filepath.Join(dir, "blob")}
		if err := writeBlob(blob.path, "blob"); err != nil {
			return err
		}
		empty := &content{path: filepath.Join(dir, nowhere)}
		if err := os.WriteFile(empty.path, nil, 0o600); err != nil {
			return err
		}
		p := newPlan(time.Unix(0, 0), nil)
		for name, e := range map[string]extent{
			"member": {content: c, size: int64(len(member)), member: true, offset: tarBlock},
			"blob":   {content: blob, size: 4},
		} {
			if err := p.place(name, &node{kind: regular, bytes: e}); err != nil {
				return err
			}
		}
		image, lower, target := filepath.Join(dir, "image"), filepath.Join(dir, "lower"), filepath.Join(dir, "target")
		devices, err := buildImage(image, p, shift{}, empty)
		if err != nil {
			return err
		}
		var files []string
		for _, c := range devices {
			files = append(files, c.path)
		}
		if err := errors.Join(os.Mkdir(lower, 0o700), os.Mkdir(target, 0o700)); err != nil {
			return err
		}
		if err := mountImage(ctx, r, image, files, lower); err != nil {
			return fmt.Errorf("%s: %w", needs, err)
		}
		want := map[string]string{"member": member}
		overlay := filepath.Join(dir, "overlay")
		if err := os.Mkdir(overlay, 0o700); err != nil {
			return errors.Join(err, readBack(lower, want, direct))
		}
		if probeOverlay(ctx, overlay, direct) == nil { // otherwise no tree uses both
			m := overlayMount(lower, dir)
			if err := m.Mount(target); err != nil {
				return errors.Join(fmt.Errorf("overlayfs does not take it as a lower layer: %w", err), readBack(lower, want, direct))
			}
			err = readBack(target, map[string]string{"member": member, "blob": "blob"}, direct)
		}
		return errors.Join(err, readBack(lower, want, direct))
	}
}

// readBack checks the files that are mounted at target, and unmounts it.
func readBack(target string, want map[string]string, direct bool) error {
	return errors.Join(readFiles(target, want, direct), mount.UnmountAll(target, 0))
}

// readFiles checks that the files in dir have these contents.
func readFiles(dir string, want map[string]string, direct bool) error {
	var errs []error
	for name, content := range want {
		file := filepath.Join(dir, name)
		got, err := os.ReadFile(file)
		if err == nil && string(got) != content {
			err = fmt.Errorf("%s has other bytes than were written", name)
		}
		if err == nil && direct {
			err = readDirect(file, content)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
