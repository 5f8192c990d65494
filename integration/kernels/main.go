// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command kernels boots Debian's kernels in virtual machines and runs the tests that depend
// on the kernel: those of the packages that lay out layers, and a node with containerd
// whose pods read image volumes in every mode. It prints the table of docs/support.md. It
// fails if a mode that the kernel supports does not work, or if a mode is chosen that the
// kernel does not support. It needs root, qemu, and what `make build tools` builds; it
// downloads kernels to bin/kernels.
//
//	go run ./integration/kernels [-accel tcg] [5.10 …]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kernel is a kernel of Debian.
type kernel struct {
	series string // the beginning of its release
	source string // its line of sources.list(5), without the component
	// raws and tars are the modes that it supports, the best first.
	raws, tars []string
	// noUserNamespaces is the reason why no pod can have a user namespace, or "".
	noUserNamespaces string
}

var kernels = []kernel{
	{"5.10", "http://deb.debian.org/debian-security bullseye-security", []string{"link", "copy"}, []string{"extract"}, "runc needs idmapped mounts, of Linux 5.12"},
	{"6.1", "http://deb.debian.org/debian-security bookworm-security", []string{"link", "copy"}, []string{"erofs-loop", "extract"}, ""},
	// Debian's 6.12 has backports; it supports the EROFS option directio of 6.13.
	{"6.12", "http://deb.debian.org/debian bookworm-backports", []string{"overlay", "link", "copy"}, []string{"erofs", "erofs-loop", "erofs-buffered", "extract"}, ""},
	{"7.3", "http://deb.debian.org/debian trixie-backports", []string{"overlay", "link", "copy"}, []string{"erofs", "erofs-loop", "erofs-buffered", "extract"}, ""},
}

// suite selects the tests of one package.
type suite struct {
	pkg, run string
	// long are tests that take minutes on an emulated processor and do not depend on the
	// kernel: they decompress or count a lot.
	long []string
	// modes lists, for a mode, the tests that are impossible without it.
	modes map[string][]string
}

var suites = []suite{
	{pkg: "integration", run: "^TestEveryModeOfTheKernel$"},
	{pkg: "unpack", long: []string{
		"TestComparingWithLayersBelowEndsWithTheContext", "TestExpansionIsLimited", "TestTheReserveOfTheDiskStaysFree", "TestLayersAreDecompressedWithinAnyBudget", "TestACancelledBuildEndsWhileItDecompresses",
		"TestLinksToALargeMemberCountLikeIt", "TestHeadersThatAddNoFileCount", "TestTargetsAndAttributesCountAsNames", "TestTwentyThousandRawFilesAreMounted", "TestTenThousandNamesInADirectoryAreMounted", "Fuzz.*",
	}},
	{pkg: "unpack/differ"},
	{pkg: "store", modes: map[string][]string{"overlay": {
		"TestAnObserverIsToldHowBytesCame", "TestAnObserverIsToldWhatGarbageCollectionFrees", "TestEachUserNamespaceHasItsTree", "TestAShiftedTreeIsRemovedWithItsLastPod",
		"TestAChangeOfTheModeWhileAPodRuns", "TestADecompressedTarIsRemovedWithTheLastTreeThatLinksToIt",
	}}},
	{pkg: "snapshot"},
}

func (s suite) name() string { return strings.ReplaceAll(s.pkg, "/", "-") }

// impossible returns the tests that need a mode that k does not support.
func (s suite) impossible(k kernel) (tests []string) {
	for mode, names := range s.modes {
		if !slices.Contains(slices.Concat(k.raws, k.tars), mode) {
			tests = append(tests, names...)
		}
	}
	slices.Sort(tests)
	return slices.Compact(tests)
}

// script returns the shell script that runs every suite in the machine. Its last line marks
// a complete run.
func script(k kernel) string {
	var b strings.Builder
	fmt.Fprintf(&b, "export ARTIFACT_SNAPSHOTTER_BIN=/tests/artifact-snapshotter ARTIFACT_SNAPSHOTTER_TOOLS=/tools ARTIFACT_SNAPSHOTTER_MODES=%s\n",
		strings.Join(slices.Concat(k.raws, k.tars), ","))
	for _, s := range suites {
		skip := "^(" + strings.Join(slices.Concat(s.impossible(k), s.long, []string{"-"}), "|") + ")$"
		fmt.Fprintf(&b, "echo 'suite %s begins'\ncd /tests/%s\n./test -test.v -test.timeout=60m -test.run='%s' -test.skip='%s'\necho 'suite %[1]s ends' $?\n",
			s.pkg, s.name(), s.run, skip)
	}
	return b.String() + "echo all suites have ended\n"
}

func main() {
	accel := flag.String("accel", "", "kvm or tcg; default: kvm if the machine has it")
	flag.Parse()
	if err := run(*accel, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(accel string, series []string) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if accel == "" {
		accel = bestAccel()
	}
	scratch, err := os.MkdirTemp("", "kernels-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	tools, err := filepath.Abs("integration/tools/bin")
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "==> building the tests")
	disk := filepath.Join(scratch, "disk")
	if err := makeDisk(ctx, disk, filepath.Join(scratch, "files"), tools); err != nil {
		return err
	}
	var results []result
	var failed []error
	for _, k := range kernels {
		if len(series) > 0 && !slices.Contains(series, k.series) {
			continue
		}
		start := time.Now()
		var r result
		r, accel, err = boot(ctx, k, accel, disk, filepath.Join(scratch, k.series))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("kernel %s: %w; see %s and %s", k.series, err, logPath(k.series, "console"), logPath(k.series, "results")))
		}
		results = append(results, r)
		fmt.Fprintf(os.Stderr, "==> Linux %s, %s: %s\n", r.release, time.Since(start).Round(time.Second), r.counts())
	}
	if len(results) == 0 {
		return fmt.Errorf("no kernel matches %q", series)
	}
	write(os.Stdout, results)
	return errors.Join(failed...)
}

// boot runs the tests on k. It also returns the acceleration that it used in the end.
func boot(ctx context.Context, k kernel, accel, disk, scratch string) (result, string, error) {
	r := result{kernel: k}
	dir, err := filepath.Abs(filepath.Join("bin", "kernels", k.series))
	if err != nil {
		return r, accel, err
	}
	release, err := download(ctx, dir, k.source)
	if err != nil {
		return r, accel, err
	}
	if !strings.HasPrefix(release, k.series+".") {
		return r, accel, fmt.Errorf("%q has the unexpected kernel %s", k.source, release)
	}
	files, err := modules(filepath.Join(dir, "lib/modules", release), guestModules...)
	if err != nil {
		return r, accel, err
	}
	m := machine{
		accel: accel, kernel: filepath.Join(dir, "boot", "vmlinuz-"+release), initramfs: scratch + ".initramfs", disk: disk,
		console: logPath(k.series, "console"), results: logPath(k.series, "results"),
	}
	if err := makeInitramfs(ctx, m.initramfs, scratch, files); err != nil {
		return r, accel, err
	}
	if err := writeToDisk(ctx, disk, scratch+".sh", script(k)); err != nil {
		return r, accel, err
	}
	fmt.Fprintf(os.Stderr, "==> booting Linux %s (%s)\n", release, m.accel)
	err = m.run(ctx)
	if errors.Is(err, errNoBoot) && m.accel == "kvm" {
		fmt.Fprintln(os.Stderr, "==> KVM cannot boot it here; trying software emulation:", err)
		m.accel = "tcg"
		err = m.run(ctx)
	}
	return r, m.accel, errors.Join(err, r.read(m.results))
}

// writeToDisk replaces the script on the disk.
func writeToDisk(ctx context.Context, disk, file, text string) error {
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	for _, request := range []string{"rm /tests/run.sh", "write " + file + " /tests/run.sh"} {
		if _, err := command(ctx, "", "debugfs", "-w", "-R", request, disk); err != nil {
			return err
		}
	}
	return nil
}
