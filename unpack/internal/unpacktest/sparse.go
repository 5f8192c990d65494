// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package unpacktest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Record returns a record of a PAX header.
func Record(key, value string) string {
	n := len(key) + len(value) + 3
	for l := len(strconv.Itoa(n)) + len(key) + len(value) + 3; l != n; l = len(strconv.Itoa(n)) + len(key) + len(value) + 3 {
		n = l
	}
	return strconv.Itoa(n) + " " + key + "=" + value + "\n"
}

// Member returns a tar member, padded, that archive/tar would not write: of any type, and
// with a header that edit has changed.
func Member(flag byte, name, content string, edit func(header []byte)) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: "n", Size: int64(len(content)), Mode: 0o644, Typeflag: tar.TypeReg, ModTime: Created}); err != nil {
		panic(err)
	}
	_, _ = io.WriteString(w, content)
	_ = w.Flush()
	b := buf.Bytes()
	copy(b[:100], name)
	b[156] = flag
	if edit != nil {
		edit(b[:512])
	}
	Checksum(b[:512])
	return b
}

// Checksum corrects the checksum of a header.
func Checksum(header []byte) {
	copy(header[148:156], "        ")
	sum := 0
	for _, c := range header {
		sum += int(c)
	}
	copy(header[148:156], fmt.Sprintf("%06o", sum)+"\x00 ")
}

// EndMark is the end-of-archive entry: two blocks of zeros.
var EndMark = make([]byte, 1024)

// Fragment is the data between two holes of a sparse file.
type Fragment struct {
	Offset int64
	Data   string
}

// SparseForms are the formats in which GNU tar writes a sparse file (its manual, "Storing
// Sparse Files"). Each function returns a member of size bytes, with holes around the
// fragments.
var SparseForms = map[string]func(name string, size int64, fragments ...Fragment) []byte{
	"old GNU": func(name string, size int64, fragments ...Fragment) []byte {
		data := ""
		var more [][]byte // headers of 21 fragments behind the first one
		for i, f := range fragments {
			data += f.Data
			if i >= 4 && (i-4)%21 == 0 {
				more = append(more, make([]byte, 512))
			}
			if i >= 4 {
				copy(more[len(more)-1][(i-4)%21*24:], fmt.Sprintf("%011o\x00%011o\x00", f.Offset, len(f.Data)))
			}
		}
		for i := range len(more) - 1 {
			more[i][504] = 1
		}
		b := Member(tar.TypeGNUSparse, name, data, func(h []byte) {
			copy(h[257:], "ustar  \x00")
			clear(h[345:512])
			for i, f := range fragments[:min(4, len(fragments))] {
				copy(h[386+24*i:], fmt.Sprintf("%011o\x00%011o\x00", f.Offset, len(f.Data)))
			}
			if len(more) > 0 {
				h[482] = 1
			}
			copy(h[483:], fmt.Sprintf("%011o\x00", size))
		})
		return slices.Concat(b[:512], bytes.Join(more, nil), b[512:])
	},
	"PAX 0.0": func(name string, size int64, fragments ...Fragment) []byte {
		pax, data := Record("GNU.sparse.size", strconv.Itoa(int(size)))+Record("GNU.sparse.numblocks", strconv.Itoa(len(fragments))), ""
		for _, f := range fragments {
			pax += Record("GNU.sparse.offset", strconv.Itoa(int(f.Offset))) + Record("GNU.sparse.numbytes", strconv.Itoa(len(f.Data)))
			data += f.Data
		}
		return slices.Concat(Member(tar.TypeXHeader, "pax", pax, nil), Member(tar.TypeReg, name, data, nil))
	},
	"PAX 0.1": func(name string, size int64, fragments ...Fragment) []byte {
		var places []string
		data := ""
		for _, f := range fragments {
			places = append(places, strconv.Itoa(int(f.Offset)), strconv.Itoa(len(f.Data)))
			data += f.Data
		}
		pax := Record("GNU.sparse.size", strconv.Itoa(int(size))) + Record("GNU.sparse.numblocks", strconv.Itoa(len(fragments))) +
			Record("GNU.sparse.name", name) + Record("GNU.sparse.map", strings.Join(places, ","))
		return slices.Concat(Member(tar.TypeXHeader, "pax", pax, nil), Member(tar.TypeReg, "GNUSparseFile.0/f", data, nil))
	},
	"PAX 1.0": func(name string, size int64, fragments ...Fragment) []byte {
		pax := Record("GNU.sparse.major", "1") + Record("GNU.sparse.minor", "0") +
			Record("GNU.sparse.name", name) + Record("GNU.sparse.realsize", strconv.Itoa(int(size)))
		places, data := strconv.Itoa(len(fragments))+"\n", ""
		for _, f := range fragments {
			places += strconv.Itoa(int(f.Offset)) + "\n" + strconv.Itoa(len(f.Data)) + "\n"
			data += f.Data
		}
		places += strings.Repeat("\x00", (512-len(places)%512)%512)
		return slices.Concat(Member(tar.TypeXHeader, "pax", pax, nil), Member(tar.TypeReg, "GNUSparseFile.0/f", places+data, nil))
	},
}
