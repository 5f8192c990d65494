// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command matrix runs the tests of package integration with several versions of containerd
// and prints the Markdown table of docs/support.md: which feature works with which version.
// It needs root, and the programs that `make tools` builds.
//
//	go run ./integration/matrix integration/tools/bin-2.1.9 integration/tools/bin
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// capabilities are the rows of the table, each with the tests that prove it.
var capabilities = []struct {
	name  string
	tests []string
}{
	{"image volumes, by crictl", []string{"TestAModelIsMountedAsItWasPacked", "TestAnIndexIsResolvedToThisPlatform", "TestTwoContainersAndTwoPodsShareOneMount", "TestAVolumeCannotBeWritten"}},
	{"sub paths of image volumes", []string{"TestASubPathAndTwoVolumesOfOneModel"}},
	{"user namespaces", []string{"TestAPodWithAUserNamespaceSeesItsOwnOwners", "TestPodsWithDifferentUserNamespacesShareAnArtifact", "TestTheRootFileSystemOfAPodWithAUserNamespace"}},
	{"the snapshotter of the node", []string{"TestOrdinaryImagesAreServedAsByOverlayfs", "TestAPodGoesOnReadingWhenTheDaemonOrContainerdEnds"}},
	{"the snapshotter of a runtime handler", []string{"TestOneRuntimeHandlerHasTheSnapshotter", "TestPodsOfTheDefaultHandlerDoNotNeedTheDaemon", "TestAnImagePulledForOneHandlerIsUnpackedForTheOther"}},
	{"refusals in the pod's event", []string{"TestAnArtifactThatBreaksARuleIsRefused"}},
	{"containerd's own unpacker, with the differ", []string{"TestContainerdUnpacksADockerModel", "TestContainerdUnpacksTars", "TestTheDifferUnpacksForStockOverlayfs"}},
	{"`unpack`, the protocol of remote snapshotters", []string{"TestAnUnpackedArtifactIsASnapshotUntilItsImageIsDeleted", "TestAPodHasAnUnpackedArtifact", "TestUnpackCanBeKilledAtAnyTime"}},
	{"`pull`, by the transfer service", []string{"TestTheToolPullsMountsVerifiesAndPrunes", "TestPullOnATerminalAndWithAPassword"}},
	{"shared configs, by image events", []string{"TestArtifactsWithOneConfigAreNotMixedUp"}},
	{"`doctor`", []string{"TestDoctorFindsNoProblemOnAGoodNode", "TestDoctorsLinesConfigureContainerd", "TestDoctorFindsEachProblemOfANode"}},
	{"[`install` and `uninstall`](install.md), the systemd unit", []string{"TestInstallWorksWithTheFilesOfNodes", "TestInstallAndUninstall", "TestTheUnit"}},
	{"the recipes of kubernetes.md, by crictl", []string{"TestPrivateRegistry", "TestVerifierChecksSignatures", "TestVerifierAllowsDigests", "TestAirGappedNode", "TestPinnedModel", "TestMirrorServesArtifacts", "TestPageCacheIsChargedToTheFirstReader", "TestImageFilesystemUsage"}},
	{"garbage collection under load", []string{"TestGarbageCollectionWhileMountsUnpacksAndPullsRun"}},
	{"metrics, health and the log", []string{"TestMetricsCountWhatTheDaemonDoes", "TestMetricsCountRefusalsByReason", "TestTheLogHasEachImageVolume", "TestHealthReportsWhetherTheDaemonServes"}},
	{"traces that go on in the daemon", []string{"TestSpansOfTheDaemonAreInTheTracesOfContainerd"}},
}

// skipped are tests that need a kubelet, and the suite of Kubernetes, which takes minutes.
const skipped = "^(TestKubelet.*|TestCRIValidationSuite)$"

func main() {
	only := flag.String("run", "", "run only the tests that match this pattern")
	flag.Parse()
	if err := run(os.Stdout, *only, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

// result is the outcome of all tests with one version.
type result struct {
	version string
	took    time.Duration
	passed  map[string]bool     // by test
	differs map[string][]string // differences that the test logged, by test
}

func run(w io.Writer, only string, dirs []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if len(dirs) == 0 {
		return errors.New("name at least one directory with containerd, ctr and containerd-shim-runc-v2")
	}
	tmp, err := os.MkdirTemp("", "matrix-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	tests := filepath.Join(tmp, "integration.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", tests, "./integration")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	var results []result
	var failed []error
	for _, dir := range dirs {
		r, err := runOn(ctx, tests, dir, only)
		if err != nil {
			failed = append(failed, err)
		}
		if ctx.Err() != nil {
			return errors.Join(failed...)
		}
		results = append(results, r)
		fmt.Fprintf(os.Stderr, "==> containerd %s: %d of %d tests passed in %s\n", r.version, r.count(), len(r.passed), r.took.Round(time.Second))
	}
	write(w, results)
	return errors.Join(failed...)
}

// runOn runs the tests with the containerd in dir. Their output goes to
// bin/matrix-<version>.log.
func runOn(ctx context.Context, tests, dir, only string) (result, error) {
	r := result{passed: map[string]bool{}, differs: map[string][]string{}}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return r, err
	}
	// "containerd github.com/containerd/containerd/v2 2.4.2+unknown"
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "containerd"), "--version").Output()
	fields := strings.Fields(string(out))
	if err != nil || len(fields) < 3 {
		return r, fmt.Errorf("the version of the containerd in %s: %q, %w", dir, out, err)
	}
	r.version, _, _ = strings.Cut(strings.TrimPrefix(fields[2], "v"), "+")

	log, err := os.Create(filepath.Join("bin", "matrix-"+r.version+".log"))
	if err != nil {
		return r, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, tests, "-test.v", "-test.timeout=60m", "-test.skip="+skipped, "-test.run="+only)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
	cmd.Dir = "integration"
	cmd.Env = append(os.Environ(), "ARTIFACT_SNAPSHOTTER_CONTAINERD="+dir)
	cmd.Stdout, cmd.Stderr = log, log
	start := time.Now()
	failed := cmd.Run()
	r.took = time.Since(start)
	if _, err := log.Seek(0, io.SeekStart); err != nil {
		return r, err
	}
	if err := r.read(log); err != nil {
		return r, err
	}
	if failed != nil {
		return r, fmt.Errorf("containerd %s: %w, see %s", r.version, failed, log.Name())
	}
	return r, nil
}

var (
	current    = regexp.MustCompile(`^=== (?:RUN|NAME|CONT) +(Test[^/\s]+)`)
	ended      = regexp.MustCompile(`^--- (PASS|FAIL): (Test\S+)`)
	difference = regexp.MustCompile(`^ +\S+\.go:\d+: containerd (before 2\.\d+: .*)$`)
)

// read parses the output of the tests.
func (r *result) read(log io.Reader) error {
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 16<<20)
	test := ""
	for lines.Scan() {
		if m := current.FindStringSubmatch(lines.Text()); m != nil {
			test = m[1]
		}
		if m := ended.FindStringSubmatch(lines.Text()); m != nil {
			r.passed[m[2]] = m[1] == "PASS"
		}
		if m := difference.FindStringSubmatch(lines.Text()); m != nil && !slices.Contains(r.differs[test], m[1]) {
			r.differs[test] = append(r.differs[test], m[1])
		}
	}
	return lines.Err()
}

func (r *result) count() (passed int) {
	for _, ok := range r.passed {
		if ok {
			passed++
		}
	}
	return passed
}

// write prints the table, and below it the differences of older versions as numbered notes.
func write(w io.Writer, results []result) {
	row := func(cells []string) { fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | ")) }
	head, line := []string{"containerd"}, []string{"---"}
	for _, r := range results {
		head, line = append(head, r.version), append(line, "---")
	}
	row(head)
	row(line)
	var notes []string
	for _, c := range capabilities {
		cells := []string{c.name}
		for _, r := range results {
			cells = append(cells, r.cell(c.tests, &notes))
		}
		row(cells)
	}
	cells := []string{"tests that passed"}
	for _, r := range results {
		cells = append(cells, fmt.Sprintf("%d of %d", r.count(), len(r.passed)))
	}
	row(cells)
	fmt.Fprintln(w)
	for i, note := range notes {
		fmt.Fprintf(w, "%d. %s\n", i+1, note)
	}
}

// cell returns the cell for some tests, with the numbers of their notes. It adds new notes
// to the list.
func (r *result) cell(tests []string, notes *[]string) string {
	works := "yes"
	var numbers []string
	for _, test := range tests {
		ok, ran := r.passed[test]
		if !ran {
			return "not run"
		}
		if !ok {
			return "**no**"
		}
		for _, note := range r.differs[test] {
			i := slices.Index(*notes, note)
			if i < 0 {
				i = len(*notes)
				*notes = append(*notes, note)
			}
			if number := fmt.Sprint(i + 1); !slices.Contains(numbers, number) {
				numbers = append(numbers, number)
			}
			if strings.Contains(note, ": no ") {
				works = "no"
			} else if works == "yes" {
				works = "partly"
			}
		}
	}
	if len(numbers) > 0 {
		works += " (" + strings.Join(numbers, ", ") + ")"
	}
	return works
}
