// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf16"

	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
)

// printTable prints lines whose columns have tabs between them.
func printTable(w io.Writer, text string) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if _, err := io.WriteString(table, text); err != nil {
		return err
	}
	return table.Flush()
}

// short is a digest as it stands in tables.
func short(d digest.Digest) string {
	if d.Validate() != nil {
		return "-"
	}
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}

// orNone stands for what is empty in tables.
func orNone(text string) string { return cmp.Or(text, "-") }

// printJSON prints one value. What a terminal obeys is escaped, as in what is printed
// as text; JSON itself leaves some of it as it is.
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

// escape replaces what a terminal might obey: all that is neither printable nor the
// end of a line nor a tab.
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

// harmless is a text as a terminal can show it.
func harmless(text string) string {
	return escape(text, func(r rune) string {
		quoted := strconv.QuoteRune(r)
		return quoted[1 : len(quoted)-1]
	})
}

// oneLine is an error as a terminal can show it: registries have a word in some.
func oneLine(err error) string { return harmless(strings.ReplaceAll(err.Error(), "\n", "; ")) }

// maxListed is how many names stand in a table; JSON has all.
const maxListed = 5

// printableList joins what others have named.
func printableList(names []string) string {
	var quoted []string
	for i, name := range names {
		if i == maxListed {
			quoted = append(quoted, fmt.Sprintf("and %d more", len(names)-i))
			break
		}
		quoted = append(quoted, printable(name))
	}
	return strings.Join(quoted, ", ")
}

// arguments refuses another number of arguments than the names that are given.
func arguments(names ...string) cli.ArgValidatorFunc {
	return func(_ context.Context, command *cli.Command) error {
		got := command.Args().Len()
		if got == len(names) {
			return nil
		}
		want := "no argument"
		if len(names) > 0 {
			want = strings.Join(names, " ")
		}
		return fmt.Errorf("%s takes %s, but was given %d (see %s --help)", command.Name, want, got, command.FullName())
	}
}

// packedAs is the path of a layer's file, or what an archive was packed from, as
// the artifact has it.
func packedAs(l artifact.Layer) string {
	d := l.Descriptor.Annotations
	return cmp.Or(l.File.Path, d[modelspec.AnnotationFilepath], d["org.cnai.model.filepath"], d[ocispec.AnnotationTitle])
}

// layerName is packedAs for people, or the digest.
func layerName(l artifact.Layer) string {
	if name := packedAs(l); name != "" {
		return printable(fmt.Sprintf("%.255s", name))
	}
	return short(l.Descriptor.Digest)
}
