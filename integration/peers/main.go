// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Command peers compares this project with the other ways to bring a model into a pod: the
// same files as a container image with overlayfs and with containerd's erofs snapshotter,
// and `oras pull` into a directory of the host. docs/benchmarks.md describes the method and
// the results. A missed bound is a "NO" in a table, not a failure of the program.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// options are the flags.
type options struct {
	datasets, variants, forms []string // names; nil means all
	rounds                    int      // 0: the data set's own number
	reads                     int      // rounds of the cold reads
	scale                     int64
	out                       string
}

func main() {
	var o options
	list := func(to *[]string, name string, all []string) {
		flag.Func(name, "`names`, separated by commas, of "+strings.Join(all, ",")+"; default: all", func(text string) error {
			*to = []string{}
			for _, s := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' }) {
				if !slices.Contains(all, s) {
					return fmt.Errorf("%q is none of %s", s, strings.Join(all, ","))
				}
				*to = append(*to, s)
			}
			return nil
		})
	}
	list(&o.datasets, "datasets", names(datasets(1), func(d *dataset) string { return d.name }))
	list(&o.variants, "variants", names(variants, func(v variant) string { return v.name }))
	list(&o.forms, "forms", names(forms, func(f pack.Form) string { return string(f) }))
	flag.IntVar(&o.rounds, "rounds", 0, "rounds of pulls; 0: 5, and 3 for the largest data set")
	flag.IntVar(&o.reads, "reads", 5, "rounds of cold reads")
	flag.Int64Var(&o.scale, "scale", 1, "divide the sizes of the data sets, for a trial run: 64 takes a few minutes")
	flag.StringVar(&o.out, "out", "", "`directory` for results and charts. Results of earlier runs there are kept and printed too; with -datasets \"\" nothing is measured. Without -out nothing is saved")
	flag.Parse()
	measure.Main("peers", func(ctx context.Context) { run(ctx, o) })
}

func names[T any](all []T, name func(T) string) (out []string) {
	for _, v := range all {
		out = append(out, name(v))
	}
	return out
}

// wanted reports whether the command line selects a name.
func wanted(chosen []string, name string) bool {
	return chosen == nil || slices.Contains(chosen, name)
}

func run(ctx context.Context, o options) {
	if o.scale < 1 || o.rounds < 0 || o.reads < 1 {
		measure.Check(errors.New("-scale and -reads must be at least 1, and -rounds at least 0"))
	}
	load := measure.Load()
	dir := os.TempDir() // before it is changed for each node
	all := &results{Scale: o.scale}
	if o.out != "" {
		measure.Check(os.MkdirAll(o.out, 0o755))
		all.load(filepath.Join(o.out, "results.json"))
		if all.Scale != o.scale {
			measure.Check(fmt.Errorf("the results in %s have the scale %d, not %d: choose another -out", o.out, all.Scale, o.scale))
		}
	}
	for _, d := range datasets(o.scale) {
		if !wanted(o.datasets, d.name) {
			continue
		}
		enoughSpace(dir, d)
		b := &bench{options: o, data: d, dir: dir, load: load, into: all.dataset(d)}
		for _, form := range forms {
			if wanted(o.forms, string(form)) {
				b.measureForm(ctx, form)
				b.describe()
				if o.out != "" {
					all.save(filepath.Join(o.out, "results.json"))
				}
			}
		}
	}
	all.print(os.Stdout)
	if o.out != "" {
		all.draw(o.out)
	}
}

// enoughSpace fails early if the disk is too small. The EROFS tar index needs the most: the
// registry's layers, the node's layers, the decompressed tar and its copy.
func enoughSpace(dir string, d *dataset) {
	var st unix.Statfs_t
	measure.Check(unix.Statfs(dir, &st))
	if need, free := 5*d.bytes(), int64(st.Bavail)*st.Bsize; free < need {
		measure.Check(fmt.Errorf("%s has %d GiB free and needs %d: set TMPDIR to a directory with more", dir, free/measure.GiB, need/measure.GiB+1))
	}
}
