// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// few returns a few of the scenarios without a start or stop, or all of them with long.
func few(m *models) (some []*scenario) {
	for i, s := range scenarios(m) {
		if !s.starting && s.name != "stop" && (long || i%6 == 4) {
			some = append(some, s)
		}
	}
	return some
}

// The wall clock jumps by a year, ahead or back, during every operation, and the daemon
// does not depend on it.
func TestTheDaemonIgnoresTheWallClock(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	const year = 365 * 24 * time.Hour
	jumps := 0
	var logs strings.Builder
	for _, s := range few(packModels(t)) {
		l := life{campaign: c, scenario: s, clock: true}
		done, err := l.meet(Fault{At: &Op{}})
		check(t, err)
		for i, op := range spread(done.ops, 6) {
			by := year - time.Duration(i%2)*2*year
			jump := Fault{At: &op, Hook: func(p *Process) { p.Skew(by) }}
			done, err := l.meet(jump)
			if err != nil {
				t.Errorf("%s, a jump by %v at %v: %v", s.name, by, op, err)
				check(t, l.end())
				continue
			}
			jumps += done.hit
		}
		if l.h != nil {
			log, err := os.ReadFile(l.h.logPath())
			check(t, err)
			logs.Write(log)
		}
		check(t, l.end())
	}
	// Not in each scenario: on a busy machine a daemon may have nothing to say after a jump.
	for _, year := range []int{-1, 1} {
		if when := fmt.Sprintf(`time="%d-`, time.Now().Year()+year); !strings.Contains(logs.String(), when) {
			t.Errorf("the clock did not jump for the daemon: its logs have no %s", when)
		}
	}
	t.Logf("%d jumps of a year survived", jumps)
}

// After a failed operation, [host.await] allows the daemon less time than it may need on a
// busy machine. A jump of the clock is not a failure, so await must wait with its full
// patience.
func TestAJumpIsNoReasonToGiveUp(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	all := scenarios(packModels(t))
	s := all[slices.IndexFunc(all, func(s *scenario) bool { return s.name == "give up a pull" })]
	manifest := &Op{"read", filepath.Join("content", s.next[0].files[0]), 1}
	l := life{campaign: c, scenario: s, clock: true}
	done, err := l.meet(Fault{At: manifest, Slow: "content", Delay: 2 * afterFailure, Hook: func(p *Process) { p.Skew(time.Hour) }})
	check(t, err)
	if done.hit != 1 {
		t.Errorf("the manifest was read %d times; the operations were %v", done.hit, done.ops)
	}
	check(t, l.end())
}

// A caller that waits for a slow disk gets its volume even if other callers give up, and
// nothing is left over.
func TestASlowDiskHarmsNoPatientCaller(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	m := packModels(t).mixed
	patient := &scenario{
		name: "two callers", next: []*model{m},
		before: func(h *host) error { return h.pull(m) },
		act: func(h *host) error {
			key := h.volumeKey(m)
			h.may[key] = true
			told := make(chan error, 1)
			go func() {
				ctx, cancel := h.context()
				defer cancel()
				ctx, end := context.WithTimeout(ctx, 200*time.Millisecond)
				defer end()
				_, err := h.Prepare(ctx, key, "")
				told <- err
			}()
			err := h.run(m)
			// The caller may retry, like kubelet. It may also get the error of an earlier
			// build whose caller left before the blobs were deleted.
			if terr := <-told; terr != nil && !errdefs.IsDeadlineExceeded(terr) && !errors.Is(terr, context.DeadlineExceeded) && !errdefs.IsUnavailable(terr) && !errdefs.IsNotFound(terr) {
				err = errors.Join(err, fmt.Errorf("the impatient caller got %w", terr))
			}
			return err
		},
	}
	l := life{campaign: c, scenario: patient}
	done, err := l.meet(Fault{At: &Op{}})
	check(t, err)
	slow := 0
	for _, dir := range []string{"root", "state", "content"} {
		done, err := l.meet(Fault{Lasting: true, Slow: dir, Delay: 20 * time.Millisecond})
		if err != nil {
			t.Errorf("with a slow %s: %v", dir, err)
		}
		slow += done.hit
	}
	for _, op := range spread(done.ops, 8) {
		done, err := l.meet(Fault{At: &op, Slow: dirOf(op), Delay: time.Second})
		if err != nil {
			t.Errorf("with a delay of one second at %v: %v", op, err)
		}
		slow += done.hit
	}
	check(t, l.end())
	if slow == 0 {
		t.Error("nothing was slow")
	}
	t.Logf("%d slow operations survived", slow)
}

// A second daemon with the same root or state directory is refused, even while the first
// one starts. It may start after the first one is killed.
func TestASecondDaemonIsRefusedFromTheFirstMoment(t *testing.T) {
	program, err := node.Program()
	check(t, err)
	c := campaign{shortDir(t), program, startContainerd(t)}
	m := packModels(t).mixed
	s := &scenario{name: "two daemons", next: []*model{m}}
	h, err := run{scenario: s, program: c.program, containerd: c.containerd}.host(c.newDir())
	check(t, err)
	defer func() { check(t, h.clear()) }()
	second := func(root, state string) string {
		ctx, cancel := context.WithTimeout(t.Context(), patience) // it may start by mistake and run
		defer cancel()
		out, err := exec.CommandContext(ctx, program, "serve", "--config", filepath.Join(h.dir, "daemon.toml"), "--root", root, "--state", state,
			"--address", filepath.Join(h.dir, "second.sock"), "--content-root", h.content, "--containerd-address", h.containerd).CombinedOutput()
		if err == nil {
			return "it ran"
		}
		return string(out)
	}
	refused := func() (errs error) {
		for _, two := range []struct{ root, state, want string }{
			{h.root, filepath.Join(h.dir, "another"), "root " + h.root},
			{filepath.Join(h.dir, "another"), h.state, "state directory " + h.state},
		} {
			if said := second(two.root, two.state); !strings.Contains(said, two.want+" belongs to another running artifact-snapshotter; stop it") {
				errs = errors.Join(errs, fmt.Errorf("the second daemon printed %s", said))
			}
		}
		return errs
	}
	var during error
	h.reads = true
	h.fault = &Fault{At: &Op{"openat", "root/overlayfs/metadata.db", 1}, Hook: func(*Process) { during = refused() }}
	check(t, h.start(true, true, nil, false))
	ops, hit := h.daemon.traced.Heal()
	if hit != 1 || during != nil {
		t.Errorf("at the start of the first daemon (hook called %d times): %v; operations: %v", hit, during, ops)
	}
	check(t, h.pull(m))
	check(t, h.run(m))
	check(t, refused())
	check(t, h.checkPods("after the second daemon was refused"))
	check(t, h.checkNext(s.next))
	check(t, h.stop(9))
	check(t, h.start(false, false, nil, false))
	check(t, h.checkPods("with the new daemon"))
	check(t, h.empty())
}
