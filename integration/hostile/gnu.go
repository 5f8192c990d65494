// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

var gnuMagic = []edit{{fMagic, "ustar "}, {fVersion, " \x00"}}

// gnuCases are long names and other extensions of GNU tar.
func gnuCases() []Case {
	const unreadable = "the archive cannot be read"
	long := func(flag byte, value string) string {
		return member(flag, "././@LongLink", value, gnuMagic...)
	}
	gnu := func(name string) string { return file(name, "x", gnuMagic...) }
	deep := strings.Repeat("d/", 100) + "f"
	return []Case{
		fine("gnu/a long name", Listing{deep: isFile("x")}, tarred(long('L', deep+"\x00"), gnu("cut"))),
		fine("gnu/a long name without its NUL", Listing{deep: isFile("x")}, tarred(long('L', deep), gnu("cut"))),
		fine("gnu/a long name and text after its NUL", Listing{"f": isFile("x")}, tarred(long('L', "f\x00/../../escaped"), gnu("cut"))),
		fine("gnu/an empty long name is ignored", Listing{"f": isFile("x")}, tarred(long('L', ""), gnu("f"))),
		fine("gnu/two long names, the last one counts", Listing{"g": isFile("x")}, tarred(long('L', "f\x00"), long('L', "g\x00"), gnu("cut"))),
		fine("gnu/a long target", Listing{"l": isLink(deep)}, tarred(long('K', deep+"\x00"), symlink("l", "cut", gnuMagic...))),
		fine("gnu/a long name and a long target", Listing{deep: isLink(deep)}, tarred(long('K', deep+"\x00"), long('L', deep+"\x00"), symlink("l", "cut", gnuMagic...))),
		fine("gnu/a long target of a file is ignored", Listing{"f": isFile("x")}, tarred(long('K', "/etc/shadow\x00"), gnu("f"))),
		fine("gnu/a long name applies to one member only", Listing{"f": isFile("x"), "g": isFile("x")}, tarred(long('L', "f\x00"), gnu("cut"), gnu("g"))),
		bad("gnu/a long name that leaves the volume", tarred(long('L', strings.Repeat("../", 50)+"escaped\x00"), gnu("cut")), `contains ".."`),
		fine("gnu/a long name that is absolute", Listing{strings.Repeat("d/", 60) + "f": isFile("x")}, tarred(long('L', "/"+strings.Repeat("d/", 60)+"f\x00"), gnu("cut"))),
		fine("gnu/a long name that ends in a slash", Listing{deep: isDir().mode(0o644)}, tarred(long('L', deep+"/\x00"), file("cut", "", gnuMagic...))).notAsFiles(),
		bad("gnu/a long name without a member", tarred(long('L', "f\x00")), "the archive"),
		bad("gnu/a long name of 2 MiB", tarred(long('L', strings.Repeat("n", 2<<20)), gnu("cut")), unreadable),
		bad("gnu/a long name that claims 8 GiB", tarred(member('L', "././@LongLink", "", append(slices.Clone(gnuMagic), edit{fSize, "77777777777\x00"})...), gnu("f")), "the archive"),
		bad("gnu/a long target that leaves the volume, of a hard link", tarred(long('K', "../../etc/shadow\x00"), hardLink("h", "cut", gnuMagic...)), `contains ".."`),
		fine("gnu/a volume's label", Listing{"f": isFile("x")}, tarred(member('V', "label", "", gnuMagic...), gnu("f"))),
		fine("gnu/a volume's label alone", Listing{}, tarred(member('V', "label", "", gnuMagic...))),
		fine("gnu/a volume's label that is a path", Listing{"f": isFile("x")}, tarred(member('V', "/../../etc/passwd", "", gnuMagic...), gnu("f"))),
		fine("gnu/a volume's label that is the name of a file", Listing{"f": isFile("x"), "g": isFile("x")}, tarred(gnu("f"), member('V', "f", "", gnuMagic...), gnu("g"))),
		fine("gnu/a volume's label with an invalid owner", Listing{"f": isFile("x")}, tarred(member('V', "label", "", append(slices.Clone(gnuMagic), edit{fUID, base256(-1, 8)})...), gnu("f"))),
		fine("gnu/a volume's label with content", Listing{"f": isFile("x")}, tarred(member('V', "label", file("hidden", "x"), gnuMagic...), gnu("f"))),
		bad("gnu/a volume's label whose content is cut off", tarred(member('V', "label", "", append(slices.Clone(gnuMagic), edit{fSize, "00000077777\x00"})...)), "the archive is truncated"),
		bad("gnu/a volume's label with holes", tarred(pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.realsize", "1048576"))+member('V', "label", "0\n"+strings.Repeat("\x00", block-2))), "cannot be sparse"),
		bad("gnu/a part of a file of another volume", tarred(member('M', "f", "x", gnuMagic...)), "a member of type 'M'"),
		fine("gnu/a listed directory", Listing{"d": isDir().mode(0o700), "d/f": isFile("x")}, tarred(member('D', "d/", "Yf\x00Ygone\x00\x00", append(slices.Clone(gnuMagic), edit{fMode, "0000700\x00"})...), gnu("d/f"))),
		fine("gnu/a listed directory whose list is an archive", Listing{"d": isDir().mode(0o644), "f": isFile("x")}, tarred(member('D', "d", file("hidden", "x")+file("more", "x"), gnuMagic...), gnu("f"))),
		fine("gnu/a listed directory that is the volume", Listing{".": isDir().mode(0o711), "f": isFile("x")}, tarred(member('D', "./", "Yf\x00\x00", append(slices.Clone(gnuMagic), edit{fMode, "0000711\x00"})...), gnu("f"))),
		bad("gnu/a listed directory that leaves the volume", tarred(member('D', "../d/", "Yf\x00\x00", gnuMagic...)), `contains ".."`),
		bad("gnu/a listed directory in the place of a symlink", tarred(symlink("d", "/etc"), member('D', "d/", "", gnuMagic...)), "passes through a symlink"),
		bad("gnu/a listed directory with holes", tarred(pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.realsize", "1048576"))+member('D', "d/", "0\n"+strings.Repeat("\x00", block-2))), "cannot be sparse"),
	}
}

// piece is one data segment of a sparse file.
type piece struct {
	at   int64
	data string
}

// whole returns the full content of a sparse file.
func whole(size int64, pieces ...piece) string {
	b := make([]byte, size)
	for _, p := range pieces {
		copy(b[p.at:], p.data)
	}
	return string(b)
}

func joined(pieces []piece) (data string) {
	for _, p := range pieces {
		data += p.data
	}
	return data
}

// oldSparse returns a member in GNU tar's sparse format before pax, with up to four
// segments in the header.
func oldSparse(name string, size int64, pieces ...piece) string {
	return sparseHeader(name, base256(size, 12), joined(pieces), pieces...)
}

func sparseHeader(name, size, data string, pieces ...piece) string {
	edits := slices.Clone(gnuMagic)
	for i, p := range pieces {
		edits = append(edits, edit{field{386 + 24*i, 12}, fmt.Sprintf("%011o\x00", p.at)}, edit{field{386 + 24*i + 12, 12}, fmt.Sprintf("%011o\x00", len(p.data))})
	}
	return member('S', name, data, append(edits, edit{field{483, 12}, size})...)
}

// sparse1 returns a member in GNU's pax format 1.0, where the map precedes the data.
func sparse1(name, size, table, data string, more ...string) string {
	table += strings.Repeat("\x00", (block-len(table)%block)%block)
	records := append([]string{record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.name", name), record("GNU.sparse.realsize", size)}, more...)
	return pax(records...) + file("GNUSparseFile.0/f", table+data)
}

// sparse0 returns a member of 20,000 bytes in format 0.1, whose map is a pax record.
func sparse0(blocks, table, data string) string {
	return pax(record("GNU.sparse.size", "20000"), record("GNU.sparse.numblocks", blocks), record("GNU.sparse.name", "s"), record("GNU.sparse.map", table)) + file("f", data)
}

// sparseCases are sparse files in GNU tar's four formats.
func sparseCases() (cases []Case) {
	const unreadable = "the archive cannot be read"
	mounted := func(name, content, members string) {
		cases = append(cases, fine("sparse/"+name, Listing{"s": isFile(content), "f": isFile("after")}, tarred(members, file("f", "after"))))
	}
	refuse := func(name, says, members string) {
		cases = append(cases, bad("sparse/"+name, tarred(members, file("f", "after")), says))
	}
	p := []piece{{4096, "abc"}, {9000, "defg"}}
	content := whole(20000, p...)
	mounted("old, two pieces", content, oldSparse("s", 20000, p...))
	mounted("old, four pieces", whole(5000, piece{0, "a"}, piece{1000, "b"}, piece{2000, "c"}, piece{4999, "d"}), oldSparse("s", 5000, piece{0, "a"}, piece{1000, "b"}, piece{2000, "c"}, piece{4999, "d"}))
	mounted("old, all hole", whole(1<<20), oldSparse("s", 1<<20))
	mounted("old, of no bytes", "", oldSparse("s", 0))
	mounted("0.0", content, pax(record("GNU.sparse.size", "20000"), record("GNU.sparse.numblocks", "2"), record("GNU.sparse.offset", "4096"), record("GNU.sparse.numbytes", "3"),
		record("GNU.sparse.offset", "9000"), record("GNU.sparse.numbytes", "4"))+file("s", "abcdefg"))
	mounted("0.1", content, sparse0("2", "4096,3,9000,4", "abcdefg"))
	mounted("1.0", content, sparse1("s", "20000", "2\n4096\n3\n9000\n4\n", "abcdefg"))
	mounted("1.0, all hole", whole(1<<20), sparse1("s", "1048576", "0\n", ""))
	mounted("1.0, no hole", "abc", sparse1("s", "3", "1\n0\n3\n", "abc"))
	mounted("1.0, pieces that touch", "abcdef", sparse1("s", "6", "2\n0\n3\n3\n3\n", "abcdef"))
	mounted("1.0, a piece of no bytes at the end", whole(100), sparse1("s", "100", "1\n100\n0\n", ""))

	refuse("1.0, overlapping pieces", unreadable, sparse1("s", "20000", "2\n0\n3\n1\n3\n", "abcdef"))
	refuse("1.0, pieces in the wrong order", unreadable, sparse1("s", "20000", "2\n9000\n3\n0\n3\n", "abcdef"))
	refuse("1.0, a piece beyond the end", unreadable, sparse1("s", "10", "1\n8\n3\n", "abc"))
	refuse("1.0, a negative offset", unreadable, sparse1("s", "10", "1\n-1\n3\n", "abc"))
	refuse("1.0, a negative length", unreadable, sparse1("s", "10", "1\n0\n-3\n", "abc"))
	refuse("1.0, a piece at 2^63", unreadable, sparse1("s", "10", "1\n9223372036854775808\n3\n", "abc"))
	refuse("1.0, a piece that ends at 2^63", unreadable, sparse1("s", "9223372036854775807", "1\n9223372036854775806\n3\n", "abc"))
	refuse("1.0, an offset of letters", unreadable, sparse1("s", "10", "1\nzero\n3\n", "abc"))
	refuse("1.0, a negative number of pieces", unreadable, sparse1("s", "10", "-1\n", ""))
	refuse("1.0, 2^62 pieces", unreadable, sparse1("s", "10", "4611686018427387904\n", ""))
	refuse("1.0, 2^63-1 pieces", unreadable, sparse1("s", "10", "9223372036854775807\n", ""))
	refuse("1.0, a million missing pieces", "the archive", sparse1("s", "10", "1000000\n", ""))
	refuse("1.0, no table", "the archive", sparse1("s", "10", "", ""))
	refuse("1.0, a negative size", unreadable, sparse1("s", "-1", "0\n", ""))
	refuse("1.0, a size over 64 bits", unreadable, sparse1("s", "9223372036854775808", "0\n", ""))
	refuse("1.0, a size of letters", unreadable, sparse1("s", "large", "0\n", ""))
	refuse("1.0, less data than pieces", "the archive", sparse1("s", "20000", "1\n0\n2000\n", "abc"))
	refuse("1.0, more data than pieces", "", sparse1("s", "10", "1\n0\n3\n", "abcdef"))
	refuse("1.0, a name that leaves the volume", `contains ".."`, sparse1("../escaped", "10", "1\n0\n3\n", "abc"))
	cases = append(cases, fine("sparse/1.0, a name that is absolute", Listing{"etc/passwd": isFile(whole(10, piece{0, "abc"}))}, tarred(sparse1("/etc/passwd", "10", "1\n0\n3\n", "abc"))))
	refuse("0.1, an odd number of values", unreadable, sparse0("2", "4096,3,9000", "abc"))
	refuse("0.1, more pieces than said", unreadable, sparse0("1", "0,1,4,1", "ab"))
	refuse("0.1, fewer pieces than said", unreadable, sparse0("9", "0,1", "a"))
	refuse("0.1, overlapping pieces", unreadable, sparse0("2", "0,3,1,3", "abcdef"))
	refuse("0.1, an invalid number", unreadable, sparse0("1", "x,3", "abc"))
	refuse("0.1, a negative number of pieces", unreadable, sparse0("-1", "0,3", "abc"))
	refuse("0.1, no pieces", "a sparse file in an unknown format", sparse0("0", "", ""))
	refuse("0.0, no pieces", "a sparse file in an unknown format", pax(record("GNU.sparse.size", "20000"), record("GNU.sparse.numblocks", "0"))+file("s", ""))
	refuse("0.0, a length without an offset", unreadable, pax(record("GNU.sparse.size", "10"), record("GNU.sparse.numblocks", "1"), record("GNU.sparse.numbytes", "3"))+file("s", "abc"))
	refuse("0.0, an offset with a comma", unreadable, pax(record("GNU.sparse.size", "10"), record("GNU.sparse.numblocks", "1"), record("GNU.sparse.offset", "0,3,4"), record("GNU.sparse.numbytes", "3"))+file("s", "abc"))
	refuse("old, overlapping pieces", unreadable, oldSparse("s", 20000, piece{0, "abc"}, piece{1, "def"}))
	refuse("old, a piece beyond the end", unreadable, oldSparse("s", 2, piece{0, "abc"}))
	refuse("old, a negative size", unreadable, sparseHeader("s", base256(-1, 12), ""))
	refuse("old, a size of letters", unreadable, sparseHeader("s", "large", ""))
	refuse("old, in an archive of another format", unreadable, member('S', "s", ""))
	refuse("old, a name that leaves the volume", `contains ".."`, oldSparse("../escaped", 100, piece{0, "abc"}))
	refuse("old, a missing extension header", "the archive", member('S', "s", "", append(slices.Clone(gnuMagic), edit{field{482, 1}, "\x01"}, edit{field{483, 12}, "00000000100\x00"})...))
	// A reader that ignores the version would read the map as content.
	refuse("of an unknown format, 2.0", "sparse", sparse1("s", "10", "1\n0\n3\n", "abc", record("GNU.sparse.major", "2")))
	refuse("of an unknown format, 1.1", "sparse", sparse1("s", "10", "1\n0\n3\n", "abc", record("GNU.sparse.minor", "1")))
	refuse("of a format of letters", "sparse", sparse1("s", "10", "1\n0\n3\n", "abc", record("GNU.sparse.major", "one")))
	refuse("of half a format", "sparse", pax(record("GNU.sparse.minor", "0"))+file("s", "1\n0\n3\nabc"))
	refuse("that states only its size", "sparse", pax(record("GNU.sparse.realsize", "20000"))+file("s", "abc"))

	// Copying the file would fill any disk with zeros.
	for _, c := range []struct {
		what string
		size int64
	}{{"2^50", 1 << 50}, {"2^60", 1 << 60}, {"2^63-1", 1<<63 - 1}} {
		for form, members := range map[string]string{"old": oldSparse("s", c.size), "1.0": sparse1("s", fmt.Sprint(c.size), "0\n", "")} {
			huge := bad(fmt.Sprintf("sparse/%s, a hole of %s bytes", form, c.what), tarred(members))
			huge.Want.Refused = errdefs.ErrResourceExhausted
			huge.Want.Says = append(huge.Want.Says, "no space")
			cases = append(cases, huge)
		}
	}
	return sorted(cases)
}

// xattrCases are extended attributes. The volume has those in user.*; all others would
// affect the node.
func xattrCases() (cases []Case) {
	mounted := func(name string, want map[string]string, set ...string) Case {
		var records []string
		for i := 0; i < len(set); i += 2 {
			records = append(records, record("SCHILY.xattr."+set[i], set[i+1]))
		}
		e := isFile("x").attrs(want)
		return fine("xattr/"+name, Listing{"f": e, "d": isDir().attrs(want)}, tarred(pax(records...), file("f", "x"), pax(records...), dir("d")))
	}
	preserved := map[string]string{"user.kept": "v"}
	for what, attr := range map[string]string{
		"file capabilities": "security.capability", "an SELinux label": "security.selinux", "a signature for IMA": "security.ima", "one for EVM": "security.evm",
		"a Smack label": "security.SMACK64", "an access list": "system.posix_acl_access", "a default access list": "system.posix_acl_default",
		"a list of NFS": "system.nfs4_acl", "inode flags": "btrfs.compression", "without a namespace": "plain", "of an empty namespace": ".x", "a name that only begins like user": "username",
	} {
		cases = append(cases, mounted("removed, "+what, preserved, attr, "\x01\x00\x00\x02", "user.kept", "v").notAsFiles())
	}
	for _, attr := range []string{"metacopy", "redirect", "opaque", "origin", "upper", "impure", "whiteout", "xattr.whiteout", "overlay.metacopy"} {
		cases = append(cases, mounted("removed, an attribute of overlayfs, "+attr, preserved, "trusted.overlay."+attr, "/0", "user.kept", "v"))
	}
	cases = append(cases,
		mounted("removed, of this project", nil, "trusted.artifact", "x"),
		mounted("removed, user alone", preserved, "user", "v", "user.kept", "v").notAsFiles(),
		mounted("preserved, an attribute of an unprivileged overlay", map[string]string{"user.overlay.opaque": "y", "user.overlay.redirect": "/etc"}, "user.overlay.opaque", "y", "user.overlay.redirect", "/etc"),
		mounted("preserved, no value", map[string]string{"user.x": ""}, "user.x", ""),
		mounted("preserved, any bytes", map[string]string{"user.\xff\n": "\x00\xff\n="}, "user.\xff\n", "\x00\xff\n="),
		mounted("preserved, a name of 255 bytes", map[string]string{"user." + strings.Repeat("n", 250): "v"}, "user."+strings.Repeat("n", 250), "v"),
		mounted("preserved, slashes and dots", map[string]string{"user.../../x": "v"}, "user.../../x", "v"),
		bad("xattr/a name of 256 bytes", tarred(pax(record("SCHILY.xattr.user."+strings.Repeat("n", 251), "v")), file("f", "x")), "exceeds the limits of Linux or EROFS"),
		bad("xattr/an empty name in user", tarred(pax(record("SCHILY.xattr.user.", "v")), file("f", "x")), "exceeds the limits of Linux or EROFS"),
		bad("xattr/a value of 65536 bytes", tarred(pax(record("SCHILY.xattr.user.x", strings.Repeat("v", 1<<16))), file("f", "x")), "exceeds the limits of Linux or EROFS"),
		bad("xattr/300 names of 255 bytes", tarred(pax(manyAttrs(300, 250)), file("f", "x")), "exceeds the limits of Linux or EROFS"),
		fine("xattr/none of a symlink", Listing{"l": isLink("x")}, tarred(pax(record("SCHILY.xattr.user.x", "v")), symlink("l", "x"))),
		// A file on ext4 cannot store it.
		onExt4(fine("xattr/a value of 65535 bytes", Listing{"f": isFile("x").attrs(map[string]string{"user.x": strings.Repeat("v", 1<<16-1)})},
			tarred(pax(record("SCHILY.xattr.user.x", strings.Repeat("v", 1<<16-1))), file("f", "x"))).
			unlike(refused("user.x"), Extracted, Linked, Copied, Files)),
	)
	return sorted(cases)
}

func onExt4(c Case) Case {
	c.Ext4 = true
	return c
}

func manyAttrs(n, length int) (records string) {
	for i := range n {
		records += record(fmt.Sprintf("SCHILY.xattr.user.%0*d", length, i), "v")
	}
	return records
}
