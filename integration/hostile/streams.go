// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// endCases are endings of an archive.
func endCases() []Case {
	stream := func(name, content string, says ...string) Case {
		return bad("end/"+name, layer{mediaType: tarType, content: content}, says...)
	}
	whole := func(name, content string, l Listing) Case {
		return fine("end/"+name, l, layer{mediaType: tarType, content: content})
	}
	f, zeros := file("f", "x"), func(n int) string { return strings.Repeat("\x00", n) }
	mounted := Listing{"f": isFile("x")}
	const truncated, unreadable, garbage = "the archive is truncated", "the archive cannot be read", "garbage follows the end"
	header := pax(record("comment", "x"))
	return []Case{
		whole("one block of zeros", f+zeros(block), mounted),
		whole("a record of 10 KiB", f+zeros(10240), mounted),
		whole("4 MiB of zeros", f+zeros(4<<20), mounted),
		whole("4 MiB of zeros and a bit", f+zeros(4<<20+1), mounted),
		whole("no block of zeros", f, mounted),
		whole("no block of zeros after a directory", f+dir("d"), Listing{"f": isFile("x"), "d": isDir()}),
		whole("no block of zeros after a label", f+member('V', "label", "", gnuMagic...), mounted),
		whole("no block of zeros after a global header", f+member('g', "pax_global_header", record("comment", "x")), mounted),
		whole("zeros that are not a whole block", f+mark+zeros(7), mounted),
		whole("only the end marker", mark, Listing{}),
		whole("only one block of zeros", zeros(block), Listing{}),
		whole("no bytes at all", "", Listing{}),
		stream("one byte", "x", truncated),
		stream("half a header", f[:100], truncated),
		stream("a header without its file", f[:block], truncated),
		stream("half a file", f[:block+1], truncated),
		stream("a file without its padding", f[:2*block-1], truncated),
		stream("half a block of zeros", f+zeros(100), truncated),
		stream("half a header after a file", f+f[:100], truncated),
		stream("an extended header without its member", f+header, truncated),
		stream("an extended header without its member, and zeros", f+header+mark, truncated),
		stream("an extended header that is cut off", f+header[:block], truncated),
		stream("a long name without its member", f+member('L', "././@LongLink", "name\x00", gnuMagic...), truncated),
		stream("a byte of garbage after 4 MiB of zeros", f+zeros(4<<20)+"x", garbage),
		stream("a member after 4 MiB of zeros", f+zeros(4<<20)+file("g", "x"), garbage),
		stream("trailing text", f+mark+"text", garbage),
		stream("a trailing archive", f+mark+file("g", "x")+mark, garbage),
		stream("a trailing byte after a MiB of zeros", f+zeros(1<<20-1)+"x", garbage),
		stream("one block of zeros and a trailing member", f+zeros(block)+file("g", "x")+mark, unreadable),
		stream("leading zeros", zeros(2*block)+f+mark, garbage),
		stream("one leading block of zeros", zeros(block)+f+mark, unreadable),
		stream("text", strings.Repeat("This is no archive. ", 100), unreadable),
		stream("noise", noise(4096), unreadable),
		stream("JSON", `{"schemaVersion": 2}`+strings.Repeat(" ", 1000), unreadable),
		stream("an executable", "\x7fELF"+zeros(1020), unreadable),
		stream("gzip with the media type of a tar, and trailing zeros", gzipped(f+mark)+zeros(1024), "bytes follow the end of the gzip stream"),
		stream("an archive within an archive that is cut off", file("f", f+mark)[:block+100], truncated),
	}
}

// noise returns pseudorandom bytes, always the same.
func noise(n int) string {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b { // Marsaglia's xorshift
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return string(b)
}

// streamCases are compressed layers.
func streamCases() (cases []Case) {
	f := file("f", "x") + mark
	fs := Listing{"f": isFile("x")}
	const truncated, unreadable, noGzip, noZstd = "the archive is truncated", "the archive cannot be read", "bytes follow the end of the gzip stream", "bytes follow the end of the zstd stream"
	nothing := func(mediaType, name, content string) {
		cases = append(cases, fine("stream/"+name, Listing{}, layer{mediaType: mediaType, content: content}))
	}
	mounted := func(mediaType, name, content string) {
		cases = append(cases, fine("stream/"+name, fs, layer{mediaType: mediaType, content: content}))
	}
	refuse := func(mediaType, name, content string, says ...string) {
		cases = append(cases, bad("stream/"+name, layer{mediaType: mediaType, content: content}, says...))
	}
	z := gzipped(f)
	// The header of RFC 1952, section 2.3: magic, method, flags, time, extra flags, system.
	head := func(flags byte, extra string) string {
		return "\x1f\x8b\x08" + string([]byte{flags}) + "\x00\x00\x00\x00\x00\xff" + extra + z[10:]
	}
	empty := gzipped("")
	mounted(gzipType, "gzip", z)
	mounted(gzipType, "gzip, two members", gzipped(f[:700])+gzipped(f[700:]))
	mounted(gzipType, "gzip, a member of each byte", eachByte(f))
	mounted(gzipType, "gzip, empty members around", empty+empty+z+empty)
	mounted(gzipType, "gzip, a name", head(8, "/etc/passwd\x00"))
	mounted(gzipType, "gzip, a comment", head(16, "comment\x00"))
	mounted(gzipType, "gzip, an extra field", head(4, "\x05\x00abcde"))
	mounted(gzipType, "gzip, said to be text", head(1, ""))
	mounted(gzipType, "gzip, a time in the future", z[:4]+"\xff\xff\xff\xff"+z[8:])
	mounted(gzipType, "gzip, no end", gzipped(f[:2*block]))
	mounted(gzipType, "gzip, 4 MiB of zeros", gzipped(f+strings.Repeat("\x00", 4<<20)))
	nothing(gzipType, "gzip, no bytes", "")
	nothing(gzipType, "gzip of no bytes", empty)
	nothing(gzipType, "gzip of no bytes, twice", empty+empty)
	refuse(gzipType, "gzip, half a header", z[:5], truncated)
	refuse(gzipType, "gzip, a header alone", z[:10], truncated)
	refuse(gzipType, "gzip, half", z[:len(z)/2], truncated)
	refuse(gzipType, "gzip, without its checksum", z[:len(z)-8], truncated)
	refuse(gzipType, "gzip, half a checksum", z[:len(z)-5], truncated)
	refuse(gzipType, "gzip, a wrong checksum", z[:len(z)-8]+"\x00\x00\x00\x00"+z[len(z)-4:], unreadable)
	refuse(gzipType, "gzip, a wrong size", z[:len(z)-4]+"\x00\x00\x00\x00", unreadable)
	refuse(gzipType, "gzip, half a second header", z+z[:5], truncated)
	refuse(gzipType, "gzip, trailing zeros", z+strings.Repeat("\x00", 512), noGzip)
	refuse(gzipType, "gzip, a trailing byte", z+"x", noGzip)
	refuse(gzipType, "gzip, seven trailing bytes", z+"garbage", noGzip)
	refuse(gzipType, "gzip, trailing text", z+"text that is longer than a header", noGzip)
	refuse(gzipType, "gzip, a trailing archive", z+f, noGzip)
	refuse(gzipType, "gzip, a byte of another member", z+"\x1f", truncated)
	refuse(gzipType, "gzip, garbage in its archive", gzipped(f+"text"), "garbage follows the end")
	refuse(gzipType, "gzip, a name without end", head(8, ""), "the archive")
	refuse(gzipType, "gzip, an extra field without end", head(4, "\xff\xff"), "the archive")
	refuse(gzipType, "gzip, a wrong header checksum", head(2, "\x00\x00"), unreadable)
	refuse(gzipType, "gzip, an unknown block type", z[:10]+"\x07"+z[11:], unreadable)
	refuse(gzipType, "gzip, gzip within", gzipped(z), "the archive")
	refuse(gzipType, "gzip, zstd within", gzipped(zstded(f)), "the archive")
	// Like in containerd, the bytes decide about the compression, not the media type.
	const notGzip, notZstd = "its media type says that it is gzip, and its bytes are not compressed", "its media type says that it is zstd, and its bytes are not compressed"
	mounted(gzipType, "gzip, zstd instead", zstded(f))
	mounted(gzipType, "gzip, an archive instead", f)
	refuse(gzipType, "gzip, an unknown method", z[:2]+"\x07"+z[3:], notGzip)
	refuse(gzipType, "gzip, text instead", "text, and no gzip", notGzip)
	refuse(gzipType, "gzip, seven bytes instead", "garbage", notGzip)
	refuse(gzipType, "gzip, noise instead", noise(1000), notGzip, unreadable)
	refuse(gzipType, "gzip, zlib instead", "\x78\x9c\x03\x00\x00\x00\x00\x01", notGzip)
	for name, magic := range map[string]string{"xz": "\xfd7zXZ\x00", "bzip2": "BZh9", "lz4": "\x04\x22\x4d\x18", "zip": "PK\x03\x04"} {
		for _, mediaType := range []string{tarType, gzipType, zstdType} {
			refuse(mediaType, name+" instead of "+mediaType, magic+noise(1000), "its bytes are "+name+", which is not supported")
		}
	}
	mounted(tarType, "gzip instead of none", z)
	mounted(tarType, "zstd instead of none", zstded(f))

	s := zstded(f)
	skip := "\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
	mounted(zstdType, "zstd", s)
	mounted(zstdType, "zstd, two frames", zstded(f[:700])+zstded(f[700:]))
	mounted(zstdType, "zstd, skippable frames around it", skip+s+skip)
	mounted(zstdType, "zstd, a trailing empty frame", s+"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00")
	mounted(zstdType, "zstd, without a checksum", zstded(f, zstd.WithEncoderCRC(false)))
	mounted(zstdType, "zstd, a window of 128 MiB", zstdFrame("\x00\x88", f))
	mounted(zstdType, "zstd, uncompressed blocks", zstdFrame("\x00\x00", f))
	mounted(zstdType, "zstd, no end", zstded(f[:2*block]))
	refuse(zstdType, "zstd, a window of 256 MiB", zstdFrame("\x00\x90", f), unreadable, "128 MiB", "--long=27")
	refuse(zstdType, "zstd, the largest window", zstdFrame("\x00\xff", f), unreadable, "128 MiB", "--long=27")
	refuse(zstdType, "zstd, one segment of 256 MiB", zstdFrame("\xa0\x00\x00\x00\x10", f), unreadable, "128 MiB", "--long=27")
	refuse(zstdType, "zstd, a window of 256 MiB in the second frame", s+zstdFrame("\x00\x90", f), unreadable, "128 MiB", "--long=27")
	nothing(zstdType, "zstd, no bytes", "")
	nothing(zstdType, "zstd of no bytes", "\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00")
	nothing(zstdType, "zstd, only a skippable frame", skip)
	refuse(zstdType, "zstd, half a header", s[:5], truncated)
	refuse(zstdType, "zstd, half", s[:len(s)/2], truncated)
	refuse(zstdType, "zstd, without its checksum", s[:len(s)-4], truncated)
	refuse(zstdType, "zstd, a wrong checksum", s[:len(s)-4]+"\x00\x00\x00\x00", unreadable)
	refuse(zstdType, "zstd, half a second header", s+s[:3], truncated)
	refuse(zstdType, "zstd, trailing zeros", s+strings.Repeat("\x00", 512), noZstd)
	refuse(zstdType, "zstd, trailing text", s+"text that is no frame", noZstd)
	refuse(zstdType, "zstd, seven trailing bytes", s+"garbage", noZstd)
	refuse(zstdType, "zstd, two trailing bytes", s+"ab", "or up to 3 bytes follow the last frame")
	refuse(zstdType, "zstd, text after a skippable frame", skip+"text that is no frame", noZstd)
	refuse(zstdType, "zstd, a wrong size of its content", zstdFrame("\x20\x05", f), unreadable)
	refuse(zstdType, "zstd, a size of 2^63", zstdFrame("\xc0\x00\xff\xff\xff\xff\xff\xff\xff\x7f", f), "")
	refuse(zstdType, "zstd, a missing dictionary", zstdFrame("\x01\x00\x07", f), unreadable)
	refuse(zstdType, "zstd, a reserved bit", zstdFrame("\x08\x00", f), unreadable)
	refuse(zstdType, "zstd, an unknown block type", "\x28\xb5\x2f\xfd\x00\x00\x07\x00\x00", unreadable)
	refuse(zstdType, "zstd, a skippable frame that claims 4 GiB", s+"\x50\x2a\x4d\x18\xff\xff\xff\xffx", "the archive")
	mounted(zstdType, "zstd, gzip instead", z)
	mounted(zstdType, "zstd, an archive instead", f)
	refuse(zstdType, "zstd, noise instead", noise(1000), notZstd, unreadable)

	for _, mediaType := range []string{gzipType, zstdType} {
		l := layer{mediaType: mediaType, content: z}
		if mediaType == zstdType {
			l.content = s
		}
		for name, id := range map[string]string{
			"another": digestOf("another").String(), "the blob's own": l.name().String(), "of a file in it": digestOf("x").String(),
		} {
			cases = append(cases, Case{
				Name: "stream/DiffID in the config, " + name + ", " + mediaType[len(tarType)+1:],
				Make: func() *Artifact { return pack(good(), l).withDiffIDs(good().name().String(), id).done() },
				Want: refused("layer 1 ("+mediaType, "the config lists the DiffID "+id),
			})
		}
		none := layer{mediaType: mediaType}
		cases = append(cases, Case{
			Name: "stream/DiffID in the config, of an empty blob, " + mediaType[len(tarType)+1:],
			Make: func() *Artifact {
				return pack(good(), none).withDiffIDs(good().name().String(), digestOf("").String()).done()
			},
			Want: mounts(Listing{"good.txt": isRaw("a good file\n")}),
		}, Case{
			Name: "stream/DiffID in the config, of a content for an empty blob, " + mediaType[len(tarType)+1:],
			Make: func() *Artifact {
				return pack(good(), none).withDiffIDs(good().name().String(), digestOf("x").String()).done()
			},
			Want: refused("layer 1 ("+mediaType, "the config lists the DiffID "+digestOf("x").String()),
		})
	}
	return sorted(cases)
}

// withDiffIDs sets a config that lists these DiffIDs.
func (p *packed) withDiffIDs(ids ...string) *packed {
	var texts []string
	for _, id := range ids {
		texts = append(texts, quote(id))
	}
	return p.withConfig(modelConfig, `{"modelfs":{"type":"layers","diffIds":`+array(texts...)+`}}`)
}

// eachByte returns gzip with one stored member per byte.
func eachByte(content string) string {
	var b strings.Builder
	for i := range len(content) {
		c := content[i : i+1]
		b.WriteString("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x01\x01\x00\xfe\xff" + c)
		b.Write(binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(c))))
		b.WriteString("\x01\x00\x00\x00")
	}
	return b.String()
}

// zstdFrame returns a frame with a header (RFC 8878, section 3.1.1.1) and content in
// uncompressed blocks that fit the smallest window.
func zstdFrame(header, content string) string {
	var b strings.Builder
	b.WriteString("\x28\xb5\x2f\xfd" + header)
	for len(content) > 0 {
		n := min(len(content), 1024)
		last := 0
		if n == len(content) {
			last = 1
		}
		h := n<<3 | last
		b.WriteString(string([]byte{byte(h), byte(h >> 8), byte(h >> 16)}) + content[:n])
		content = content[n:]
	}
	return b.String()
}

// zstdRun returns a frame that repeats one byte n times, in blocks of 128 KiB that take 4
// bytes each.
func zstdRun(c byte, n int64) string {
	const most = 128 << 10
	var b strings.Builder
	b.WriteString("\x28\xb5\x2f\xfd\x00\x38") // a window of 128 KiB
	for n > 0 {
		size := min(n, most)
		n -= size
		last := 0
		if n == 0 {
			last = 1
		}
		h := int(size)<<3 | 1<<1 | last
		b.Write([]byte{byte(h), byte(h >> 8), byte(h >> 16), c})
	}
	return b.String()
}

// precedenceCases are layers that share a path.
func precedenceCases() (cases []Case) {
	a, b := file("p", "a"), file("p", "b")
	cases = append(cases,
		fine("layers/a file in the place of a file, tars", Listing{"p": isFile("b")}, tarred(a), tarred(b)),
		fine("layers/a raw file in the place of a tar's", Listing{"p": isRaw("b")}, tarred(a), raw("p", "b")),
		fine("layers/a tar's file in the place of a raw one", Listing{"p": isFile("b")}, raw("p", "a"), tarred(b)),
		fine("layers/a file in the place of a file, in one tar", Listing{"p": isFile("b")}, tarred(a, b)),
		fine("layers/a symlink in the place of a file", Listing{"p": isLink("x")}, tarred(a), tarred(symlink("p", "x"))),
		fine("layers/a file in the place of a symlink", Listing{"p": isFile("b")}, tarred(symlink("p", "/etc/passwd")), tarred(b)),
		fine("layers/a raw file in the place of a symlink", Listing{"p": isRaw("b")}, tarred(symlink("p", "/etc/passwd")), raw("p", "b")),
		fine("layers/a directory in the place of a directory", Listing{"d": isDir().mode(0o700), "d/f": isFile("x"), "d/g": isFile("y")},
			tarred(dir("d"), file("d/f", "x")), tarred(dir("d", edit{fMode, "0000700\x00"}), file("d/g", "y"))),
		fine("layers/a directory that a later layer describes", Listing{"d": isDir().mode(0o700), "d/f": isRaw("x")},
			raw("d/f", "x"), tarred(dir("d", edit{fMode, "0000700\x00"}))),
		fine("layers/a directory that a later layer only uses", Listing{"d": isDir().mode(0o700), "d/f": isFile("x"), "d/g": isRaw("y")},
			tarred(dir("d", edit{fMode, "0000700\x00"}), file("d/f", "x")), raw("d/g", "y")),
		fine("layers/the same layer twice", Listing{"p": isFile("a")}, tarred(a), tarred(a)),
		fine("layers/the same blob as file and as archive", Listing{"p": isFile("a"), "p.tar": isRaw(a + mark)}, tarred(a), raw("p.tar", a+mark)).notAsFiles(),
		fine("layers/the same blob under two names", Listing{"p": isRaw("a"), "q": isRaw("a")}, raw("p", "a"), raw("q", "a")),
		fine("layers/one file twice", Listing{"d/p": isRaw("a").mode(0o600)}, raw("d/p", "a"), described("./d//./p", "a", `{"mode":384}`)),
		fine("layers/a raw layer whose content is a manifest", Listing{"p": isRaw(`{"schemaVersion":2,"layers":[]}`)}, raw("p", `{"schemaVersion":2,"layers":[]}`)),
		fine("layers/an empty file", Listing{"p": isRaw("")}, raw("p", "")).notAsFiles(),
		fine("layers/a thousand tars of one path", Listing{"p": isFile("999")}, many(1000, func(i int) layer { return tarred(file("p", fmt.Sprint(i))) })...),
		fine("layers/a whiteout of images is a file", Listing{"p": isRaw("a"), ".wh.p": isFile("")}, raw("p", "a"), tarred(file(".wh.p", ""))).notAsFiles(),
		fine("layers/an opaque whiteout of images is a file", Listing{"d/f": isFile("a"), "d/.wh..wh..opq": isFile("")}, tarred(file("d/f", "a")), tarred(file("d/.wh..wh..opq", ""))).notAsFiles(),
		bad("layers/a whiteout of overlayfs", tarred(member('3', "good.txt", "")), "a character device"),
	)
	conflict := func(name, says string, layers ...layer) {
		last := layers[len(layers)-1]
		cases = append(cases, Case{
			Name: "layers/" + name,
			Make: func() *Artifact { return pack(layers...).ofLayers() },
			Want: refused(fmt.Sprintf("layer %d (%s, %s", len(layers)-1, last.mediaType, last.name()), says),
		})
	}
	conflict("a file in the place of a directory, tars", "is a directory", tarred(dir("p")), tarred(a))
	conflict("a file in the place of a directory, raw", "is a directory", raw("p/f", "x"), raw("p", "a"))
	conflict("a raw file in the place of a tar's directory", "is a directory", tarred(file("p/f", "x")), raw("p", "a"))
	conflict("a symlink in the place of a directory", "is a directory", tarred(dir("p")), tarred(symlink("p", "/etc")))
	conflict("a file in the place of a directory, in one tar", "is a directory", tarred(dir("p"), a))
	conflict("a directory in the place of a file, tars", "must be a directory", tarred(a), tarred(dir("p")))
	conflict("a directory in the place of a file, raw", "must be a directory", raw("p", "a"), raw("p/f", "x"))
	conflict("a directory in the place of a raw file", "must be a directory", raw("p", "a"), tarred(file("p/f", "x")))
	conflict("a directory in the place of a file, in one tar", "must be a directory", tarred(a, dir("p")))
	conflict("a directory in the place of a hard link", "must be a directory", tarred(file("f", "x"), hardLink("p", "f"), dir("p")))
	conflict("a raw file through a symlink", "passes through a symlink", tarred(symlink("l", "/tmp")), raw("l/f", "x"))
	conflict("a tar's file through a symlink of another layer", "passes through a symlink", tarred(symlink("l", "/tmp")), tarred(file("l/f", "x")))
	conflict("a directory over a symlink of another layer", "passes through a symlink", tarred(symlink("l", "/tmp")), tarred(dir("l")))
	conflict("a file that a later layer replaces, and a path below it", "must be a directory", raw("p", "a"), tarred(b), raw("p/f", "x"))
	// One of two files is lost. A client that unpacks layer by layer detects it only if it
	// knows the layers below.
	lost := func(name string, mounted Listing, layers ...layer) {
		conflict(name, "has the same path and other bytes", layers...)
		cases[len(cases)-1] = cases[len(cases)-1].unlike(mounts(mounted), Files)
	}
	lost("two raw layers of one path", Listing{"p": isRaw("b")}, raw("p", "a"), raw("p", "b"))
	lost("two raw layers of one path, spelled in two ways", Listing{"d/p": isRaw("b")}, raw("d/p", "a"), raw("./d//./p", "b"))
	lost("two raw layers of one path, and a tar between", Listing{"p": isRaw("c")}, raw("p", "a"), tarred(b), raw("p", "c"))
	lost("two ORAS files with one title", Listing{"p": isRaw("b")}, titled(imageType, "p", "a"), titled(imageType, "p", "b"))
	return cases
}

func many(n int, f func(i int) layer) (layers []layer) {
	for i := range n {
		layers = append(layers, f(i))
	}
	return layers
}
