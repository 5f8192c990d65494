// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpack

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// overflowID owns files whose owner has no mapping in the user namespace
// (/proc/sys/kernel/overflowuid, which nobody changes in practice).
const overflowID = 65534

// IDMap is the ID mapping of a user namespace as containerd writes it into the labels
// containerd.io/snapshot/uidmapping and gidmapping: a comma-separated list of
// container:host:size. The zero value maps every ID to itself.
type IDMap struct{ UID, GID string }

// Root returns the owner on the host of files that root owns in the user namespace. mapped
// is false for the zero value. A map that cannot be parsed is errdefs.ErrInvalidArgument.
func (m IDMap) Root() (uid, gid uint32, mapped bool, err error) {
	s, err := m.parse()
	if err != nil || m == (IDMap{}) {
		return 0, 0, false, err
	}
	uid, gid = s.owner(0, 0)
	return uid, gid, true, nil
}

// shift maps owners by the ranges of an IDMap.
type shift struct{ uids, gids []idRange }

type idRange struct{ container, host, size uint32 }

// parse returns errdefs.ErrInvalidArgument for a map that cannot be parsed.
func (m IDMap) parse() (s shift, err error) {
	if s.uids, err = parseRanges(m.UID); err != nil {
		return s, err
	}
	s.gids, err = parseRanges(m.GID)
	return s, err
}

func parseRanges(list string) ([]idRange, error) {
	if list == "" {
		return nil, nil
	}
	var ranges []idRange
	for item := range strings.SplitSeq(list, ",") {
		fields := strings.Split(item, ":")
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil || len(fields) != len(n) {
				return nil, fmt.Errorf("ID mapping %q is not a list of container:host:size: %w", list, errdefs.ErrInvalidArgument)
			}
			n[i] = uint32(v)
		}
		if n[2] == 0 || uint64(n[0])+uint64(n[2]) > math.MaxUint32 || uint64(n[1])+uint64(n[2]) > math.MaxUint32 {
			return nil, fmt.Errorf("ID mapping %q leaves the range of user IDs: %w", list, errdefs.ErrInvalidArgument)
		}
		ranges = append(ranges, idRange{container: n[0], host: n[1], size: n[2]})
	}
	return ranges, nil
}

// owner returns the owner on the host of a file of uid and gid.
func (s shift) owner(uid, gid uint32) (uint32, uint32) { return mapID(s.uids, uid), mapID(s.gids, gid) }

func mapID(ranges []idRange, id uint32) uint32 {
	if len(ranges) == 0 {
		return id
	}
	for _, r := range ranges {
		if id >= r.container && id-r.container < r.size {
			return r.host + (id - r.container)
		}
	}
	return overflowID
}
