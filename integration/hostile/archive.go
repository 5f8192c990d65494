// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// block is the block size of an archive in bytes.
const block = 512

// mark is the end of an archive: two blocks of zeros.
var mark = strings.Repeat("\x00", 2*block)

// The fields of a header: offset and length (POSIX pax, "ustar Interchange Format").
var (
	fName     = field{0, 100}
	fMode     = field{100, 8}
	fUID      = field{108, 8}
	fGID      = field{116, 8}
	fSize     = field{124, 12}
	fMTime    = field{136, 12}
	fChecksum = field{148, 8}
	fType     = field{156, 1}
	fLink     = field{157, 100}
	fMagic    = field{257, 6}
	fVersion  = field{263, 2}
	fUname    = field{265, 32}
	fGname    = field{297, 32}
	fMajor    = field{329, 8}
	fMinor    = field{337, 8}
	fPrefix   = field{345, 155}
	fRest     = field{500, 12}
)

type field struct{ at, length int }

// edit overwrites a field with a value, padded with zeros.
type edit struct {
	field
	value string
}

// at is the default modification time of members.
const at = 1700000000

// member returns one header with its data.
func member(flag byte, name, content string, edits ...edit) string {
	h := make([]byte, block)
	put := func(f field, value string) {
		if len(value) > f.length {
			panic(fmt.Sprintf("%q does not fit its field", value))
		}
		clear(h[f.at : f.at+f.length])
		copy(h[f.at:], value)
	}
	put(fName, name)
	put(fMode, "0000644\x00")
	put(fUID, "0000000\x00")
	put(fGID, "0000000\x00")
	put(fSize, fmt.Sprintf("%011o\x00", len(content)))
	put(fMTime, fmt.Sprintf("%011o\x00", at))
	put(fType, string([]byte{flag}))
	put(fMagic, "ustar\x00")
	put(fVersion, "00")
	put(fMajor, "0000000\x00")
	put(fMinor, "0000000\x00")
	var checksum *string
	for _, e := range edits {
		if e.field == fChecksum {
			checksum = &e.value
			continue
		}
		put(e.field, e.value)
	}
	put(fChecksum, "        ")
	total := 0
	for _, b := range h {
		total += int(b)
	}
	put(fChecksum, fmt.Sprintf("%06o\x00 ", total))
	if checksum != nil {
		put(fChecksum, *checksum)
	}
	return string(h) + content + strings.Repeat("\x00", (block-len(content)%block)%block)
}

func file(name, content string, edits ...edit) string { return member('0', name, content, edits...) }

func dir(name string, edits ...edit) string {
	return member('5', name, "", append([]edit{{fMode, "0000755\x00"}}, edits...)...)
}

func symlink(name, target string, edits ...edit) string {
	return member('2', name, "", append([]edit{{fLink, target}}, edits...)...)
}

func hardLink(name, target string, edits ...edit) string {
	return member('1', name, "", append([]edit{{fLink, target}}, edits...)...)
}

// record returns a pax record. Its length includes the length field itself.
func record(key, value string) string {
	body := " " + key + "=" + value + "\n"
	n := len(body) + 1
	for len(strconv.Itoa(n))+len(body) != n {
		n++
	}
	return strconv.Itoa(n) + body
}

// pax returns an extended header for the next member.
func pax(records ...string) string {
	return member('x', "PaxHeaders/x", strings.Join(records, ""))
}

// named returns a member whose name may have any length and any bytes.
func named(name string, flag byte, content string, edits ...edit) string {
	return pax(record("path", name)) + member(flag, "name", content, edits...)
}

// base256 encodes a number like GNU tar if it does not fit into octal digits.
func base256(n int64, length int) string {
	b := make([]byte, length)
	for i := range b {
		shift := 8 * (length - 1 - i)
		if shift > 56 {
			b[i] = byte(n >> 63)
		} else {
			b[i] = byte(n >> shift)
		}
	}
	b[0] |= 0x80
	return string(b)
}

func isFile(content string) Entry {
	return Entry{Type: File, Mode: 0o644, Sec: at, Size: int64(len(content)), SHA256: sum(content)}
}

func isDir() Entry { return Entry{Type: Directory, Mode: 0o755, Sec: at} }

func isLink(target string) Entry {
	return Entry{Type: Symlink, Mode: 0o777, Sec: at, Target: target}
}

func (e Entry) mode(mode uint32) Entry { e.Mode = mode; return e }

func (e Entry) owner(uid, gid uint32) Entry { e.UID, e.GID = uid, gid; return e }

func (e Entry) time(sec, nsec int64) Entry { e.Sec, e.Nsec = sec, nsec; return e }

func (e Entry) attrs(set map[string]string) Entry { e.Xattrs = xattrs(set); return e }

func gzipped(content string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(content)) // a bytes.Buffer accepts everything
	_ = w.Close()
	return b.String()
}

func zstded(content string, opts ...zstd.EOption) string {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, opts...)
	if err != nil {
		panic(err)
	}
	_, _ = w.Write([]byte(content))
	_ = w.Close()
	return b.String()
}
