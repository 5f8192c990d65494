// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// checkUnambiguous refuses JSON that two readers can understand differently, and of
// which encoding/json takes one meaning without a word: text that is no Unicode, for
// which it puts the replacement character, so that two names become one; and an object
// with one name twice, of which it takes the last or, of lists of objects, a mixture
// (RFC 8259, sections 4 and 8). The JSON is well-formed.
func checkUnambiguous(raw []byte) error {
	if !utf8.Valid(raw) {
		return errors.New("it is not UTF-8")
	}
	if loneSurrogate(raw) {
		return errors.New("it has half of a surrogate pair, which is not UTF-8 either")
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber() // of any size
	return checkNames(d, false)
}

// checkNames checks the next value of d. Names are those of encoding/json, which finds
// a field in capitals, too, unless they are exact: those of annotations.
func checkNames(d *json.Decoder, exact bool) error {
	begin, err := d.Token()
	if err != nil {
		return err
	}
	switch begin {
	case json.Delim('['):
		for d.More() {
			if err := checkNames(d, false); err != nil {
				return err
			}
		}
	case json.Delim('{'):
		seen := map[string]bool{}
		for d.More() {
			token, err := d.Token()
			if err != nil {
				return err
			}
			key, _ := token.(string)
			folded := fold(key)
			name := folded
			if exact {
				name = key
			}
			if seen[name] {
				return fmt.Errorf("the name %.255q is there twice in one object", key)
			}
			seen[name] = true
			if err := checkNames(d, folded == "ANNOTATIONS" || folded == "LABELS"); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	_, err = d.Token() // the end of it
	return err
}

// fold makes names the same that encoding/json takes for the same (fold.go there).
func fold(name string) string {
	return strings.Map(func(r rune) rune {
		for {
			next := unicode.SimpleFold(r)
			if next <= r {
				return next
			}
			r = next
		}
	}, name)
}

// loneSurrogate reports whether an escape \uXXXX in JSON is half of a pair.
func loneSurrogate(raw []byte) bool {
	high := false // the last one was the first half
	for i := 0; i < len(raw); i++ {
		r := rune(0)
		if raw[i] == '\\' {
			if raw[i+1] == 'u' {
				code, err := strconv.ParseUint(string(raw[i+2:i+6]), 16, 16)
				if err != nil { // it is not well-formed
					return true
				}
				r = rune(code)
				i += 4
			}
			i++
		}
		isLow := utf16.IsSurrogate(r) && r >= 0xdc00
		if high != isLow {
			return true
		}
		high = utf16.IsSurrogate(r) && !isLow
	}
	return high
}
