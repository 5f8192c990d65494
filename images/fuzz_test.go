// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package images

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
)

// FuzzDocument reads what may be the manifest or the index of an image as CRI does:
// like encoding/json, but without keeping lists.
func FuzzDocument(f *testing.F) {
	d := digest.FromString("x").String()
	for _, text := range []string{
		`{}`, `null`, `{"config":{"digest":"` + d + `"}}`, `{"manifests":[]}`, `{"manifests":null}`, `{"manifests":[{"digest":"` + d + `"},{"digest":"` + d + `","platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"manifests":[{"platform":{"os":"linux","architecture":"arm64"}}],"Manifests":[{"digest":"x"}]}`, `{"manifests":{}}`, `{"manifests":[1]}`, `{"manifests":[{}],"manifests":[{}]}`,
		`{"config":[]}`, `{"manifests":[[]]}`, `{"manifests":[{"platform":1}]}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var doc document
		err := json.Unmarshal(text, &doc)
		whole, werr := mergeTwice(text)
		if errors.Is(err, errUndecided) {
			return // it is read by mergeTwice, then
		}
		if (err == nil) != (werr == nil) {
			// What is no list at all may be as good as none.
			if err != nil || doc.Manifests.any {
				t.Fatalf("%q: %v, and as a whole %v", text, err, werr)
			}
			return
		}
		if err != nil {
			return
		}
		if doc.Config != whole.Config || doc.Manifests.any != whole.Manifests.any || (doc.Manifests.best == nil) != (whole.Manifests.best == nil) ||
			doc.Manifests.best != nil && doc.Manifests.best.Digest != whole.Manifests.best.Digest {
			t.Errorf("%q: %+v, and as a whole %+v", text, doc, whole)
		}
	})
}
