// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// long is whether all is run that there is, some minutes of it, and not a selection.
var long = os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != ""

// TestMain gives all hosts one temporary directory and fails the run if, at its end,
// anything is mounted or running there.
func TestMain(m *testing.M) {
	Main()
	dir, err := os.MkdirTemp("", "as-")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o711), os.Setenv("TMPDIR", dir))
	}
	code := 1
	if err == nil {
		code = m.Run()
		err = left(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}

// left removes dir, and returns what should not have been there any more.
func left(dir string) error {
	mounts, merr := node.Mounts(dir)
	processes, perr := node.Processes(dir)
	if err := errors.Join(merr, perr); err != nil {
		return err
	}
	if len(mounts) > 0 || len(processes) > 0 {
		return fmt.Errorf("the tests left mounts %q and processes %v in %s", mounts, processes, dir)
	}
	return os.RemoveAll(dir)
}

// run is one run of a scenario.
type run struct {
	*scenario
	program, containerd string
	target              *Op  // nil: the daemon is not killed, and its operations are listed
	after               bool // kill when the operation has been done
}

// result is how it went.
type result struct {
	ops    []Op
	killed bool
}

// run runs the scenario in dir, which must not exist, and checks everything. An error
// is one of the daemon, or of the harness.
func (r run) run(dir string) (done result, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return done, err
	}
	h, err := newHost(dir, dir, r.program, r.containerd, fmt.Sprintf("decompress_on_pull = %v\n%s", r.early, r.toml))
	if err != nil {
		return done, err
	}
	defer func() {
		if err != nil {
			log, _ := os.ReadFile(h.logPath())
			lines := strings.Split(string(log), "\n")
			err = fmt.Errorf("%w\nthe end of its log:\n%s", err, strings.Join(lines[max(0, len(lines)-25):], "\n"))
		}
		err = errors.Join(err, h.clear())
	}()
	if r.apart {
		if err := unix.Mount("tmpfs", h.content, "tmpfs", 0, ""); err != nil {
			return done, err
		}
	}
	if done.ops, done.killed, err = r.crash(h); err != nil {
		return done, err
	}
	if err := r.check(h); err != nil {
		return done, err
	}
	if err := errors.Join(h.empty(), h.stop(syscall.SIGTERM), h.checkDatabase()); err != nil {
		return done, fmt.Errorf("removing everything: %w", err)
	}
	return done, h.checkIdle()
}

// crash does what is before and what is to be crashed. The daemon does not run then.
func (r run) crash(h *host) (ops []Op, killed bool, err error) {
	if r.before != nil || !r.starting {
		if err := h.start(!r.starting, false, nil, false); err != nil {
			return nil, false, err
		}
	}
	if r.before != nil {
		if err := r.before(h); err != nil {
			return nil, false, fmt.Errorf("before: %w", err)
		}
	}
	if r.starting {
		if err := h.stop(syscall.SIGKILL); err != nil {
			return nil, false, err
		}
		err = h.start(true, true, r.target, r.after)
	} else {
		h.daemon.traced.Arm(r.target, r.after)
	}
	traced := h.daemon.traced
	if err == nil && r.act != nil {
		err = r.act(h)
	}
	ops = traced.Disarm()
	if serr := h.stop(syscall.SIGKILL); serr != nil {
		return ops, false, serr
	}
	if killed = traced.Killed() != nil; killed {
		return ops, true, nil
	}
	if err != nil {
		err = fmt.Errorf("not killed: %w", err)
	}
	return ops, false, err
}

// check checks the host after the crash, and starts the daemon again.
func (r run) check(h *host) error {
	if err := errors.Join(h.checkPods("while the daemon is dead"), h.checkDatabase()); err != nil {
		return err
	}
	if err := h.start(false, false, nil, false); err != nil {
		return fmt.Errorf("start again: %w", err)
	}
	if err := h.checkPods("when the daemon is back"); err != nil {
		return err
	}
	if err := h.checkSnapshots(); err != nil {
		return err
	}
	// What has been deleted is pulled again for the next pods.
	if err := errors.Join(h.pull(r.next...), h.checkNext(r.next)); err != nil {
		return err
	}
	if r.again != nil {
		if err := r.again(h); err != nil {
			return fmt.Errorf("doing it again: %w", err)
		}
	}
	return h.checkPods("at the end")
}

// point is where a run is killed.
type point struct {
	*scenario
	Op
	after bool
}

func TestTheDaemonIsKilledAtEveryOperation(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	containerd := startContainerd(t)
	all := scenarios(packModels(t))
	if only := os.Getenv("ARTIFACT_SNAPSHOTTER_SCENARIO"); only != "" {
		all = slices.DeleteFunc(all, func(s *scenario) bool { return !strings.Contains(s.name, only) })
	}
	began := time.Now()
	runs := pool{dir: t.TempDir(), workers: 2}

	var mu sync.Mutex
	points := map[*scenario][]Op{}
	for _, s := range all {
		runs.add(func(dir string) {
			done, err := run{scenario: s, program: program, containerd: containerd}.run(dir)
			if err != nil {
				t.Errorf("%s, without a crash: %v", s.name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			points[s] = done.ops
		})
	}
	runs.wait()
	if t.Failed() {
		return
	}
	chosen := choose(all, points)
	counting := time.Since(began)

	outcome := map[*scenario]*tally{}
	calls, anywhere := map[string]int{}, map[string]bool{}
	for _, s := range all {
		outcome[s] = &tally{operations: len(points[s])}
	}
	for _, p := range chosen {
		runs.add(func(dir string) {
			done, err := run{
				scenario: p.scenario, program: program, containerd: containerd,
				target: &p.Op, after: p.after,
			}.run(dir)
			mu.Lock()
			defer mu.Unlock()
			o := outcome[p.scenario]
			switch {
			case err != nil:
				o.lost++
				t.Errorf("%s, killed at %v (after it: %v): %v", p.name, p.Op, p.after, err)
			case !done.killed:
				o.missed++
			case p.after:
				o.after++
			default:
				o.survived++
				calls[p.Call]++
				anywhere[p.Key()] = true
			}
		})
	}
	runs.wait()
	total := &tally{}
	var table strings.Builder
	fmt.Fprintf(&table, "%-60s %10s %8s %8s %8s %8s\n", "scenario", "operations", "before", "after", "missed", "lost")
	for _, s := range all {
		o := outcome[s]
		fmt.Fprintf(&table, "%-60s %10d %8d %8d %8d %8d\n", s.name, o.operations, o.survived, o.after, o.missed, o.lost)
		total.add(o)
	}
	fmt.Fprintf(&table, "%-60s %10d %8d %8d %8d %8d\n", "all", total.operations, total.survived, total.after, total.missed, total.lost)
	t.Logf("killed at:\n%s", &table)
	t.Logf("distinct kill points by system call: %s", byCall(calls))
	t.Logf("%d distinct kill points survived (%d if an operation counts once for all scenarios), and %d runs killed right after an operation; %d lost; %d not met again; %v to count, %v in all",
		total.survived, len(anywhere), total.after, total.lost, total.missed, counting.Round(time.Second), time.Since(began).Round(time.Second))
	if want := 1000; long && total.survived < want {
		t.Errorf("these are fewer than %d", want)
	}
	// What a run does is not the same each time: several things are done at once.
	if total.missed*10 > len(chosen) {
		t.Errorf("%d of %d operations were not met again", total.missed, len(chosen))
	}
}

// startContainerd starts a containerd and returns its socket. The daemon asks it which
// images there are: none in the namespace of the tests.
func startContainerd(t *testing.T) (address string) {
	t.Helper()
	n, err := node.Start(t.Context(), node.Options{Stock: true})
	check(t, err)
	t.Cleanup(func() { check(t, n.Stop()) })
	return n.Address
}

// tally counts runs.
type tally struct{ operations, survived, after, missed, lost int }

func (t *tally) add(o *tally) {
	t.operations += o.operations
	t.survived += o.survived
	t.after += o.after
	t.missed += o.missed
	t.lost += o.lost
}

func byCall(calls map[string]int) string {
	names := slices.SortedFunc(maps.Keys(calls), func(a, b string) int {
		return cmp.Or(calls[b]-calls[a], strings.Compare(a, b))
	})
	for i, name := range names {
		names[i] = fmt.Sprintf("%s %d", name, calls[name])
	}
	return strings.Join(names, ", ")
}

// selected is how many kill points a selection has.
const selected = 80

// choose is where to kill: before every operation, and after every fifth; or some of
// those, spread over all.
func choose(all []*scenario, points map[*scenario][]Op) (chosen []point) {
	for _, s := range all {
		for i, op := range points[s] {
			chosen = append(chosen, point{s, op, false})
			if i%5 == 4 {
				chosen = append(chosen, point{s, op, true})
			}
		}
	}
	if long || len(chosen) <= selected {
		return chosen
	}
	for i := range selected {
		chosen[i] = chosen[i*len(chosen)/selected]
	}
	return chosen[:selected]
}

// pool runs functions, several at a time, each with a directory of its own.
type pool struct {
	dir     string
	workers int

	number  int
	running sync.WaitGroup
	tokens  chan struct{}
}

func (p *pool) add(f func(dir string)) {
	if p.tokens == nil {
		p.tokens = make(chan struct{}, p.workers)
	}
	p.tokens <- struct{}{}
	p.number++
	dir := filepath.Join(p.dir, fmt.Sprint(p.number))
	p.running.Go(func() {
		defer func() { <-p.tokens }()
		f(dir)
	})
}

func (p *pool) wait() { p.running.Wait() }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
