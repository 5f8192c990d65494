// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// supportTable is the file with the table of TestSupportTable.
const supportTable = "../docs/nri.md"

// ways are the columns of the table: the ways in which a node can mount volumes of
// artifacts.
var ways = []struct {
	name    string
	options node.Options
}{
	{"containerd, snapshotter", node.Options{}},
	{"containerd, NRI plugin", node.Options{NRI: true}},
	{"CRI-O", node.Options{CRIO: true, Stock: true}},
	{"CRI-O, NRI plugin", node.Options{CRIO: true}},
}

// The table of docs/nri.md is generated here. It includes stock CRI-O, of which nothing is
// required.
func TestSupportTable(t *testing.T) {
	if testing.Short() {
		t.Skip("NOT TESTED with -short: the whole table of docs/nri.md")
	}
	rows, whole := []string{"| a volume of | ", "|---|"}, true
	probes := supportProbes()
	for _, p := range probes {
		rows = append(rows, "| "+p.name+" | ")
	}
	for _, way := range ways {
		cells := []string{way.name, ""}
		t.Run(way.name, func(t *testing.T) {
			n := startOrSkip(t, way.options)
			src := writeModel(t)
			for _, p := range probes {
				cells = append(cells, p.measure(t, n, src))
			}
		})
		for i := range rows {
			switch {
			case i == 1:
				rows[i] += "---|"
			case i < len(cells):
				rows[i] += cells[i] + " | "
			default:
				rows[i], whole = rows[i]+"not measured | ", false
			}
		}
	}
	var table strings.Builder
	for _, row := range rows {
		fmt.Fprintln(&table, strings.TrimSpace(row))
	}
	t.Logf("measured:\n%s", &table)
	if !whole {
		t.Skip("a part of the table was not measured")
	}
	doc, err := os.ReadFile(supportTable)
	check(t, err)
	if !strings.Contains(string(doc), "\n"+table.String()) {
		t.Errorf("the table in %s differs", supportTable)
	}
}

// startOrSkip starts a node. It skips the test if the node needs CRI-O and the machine does
// not have it.
func startOrSkip(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	if o.CRIO {
		if _, err := node.FindCRIO(); errors.Is(err, node.ErrNoCRIO) {
			t.Skipf("NOT TESTED: %v", err)
		}
	}
	return node.ForTest(t, o)
}

// probe is a row of the table.
type probe struct {
	name    string
	measure func(t *testing.T, n *node.Node, src string) string
}

func supportProbes() (probes []probe) {
	for _, of := range []struct {
		name string
		form pack.Form
	}{
		{"raw layers", pack.Raw}, {"tar layers", pack.Tar}, {"tar+gzip layers", pack.TarGzip}, {"tar+zstd layers", pack.TarZstd},
		{"layers that are not ModelPack's, with titles", pack.Generic},
		{"raw layers with the legacy media types", pack.Legacy}, {"tar layers with the legacy media types", pack.LegacyTar},
	} {
		probes = append(probes, probe{of.name, func(t *testing.T, n *node.Node, src string) string {
			return filesOf(wantTree(t, src, of.form), inPod(t, n, node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, of.form), Path: "/model"}}}))
		}})
	}
	for _, of := range []struct {
		name string
		form pack.Form
	}{{"mode, owner and time of a file of a raw layer", pack.Raw}, {"mode, owner and time of a member of a tar", pack.TarGzip}} {
		probes = append(probes, probe{of.name, func(t *testing.T, n *node.Node, src string) string {
			return attributesOf(wantTree(t, src, of.form), inPod(t, n, node.PodSpec{Volumes: []node.Volume{{Image: pulled(t, n, src, of.form), Path: "/model"}}}))
		}})
	}
	return append(probes,
		probe{"a directory that cannot be written", func(t *testing.T, n *node.Node, src string) string {
			out := inside(t, n, pulled(t, n, src, pack.Raw), "write", "/model/new")
			if out == "EROFS\n" {
				return "yes"
			}
			return "no: " + strings.TrimSpace(out)
		}},
		probe{"a sub path", func(t *testing.T, n *node.Node, src string) string {
			return filesOf(below(wantTree(t, src, pack.Raw), "tokenizer/deep/"), inPod(t, n, node.PodSpec{
				Volumes: []node.Volume{{Image: pulled(t, n, src, pack.Raw), Path: "/model", SubPath: "tokenizer/deep"}},
			}))
		}},
		probe{"a sub path of a tar", func(t *testing.T, n *node.Node, src string) string {
			return filesOf(below(wantTree(t, src, pack.TarGzip), "tokenizer/deep/"), inPod(t, n, node.PodSpec{
				Volumes: []node.Volume{{Image: pulled(t, n, src, pack.TarGzip), Path: "/model", SubPath: "tokenizer/deep"}},
			}))
		}},
		probe{"owners in a user namespace", func(t *testing.T, n *node.Node, src string) string {
			return attributesOf(wantTree(t, src, pack.Raw), inPod(t, n, node.PodSpec{
				OwnNetwork: true, UserNamespace: true,
				Volumes: []node.Volume{{Image: pulled(t, n, src, pack.Raw), Path: "/model"}},
			}))
		}},
		probe{"mounts of a volume of 8 files", func(t *testing.T, n *node.Node, src string) string {
			return fmt.Sprint(countMounts(inside(t, n, pulled(t, n, src, pack.Raw), "mountinfo"), "/model"))
		}},
		probe{"one of two artifacts with the same config", func(t *testing.T, n *node.Node, src string) string {
			ref := pulled(t, n, src, pack.Generic)
			pushModel(t, n, writeModel(t, "README.md"), pack.Generic, "other")
			_, err := n.Pull(n.Registry + "/models/tiny:other")
			check(t, err)
			return filesOf(wantTree(t, src, pack.Generic), inPod(t, n, node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}}))
		}},
	)
}

// seen is the content of /model, or the reason why there is none.
type seen struct {
	entries []treelist.Entry
	err     error
}

// inPod runs a pod, lists its volume, and removes it.
func inPod(t *testing.T, n *node.Node, spec node.PodSpec) seen {
	t.Helper()
	pod, err := n.RunPod(spec)
	if err != nil {
		t.Log(err)
		return seen{err: errors.New("the container is not created")}
	}
	entries, err := pod.Tree("main", "/model")
	if err != nil {
		t.Log(err)
		err = errors.New("no volume at all")
	}
	check(t, pod.Remove())
	return seen{entries, err}
}

// inside returns the output of the guest in a pod with a volume.
func inside(t *testing.T, n *node.Node, ref string, command ...string) string {
	t.Helper()
	pod, err := n.RunPod(node.PodSpec{Volumes: []node.Volume{{Image: ref, Path: "/model"}}})
	check(t, err)
	out, err := pod.Exec("main", append([]string{node.Guest}, command...)...)
	check(t, err)
	check(t, pod.Remove())
	return out
}

// countMounts counts the mounts at and below a directory.
func countMounts(mountinfo, dir string) (count int) {
	for line := range strings.Lines(mountinfo) {
		if point := strings.Fields(line)[4]; point == dir || strings.HasPrefix(point, dir+"/") {
			count++
		}
	}
	return count
}

// filesOf returns a cell: whether the files exist with the right bytes.
func filesOf(want []treelist.Entry, got seen) string {
	if got.err != nil {
		return "no: " + got.err.Error()
	}
	sums := map[string]string{}
	for _, e := range got.entries {
		sums[e.Path] = e.SHA256
	}
	files, there, right := 0, 0, 0
	for _, e := range want {
		if e.Type != "file" {
			continue
		}
		files++
		if sum, ok := sums[e.Path]; ok {
			there++
			if sum == e.SHA256 {
				right++
			}
		}
	}
	switch {
	case right == files:
		return "yes"
	case len(got.entries) == 0:
		return "no: an empty directory"
	case there == files && right == 0:
		return "no: archives under the names of the files"
	}
	return fmt.Sprintf("no: %d of %d files", right, files)
}

// attributesOf returns a cell: whether the attributes of the files are right, or which are
// not.
func attributesOf(want []treelist.Entry, got seen) string {
	if got.err != nil {
		return "no: " + got.err.Error()
	}
	found := map[string]treelist.Entry{}
	for _, e := range got.entries {
		found[e.Path] = e
	}
	var lost []string
	for _, w := range want {
		g, ok := found[w.Path]
		if w.Type != "file" {
			continue
		}
		for _, a := range []struct {
			name  string
			right bool
		}{{"mode", g.Mode == w.Mode}, {"owner", g.UID == w.UID && g.GID == w.GID}, {"time", g.ModTime == w.ModTime}, {"file", ok}} {
			if !a.right && !slices.Contains(lost, a.name) {
				lost = append(lost, a.name)
			}
		}
	}
	if len(lost) == 0 {
		return "yes"
	}
	slices.Sort(lost)
	return "no: not the " + strings.Join(lost, ", ")
}
