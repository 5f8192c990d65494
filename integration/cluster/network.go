// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// network is a network namespace that lives as long as this process keeps it open or a
// process is in it. Its links, addresses and routes vanish with it, so that clusters
// neither touch the host's network nor each other's.
type network struct{ file *os.File }

func newNetwork() (*network, error) {
	var n network
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("a network namespace: %w", err)
		}
		var err error
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return &n, err
}

// onThread calls f on a thread that is not used again, whose namespaces f may change.
func onThread(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		result <- f()
	}()
	return <-result
}

// path is the namespace's path for other processes.
func (n *network) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

func (n *network) close() error { return n.file.Close() }

// run runs a shell script in the namespace.
func (n *network) run(ctx context.Context, script string) error {
	_, err := process.Run(ctx, os.Environ(), "nsenter", "--net="+n.path(), "sh", "-e", "-c", script)
	return err
}

// dial connects from the namespace to an IP address and port.
func (n *network) dial(ctx context.Context, _, address string) (conn net.Conn, err error) {
	err = onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		var dialer net.Dialer
		conn, err = dialer.DialContext(ctx, "tcp", address) // of one address, on this thread
		return err
	})
	return conn, err
}

// forward passes connections to a port of the host's loopback interface on to an address
// in the namespace, until the listener is closed.
func (n *network) forward(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			near, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			go func() {
				defer near.Close()
				far, err := n.dial(context.Background(), "tcp", address)
				if err != nil {
					return // near is closed: nobody listens there
				}
				defer far.Close()
				go func() {
					_, _ = io.Copy(far, near)
					_ = far.(*net.TCPConn).CloseWrite()
				}()
				_, _ = io.Copy(near, far)
			}()
		}
	}()
	return l, nil
}
