// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"math"
	"testing"
)

// FuzzIDMap parses ID mappings. No owner may become the one that chown(2) takes for "leave
// unchanged", nor one outside of the mapped ranges, except for overflowID.
func FuzzIDMap(f *testing.F) {
	for _, list := range []string{
		"", "0:200000:65536", "0:0:1,1:100000:65535", "0:4294967294:1", "0:1:4294967295", "4294967295:0:1", "0:0:0", "1:2", "1:2:3:4", "-1:0:1", "0:0:1,", ",", "a:b:c",
		"00:0x1:1", "0:200000:65536,0:0:65536", " 0:0:1", "4294967294:4294967294:1",
	} {
		f.Add(list, uint32(0))
		f.Add(list, uint32(65535))
		f.Add(list, uint32(math.MaxUint32-1))
	}
	f.Fuzz(func(t *testing.T, list string, id uint32) {
		s, err := IDMap{UID: list, GID: list}.parse()
		if err != nil {
			wantKind(t, err)
			return
		}
		if id == math.MaxUint32 {
			return // no plan has it
		}
		uid, gid := s.owner(id, id)
		if uid != gid || uid == math.MaxUint32 {
			t.Errorf("%q makes %d %d:%d", list, id, uid, gid)
		}
		within := len(s.uids) == 0 && uid == id || uid == overflowID
		for _, r := range s.uids {
			if id >= r.container && uint64(id) < uint64(r.container)+uint64(r.size) && uid-r.host == id-r.container {
				within = true
			}
		}
		if !within {
			t.Errorf("%q makes %d %d", list, id, uid)
		}
	})
}
