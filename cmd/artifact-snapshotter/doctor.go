// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/blobs"
	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/store"
	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

const (
	outputText = "text"
	outputJSON = "json"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "try what this node can do, and say what would make it do more",
		Description: "It makes the mounts that the daemon makes when it starts, in the same root and beside a\n" +
			"daemon that runs, asks the daemon and containerd what they have, reads containerd's\n" +
			"configuration, and leaves nothing behind. The exit code is 1 if the daemon could not show\n" +
			"artifacts with this configuration; what does not run is no such problem.\n\n" +
			"Examples:\n\n" +
			"  artifact-snapshotter doctor\n" +
			"  artifact-snapshotter doctor --containerd-config /etc/containerd/other.toml\n" +
			"  artifact-snapshotter doctor --output json",
		Flags: append(daemonFlags(),
			&cli.StringFlag{Name: "containerd-config", Usage: "containerd's own configuration file", Value: filepath.Join(defaults.DefaultConfigDir, "config.toml"), TakesFile: true},
			outputFlag(),
		),
		Action: doctor,
	}
}

// patient is what doctor looks at: the daemon's configuration, and the containerd
// that it names.
type patient struct {
	daemon.Config
	configFile       string         // the daemon's own configuration file
	containerdConfig string         // containerd's
	containerd       *client.Client // nil if it does not answer,
	unanswered       error          // for this reason
}

// checks are what doctor looks at, in this order. One that fails does not keep
// it from the next.
var checks = []struct {
	name string
	run  func(context.Context, patient) finding
	// without says whether there is nothing to look at on the node; nil is never.
	without func(patient) bool
}{
	{"kernel", checkKernel, nil},
	{"raw layers", func(ctx context.Context, p patient) finding {
		return checkModes(ctx, p.Config, "raw_mode", p.RawMode, unpack.RawModes)
	}, nil},
	{"tar layers", func(ctx context.Context, p patient) finding {
		return checkModes(ctx, p.Config, "tar_mode", p.TarMode, unpack.TarModes)
	}, nil},
	{"content root", checkContentRoot, withoutContainerd},
	{"containerd", checkContainerd, withoutContainerd},
	{"socket", checkSocket, nil},
	{"containerd config", checkContainerdConfig, withNRI},
	{"empty blob", checkEmptyBlob, withoutContainerd},
	{"shared configs", checkSharedConfigs, withoutContainerd},
	{"NRI", checkNRI, func(p patient) bool { return !p.NRI.Enabled }},
}

// finding is what a check finds.
type finding struct {
	// Problem is why the daemon could not show artifacts.
	Problem string `json:"problem,omitempty"`
	// Unknown is why something could not be looked at.
	Unknown string `json:"unknown,omitempty"`
	// Facts are for programs what text is for people, with tabs between columns.
	Facts any `json:"facts,omitempty"`
	text  string
	// Advice is what would make it better.
	Advice []advice `json:"advice,omitempty"`
}

type advice struct {
	Do   string `json:"do"`
	Gain string `json:"gain"`
	// Lines are the lines to write, if it is to write lines.
	Lines string `json:"lines,omitempty"`
}

func doctor(ctx context.Context, command *cli.Command) error {
	asJSON, err := wantsJSON(command)
	if err != nil {
		return err
	}
	cfg, err := daemonConfig(command)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("doctor makes the mounts that the daemon makes, and needs root for it: run it as root")
	}
	// What the packages below log is for the daemon's log.
	if err := log.SetLevel("fatal"); err != nil {
		return err
	}
	examined := patient{Config: cfg.Discover(ctx), configFile: command.String("config"), containerdConfig: command.String("containerd-config")}
	examined.containerd, examined.unanswered = client.Connect(ctx, cfg.ContainerdAddress, namespaces.Default, proxyName)
	if examined.unanswered == nil {
		defer func() { _ = examined.containerd.Close() }()
	}
	findings := map[string]finding{}
	var problems []string
	for _, check := range checks {
		if err := ctx.Err(); err != nil {
			return err
		}
		if check.without != nil && check.without(examined) {
			continue
		}
		found := check.run(ctx, examined)
		findings[key(check.name)] = found
		if found.Problem != "" {
			problems = append(problems, check.name)
		}
	}
	if asJSON {
		err = printJSON(command.Root().Writer, findings)
	} else {
		err = printFindings(command.Root().Writer, findings)
	}
	if err == nil && problems != nil {
		err = fmt.Errorf("doctor has found a problem with: %s", strings.Join(problems, ", "))
	}
	return err
}

// key is the key of a check in JSON.
func key(check string) string { return strings.ReplaceAll(strings.ToLower(check), " ", "_") }

func printFindings(w io.Writer, findings map[string]finding) error {
	for i, check := range checks {
		found, ok := findings[key(check.name)]
		if !ok {
			continue
		}
		var text strings.Builder
		if i > 0 {
			text.WriteByte('\n')
		}
		fmt.Fprintf(&text, "%s: %s", check.name, found.text)
		if found.Unknown != "" {
			fmt.Fprintf(&text, "unknown: %s\n", found.Unknown)
		}
		if found.Problem != "" {
			fmt.Fprintf(&text, "problem: %s\n", found.Problem)
		}
		for _, a := range found.Advice {
			fmt.Fprintf(&text, "advice: %s: %s\n", a.Do, a.Gain)
			for line := range strings.Lines(a.Lines) {
				if line != "\n" {
					text.WriteString("    ")
				}
				text.WriteString(line)
			}
		}
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		if _, err := io.WriteString(table, harmless(text.String())); err != nil {
			return err
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// failed is the finding of a check that could not be made.
func failed(err error) finding {
	return finding{Problem: "it cannot be checked: " + err.Error(), text: "unknown\n"}
}

func checkKernel(context.Context, patient) finding {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return failed(os.NewSyscallError("uname", err))
	}
	release := unix.ByteSliceToString(name.Release[:])
	return finding{
		Facts: map[string]string{"release": release},
		text:  fmt.Sprintf("Linux %s\n", release),
	}
}

// modeFacts are the facts of checkModes.
type modeFacts struct {
	Root unpack.Place `json:"root"`
	// Configured is a mode or "auto".
	Configured string `json:"configured"`
	unpack.Comparison
}

// checkModes tries all modes; option and configured are what the configuration says.
func checkModes(ctx context.Context, cfg daemon.Config, option, configured string, all []unpack.Mode) finding {
	root, err := unpack.Locate(cfg.Root)
	if err != nil {
		return failed(err)
	}
	var forced unpack.Mode // none if it is "auto"
	if slices.Contains(all, unpack.Mode(configured)) {
		forced = unpack.Mode(configured)
	}
	compared := unpack.CompareModes(ctx, root, forced, cfg.NeedsDirectIO(), all)
	found := finding{Facts: modeFacts{root, configured, compared}}
	var text strings.Builder
	fmt.Fprintf(&text, "%s = %q, direct_io = %q, tried in %s\n", option, configured, cfg.DirectIO, where(root))
	fmt.Fprintln(&text, "MODE\tTRIED\tO_DIRECT\tRESULT")
	for _, t := range compared.Trials {
		direct := "no"
		if t.DirectIO {
			direct = "yes"
		}
		fmt.Fprintf(&text, "%s\t%s\t%s\t%s\n", t.Mode, t.Tried, direct, result(t, compared.Taken, forced))
	}
	if compared.Twice != "" {
		fmt.Fprintf(&text, "the page cache holds tars twice: %s\n", compared.Twice)
	}
	found.text = text.String()
	if compared.Taken == "" {
		found.Problem = "the daemon does not start: " + compared.Error
	}

	found.Advice = modeAdvice(compared, option, forced)
	if compared.Remedy != "" {
		found.advise(compared.Remedy, "the page cache holds tars once, not twice")
	}
	return found
}

// modeAdvice says what would make a better mode work, or be taken.
func modeAdvice(compared unpack.Comparison, option string, forced unpack.Mode) (all []advice) {
	// Several modes may lack the same; the first one gains the most by it.
	add := func(do, gain string) {
		if !slices.ContainsFunc(all, func(a advice) bool { return a.Do == do }) {
			all = append(all, advice{Do: do, Gain: gain})
		}
	}
	trials := compared.Trials
	from := compared.Taken
	best := slices.IndexFunc(trials, func(t unpack.Trial) bool { return t.Works }) // what "auto" takes
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

// result says what became of a mode.
func result(t unpack.Trial, taken, forced unpack.Mode) string {
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

func (f *finding) advise(do, gain string) { f.Advice = append(f.Advice, advice{Do: do, Gain: gain}) }

// where is the directory in which something was tried, and why not in p itself.
func where(p unpack.Place) string {
	if p.Existing == filepath.Clean(p.Path) {
		return p.Path
	}
	return fmt.Sprintf("%s, for %s is not there yet", p.Existing, p.Path)
}

// checkContentRoot tries how the daemon can retain containerd's blobs.
func checkContentRoot(_ context.Context, cfg patient) finding {
	root, err := unpack.Locate(cfg.Root)
	if err != nil {
		return failed(err)
	}
	s, err := unpack.DiagnoseSharing(root, blobs.Dir(cfg.ContentRoot))
	if err != nil {
		return failed(err)
	}
	found := finding{Facts: s}
	var text strings.Builder
	fmt.Fprintln(&text, retention(s))
	fmt.Fprintln(&text, "DIRECTORY\tFILESYSTEM\tDEVICE\tMOUNTED AT\tPATH")
	for _, d := range []struct {
		name string
		unpack.Place
	}{{"root", s.Root}, {"blobs", s.Blobs}} {
		fmt.Fprintf(&text, "%s\t%s\t%s\t%s\t%s\n", d.name, d.Type, d.Device, d.Mount, there(d.Place))
	}
	found.text = text.String()
	if s.Blob != "" && s.Retention == "" {
		found.Problem = fmt.Sprintf("blob %s can be neither linked into root nor copied: %s", s.Blob, s.Error)
	}
	if s.Blobs.Existing != s.Blobs.Path {
		found.advise("if something has been pulled, set content_root to what `ctr plugins ls --detailed id==content | grep root` prints",
			"the daemon finds the blobs")
	}
	const gain = "models take no second copy on the disk"
	switch {
	case s.Retention == unpack.Linked, s.Retention == unpack.Reflinked:
	case s.Apart == unpack.FilesystemBoundary:
		found.advise(fmt.Sprintf("move root to the filesystem of content_root (%s, mounted at %s)", s.Blobs.Device, s.Blobs.Mount), gain)
	case s.Apart == unpack.MountBoundary:
		found.advise(fmt.Sprintf("put root and content_root on one mount of their filesystem (now %s and %s)", s.Root.Mount, s.Blobs.Mount), gain)
	case s.Apart == unpack.SubvolumeBoundary && s.Retention == unpack.Copied:
		found.advise("put root into the subvolume of content_root", gain)
	}
	if err := store.CanWatch(cfg.Blobs()); err != nil {
		found.advise(err.Error(), "a daemon that starts now is told of new and deleted blobs, and need not look for them once a second")
	}
	if s.Root.Type == "overlay" {
		found.advise("move root to ext4, xfs or btrfs, in a container to a volume",
			"the containers of pods start, whose own root filesystem overlayfs cannot have on an overlay")
	}
	return found
}

// retention says how blobs are retained.
func retention(s unpack.Sharing) string {
	switch {
	case s.Retention == unpack.Linked:
		return fmt.Sprintf("blobs are linked into root, without a copy (tried with %s)", s.Blob)
	case s.Retention == unpack.Reflinked:
		return fmt.Sprintf("blobs are reflinked into root, without a copy, since they cannot be linked (tried with %s: %s)", s.Blob, s.Error)
	case s.Retention == unpack.Copied:
		return fmt.Sprintf("blobs are copied into root, since they can be neither linked nor reflinked (tried with %s: %s)", s.Blob, s.Error)
	case s.Blob != "":
		return fmt.Sprintf("blobs cannot be retained (tried with %s: %s)", s.Blob, s.Error)
	}
	const untried = "not tried, for there is no blob yet; blobs "
	switch s.Apart {
	case "":
		return untried + "can be linked into root, which is on the same filesystem"
	case unpack.MountBoundary:
		return untried + "cannot be linked into root, which is on the same filesystem but on another mount of it"
	case unpack.SubvolumeBoundary:
		return untried + "cannot be linked into root, which is another subvolume of the same filesystem"
	default:
		return untried + "cannot be linked into root, which is on another filesystem"
	}
}

// there is the path of p, and whether it is there.
func there(p unpack.Place) string {
	if p.Existing == filepath.Clean(p.Path) {
		return p.Path
	}
	return p.Path + " (not there yet)"
}
