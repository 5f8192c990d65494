// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// The bounds.
const (
	timeBound  = 1.03 // times a download plus a pod without a volume
	diskBound  = 1.01 // times a download
	cacheBound = 1.05 // times the bytes of the files: cached once
	readBound  = 0.95 // times the speed of plain files
)

// results are all measurements, as saved in results.json.
type results struct {
	Scale    int64
	Datasets []*datasetResult
}

// datasetResult has the measurements of one data set.
type datasetResult struct {
	Name, Title string
	Bytes       int64  // of the files
	Machine     string // date, hardware and versions
	Rows        []*row
}

// row is one way to bring one form of a model into a pod. The samples have one value per
// round; index i is the same round in all rows of a form.
type row struct {
	Form                     pack.Form
	Variant                  string
	Compressed, Uncompressed int64  // bytes of the form's layers
	Failed                   string // the reason why there are no numbers

	Pull  measure.Sample     // seconds
	Pod   measure.Sample     // seconds until the first byte of the volume is read; empty for a download alone
	Bare  measure.Sample     // seconds until a pod without a volume runs, on the same node
	Disk  measure.Sample     // bytes
	Cache measure.Sample     // bytes
	Reads map[string]reading // by the pattern's name

	variant variant
}

// fail marks a row as failed if err is not nil.
func (r *row) fail(err error) {
	if err != nil && r.Failed == "" {
		text := err.Error()
		if _, said, ok := strings.Cut(text, `level=fatal msg="`); ok { // crictl's own message, without its command line
			text = said
		}
		text, _, _ = strings.Cut(text, "\n")
		r.Failed = "not measured: " + strings.NewReplacer("|", "/", `\"`, `"`).Replace(text)
		measure.Progress("%s, %s: %v", r.Form, r.Variant, err)
	}
}

// total is the time a user waits: pull and pod. For a download alone the pod has no volume.
func (r *row) total() (total measure.Sample) {
	pods := r.Pod
	if len(pods) == 0 {
		pods = r.Bare
	}
	for i := range min(len(r.Pull), len(pods)) {
		total = append(total, r.Pull[i]+pods[i])
	}
	return total
}

func (r *row) title() string {
	for _, v := range variants {
		if v.name == r.Variant {
			return v.title
		}
	}
	return r.Variant
}

// ratio returns the ratio of two samples for each round.
func ratio(a, b measure.Sample) (out measure.Sample) {
	for i := range min(len(a), len(b)) {
		out = append(out, a[i]/b[i])
	}
	return out
}

func (all *results) load(name string) {
	text, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	measure.Check(err)
	measure.Check(json.Unmarshal(text, all))
}

func (all *results) save(name string) {
	measure.Check(os.WriteFile(name, append(measure.Must(json.MarshalIndent(all, "", " ")), '\n'), 0o644))
}

// dataset returns the result of a data set, or adds an empty one.
func (all *results) dataset(d *dataset) *datasetResult {
	for _, r := range all.Datasets {
		if r.Name == d.name {
			return r
		}
	}
	all.Datasets = append(all.Datasets, &datasetResult{Name: d.name, Title: d.title, Bytes: d.bytes()})
	return all.Datasets[len(all.Datasets)-1]
}

// replace replaces the rows of a form by those of this run.
func (d *datasetResult) replace(form pack.Form, rows []*row) {
	d.Rows = append(slices.DeleteFunc(d.Rows, func(r *row) bool { return r.Form == form }), rows...)
	slices.SortStableFunc(d.Rows, func(a, b *row) int {
		return cmp.Compare(slices.Index(forms, a.Form), slices.Index(forms, b.Form))
	})
}

// describe records the machine and the versions.
func (b *bench) describe() {
	b.into.Machine = fmt.Sprintf("%s, containerd %s, %s, %s; load average before the run %s.",
		measure.Machine(), b.containerd, b.mkfs, runtime.Version(), b.load)
}

// of returns the row of a variant in a form, or an empty row.
func (d *datasetResult) of(form pack.Form, variant string) *row {
	for _, r := range d.Rows {
		if r.Form == form && r.Variant == variant {
			return r
		}
	}
	return &row{}
}

// fastest returns the image row with the least total time in a form, or nil.
func (d *datasetResult) fastest(form pack.Form) (found *row) {
	for _, r := range d.Rows {
		image := strings.HasPrefix(r.title(), "image")
		if r.Form == form && image && len(r.total()) > 0 && (found == nil || r.total().Median() < found.total().Median()) {
			found = r
		}
	}
	return found
}

// table is one table of the report. An empty cell means that there is no value.
type table struct {
	title, note string
	columns     []string
	cells       func(d *datasetResult, r *row) []string
}

var tables = []table{
	{
		title: "Seconds from the pull to the first byte in a pod",
		note: "In parentheses: a pod without a volume. The bound applies to \"÷ fetch and pod\": " +
			"both sides include a pod, one with the volume and one without. \"÷ fetch\" counts the start of the pod itself as part of the volume. " +
			"\"÷ stock pull and pod\" compares with `crictl pull` on a stock node, which does not copy the bytes through ctr.",
		columns: []string{"pull", "pod to first byte", "total", "÷ fetch", "÷ stock pull and pod", "÷ fetch and pod", "bound", "met"},
		cells: func(d *datasetResult, r *row) []string {
			base := d.of(r.Form, download)
			pod := fmt.Sprintf("(%.2f)", r.Bare.Median())
			if len(r.Pod) > 0 {
				pod = fmt.Sprintf("%.2f", r.Pod.Median())
			}
			total := r.total()
			cells := []string{
				fmt.Sprintf("%.2f", r.Pull.Median()), pod, total.Format("%.2f", ""),
				median(ratio(total, base.Pull)), median(ratio(total, d.of(r.Form, criPull).total())), median(ratio(total, base.total())),
			}
			if r.Variant != ours {
				return cells
			}
			if r.Form == pack.Raw || r.Form == pack.Tar {
				return append(cells, bound(ratio(total, base.total()), timeBound, "≤ %.2f")...)
			}
			image := d.fastest(r.Form)
			if image == nil {
				return cells
			}
			against := ratio(total, image.total())
			return append(cells, fmt.Sprintf("≤ 1.00 × the fastest image (%s): %.2f", strings.TrimPrefix(image.title(), "image, "), against.Median()),
				answer(against.Median() <= 1))
		},
	},
	{
		title: "Disk",
		note: "Blocks and inodes added by the pull and the first pod. The bound for compressed forms is the compressed plus the uncompressed layers, " +
			"plus 1 % for the file system.",
		columns: []string{"MiB", "÷ download only", "÷ bytes of the files", "bound", "met"},
		cells: func(d *datasetResult, r *row) []string {
			cells := []string{
				fmt.Sprintf("**%.0f**", r.Disk.Median()/measure.MiB),
				median3(ratio(r.Disk, d.of(r.Form, download).Disk)), fmt.Sprintf("%.3f", r.Disk.Median()/float64(d.Bytes)),
			}
			switch {
			case r.Variant != ours:
				return cells
			case r.Form == pack.Raw, r.Form == pack.Tar:
				return append(cells, bound(ratio(r.Disk, d.of(r.Form, download).Disk), diskBound, "≤ %.2f × download")...)
			}
			limit := diskBound * float64(r.Compressed+r.Uncompressed)
			return append(cells, fmt.Sprintf("≤ %.0f MiB", limit/measure.MiB), answer(r.Disk.Median() <= limit))
		},
	},
	{
		title:   "Page cache after two pods have read everything",
		columns: []string{"MiB", "÷ bytes of the files", "bound", "met"},
		cells: func(d *datasetResult, r *row) []string {
			if len(r.Cache) == 0 {
				return nil
			}
			times := r.Cache.Median() / float64(d.Bytes)
			cells := []string{fmt.Sprintf("**%.0f**", r.Cache.Median()/measure.MiB), fmt.Sprintf("%.3f", times)}
			if r.Variant != ours {
				return cells
			}
			return append(cells, fmt.Sprintf("once: ≤ %.2f", cacheBound), answer(times <= cacheBound))
		},
	},
	{
		title:   "Speed of reads against plain files of the same bytes",
		note:    "Median of the rounds' ratios; in parentheses the median MiB/s.",
		columns: append(readColumns(), "bound", "met"),
		cells: func(_ *datasetResult, r *row) []string {
			if len(r.Reads) == 0 {
				return nil
			}
			var cells []string
			least := math.Inf(1)
			for _, name := range readColumns() {
				read := r.Reads[name]
				least = min(least, read.Ratio.Median())
				cells = append(cells, fmt.Sprintf("**%.2f** (%.0f)", read.Ratio.Median(), read.Speed.Median()))
			}
			if r.Variant != ours {
				return cells
			}
			return append(cells, fmt.Sprintf("≥ %.2f", readBound), answer(least >= readBound))
		},
	},
}

// readColumns returns the names of the readings.
func readColumns() (names []string) {
	for _, p := range patterns {
		names = append(names, p.name+", cold", p.name+", warm")
	}
	return names
}

func median(s measure.Sample) string  { return format(s, "**%.2f**") }
func median3(s measure.Sample) string { return format(s, "**%.3f**") }

// format returns "" for an empty sample.
func format(s measure.Sample, verb string) string {
	if len(s) == 0 {
		return ""
	}
	return fmt.Sprintf(verb, s.Median())
}

// bound returns two cells: the bound, and whether the sample's median meets it.
func bound(s measure.Sample, limit float64, format string) []string {
	return []string{fmt.Sprintf(format, limit), answer(s.Median() <= limit)}
}

func answer(met bool) string {
	if met {
		return "yes"
	}
	return "**NO**"
}

func (all *results) print(out io.Writer) {
	if all.Scale != 1 {
		fmt.Fprintf(out, "A TRIAL RUN: all sizes are divided by %d, so the numbers are not representative.\n\n", all.Scale)
	}
	for _, named := range datasets(all.Scale) {
		i := slices.IndexFunc(all.Datasets, func(d *datasetResult) bool { return d.Name == named.name })
		if i < 0 {
			continue
		}
		d := all.Datasets[i]
		fmt.Fprintf(out, "## %s\n\n%s\n", d.Title, d.Machine)
		for _, t := range tables {
			fmt.Fprintf(out, "\n### %s: %s\n\n| layers | variant | %s |\n|---|---|%s\n", d.Title, lower(t.title),
				strings.Join(t.columns, " | "), strings.Repeat("---|", len(t.columns)))
			for _, r := range d.Rows {
				cells := []string{r.Failed}
				if r.Failed == "" {
					if cells = t.cells(d, r); cells == nil {
						continue
					}
				}
				cells = append(cells, make([]string, len(t.columns)-len(cells))...)
				fmt.Fprintf(out, "| %s | %s | %s |\n", r.Form, r.title(), strings.Join(cells, " | "))
			}
			if t.note != "" {
				fmt.Fprintf(out, "\n%s\n", t.note)
			}
		}
		fmt.Fprintln(out)
	}
}

func lower(s string) string { return strings.ToLower(s[:1]) + s[1:] }
