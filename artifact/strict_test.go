// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestJSONThatCanBeReadInTwoWays(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:                                    "",
		`[{"a":1},{"a":1}]`:                     "",
		`{"a":{"a":{"a":1}}}`:                   "",
		`{"annotations":{"a":"1","A":"2"}}`:     "",
		`{"a":"\\ud800"}`:                       "",
		`{"a":"\ud83d\ude00","b":"\u00e9\"\n"}`: "",
		`{"a":1,"b":2,"a":3}`:                   `"a" is there twice`,
		`{"a":1,"A":3}`:                         `"A" is there twice`,
		`{"layers":[],"LAYER\u017f":[]}`:        "is there twice", // the long s
		`{"a":1,"\u0061":3}`:                    `"a" is there twice`,
		`[[{"a":[{"b":0,"b":0}]}]]`:             `"b" is there twice`,
		`{"annotations":{"a":"1","a":"2"}}`:     `"a" is there twice`,
		`{"annotations":{},"Annotations":{}}`:   "is there twice",
		"{\"a\":\"\xff\"}":                      "not UTF-8",
		`{"a":"\ud800"}`:                        "half of a surrogate pair",
		`{"a":"\udc00"}`:                        "half of a surrogate pair",
		`{"a":"\ud800x\udc00"}`:                 "half of a surrogate pair",
		`{"a":"\ud800\ud800\udc00"}`:            "half of a surrogate pair",
		`{"a":"\udC00\uD800"}`:                  "half of a surrogate pair",
	} {
		err := checkUnambiguous([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzUnambiguous checks that encoding/json gives back each name of what is accepted.
func FuzzUnambiguous(f *testing.F) {
	for _, text := range []string{`{"a":1,"A":2}`, `{"annotations":{"a":"","A":""}}`, `[{"a":{"b":[]}},{"a":0}]`, `"\ud83d\ude00"`, `{"\ud800":1}`, `"\\u"`, "\"\xff\"", `{"":{"":""}}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var v any
		if json.Unmarshal(raw, &v) != nil {
			return
		}
		if checkUnambiguous(raw) != nil {
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

// colons counts those that are not in strings: one for each name.
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
