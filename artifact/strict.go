// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"
)

// checkUnambiguous refuses JSON, to be read as a T, that two readers can understand
// differently and that encoding/json, which containerd uses, reads without an error (RFC
// 8259, sections 4 and 8): text that is not Unicode, which becomes the replacement
// character; and an object with the same name twice, of which the last counts or, if it is
// a list of objects, a mixture. Two names that stand for the same field of T are the same,
// since encoding/json ignores the case of a field's name; keys of maps, such as those of
// annotations, are compared exactly.
func checkUnambiguous[T any](raw []byte) error {
	var v T
	return json.Unmarshal(raw, &v, jsonv1.DefaultOptionsV1(), jsonv1.ReportErrorsWithLegacySemantics(false),
		jsontext.AllowDuplicateNames(false), jsontext.AllowInvalidUTF8(false))
}
