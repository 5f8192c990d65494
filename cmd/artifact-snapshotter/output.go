// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/internal/plain"
)

// printTable prints lines with tabs between their columns.
func printTable(w io.Writer, text string) error {
	var padded strings.Builder
	table := tabwriter.NewWriter(&padded, 0, 0, 2, ' ', 0)
	if _, err := io.WriteString(table, text); err != nil {
		return err
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(padded.String()) {
		if _, err := io.WriteString(w, strings.TrimRight(line, " \n")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// lineWidth is how wide a table is at most by default, in columns.
const lineWidth = 100

// flexible is a column whose cells are cut if a table is too wide. It keeps at least min
// columns.
type flexible struct {
	column, min int
	cut         func(text string, width int) string
}

// fit cuts the cells of flexible columns, the first ones first, until the rows fit a line.
func fit(rows [][]string, columns ...flexible) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	over := 2*(len(widths)-1) - lineWidth
	for _, width := range widths {
		over += width
	}
	for _, f := range columns {
		if width := widths[f.column]; over > 0 && width > f.min {
			allowed := max(width-over, f.min)
			over -= width - allowed
			for _, row := range rows {
				row[f.column] = f.cut(row[f.column], allowed)
			}
		}
	}
}

// cutEnd shortens a text at its end.
func cutEnd(text string, width int) string {
	if runes := []rune(text); len(runes) > width {
		return string(runes[:width-1]) + "…"
	}
	return text
}

// cutMiddle shortens a name or a path: the registry is at its beginning, the tag at its end.
func cutMiddle(text string, width int) string {
	if runes := []rune(text); len(runes) > width {
		return string(runes[:width/3]) + "…" + string(runes[len(runes)-(width-1-width/3):])
	}
	return text
}

// printRows prints a table.
func printRows(w io.Writer, rows [][]string) error {
	var text strings.Builder
	for _, row := range rows {
		fmt.Fprintln(&text, strings.Join(row, "\t"))
	}
	return printTable(w, text.String())
}

// short abbreviates a digest for tables, as docker does. All commands take the abbreviation.
func short(d digest.Digest) string {
	if d.Validate() != nil {
		return "-"
	}
	return d.Encoded()[:12]
}

// orNone replaces an empty cell of a table.
func orNone(text string) string { return cmp.Or(text, "-") }

// printJSON prints a value. It escapes what a terminal would interpret, some of which JSON
// permits.
func printJSON(w io.Writer, v any) error {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(v); err != nil {
		return err
	}
	escaped := escape(text.String(), func(r rune) string {
		var units strings.Builder
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&units, `\u%04x`, unit)
		}
		return units.String()
	})
	_, err := io.WriteString(w, escaped)
	return err
}

// escape replaces what a terminal might interpret: all runes but printable ones, newlines
// and tabs.
func escape(text string, with func(rune) string) string {
	var escaped strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) || r == '\n' || r == '\t' {
			escaped.WriteRune(r)
		} else {
			escaped.WriteString(with(r))
		}
	}
	return escaped.String()
}

// harmless escapes text for a terminal.
func harmless(text string) string {
	return escape(text, func(r rune) string {
		quoted := strconv.QuoteRune(r)
		return quoted[1 : len(quoted)-1]
	})
}

// oneLine is an error for a terminal. Registries write parts of some errors.
func oneLine(err error) string { return harmless(strings.ReplaceAll(plain.Error(err), "\n", "; ")) }

// maxListed is the number of names in a cell of a table; JSON has all.
const maxListed = 5

// printableList joins the first of names that others have chosen.
func printableList(names []string) string { return printableNames(names, maxListed) }

// printableNames joins so many of the names.
func printableNames(names []string, most int) string {
	var quoted []string
	for i, name := range names {
		if i == most {
			quoted = append(quoted, fmt.Sprintf("and %d more", len(names)-i))
			break
		}
		quoted = append(quoted, printable(name))
	}
	return strings.Join(quoted, ", ")
}

// packedAs is the path of a layer's file or, for an archive, of what it was packed from,
// according to the artifact.
func packedAs(l artifact.Layer) string {
	d := l.Descriptor.Annotations
	return cmp.Or(l.File.Path, d[modelspec.AnnotationFilepath], d["org.cnai.model.filepath"], d[ocispec.AnnotationTitle])
}

// layerName is packedAs for a terminal, or else the digest.
func layerName(l artifact.Layer) string {
	if name := packedAs(l); name != "" {
		return printable(fmt.Sprintf("%.255s", name))
	}
	return short(l.Descriptor.Digest)
}
