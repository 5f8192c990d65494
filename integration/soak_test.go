// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

const soakWorkers = 8

// soak is a node under a mixed load.
type soak struct {
	tally
	n        *node.Node
	c        *client.Client
	metrics  string // socket
	subPaths bool   // whether containerd supports them, and lets containers share a volume in a user namespace

	mountable, bad []*soaked
	restarts       windows
	failures       atomic.Int64 // in this round
	// at is closed when the workers together have done this number of operations
	after atomic.Int64
	at    chan struct{}

	logged   int // bytes of the daemon's log that were already checked
	mostRSS  int // KiB, maximum of all daemons
	compared int // volumes, by check
}

// step is called after each operation.
func (s *soak) step() {
	if s.after.Add(-1) == 0 {
		close(s.at)
	}
}

// excuse counts an error that is not a fault of the daemon.
func (s *soak) excuse(why, text string) {
	s.count(why)
	if os.Getenv("ARTIFACT_SNAPSHOTTER_SOAK_DEBUG") != "" {
		fmt.Fprintf(os.Stderr, "%s: %.1500s\n", why, text)
	}
}

// Eight workers pull, run pods, delete, mount and collect garbage in random order, and some
// give up in the middle, while the daemon and containerd are restarted and killed. After
// each round and at the end, everything on the node must belong to a running pod or an
// existing image.
func TestNothingIsLostOrLeftByAnythingAtOnce(t *testing.T) {
	// operations of each worker in a round; 12 take about 30 seconds on two cores
	operations, rounds, least := 4, 2, time.Duration(0)
	if os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != "" {
		operations, rounds, least = 12, len(restarts), 10*time.Minute
	} else if testing.Short() {
		rounds = 1
	}
	seed := uint64(1)
	if text := os.Getenv("ARTIFACT_SNAPSHOTTER_SOAK_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		check(t, err)
	}
	t.Logf("ARTIFACT_SNAPSHOTTER_SOAK_SEED=%d", seed)

	n, metrics := metered(t, node.Options{RaceDaemon: true, DaemonConfig: "tar_mode = 'auto'\n"})
	s := &soak{n: n, c: connect(t, n), metrics: metrics, subPaths: !older(t, n, 2, noSubPaths)}
	s.mountable, s.bad = soakedMounted(t, n), soakedRefused(t, n)
	workers := make([]*worker, soakWorkers)
	forms := []pack.Form{pack.Raw, pack.TarGzip, pack.TarZstd, pack.Tar}
	for i := range workers {
		w := &worker{soak: s, own: comesAndGoes{c: s.c, target: mountPoint(t)}}
		w.own.ref, w.own.want = ownModel(t, n, i, forms[i%len(forms)])
		workers[i] = w
	}
	// Do everything once, so that everything that stays exists.
	first, err := n.RunPod(node.PodSpec{})
	check(t, err)
	check(t, first.Remove())
	check(t, workers[1].own.round(t.Context()))
	idle := s.settled(t)
	began := time.Now()

	conductor := rand.New(rand.NewPCG(seed, 0))
	var order []int
	done := 0
	for ; done < rounds || time.Since(began) < least; done++ {
		if len(order) == 0 {
			order = conductor.Perm(len(restarts))
		}
		restart := restarts[order[0]]
		order = order[1:]
		for i, w := range workers {
			w.random = rand.New(rand.NewPCG(seed, uint64(1+done*soakWorkers+i)))
		}
		start := time.Now()
		s.round(t, workers, operations, 1+conductor.Int64N(int64(soakWorkers*operations*2/3)), restart)
		worked := time.Since(start)
		s.check(t, workers, idle)
		t.Logf("round %d, with %s: %v, checked in %v", done+1, restart.name, worked.Round(time.Second), (time.Since(start) - worked).Round(time.Second))
		if t.Failed() {
			t.FailNow()
		}
	}
	took := time.Since(began)
	for _, w := range workers {
		for _, p := range w.pods {
			check(t, p.Remove())
		}
		w.pods = nil
	}
	s.wantGone(t, idle)
	s.report(t, done, took, idle)
	check(t, n.StopDaemon())
	s.readLog(t)
}

// restart ends and starts a process.
type restart struct {
	name       string
	end, start func(*soak) error
}

var restarts = []restart{
	{"no restart", func(*soak) error { return nil }, func(*soak) error { return nil }},
	{"containerd, SIGTERM", func(s *soak) error { return s.n.StopContainerd() }, func(s *soak) error { return s.n.StartContainerd() }},
	{"containerd, SIGKILL", func(s *soak) error { return s.n.KillContainerd() }, func(s *soak) error { return s.n.StartContainerd() }},
	{"daemon, SIGTERM", func(s *soak) error { return s.n.StopDaemon() }, func(s *soak) error { return s.n.StartDaemon() }},
	{"daemon, SIGKILL", func(s *soak) error { return s.n.KillDaemon() }, func(s *soak) error { return s.n.StartDaemon() }},
	{"daemon, SIGKILL, then another mode", func(s *soak) error { return s.n.KillDaemon() }, func(s *soak) error { return errors.Join(s.nextMode(), s.n.StartDaemon()) }},
}

var tarMode = regexp.MustCompile(`tar_mode = '(.*)'`)

// nextMode configures the next mode for tars.
func (s *soak) nextMode() error {
	modes := []string{"auto", "erofs-loop", "extract"}
	name := filepath.Join(s.n.Dir, "daemon.toml")
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	now := slices.Index(modes, string(tarMode.FindSubmatch(text)[1]))
	next := modes[(now+1)%len(modes)]
	return os.WriteFile(name, tarMode.ReplaceAll(text, []byte("tar_mode = '"+next+"'")), 0o644)
}

// round lets each worker do a number of operations, and restarts a process after a number
// of them in total.
func (s *soak) round(t *testing.T, workers []*worker, operations int, after int64, restart restart) {
	t.Helper()
	s.failures.Store(0)
	s.at = make(chan struct{})
	s.after.Store(after)
	work, ctx := errgroup.WithContext(t.Context())
	for i, w := range workers {
		work.Go(func() error {
			if err := w.round(ctx, operations); err != nil {
				return fmt.Errorf("worker %d: %w", i, err)
			}
			return nil
		})
	}
	collecting, stop := context.WithCancel(ctx)
	collector := make(chan error, 1)
	go func() {
		var err error
		for err == nil && collecting.Err() == nil {
			err = (&worker{soak: s}).try(collecting, nil, func() error { return collectGarbage(t.Context(), s.c) })
			s.count("garbage collections")
		}
		if collecting.Err() != nil {
			err = nil
		}
		collector <- err
	}()
	select {
	case <-s.at:
		s.restart(t, restart)
	case <-ctx.Done():
	}
	err := work.Wait()
	stop()
	check(t, errors.Join(err, <-collector))
}

// restart ends and starts a process, and returns when requests are answered again.
func (s *soak) restart(t *testing.T, r restart) {
	t.Helper()
	defer s.restarts.begin()()
	s.memory(t)
	check(t, r.end(s))
	check(t, r.start(s))
	waitForDaemon(t, s.n)
	waitFor(t, "containerd to answer", func() bool {
		_, err := s.c.Version(t.Context())
		return err == nil
	})
	s.count("restart: " + r.name)
}

// status returns a number from the daemon's /proc/PID/status.
func (s *soak) status(t *testing.T, field string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.n.DaemonPID()))
	check(t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			number, err := strconv.Atoi(strings.Fields(value)[0])
			check(t, err)
			return number
		}
	}
	t.Fatalf("%s is missing in %s", field, text)
	return 0
}

func (s *soak) memory(t *testing.T) {
	t.Helper()
	s.mostRSS = max(s.mostRSS, s.status(t, "VmHWM"))
}

func (s *soak) report(t *testing.T, rounds int, took time.Duration, idle holding) {
	t.Helper()
	s.memory(t)
	var out strings.Builder
	fmt.Fprintf(&out, "%d rounds in %v, %d volumes compared after them\n", rounds, took.Round(time.Second), s.compared)
	for _, what := range slices.Sorted(maps.Keys(s.counts)) {
		fmt.Fprintf(&out, "%-40s %6d\n", what, s.counts[what])
	}
	now := s.settled(t)
	fmt.Fprintf(&out, "%-40s %6d %6d\n", "goroutines, before and after", idle.goroutines, now.goroutines)
	fmt.Fprintf(&out, "%-40s %6d %6d\n", "descriptors", idle.descriptors, now.descriptors)
	fmt.Fprintf(&out, "%-40s %6d %6d\n", "files and directories", len(idle.files), len(now.files))
	fmt.Fprintf(&out, "%-40s %6d %6d\n", "resident MiB, with the race detector", idle.rss>>10, now.rss>>10)
	fmt.Fprintf(&out, "%-40s %13d\n", "at most", s.mostRSS>>10)
	t.Logf("%s", out.String())
}
