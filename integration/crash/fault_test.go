// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// errnos are the injected errors.
var errnos = []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EMFILE}

// failure is a fault in a scenario.
type failure struct {
	*scenario
	Fault
}

func (f failure) String() string {
	lasting := ""
	if f.Lasting {
		lasting = " and later"
	}
	return fmt.Sprintf("%s, %v at %v%s", f.name, f.Errno, f.At, lasting)
}

// life is a daemon that meets the faults of one scenario in turn.
type life struct {
	campaign
	*scenario
	clock bool // the clock can be set
	h     *host
}

// host starts a host with a daemon unless one is running.
func (l *life) host() (err error) {
	if l.h != nil {
		return nil
	}
	l.h, err = run{scenario: l.scenario, program: l.program, containerd: l.containerd}.host(l.newDir())
	if err != nil {
		return err
	}
	l.h.reads, l.h.clock = true, l.clock
	if l.before != nil || !l.starting {
		return l.h.start(!l.starting, false, nil, false)
	}
	return nil
}

// end stops the daemon and removes the host.
func (l *life) end() error {
	if l.h == nil {
		return nil
	}
	h := l.h
	l.h = nil
	return h.clear()
}

// met is the outcome of a fault.
type met struct {
	ops  []Op
	hit  int
	told error // the daemon's error
}

// meet runs the scenario with a fault, checks everything, and leaves an idle daemon for the
// next fault.
func (l *life) meet(f Fault) (done met, err error) {
	if err := l.host(); err != nil {
		return done, err
	}
	h := l.h
	defer func() {
		if err != nil || l.starting || h.daemon == nil {
			err = errors.Join(h.withLog(err), l.end())
		}
	}()
	if l.before != nil {
		if err := l.before(h); err != nil {
			return done, fmt.Errorf("before: %w", err)
		}
	}
	if l.starting {
		if err := h.stop(syscall.SIGKILL); err != nil {
			return done, err
		}
		h.fault = &f
		done.told = h.start(true, true, nil, false)
	} else {
		h.daemon.traced.Inject(f)
	}
	traced := h.daemon.traced
	if done.told == nil && l.act != nil {
		done.told = l.act(h)
	}
	done.ops, done.hit = traced.Heal()
	if err := l.survived(done, f); err != nil {
		return done, err
	}
	// The scenario's operations end before the next scenario starts.
	for _, step := range []func() error{
		func() error { return h.checkPods("after the fault") },
		h.checkSnapshots,
		func() error {
			err := errors.Join(h.pull(l.next...), h.checkNext(l.next))
			if err != nil && errors.Is(done.told, errNotDone) && h.understood(err.Error(), f) == nil {
				// A build that met the fault was still failing, and its error reached this
				// caller too.
				err = h.checkNext(l.next)
			}
			return err
		},
		func() error {
			if l.again == nil {
				return nil
			}
			return l.again(h)
		},
		func() error { return h.checkPods("at the end") },
		h.empty,
		h.awaitIdle,
	} {
		if err := step(); err != nil {
			return done, fmt.Errorf("after the daemon returned %v: %w", done.told, err)
		}
	}
	clear(h.may)
	return done, nil
}

// survived checks the daemon's error and that it still runs. It restarts a daemon that
// failed to start.
func (l *life) survived(done met, f Fault) error {
	h := l.h
	// On a busy machine the caller's time limit may expire.
	busy := errdefs.IsUnavailable(done.told) && strings.Contains(done.told.Error(), "is still being unpacked")
	if done.told != nil && !busy && (done.hit == 0 || f.Errno == 0) {
		return fmt.Errorf("an error although no operation failed: %w", done.told)
	}
	ended := h.daemon == nil
	if !ended {
		select {
		case <-h.daemon.done:
			ended = true
		default:
		}
	}
	switch {
	case ended && h.daemon != nil && (!l.starting || !errors.Is(done.told, errEnded)):
		return fmt.Errorf("the daemon has ended with %w", done.told)
	case ended:
		said, err := h.lastWords()
		if err == nil && h.daemon != nil {
			err = h.understood(said, f)
		}
		if err == nil {
			err = h.stop(syscall.SIGKILL)
		}
		if err == nil {
			err = h.start(true, false, nil, false)
		}
		return err
	case done.told == nil || busy || errors.Is(done.told, errNotDone):
		return nil
	}
	if (f.Errno == unix.ENOSPC || f.Errno == unix.EDQUOT) && !errdefs.IsResourceExhausted(done.told) {
		return fmt.Errorf("the error is not of the kind ResourceExhausted: %w", done.told)
	}
	return h.understood(done.told.Error(), f)
}

// understood checks that an error says what failed and where.
func (h *host) understood(text string, f Fault) error {
	if !strings.Contains(text, f.Errno.Error()) {
		return fmt.Errorf("the error does not contain %q: %s", f.Errno.Error(), text)
	}
	for _, where := range []string{h.root, h.state, h.content, "layer ", `": `, "image of metadata"} { // or a file of the artifact
		if strings.Contains(text, where) {
			return nil
		}
	}
	return fmt.Errorf("the error does not say where: %s", text)
}

// lastWords returns the last line of the daemon's log.
func (h *host) lastWords() (string, error) {
	log, err := os.ReadFile(h.logPath())
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return lines[len(lines)-1], err
}

// awaitIdle waits until the daemon, which also collects garbage by itself, has only the
// files of an idle one.
func (h *host) awaitIdle() (err error) {
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		// An abandoned request may create its snapshot only now. containerd's collector
		// removes snapshots that containerd does not know (core/metadata/snapshot.go,
		// pruneBranch).
		if err = h.empty(); err != nil {
			continue
		}
		// The daemon creates the directories of NRI's and CSI's records if it cannot read them.
		if err = h.checkIdle("state/artifact-snapshotter.sock", "root/nri", "root/csi"); err == nil {
			return nil
		}
	}
	return err
}

// failures returns the possible faults at these operations: one for each single call, and
// for every third operation one that lasts.
func failures(s *scenario, ops []Op) (all []failure) {
	for i, op := range ops {
		for j, errno := range errnos {
			if !CanFail(op, errno) {
				continue
			}
			all = append(all, failure{s, Fault{At: &op, Errno: errno}})
			if (i+j)%3 == 0 {
				all = append(all, failure{s, Fault{At: &op, Errno: errno, Lasting: true}})
			}
		}
	}
	return all
}

// tally counts outcomes.
type tally struct {
	mu    sync.Mutex
	rows  map[string]*counts // by errno and directory
	in    map[*scenario]*counts
	total counts
}

type counts struct{ injected, refused, absorbed, missed, lost int }

func (c *counts) add(done met, err error) {
	switch {
	case err != nil:
		c.lost++
	case done.hit == 0:
		c.missed++
		return
	case done.told != nil:
		c.refused++
	default:
		c.absorbed++
	}
	c.injected++
}

func (t *tally) add(f failure, done met, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	row := fmt.Sprintf("%s, %s", unix.ErrnoName(f.Errno), cmp.Or(dirOf(*f.At), "mounts"))
	if t.rows[row] == nil {
		t.rows[row] = &counts{}
	}
	if t.in[f.scenario] == nil {
		t.in[f.scenario] = &counts{}
	}
	for _, c := range []*counts{t.rows[row], t.in[f.scenario], &t.total} {
		c.add(done, err)
	}
}

// selectedFaults is the number of faults in a selection.
const selectedFaults = 80

func TestTheDaemonSurvivesEveryFault(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	all := scenarios(packModels(t))
	if only := os.Getenv("ARTIFACT_SNAPSHOTTER_SCENARIO"); only != "" {
		all = slices.DeleteFunc(all, func(s *scenario) bool { return !strings.Contains(s.name, only) })
	}
	began := time.Now()
	chosen := map[*scenario][]failure{}
	operations, possible := 0, 0
	runs := pool{dir: c.dir}
	var mu sync.Mutex
	for _, s := range all {
		runs.add(func(string) {
			l := life{campaign: c, scenario: s}
			done, err := l.meet(Fault{At: &Op{}})
			err = errors.Join(err, l.end())
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Errorf("%s, without a fault: %v", s.name, err)
				return
			}
			chosen[s] = failures(s, done.ops)
			operations += len(done.ops)
			possible += len(chosen[s])
		})
	}
	runs.running.Wait()
	if t.Failed() {
		return
	}
	listing := time.Since(began)
	if !long {
		for _, s := range all {
			chosen[s] = spread(chosen[s], selection(selectedFaults)*len(chosen[s])/possible+1)
		}
	}
	counted := tally{rows: map[string]*counts{}, in: map[*scenario]*counts{}}
	for _, s := range all {
		runs.add(func(string) {
			l := life{campaign: c, scenario: s}
			for _, f := range chosen[s] {
				done, err := l.meet(f.Fault)
				if counted.add(f, done, err); err != nil {
					t.Errorf("%v: %v", f, err)
				}
			}
			if err := l.end(); err != nil {
				t.Error(err)
			}
		})
	}
	runs.running.Wait()
	t.Logf("faults by scenario:\n%s", counted.table(all))
	t.Logf("%d scenarios, %d operations, %d faults possible; %v to list them, %v in all", len(all), operations, possible, listing.Round(time.Second), time.Since(began).Round(time.Second))
	if n := counted.total; n.missed*5 > n.missed+n.injected {
		t.Errorf("%d of %d operations did not occur again", n.missed, n.missed+n.injected)
	}
}

// spread returns n evenly spaced elements, or all if there are fewer.
func spread[T any](all []T, n int) (some []T) {
	if len(all) <= n {
		return all
	}
	for i := range n {
		some = append(some, all[i*len(all)/n])
	}
	return some
}

func (t *tally) table(all []*scenario) string {
	var table strings.Builder
	row := func(name string, c *counts) {
		if c != nil {
			fmt.Fprintf(&table, "%-60s %8d %8d %8d %8d %8d\n", name, c.injected, c.refused, c.absorbed, c.missed, c.lost)
		}
	}
	fmt.Fprintf(&table, "%-60s %8s %8s %8s %8s %8s\n", "scenario", "injected", "refused", "absorbed", "missed", "lost")
	for _, s := range all {
		row(s.name, t.in[s])
	}
	for _, errno := range errnos {
		for _, dir := range []string{"root", "state", "content", "mounts"} {
			name := fmt.Sprintf("%s, %s", unix.ErrnoName(errno), dir)
			row(name, t.rows[name])
		}
	}
	row("all", &t.total)
	return table.String()
}
