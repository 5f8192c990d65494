// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build amd64

package crash

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a traced program.
type Process struct {
	pid  int
	dirs []string
	done chan struct{}

	mu     sync.Mutex
	armed  bool
	target *Op  // nil: only count
	after  bool // kill after the operation instead of before it
	counts map[string]int
	ops    []Op
	killed *Op
	status unix.WaitStatus

	fault   *Fault // nil: nothing fails
	hit     int    // how often the fault has occurred
	failing string // the directory of the last occurrence

	skew atomic.Int64
}

// Program describes a program to start.
type Program struct {
	Args, Env []string
	Log       *os.File // its output
	// Dirs are the directories whose operations count. Operations on mounts and loop
	// devices always count.
	Dirs []string
	// Armed arms the program from its first operation, with Target and After.
	Armed  bool
	Target *Op
	After  bool
	// Fault is injected from the beginning; see Inject.
	Fault *Fault
	// Reads also counts operations that only read.
	Reads bool
	// Clock enables Skew.
	Clock bool
}

// Start starts the program and returns when it runs.
func (program Program) Start() (*Process, error) {
	p := &Process{dirs: program.Dirs, done: make(chan struct{})}
	if p.Arm(program.Target, program.After); !program.Armed {
		p.Disarm()
	}
	if program.Fault != nil {
		p.Inject(*program.Fault)
	}
	started := make(chan error)
	go p.trace(program, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s traced: %w", program.Args[0], err)
	}
	return p, nil
}

// PID returns the process ID.
func (p *Process) PID() int { return p.pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Arm starts counting. If target is not nil, the program is killed at that operation:
// before it or, with after, after it. A target without a call matches the Nth operation of
// any kind.
func (p *Process) Arm(target *Op, after bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begin()
	p.target, p.after = target, after
}

// begin starts counting.
func (p *Process) begin() {
	p.armed, p.target, p.fault, p.hit = true, nil, nil, 0
	p.counts, p.ops = map[string]int{}, nil
}

// Disarm stops counting and returns the operations since Arm.
func (p *Process) Disarm() []Op {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.armed = false
	return p.ops
}

// Killed returns the operation at which the program was killed, or nil.
func (p *Process) Killed() *Op {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.killed
}

// Signal sends a signal to the program.
func (p *Process) Signal(s syscall.Signal) error {
	err := syscall.Kill(p.pid, s)
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

// Status returns the exit status. It is valid after Done is closed.
func (p *Process) Status() unix.WaitStatus { return p.status }

// trace is the tracer. ptrace(2) requires that it stays on one thread.
func (p *Process) trace(program Program, started chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	defer close(p.done)
	self, err := os.Executable()
	if err == nil {
		err = p.launch(self, program)
	}
	started <- err
	if err != nil {
		return
	}
	threads := map[int]bool{p.pid: true}
	due := map[int]time.Time{} // threads that are being delayed
	for {
		var status unix.WaitStatus
		options := unix.WALL | unix.WNOTHREAD
		if len(due) > 0 {
			options |= unix.WNOHANG
		}
		// Wait by process group: the thread may have other children.
		tid, err := unix.Wait4(-p.pid, &status, options, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && tid == 0 {
			time.Sleep(time.Millisecond)
			for slow, until := range due {
				if time.Now().After(until) {
					delete(due, slow)
					_ = unix.PtraceCont(slow, 0) // ESRCH: it has been killed
				}
			}
			continue
		}
		if err != nil { // ECHILD: all threads have ended
			return
		}
		if !status.Stopped() {
			delete(threads, tid)
			delete(due, tid)
			if tid == p.pid {
				p.status = status
			}
			continue
		}
		signal, event := status.StopSignal(), status.TrapCause()
		resume := unix.PtraceCont
		switch {
		case signal == unix.SIGTRAP && event == unix.PTRACE_EVENT_SECCOMP:
			signal = 0
			switch p.stopped(tid) {
			case kill:
				_ = p.Signal(unix.SIGKILL)
				continue
			case killAfter:
				resume = unix.PtraceSyscall
			case later:
				due[tid] = time.Now().Add(p.delay())
				threads[tid] = true
				continue
			case goOn:
			}
		case signal == unix.SIGTRAP && event == unix.PTRACE_EVENT_EXEC && program.Clock:
			signal = 0
			if err := withoutVDSO(tid); err != nil {
				fmt.Fprintln(program.Log, "the clock cannot be adjusted:", err)
			}
		case signal == unix.SIGTRAP|0x80: // the call has returned
			_ = p.Signal(unix.SIGKILL)
			continue
		case signal == unix.SIGTRAP && event > 0:
			signal = 0
		case signal == unix.SIGSTOP && !threads[tid]: // a new thread starts with this
			signal = 0
		}
		threads[tid] = true
		_ = resume(tid, int(signal)) // ESRCH: it has been killed
	}
}

// launch starts the launcher, which executes the program.
func (p *Process) launch(self string, program Program) (err error) {
	p.pid, err = syscall.ForkExec(self, append([]string{self}, program.Args...), &syscall.ProcAttr{
		Env:   append(program.Env, launching+"="+program.stops()),
		Files: []uintptr{0, program.Log.Fd(), program.Log.Fd()},
		Sys:   &syscall.SysProcAttr{Ptrace: true, Setpgid: true},
	})
	if err != nil {
		return err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(p.pid, &status, unix.WALL, nil); err != nil {
		return os.NewSyscallError("wait4", err)
	}
	const options = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACESECCOMP |
		unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC
	if err := unix.PtraceSetOptions(p.pid, options); err != nil {
		return os.NewSyscallError("ptrace PTRACE_SETOPTIONS", err)
	}
	return os.NewSyscallError("ptrace PTRACE_CONT", unix.PtraceCont(p.pid, 0))
}

// verdict is the decision about a stopped thread.
type verdict int

const (
	goOn verdict = iota
	kill
	killAfter
	later // continue after the delay of the fault
)

func (p *Process) delay() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == nil {
		return 0
	}
	return p.fault.Delay
}

// stopped handles a thread that is about to begin a system call of the filter.
func (p *Process) stopped(tid int) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	var regs unix.PtraceRegs
	if unix.PtraceGetRegs(tid, &regs) != nil {
		return goOn // it has been killed
	}
	if regs.Orig_rax == unix.SYS_CLOCK_GETTIME {
		_ = p.tell(tid, &regs) // ESRCH as above
		return goOn
	}
	if !p.armed || p.killed != nil {
		return goOn
	}
	op, ok := p.read(tid, &regs)
	if !ok {
		return goOn
	}
	op.Nth = 0
	p.counts[op.Key()]++
	op.Nth = p.counts[op.Key()]
	p.ops = append(p.ops, op)
	if p.fault != nil {
		return p.meet(tid, &regs, op)
	}
	switch target := p.target; {
	case target == nil:
		return goOn
	case target.Call == "" && len(p.ops) != target.Nth, target.Call != "" && *target != op:
		return goOn
	}
	p.killed = &op
	if p.after {
		return killAfter
	}
	return kill
}
