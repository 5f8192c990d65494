// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
)

// chart is a bar chart with one line per row of a data set.
type chart struct {
	name, title, axis string // axis includes the unit
	series            []string
	values            func(r *row) []float64 // one value per series; nil leaves the row out
	side              bool                   // the bars of a line are side by side instead of stacked
}

var charts = []chart{
	{
		name: "time", title: "Seconds from the pull to the first byte in a pod", axis: "seconds, median",
		series: []string{"pull", "pod, to its first byte"},
		values: func(r *row) []float64 {
			pods := r.Pod
			if len(pods) == 0 {
				pods = r.Bare
			}
			return []float64{r.Pull.Median(), pods.Median()}
		},
	},
	{
		name: "disk", title: "GiB on the disk after the pull and the first pod", axis: "GiB", series: []string{"disk"},
		values: func(r *row) []float64 { return []float64{r.Disk.Median() / measure.GiB} },
	},
	{
		name: "cache", title: "GiB in the page cache after two pods have read everything", axis: "GiB", series: []string{"page cache"},
		values: func(r *row) []float64 {
			if len(r.Cache) == 0 {
				return nil
			}
			return []float64{r.Cache.Median() / measure.GiB}
		},
	},
	{
		name: "reads", title: "Speed of cold reads as a part of plain files' speed", axis: "1 is the speed of plain files", side: true,
		series: []string{"read(2)", "mmap", "random mmap"},
		values: func(r *row) (out []float64) {
			if len(r.Reads) == 0 {
				return nil
			}
			for _, p := range patterns {
				out = append(out, r.Reads[p.name+", cold"].Ratio.Median())
			}
			return out
		},
	},
}

// The dimensions of a chart, in pixels.
const (
	chartWidth = 860
	labelWidth = 330
	valueWidth = 70 // right of the longest bar
	barsWidth  = chartWidth - labelWidth - valueWidth
	topHeight  = 62
	barHeight  = 16
	lineGap    = 8
)

// svg is the template of a chart. It has colors for light and dark windows; a viewer that
// does not know prefers-color-scheme shows the light one.
var svg = template.Must(template.New("chart").Parse(`<svg xmlns="http://www.w3.org/2000/svg" width="{{.Width}}" height="{{.Height}}" viewBox="0 0 {{.Width}} {{.Height}}" role="img" aria-label="{{html .Title}}">
<style>
.ground{fill:#fff}text{font:12px sans-serif;fill:#24292f}.title{font-size:15px;font-weight:bold}.ours{font-weight:bold}.grid{stroke:#d0d7de}
.s0{fill:#0969da}.s1{fill:#bf8700}.s2{fill:#8250df}.other{opacity:.55}
@media (prefers-color-scheme:dark){.ground{fill:#0d1117}text{fill:#e6edf3}.grid{stroke:#30363d}.s0{fill:#58a6ff}.s1{fill:#d29922}.s2{fill:#bc8cff}}
</style>
<rect class="ground" width="100%" height="100%"/>
<text class="title" x="10" y="22">{{html .Title}}</text>
{{range .Legend}}<rect class="s{{.Series}}" x="{{.X}}" y="34" width="12" height="12"/><text x="{{.TextX}}" y="44">{{html .Text}}</text>
{{end}}{{range .Ticks}}<line class="grid" x1="{{.X}}" x2="{{.X}}" y1="{{$.Top}}" y2="{{$.Bottom}}"/><text x="{{.X}}" y="{{$.TickY}}" text-anchor="middle">{{.Text}}</text>
{{end}}{{range .Lines}}<text{{if .Ours}} class="ours"{{end}} x="{{$.LabelX}}" y="{{.TextY}}" text-anchor="end">{{html .Label}}</text>
{{$ours := .Ours}}{{range .Bars}}<rect class="s{{.Series}}{{if not $ours}} other{{end}}" x="{{.X}}" y="{{.Y}}" width="{{.Width}}" height="{{.Height}}"/>
{{end}}{{range .Values}}<text{{if $ours}} class="ours"{{end}} x="{{.X}}" y="{{.Y}}">{{.Text}}</text>
{{end}}{{end}}<text x="{{.AxisX}}" y="{{.AxisY}}" text-anchor="middle">{{html .Axis}}</text>
</svg>
`))

type svgBar struct {
	Series        int
	X, Y          float64
	Width, Height float64
}

type svgText struct {
	X, Y float64
	Text string
}

type svgLegend struct {
	Series   int
	X, TextX float64
	Text     string
}

type svgLine struct {
	Label  string
	TextY  float64
	Ours   bool
	Bars   []svgBar
	Values []svgText
}

type svgChart struct {
	Title, Axis                      string
	Width, Height                    float64
	Top, Bottom, TickY, AxisX, AxisY float64
	LabelX                           float64
	Legend                           []svgLegend
	Ticks                            []svgText
	Lines                            []svgLine
}

// draw writes all charts into a directory.
func (all *results) draw(dir string) {
	for _, d := range all.Datasets {
		for _, c := range charts {
			f := measure.Must(os.Create(filepath.Join(dir, d.Name+"-"+c.name+".svg")))
			err := svg.Execute(f, c.layOut(d))
			measure.Check(err)
			measure.Check(f.Close())
		}
	}
}

// layOut computes the positions.
func (c chart) layOut(d *datasetResult) svgChart {
	type line struct {
		row    *row
		values []float64
	}
	var lines []line
	longest := 0.0
	for _, r := range d.Rows {
		if r.Failed != "" {
			continue
		}
		values := c.values(r)
		if values == nil {
			continue
		}
		lines = append(lines, line{r, values})
		sum := 0.0
		for _, v := range values {
			sum += v
			longest = max(longest, v)
		}
		if !c.side {
			longest = max(longest, sum)
		}
	}
	step := tick(longest)
	scale := barsWidth / max(longest, step)
	out := svgChart{
		Title: c.title + ": " + d.Title, Axis: c.axis, Width: chartWidth, Top: topHeight, LabelX: labelWidth - 8,
		AxisX: labelWidth + barsWidth/2,
	}
	if len(c.series) > 1 {
		x := 10.0
		for i, name := range c.series {
			out.Legend = append(out.Legend, svgLegend{i, x, x + 17, name})
			x += 40 + 7*float64(len(name))
		}
	}
	y := float64(topHeight)
	for _, l := range lines {
		line := svgLine{
			Label: string(l.row.Form) + ": " + strings.NewReplacer("*", "", "`", "").Replace(l.row.title()),
			Ours:  l.row.Variant == ours,
		}
		height := float64(barHeight)
		if c.side {
			height *= float64(len(l.values))
		}
		line.TextY = y + height/2 + 4
		x := float64(labelWidth)
		sum := 0.0
		for i, v := range l.values {
			bar := svgBar{Series: i, X: round(x), Y: y, Width: round(v * scale), Height: barHeight}
			sum += v
			if c.side {
				bar.Y += float64(i * barHeight)
				line.Values = append(line.Values, svgText{bar.X + bar.Width + 5, bar.Y + 12, fmt.Sprintf("%.2f", v)})
			} else {
				x += v * scale
			}
			line.Bars = append(line.Bars, bar)
		}
		if !c.side {
			line.Values = append(line.Values, svgText{round(x + 5), y + 12, fmt.Sprintf("%.2f", sum)})
		}
		out.Lines = append(out.Lines, line)
		y += height + lineGap
	}
	for i := 0; float64(i)*step <= longest*1.0001; i++ {
		v := float64(i) * step
		out.Ticks = append(out.Ticks, svgText{X: round(labelWidth + v*scale), Text: fmt.Sprintf("%g", round(v*100)/100)})
	}
	out.Bottom = y
	out.TickY, out.AxisY, out.Height = y+16, y+34, y+44
	return out
}

// tick returns a distance between the numbers on the axis that needs at most seven of them.
func tick(longest float64) float64 {
	if longest <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(longest)))
	for _, n := range []float64{0.1, 0.2, 0.25, 0.5, 1, 2} {
		if longest/(n*power) <= 6 {
			return n * power
		}
	}
	return 5 * power
}

// round rounds to a tenth of a pixel.
func round(v float64) float64 { return math.Round(v*10) / 10 }
