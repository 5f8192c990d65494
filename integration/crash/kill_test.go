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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// long runs everything, which takes minutes, instead of a selection.
var long = os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != ""

// TestMain gives all hosts one temporary directory, and fails if mounts or processes remain
// there.
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

// left removes dir and returns an error if mounts or processes remain.
func left(dir string) error {
	mounts, merr := node.Mounts(dir)
	processes, perr := node.Processes(dir)
	if err := errors.Join(merr, perr); err != nil {
		return err
	}
	if len(mounts) > 0 || len(processes) > 0 {
		return fmt.Errorf("the tests left the mounts %q and the processes %v in %s", mounts, processes, dir)
	}
	return os.RemoveAll(dir)
}

// run is one run of a scenario.
type run struct {
	*scenario
	program, containerd string
	target              *Op  // nil: the daemon is not killed, and its operations are listed
	after               bool // kill after the operation instead of before it
}

// result is a run's outcome.
type result struct {
	ops    []Op
	killed bool
}

// run runs the scenario in dir, which must not exist, and checks everything. It returns
// errors of the daemon and of the harness.
func (r run) run(dir string) (done result, err error) {
	h, err := r.host(dir)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(h.withLog(err), h.clear()) }()
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

// host creates the scenario's host in dir.
func (r run) host(dir string) (*host, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	h, err := newHost(dir, dir, r.program, r.containerd, fmt.Sprintf("decompress_on_pull = %v\n%s", r.decompressOnPull, r.toml))
	if err != nil {
		return nil, err
	}
	if r.apart {
		if err := unix.Mount("tmpfs", h.content, "tmpfs", 0, ""); err != nil {
			return nil, errors.Join(err, h.clear())
		}
	}
	return h, nil
}

// withLog adds the end of the daemon's log to an error.
func (h *host) withLog(err error) error {
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(h.logPath())
	lines := strings.Split(string(log), "\n")
	return fmt.Errorf("%w\nthe end of its log:\n%s", err, strings.Join(lines[max(0, len(lines)-25):], "\n"))
}

// crash runs the preparation and then the task, during which the daemon is killed. It
// returns with the daemon stopped.
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

// check checks the host after the crash and restarts the daemon.
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
	// The next pods pull deleted images again.
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

// point is an operation at which a run is killed.
type point struct {
	*scenario
	Op
	after bool
}

// campaign is many runs, several in parallel.
type campaign struct {
	dir, program, containerd string
}

// listed returns the operations of each scenario without a kill.
func (c campaign) listed(all []*scenario) (map[*scenario][]Op, error) {
	runs := pool{dir: c.dir}
	var mu sync.Mutex
	var errs []error
	points := map[*scenario][]Op{}
	for _, s := range all {
		runs.add(func(dir string) {
			done, err := run{scenario: s, program: c.program, containerd: c.containerd}.run(dir)
			mu.Lock()
			defer mu.Unlock()
			points[s] = done.ops
			if err != nil {
				errs = append(errs, fmt.Errorf("%s, without a crash: %w", s.name, err))
			}
		})
	}
	runs.running.Wait()
	return points, errors.Join(errs...)
}

// outcome has the results of many runs.
type outcome struct {
	survived, after, missed []point // after: killed right after the operation
	lost                    []error
	in                      map[*scenario]int // number of lost by scenario
}

// killed kills the daemon at each point.
func (c campaign) killed(at []point) *outcome {
	runs := pool{dir: c.dir}
	var mu sync.Mutex
	o := &outcome{in: map[*scenario]int{}}
	for _, p := range at {
		runs.add(func(dir string) {
			done, err := run{scenario: p.scenario, program: c.program, containerd: c.containerd, target: &p.Op, after: p.after}.run(dir)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				o.in[p.scenario]++
				o.lost = append(o.lost, fmt.Errorf("%s, killed at %v (after it: %v): %w", p.name, p.Op, p.after, err))
			case !done.killed:
				o.missed = append(o.missed, p)
			case p.after:
				o.after = append(o.after, p)
			default:
				o.survived = append(o.survived, p)
			}
		})
	}
	runs.running.Wait()
	return o
}

func TestTheDaemonSurvivesAKillAtEveryOperation(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	all := scenarios(packModels(t))
	only := os.Getenv("ARTIFACT_SNAPSHOTTER_SCENARIO")
	if only != "" {
		all = slices.DeleteFunc(all, func(s *scenario) bool { return !strings.Contains(s.name, only) })
	}
	began := time.Now()
	points, err := c.listed(all)
	check(t, err)
	listing := time.Since(began)
	chosen := choose(all, points)
	o := c.killed(chosen)
	for _, err := range o.lost {
		t.Error(err)
	}
	t.Logf("killed at:\n%s", o.table(all, points))
	calls, anywhere := map[string]int{}, map[string]bool{}
	for _, p := range o.survived {
		calls[p.Call]++
		anywhere[p.Key()] = true
	}
	t.Logf("distinct kill points by system call: %s", byCall(calls))
	t.Logf("%d distinct kill points survived (%d if an operation counts once for all scenarios), and %d runs killed right after an operation; %d lost; %d not met again; %v to list them, %v in all",
		len(o.survived), len(anywhere), len(o.after), len(o.lost), len(o.missed), listing.Round(time.Second), time.Since(began).Round(time.Second))
	if want := 1000; long && only == "" && len(o.survived) < want {
		t.Errorf("want at least %d distinct kill points", want)
	}
	// The daemon works in parallel, so runs differ.
	if len(o.missed)*10 > len(chosen) {
		t.Errorf("%d of %d operations did not occur again", len(o.missed), len(chosen))
	}
}

// table prints the outcome by scenario.
func (o *outcome) table(all []*scenario, points map[*scenario][]Op) string {
	var table strings.Builder
	row := func(name string, s *scenario, operations int) {
		count := func(of []point) (n int) {
			for _, p := range of {
				if s == nil || p.scenario == s {
					n++
				}
			}
			return n
		}
		lost := len(o.lost)
		if s != nil {
			lost = o.in[s]
		}
		fmt.Fprintf(&table, "%-60s %10d %8d %8d %8d %8d\n", name, operations, count(o.survived), count(o.after), count(o.missed), lost)
	}
	fmt.Fprintf(&table, "%-60s %10s %8s %8s %8s %8s\n", "scenario", "operations", "before", "after", "missed", "lost")
	operations := 0
	for _, s := range all {
		row(s.name, s, len(points[s]))
		operations += len(points[s])
	}
	row("all", nil, operations)
	return table.String()
}

// startContainerd starts a containerd and returns its socket. The daemon asks it for
// images; the tests' namespace has none.
func startContainerd(t *testing.T) (address string) {
	t.Helper()
	n, err := node.Start(t.Context(), node.Options{Stock: true})
	check(t, err)
	t.Cleanup(func() { check(t, n.Stop()) })
	return n.Address
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

// selected is the number of kill points in a selection.
const selected = 80

// selection returns the part of n that a selection has. With -short it is a quarter.
func selection(n int) int {
	if testing.Short() {
		return n / 4
	}
	return n
}

// choose returns the kill points: before every operation and after every fifth, or an
// evenly spaced selection.
func choose(all []*scenario, points map[*scenario][]Op) (chosen []point) {
	for _, s := range all {
		for i, op := range points[s] {
			chosen = append(chosen, point{s, op, false})
			if i%5 == 4 {
				chosen = append(chosen, point{s, op, true})
			}
		}
	}
	if long {
		return chosen
	}
	return spread(chosen, selection(selected))
}

// pool runs functions, two in parallel, each in its own directory.
type pool struct {
	dir     string
	running sync.WaitGroup
	tokens  chan struct{}
}

// directories is the number of directories so far.
var directories atomic.Int64

func (c campaign) newDir() string { return filepath.Join(c.dir, fmt.Sprint(directories.Add(1))) }

func (p *pool) add(f func(dir string)) {
	if p.tokens == nil {
		p.tokens = make(chan struct{}, 2)
	}
	p.tokens <- struct{}{}
	dir := filepath.Join(p.dir, fmt.Sprint(directories.Add(1)))
	p.running.Go(func() {
		defer func() { <-p.tokens }()
		f(dir)
	})
}

// shortDir returns a temporary directory with a path that is short enough for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	return dir
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
