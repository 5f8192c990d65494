// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package doctor examines a node: whether the daemon can mount artifacts on it, and what
// would make it do so better. It tries real mounts and changes nothing that lasts.
package doctor

import (
	"context"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

// Node is what is examined: the daemon's configuration, and the containerd that it names.
type Node struct {
	daemon.Config
	// ConfigFile is the daemon's configuration file, and ContainerdConfig containerd's.
	ConfigFile       string
	ContainerdConfig string
	// Containerd is nil if it does not answer; Unanswered says why.
	Containerd *client.Client
	Unanswered error
}

// Finding is the result of one check.
type Finding struct {
	// Check is its name.
	Check string `json:"-"`
	// Problem is why the daemon cannot mount artifacts; empty if it can.
	Problem string `json:"problem,omitempty"`
	// Unknown is what could not be examined, and why.
	Unknown string `json:"unknown,omitempty"`
	// Facts are the result for programs, and Text and Table the same for people: lines,
	// and a table that belongs after the first of them.
	Facts any        `json:"facts,omitempty"`
	Text  []string   `json:"-"`
	Table [][]string `json:"-"`
	// Advice is what would improve it.
	Advice []Advice `json:"advice,omitempty"`
}

// Advice is something to do, and what that gains.
type Advice struct {
	Do   string `json:"do"`
	Gain string `json:"gain"`
	// Lines are to be written into the file that Do names.
	Lines string `json:"lines,omitempty"`
}

// Key is the name of the check in JSON.
func (f Finding) Key() string { return strings.ReplaceAll(strings.ToLower(f.Check), " ", "_") }

// checks are made in this order. One that fails does not prevent the others.
var checks = []struct {
	name string
	run  func(context.Context, Node) Finding
	// skip says that the check does not concern the node; nil is never.
	skip func(Node) bool
}{
	{"kernel", checkKernel, nil},
	{"raw layers", checkRaw, nil},
	{"tar layers", checkTar, nil},
	{"content root", checkContentRoot, withoutContainerd},
	{"containerd", checkContainerd, withoutContainerd},
	{"socket", checkSocket, nil},
	{"containerd config", checkContainerdConfig, withoutSnapshotter},
	{"empty blob", checkEmptyBlob, withoutContainerd},
	{"shared configs", checkSharedConfigs, withoutContainerd},
	{"NRI", checkNRI, func(n Node) bool { return !n.NRI.Enabled }},
	{"CSI", checkCSI, func(n Node) bool { return !n.CSI.Enabled }},
}

// Examine makes all checks that concern the node. Its error is that of ctx.
func Examine(ctx context.Context, n Node) ([]Finding, error) {
	var findings []Finding
	for _, check := range checks {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if check.skip != nil && check.skip(n) {
			continue
		}
		found := check.run(ctx, n)
		found.Check = check.name
		findings = append(findings, found)
	}
	return findings, nil
}

// failed is the finding of a check that cannot be made.
func failed(err error) Finding {
	return Finding{Problem: "the check failed: " + plain.Error(err), Text: []string{"unknown"}}
}

func (f *Finding) sayf(format string, args ...any) {
	f.Text = append(f.Text, fmt.Sprintf(format, args...))
}

func (f *Finding) row(cells ...string) { f.Table = append(f.Table, cells) }

func (f *Finding) advise(do, gain string) { f.Advice = append(f.Advice, Advice{Do: do, Gain: gain}) }

// problemf adds a problem.
func (f *Finding) problemf(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if f.Problem != "" {
		text = f.Problem + "; " + text
	}
	f.Problem = text
}

// list joins names for a person.
func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

func checkKernel(context.Context, Node) (found Finding) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return failed(os.NewSyscallError("uname", err))
	}
	release := unix.ByteSliceToString(name.Release[:])
	found.Facts = map[string]string{"release": release}
	found.sayf("Linux %s", release)
	return found
}
