// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestAmbiguousJSONIsRefused(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:                                 "",
		`{"layers":[{"size":1},{"size":1}]}`: "",
		`{"layers":[{"annotations":{"a":"1","A":"2"}}]}`:   "",
		`{"a":{"a":{"a":1}}}`:                              "",
		`{"a":"\\ud800"}`:                                  "",
		`{"a":"\ud83d\ude00","b":"\u00e9\"\n"}`:            "",
		`{"a":1,"b":2,"a":3}`:                              `name "a"`,
		`{"config":{},"CONFIG":{}}`:                        `name "CONFIG"`,
		`{"layers":[],"LAYER\u017f":[]}`:                   "duplicate object member name", // the long s
		`{"layers":[{"size":1,"Size":2}]}`:                 `name "Size" within "/layers/0"`,
		`{"a":1,"\u0061":3}`:                               `name "a"`,
		`{"x":[[{"a":[{"b":0,"b":0}]}]]}`:                  `name "b"`,
		`{"layers":[{"annotations":{"a":"1","a":"2"}}]}`:   `name "a" within "/layers/0/annotations"`,
		`{"layers":[{"annotations":{},"Annotations":{}}]}`: `name "Annotations"`,
		"{\"a\":\"\xff\"}":                                 "invalid UTF-8",
		`{"a":"\ud800"}`:                                   "surrogate pair",
		`{"a":"\udc00"}`:                                   "surrogate pair",
		`{"a":"\ud800x\udc00"}`:                            "surrogate pair",
		`{"a":"\ud800\ud800\udc00"}`:                       "surrogate pair",
		`{"a":"\udC00\uD800"}`:                             "surrogate pair",
	} {
		err := checkUnambiguous[document]([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzUnambiguous checks that encoding/json returns every name of what is accepted.
func FuzzUnambiguous(f *testing.F) {
	for _, text := range []string{`{"a":1,"A":2}`, `{"annotations":{"a":"","A":""}}`, `[{"a":{"b":[]}},{"a":0}]`, `"\ud83d\ude00"`, `{"\ud800":1}`, `"\\u"`, "\"\xff\"", `{"":{"":""}}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var v any
		if json.Unmarshal(raw, &v) != nil {
			return
		}
		if checkUnambiguous[any](raw) != nil {
			return
		}
		if strings.Contains(string(raw), "\ufffd") || strings.Contains(strings.ToLower(string(raw)), `\ufffd`) {
			return // it may mean just that
		}
		again, err := json.Marshal(v)
		if err != nil || strings.Contains(string(again), "\ufffd") {
			t.Errorf("%q has become %q (%v)", raw, again, err)
		}
		if a, b := colons(raw), colons(again); a != b {
			t.Errorf("%q has %d names, and %d of them are left", raw, a, b)
		}
	})
}

// colons counts the colons outside of strings: one for each name.
func colons(raw []byte) (n int) {
	quoted := false
	for i := 0; i < len(raw); i++ {
		switch {
		case raw[i] == '\\':
			i++
		case raw[i] == '"':
			quoted = !quoted
		case raw[i] == ':' && !quoted:
			n++
		}
	}
	return n
}
