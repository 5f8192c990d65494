// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/containerdconfig"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

// ModeFacts are the facts about the modes of one layer format.
type ModeFacts struct {
	Root unpack.Location `json:"root"`
	// Configured is a mode or "auto".
	Configured string `json:"configured"`
	unpack.ModeDiagnosis
}

func checkRaw(ctx context.Context, n Node) Finding {
	return checkModes(ctx, n, "raw_mode", n.RawMode, unpack.RawModes)
}

func checkTar(ctx context.Context, n Node) Finding {
	return checkModes(ctx, n, "tar_mode", n.TarMode, unpack.TarModes)
}

// checkModes tries all modes of a format; configured is the value of option.
func checkModes(ctx context.Context, n Node, option, configured string, all []unpack.Mode) (found Finding) {
	root, err := unpack.Locate(n.Root)
	if err != nil {
		return failed(err)
	}
	var forced unpack.Mode // none if it is "auto"
	if slices.Contains(all, unpack.Mode(configured)) {
		forced = unpack.Mode(configured)
	}
	compared := unpack.DiagnoseModes(ctx, root, forced, n.NeedsDirectIO(), all)
	found.Facts = ModeFacts{root, configured, compared}
	where := n.Root
	if root.Existing != filepath.Clean(root.Path) {
		where = fmt.Sprintf("%s, since %s does not exist yet", root.Existing, root.Path)
	}
	found.sayf("%s = %q, direct_io = %q, tried in %s", option, configured, n.DirectIO, where)
	found.row("MODE", "TRIED", "O_DIRECT", "RESULT")
	for _, t := range compared.Trials {
		direct := "no"
		if t.DirectIO {
			direct = "yes"
		}
		found.row(string(t.Mode), t.Tried, direct, result(t, compared.Taken, forced))
	}
	if compared.Taken == "" {
		found.Problem = "the daemon does not start: " + compared.Error
	}
	found.Advice = modeAdvice(compared, option, forced)
	if compared.Twice != "" {
		found.sayf("the page cache holds tar layers twice: %s", compared.Twice)
	}
	if compared.Remedy != "" {
		found.advise(compared.Remedy, "the page cache holds tar layers once, not twice")
	}
	return found
}

// modeAdvice says how to get a better mode.
func modeAdvice(compared unpack.ModeDiagnosis, option string, forced unpack.Mode) (all []Advice) {
	// One remedy may help several modes; the first of them gains the most.
	add := func(do, gain string) {
		if !slices.ContainsFunc(all, func(a Advice) bool { return a.Do == do }) {
			all = append(all, Advice{Do: do, Gain: gain})
		}
	}
	trials := compared.Trials
	from := compared.Taken
	best := slices.IndexFunc(trials, func(t unpack.ModeTrial) bool { return t.Works }) // what "auto" takes
	if best < 0 {
		best = len(trials)
	} else if auto := trials[best].Mode; forced != "" {
		if compared.Taken == "" {
			add(fmt.Sprintf("set %s to \"auto\"", option), fmt.Sprintf("the daemon takes %q", auto))
		} else if auto != compared.Taken {
			add(fmt.Sprintf("set %s to \"auto\"", option), unpack.Gain(compared.Taken, auto))
		}
		from = auto
	}
	for i, t := range trials {
		switch {
		case t.Remedy == "":
		case t.Mode == forced:
			add(t.Remedy, fmt.Sprintf("%s = %q works", option, forced))
		case i < best:
			add(t.Remedy, unpack.Gain(from, t.Mode))
		}
	}
	return all
}

// result says in a few words how the trial of a mode ended.
func result(t unpack.ModeTrial, taken, forced unpack.Mode) string {
	switch {
	case t.Mode == taken && forced != "":
		return "taken, as configured"
	case t.Mode == taken:
		return "taken"
	case t.Works && forced != "":
		return "works, not configured"
	case t.Works && taken != "":
		return "works, not needed"
	case t.Works:
		return "works, not taken"
	case t.Mode == forced:
		return "configured, does not work: " + t.Reason
	default:
		return "does not work: " + t.Reason
	}
}

// checkContentRoot tries how the daemon can retain containerd's blobs.
func checkContentRoot(ctx context.Context, n Node) (found Finding) {
	root, err := unpack.Locate(n.Root)
	if err != nil {
		return failed(err)
	}
	s, err := unpack.DiagnoseRetention(root, blobs.Dir(n.ContentRoot))
	if err != nil {
		return failed(err)
	}
	found.Facts = s
	found.sayf("%s", retention(s))
	found.row("DIRECTORY", "FILESYSTEM", "DEVICE", "MOUNTED AT", "PATH")
	found.row("root", s.Root.Type, s.Root.Device, s.Root.Mount, pathOf(s.Root))
	found.row("blobs", s.Blobs.Type, s.Blobs.Device, s.Blobs.Mount, pathOf(s.Blobs))
	if s.Blob != "" && s.Retention == "" {
		found.problemf("blob %s can be neither linked nor copied into root: %s", s.Blob, s.Error)
	}
	if s.Blobs.Existing != s.Blobs.Path {
		found.advise("if images have been pulled, set content_root to what `ctr plugins ls --detailed id==content | grep root` prints",
			"the daemon finds the blobs")
	}
	if n.Unanswered != nil { // otherwise checkContainerd asks it
		adviseContentRoot(ctx, n, &found)
	}
	const gain = "models need no second copy on disk"
	switch {
	case s.Retention == unpack.Linked, s.Retention == unpack.Reflinked:
	case s.Apart == unpack.FilesystemBoundary:
		found.advise(fmt.Sprintf("move root to the filesystem of content_root (%s, mounted at %s)", s.Blobs.Device, s.Blobs.Mount), gain)
	case s.Apart == unpack.MountBoundary:
		found.advise(fmt.Sprintf("put root and content_root on one mount of their filesystem (now %s and %s)", s.Root.Mount, s.Blobs.Mount), gain)
	case s.Apart == unpack.SubvolumeBoundary && s.Retention == unpack.Copied:
		found.advise("put root into the subvolume of content_root", gain)
	}
	if err := store.CanWatch(n.Blobs()); err != nil {
		found.advise(err.Error(), "a daemon that starts now is notified of new and deleted blobs, and need not poll once a second")
	}
	if s.Root.Type == "overlay" {
		found.advise("move root to ext4, xfs or btrfs, in a container to a volume",
			"containers start: overlayfs does not accept an overlay for their root filesystems")
	}
	return found
}

// adviseContentRoot compares content_root with containerd's configuration, if that can be read:
// checkContainerdConfig says why it cannot.
func adviseContentRoot(ctx context.Context, n Node, found *Finding) {
	if _, err := os.Stat(n.ContainerdConfig); err != nil {
		return
	}
	read, err := containerdconfig.Read(ctx, n.ContainerdConfig)
	if err != nil || sameFile(read.ContentRoot, n.ContentRoot) || filepath.Clean(read.ContentRoot) == filepath.Clean(n.ContentRoot) {
		return
	}
	found.advise(fmt.Sprintf("set content_root to %q, where %s says that containerd has its blobs, unless it is started with another --root", read.ContentRoot, n.ContainerdConfig),
		"the daemon finds the blobs")
}

// retention says how blobs are retained.
func retention(s unpack.RetentionDiagnosis) string {
	switch {
	case s.Retention == unpack.Linked:
		return fmt.Sprintf("blobs are linked into root, without a copy (tried with %s)", s.Blob)
	case s.Retention == unpack.Reflinked:
		return fmt.Sprintf("blobs cannot be linked and are reflinked into root, without a copy (tried with %s: %s)", s.Blob, s.Error)
	case s.Retention == unpack.Copied:
		return fmt.Sprintf("blobs can be neither linked nor reflinked and are copied into root (tried with %s: %s)", s.Blob, s.Error)
	case s.Blob != "":
		return fmt.Sprintf("blobs cannot be retained (tried with %s: %s)", s.Blob, s.Error)
	}
	return "not tried, since there is no blob yet; " + map[unpack.Boundary]string{
		"":                        "blobs can be linked into root, which is on the same filesystem",
		unpack.MountBoundary:      "blobs cannot be linked into root, which is on another mount of the same filesystem",
		unpack.SubvolumeBoundary:  "blobs cannot be linked into root, which is another subvolume of the same filesystem",
		unpack.FilesystemBoundary: "blobs cannot be linked into root, which is on another filesystem",
	}[s.Apart]
}

// pathOf is the path of p, with a remark if it does not exist.
func pathOf(p unpack.Location) string {
	if p.Existing == filepath.Clean(p.Path) {
		return p.Path
	}
	return p.Path + " (does not exist yet)"
}
