// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// span is a range of bytes in a text.
type span struct{ start, end int }

// importsIn is where a TOML file says what it imports.
type importsIn struct {
	found bool
	// key and elements are where the key and the strings of the array are, open is
	// behind its bracket.
	key      span
	open     int
	elements []span
	patterns []string
	// version is behind the value of the key, 0 if there is none.
	version int
}

// findImports looks for the keys above all tables: containerd reads no others.
func findImports(text []byte) (in importsIn, err error) {
	var p unstable.Parser
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.KeyValue {
			break // the first table
		}
		key := e.Key()
		key.Next()
		name := key.Node()
		value := e.Value()
		switch {
		case key.Next(): // a dotted key
		case string(name.Data) == "version":
			in.version = int(value.Raw.Offset + value.Raw.Length)
		case string(name.Data) == "imports":
			if value.Kind != unstable.Array {
				return in, errors.New("imports is not a list")
			}
			in.found = true
			in.key = span{int(name.Raw.Offset), int(name.Raw.Offset + name.Raw.Length)}
			// Between the key and the bracket there are blanks and = alone.
			in.open = in.key.end + bytes.IndexByte(text[in.key.end:], '[') + 1
			for items := value.Children(); items.Next(); {
				item := items.Node()
				if item.Kind != unstable.String {
					return in, errors.New("imports is not a list of strings")
				}
				in.elements = append(in.elements, span{int(item.Raw.Offset), int(item.Raw.Offset + item.Raw.Length)})
				in.patterns = append(in.patterns, string(item.Data))
			}
		}
	}
	return in, p.Error()
}

// withoutImports is the text of a file that says the same but imports nothing.
func withoutImports(text []byte) ([]byte, error) {
	var all map[string]any
	if err := toml.Unmarshal(text, &all); err != nil {
		return nil, err
	}
	delete(all, "imports")
	return toml.Marshal(all)
}

// addImport makes the file import pattern, too, and changes nothing else.
func addImport(text []byte, pattern string) ([]byte, error) {
	in, err := findImports(text)
	if err != nil {
		return nil, err
	}
	newline := "\n"
	if bytes.Contains(text, []byte("\r\n")) {
		newline = "\r\n"
	}
	line := fmt.Sprintf("imports = [%q]", pattern)
	var after []byte
	switch last := len(in.elements) - 1; {
	case last >= 0:
		after = insert(text, in.elements[last].end, fmt.Sprintf(", %q", pattern))
	case in.found:
		after = insert(text, in.open, fmt.Sprintf("%q", pattern))
	case in.version == 0:
		after = insert(text, 0, line+newline)
	default:
		end := bytes.IndexByte(text[in.version:], '\n')
		if end < 0 {
			after = append(slices.Clone(text), newline+line...)
			break
		}
		after = insert(text, in.version+end+1, line+newline)
	}
	return after, onlyImportsDiffer(text, after, append(slices.Clone(in.patterns), pattern))
}

// removeImport is the other way round. A line of this pattern alone goes as a whole.
func removeImport(text []byte, pattern string) ([]byte, error) {
	in, err := findImports(text)
	if err != nil {
		return nil, err
	}
	i := slices.Index(in.patterns, pattern)
	if i < 0 {
		return text, nil
	}
	cut := in.elements[i]
	switch {
	case i > 0:
		cut.start = in.elements[i-1].end
	case len(in.elements) > 1:
		cut.end = in.elements[1].start
	default:
		line := span{bytes.LastIndexByte(text[:in.key.start], '\n') + 1, len(text)}
		if n := bytes.IndexByte(text[cut.end:], '\n'); n >= 0 {
			line.end = cut.end + n + 1
		} else if line.start > 0 { // addImport has put the newline before it
			line.start = len(bytes.TrimRight(text[:line.start], "\r\n"))
		}
		if string(bytes.TrimSpace(text[line.start:line.end])) == fmt.Sprintf("imports = [%q]", pattern) {
			cut = line
		}
	}
	after := slices.Concat(text[:cut.start], text[cut.end:])
	return after, onlyImportsDiffer(text, after, slices.Delete(slices.Clone(in.patterns), i, i+1))
}

func insert(text []byte, at int, what string) []byte {
	return slices.Insert(slices.Clone(text), at, []byte(what)...)
}

// onlyImportsDiffer reads both texts, and returns an error if they say different
// things but for the imports, which are to be those.
func onlyImportsDiffer(before, after []byte, imports []string) error {
	var was, is map[string]any
	if err := toml.Unmarshal(before, &was); err != nil {
		return err
	}
	if err := toml.Unmarshal(after, &is); err != nil {
		return err
	}
	got, _ := is["imports"].([]any)
	same := len(got) == len(imports)
	for i := range min(len(got), len(imports)) {
		same = same && got[i] == imports[i]
	}
	delete(was, "imports")
	delete(is, "imports")
	if !same || !reflect.DeepEqual(was, is) {
		return errors.New("the imports cannot be edited without changing something else")
	}
	return nil
}
