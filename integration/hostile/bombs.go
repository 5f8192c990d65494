// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
)

// zeros returns gzip of this many MiB of zeros, about a thousandth of the size. It
// compresses only two of them and repeats the second, which ends on a byte boundary like
// the first.
func zeros(mib int) string {
	zero := make([]byte, 1<<20)
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.DefaultCompression)
	if err != nil {
		panic(err)
	}
	next := func() string {
		b.Reset()
		_, _ = w.Write(zero)
		_ = w.Flush()
		return b.String()
	}
	stream := "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + next() + strings.Repeat(next(), mib-1)
	b.Reset()
	_ = w.Close()
	crc := uint32(0)
	for range mib {
		crc = crc32.Update(crc, crc32.IEEETable, zero)
	}
	end := binary.LittleEndian.AppendUint32(b.Bytes(), crc)
	return stream + string(binary.LittleEndian.AppendUint32(end, uint32(mib)<<20))
}

// compressedMembers returns gzip of n members and the end marker.
func compressedMembers(n int, f func(i int) string) string {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		panic(err)
	}
	for i := range n {
		_, _ = w.Write([]byte(f(i)))
	}
	_, _ = w.Write([]byte(mark))
	_ = w.Close()
	return b.String()
}

// members returns n uncompressed members and the end marker, for cases that the limit on
// expansion must not refuse.
func members(n int, f func(i int) string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(f(i))
	}
	return b.String() + mark
}

// later returns a slow or large case. Its layers and verdict are made on demand.
func later(name string, want func() Verdict, layers func() []layer) Case {
	return Case{Name: name, Make: func() *Artifact { return pack(layers()...).ofLayers() }, want: want}
}

// bombCases need far more disk, memory or time than their size suggests.
func bombCases() (cases []Case) {
	add := func(name string, long bool, want func() Verdict, layers func() []layer) {
		c := later("bomb/"+name, want, layers)
		c.Long = long
		cases = append(cases, c)
	}
	says := func(text ...string) func() Verdict { return func() Verdict { return refused(text...) } }
	of := func(mediaType string, content func() string) func() []layer {
		return func() []layer { return []layer{good(), {mediaType: mediaType, content: content()}} }
	}
	// A million equal members would compress too well and exceed max_expansion, so each has
	// a different owner name, which is ignored.
	salt := func(i int) edit {
		return edit{fUname, fmt.Sprintf("%08x%08x", uint32(i)*2654435761, uint32(i)*2246822519)}
	}
	one := func(i int) string { return file(fmt.Sprintf("%d", i), "", salt(i)) }
	files := func(n int) func() Verdict {
		return func() Verdict {
			l := Listing{}
			for i := range n {
				l[fmt.Sprintf("%d", i)] = isFile("")
			}
			return mounts(l)
		}
	}
	const expands = "raise max_expansion"
	add("gzip, a thousand to one, of zeros", false, says(expands), of(gzipType, func() string { return zeros(512) }))
	add("gzip, a member of 512 MiB", false, says(expands), of(gzipType, func() string {
		return gzipped(member('0', "f", "", edit{fSize, "04000000000\x00"})) + zeros(512)
	}))
	add("zstd, thirty thousand to one", false, says(expands), of(zstdType, func() string { return zstdRun(0, 1<<36) }))
	add("zstd, a thousand skippable frames and then a run", false, says(expands), of(zstdType, func() string {
		return strings.Repeat("\x50\x2a\x4d\x18\x00\x00\x00\x00", 1000) + zstdRun('x', 1<<30)
	}))
	add("gzip within gzip within gzip", false, says("the archive"), of(gzipType, func() string { return gzipped(gzipped(zeros(64))) }))
	add("100,000 empty files", false, files(100000), func() []layer {
		return []layer{{mediaType: gzipType, content: compressedMembers(100000, one)}}
	})
	add("100,000 directories", true, func() Verdict {
		l := Listing{}
		for i := range 100000 {
			l[fmt.Sprintf("%d", i)] = isDir()
		}
		return mounts(l)
	}, func() []layer {
		return []layer{{mediaType: gzipType, content: compressedMembers(100000, func(i int) string { return dir(fmt.Sprintf("%d", i)) })}}
	})
	add("1,048,575 empty files", true, files(1<<20-1), func() []layer {
		return []layer{{mediaType: gzipType, content: compressedMembers(1<<20-1, one)}}
	})
	add("1,048,577 empty files", true, says("more than 1048576 files and directories"), of(gzipType, func() string { return compressedMembers(1<<20+1, one) }))
	add("1,048,577 times the volume itself", true, says("more than 1048576 files and directories"), of(gzipType, func() string {
		return compressedMembers(1<<20+1, func(i int) string { return dir("./", salt(i)) })
	}))
	add("one path, 1,048,577 times", true, says("more than 1048576 files and directories"), of(gzipType, func() string {
		return compressedMembers(1<<20+1, func(i int) string { return file("f", "", salt(i)) })
	}))
	add("20,000 files below 100 directories each", false, says("more than 1048576 files and directories"), of(gzipType, func() string {
		return compressedMembers(20000, func(i int) string { return named(fmt.Sprintf("%d/", i)+strings.Repeat("d/", 100)+"f", '0', "") })
	}))
	add("64 MiB of names", false, says("MiB of names"), of(tarType, func() string {
		return members(18000, func(i int) string { return named(strings.Repeat(name255+"/", 15)+fmt.Sprint(i), '0', "") })
	}))
	add("64 MiB of targets", false, says("MiB of names"), of(tarType, func() string {
		return members(17000, func(i int) string {
			return pax(record("linkpath", strings.Repeat("t", 4095))) + symlink(fmt.Sprint(i), "x")
		})
	}))
	add("64 MiB of extended attributes", false, says("MiB of names"), of(tarType, func() string {
		return members(1100, func(i int) string {
			return pax(record("SCHILY.xattr.user.x", strings.Repeat("v", 1<<16-1))) + file(fmt.Sprint(i), "")
		})
	}))
	add("extended headers of 1 MiB, a thousand times", false, says(expands), of(gzipType, func() string {
		return compressedMembers(1000, func(i int) string {
			return pax(record("comment", strings.Repeat("c", 1<<20-100))) + file(fmt.Sprint(i), "")
		})
	}))
	// ext4 allows 65,000 links to a file (EXT4_LINK_MAX).
	const links = 66000
	add(fmt.Sprintf("%d hard links to one file", links), false, func() Verdict {
		l := Listing{"f": isFile("x")}
		for i := range links {
			l[fmt.Sprintf("h%d", i)] = isFile("x")
		}
		return mounts(l)
	}, func() []layer {
		return []layer{{mediaType: gzipType, content: compressedMembers(links+1, func(i int) string {
			if i == 0 {
				return file("f", "x")
			}
			return hardLink(fmt.Sprintf("h%d", i-1), "f")
		})}}
	})
	add("10,000 hard links to a file with a hole of 8 GiB", false, says("more than 1048576 files and directories"), func() []layer {
		all := []string{sparse1("s", fmt.Sprint(int64(8)<<30), "0\n", "")}
		for i := range 10000 {
			all = append(all, hardLink(fmt.Sprint(i), "s"))
		}
		return []layer{good(), tarred(all...)}
	})
	const fragments = 20000 // of one byte, with a hole of one block around each
	add(fmt.Sprintf("a sparse file of %d fragments", fragments), false, func() Verdict {
		var pieces []piece
		for i := range fragments {
			pieces = append(pieces, piece{int64(i) * 1024, "x"})
		}
		return mounts(Listing{"s": isFile(whole(fragments*1024, pieces...))})
	}, func() []layer {
		var table strings.Builder
		fmt.Fprintf(&table, "%d\n", fragments)
		for i := range fragments {
			fmt.Fprintf(&table, "%d\n1\n", i*1024)
		}
		return []layer{tarred(sparse1("s", fmt.Sprint(fragments*1024), table.String(), strings.Repeat("x", fragments)))}
	})
	add("5,000 raw layers", true, func() Verdict {
		l := Listing{}
		for i := range 5000 {
			l[fmt.Sprintf("%d", i)] = isRaw(fmt.Sprint(i))
		}
		return mounts(l)
	}, func() []layer { return many(5000, func(i int) layer { return raw(fmt.Sprint(i), fmt.Sprint(i)) }) })
	add("one blob in 10,000 layers", true, func() Verdict {
		l := Listing{}
		for i := range 10000 {
			l[fmt.Sprintf("%d", i)] = isRaw("x")
		}
		return mounts(l)
	}, func() []layer { return many(10000, func(i int) layer { return raw(fmt.Sprint(i), "x") }) })
	add("one archive in 1,000 layers", false, func() Verdict { return mounts(Listing{"f": isFile("x")}) },
		func() []layer { return many(1000, func(int) layer { return tarred(file("f", "x")) }) })
	add("1,200 archives", true, func() Verdict {
		l := Listing{}
		for i := range 1200 {
			l[fmt.Sprintf("%d", i)] = isFile("x")
		}
		return mounts(l)
	}, func() []layer { return many(1200, func(i int) layer { return tarred(file(fmt.Sprint(i), "x")) }) })
	add("1,000 gzip archives", true, func() Verdict {
		l := Listing{}
		for i := range 1000 {
			l[fmt.Sprintf("%d", i)] = isFile("x")
		}
		return mounts(l)
	}, func() []layer {
		return many(1000, func(i int) layer {
			return layer{mediaType: gzipType, content: gzipped(file(fmt.Sprint(i), "x") + mark)}
		})
	})
	add("an archive of holes only, 64 times", false, func() Verdict {
		l := Listing{}
		for i := range 64 {
			l[fmt.Sprintf("%d", i)] = isFile(whole(1 << 20))
		}
		return mounts(l)
	}, func() []layer {
		var all []string
		for i := range 64 {
			all = append(all, sparse1(fmt.Sprint(i), "1048576", "0\n", ""))
		}
		return []layer{tarred(all...)}
	})
	return cases
}
