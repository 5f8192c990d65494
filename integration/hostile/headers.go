// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"math"
	"strings"
)

// typeCases are members of every type.
func typeCases() (cases []Case) {
	for _, c := range []struct {
		flag byte
		says string
	}{
		{'3', "a character device"}, {'4', "a block device"}, {'6', "a FIFO"},
	} {
		for what, edits := range map[string][]edit{
			"no device numbers":            nil,
			"the device numbers of a disk": {{fMajor, "0000010\x00"}, {fMinor, "0000000\x00"}},
			"the device numbers 0, 0":      {{fMajor, "0000000\x00"}, {fMinor, "0000000\x00"}}, // a whiteout of overlayfs
			"huge device numbers":          {{fMajor, base256(math.MaxInt64, 8)}, {fMinor, base256(math.MinInt32, 8)}},
		} {
			cases = append(cases, bad(fmt.Sprintf("type/%s with %s", c.says, what), tarred(member(c.flag, "special", "", edits...)), `member "special"`, c.says))
		}
	}
	// These types have their own cases: files ('0', '7' and NUL), links and directories
	// ('1', '2' and '5'), headers ('x', 'g', 'L', 'K' and 'S'), GNU tar's 'V' and 'D', and
	// Solaris's 'X'. The rest is vendor-specific.
	for c := range 256 {
		flag := byte(c)
		printable := flag >= 'A' && flag <= 'Z' || flag >= 'a' && flag <= 'z' || flag == '8' || flag == '9' || flag == ' '
		if !printable && c != 1 && c != 0x7f && c != 0x80 && c != 0xff || strings.ContainsRune("xgLKSVDX", rune(flag)) {
			continue
		}
		cases = append(cases, bad(fmt.Sprintf("type/of a vendor, %q", flag), tarred(member(flag, "special", "")), `member "special"`, fmt.Sprintf("a member of type %q", flag)))
	}
	return append(sorted(cases),
		fine("type/a file of the old format", Listing{"f": isFile("x")}, tarred(member(0, "f", "x", edit{fMagic, ""}, edit{fVersion, ""}))),
		bad("type/an extended header of Solaris", tarred(member('X', "p", record("path", "g")), file("f", "x")), `member "p"`, "an extended header of Solaris (type 'X') is not supported", "pax"),
		fine("type/a contiguous file", Listing{"f": isFile("x")}, tarred(member('7', "f", "x"))),
		bad("type/a directory with content", tarred(member('5', "d", strings.Repeat("x", block))), "the archive cannot be read"),
		bad("type/a symlink with content", tarred(member('2', "l", strings.Repeat("x", block), edit{fLink, "x"})), "the archive cannot be read"),
		bad("type/a hard link with content", tarred(file("f", "x"), member('1', "h", strings.Repeat("x", block), edit{fLink, "f"})), "the archive cannot be read"),
		fine("type/a directory that claims a size", Listing{"d": isDir(), "f": isFile("x")}, tarred(dir("d", edit{fSize, "00000007777\x00"}), file("f", "x"))),
		fine("type/a file with the target of a link", Listing{"f": isFile("x")}, tarred(file("f", "x", edit{fLink, "/etc/shadow"}))),
		fine("type/a file with the numbers of a device", Listing{"f": isFile("x")}, tarred(file("f", "x", edit{fMajor, "0000010\x00"}, edit{fMinor, "0000001\x00"}))),
		fine("type/a file whose mode is a directory's", Listing{"f": isFile("x").mode(0o755)}, tarred(file("f", "x", edit{fMode, "0040755\x00"}))),
		fine("type/a file whose mode is a device's", Listing{"f": isFile("x").mode(0o666)}, tarred(file("f", "x", edit{fMode, "0020666\x00"}))),
		fine("type/a directory whose mode is a file's", Listing{"d": isDir()}, tarred(dir("d", edit{fMode, "0100755\x00"}))),
	)
}

func sorted(cases []Case) []Case {
	sortCases(cases)
	return cases
}

// fieldCases are header fields at their limits.
func fieldCases() (cases []Case) {
	mounted := func(name string, e Entry, edits ...edit) {
		cases = append(cases, fine("field/"+name, Listing{"f": e}, tarred(file("f", "x", edits...))))
	}
	refuse := func(name, says string, edits ...edit) {
		cases = append(cases, bad("field/"+name, tarred(file("f", "x", edits...)), says))
	}
	const unreadable = "the archive cannot be read"
	f := isFile("x")

	mounted("mode 0", f.mode(0), edit{fMode, "0000000\x00"})
	mounted("mode empty", f.mode(0), edit{fMode, ""})
	mounted("mode of spaces", f.mode(0), edit{fMode, "        "})
	mounted("mode with spaces around", f.mode(0o640), edit{fMode, "  640 \x00"})
	mounted("mode that fills its field", f.mode(0o777), edit{fMode, "00000777"})
	cases = append(cases, fine("field/mode of all bits", Listing{"f": f.mode(0o777)}, tarred(file("f", "x", edit{fMode, "77777777"}))).notAsFiles())
	mounted("mode of 52 bits", f.mode(0o001), edit{fMode, base256(1<<52|1, 8)})
	cases = append(cases, fine("field/mode below zero", Listing{"f": f.mode(0o777)}, tarred(file("f", "x", edit{fMode, base256(-1, 8)}))).notAsFiles())
	for _, c := range []struct{ what, mode string }{{"setuid", "0004755"}, {"setgid", "0002755"}, {"sticky", "0001755"}, {"all special bits", "0007755"}} {
		cases = append(cases,
			fine("field/mode of a file, "+c.what, Listing{"f": f.mode(0o755)}, tarred(file("f", "x", edit{fMode, c.mode + "\x00"}))).notAsFiles())
	}
	cases = append(cases,
		fine("field/mode of a directory, special bits", Listing{"d": isDir().mode(0o7755)}, tarred(dir("d", edit{fMode, "0007755\x00"}))),
		fine("field/mode of a directory without permissions", Listing{"d": isDir().mode(0), "d/f": f}, tarred(dir("d", edit{fMode, "0000000\x00"}), file("d/f", "x"))),
		fine("field/mode of a symlink", Listing{"l": isLink("x")}, tarred(symlink("l", "x", edit{fMode, "0007777\x00"}))))
	refuse("mode of no octal digits", unreadable, edit{fMode, "0000888\x00"})
	refuse("mode of letters", unreadable, edit{fMode, "rw-r--r-"})
	refuse("mode with a sign", unreadable, edit{fMode, "-000644\x00"})
	refuse("mode in hexadecimal", unreadable, edit{fMode, "0x01ff\x00"})

	for _, id := range []struct {
		name string
		field
		set func(Entry, uint32) Entry
	}{
		{"user", fUID, func(e Entry, n uint32) Entry { return e.owner(n, 0) }},
		{"group", fGID, func(e Entry, n uint32) Entry { return e.owner(0, n) }},
	} {
		mounted(id.name+" empty", f, edit{id.field, ""})
		mounted(id.name+" of all digits", id.set(f, 0o77777777), edit{id.field, "77777777"})
		mounted(id.name+" 65534", id.set(f, 65534), edit{id.field, "0177776\x00"})
		mounted(id.name+" 65536", id.set(f, 65536), edit{id.field, "0200000\x00"})
		mounted(id.name+" 2147483648", id.set(f, 1<<31), edit{id.field, base256(1<<31, 8)})
		mounted(id.name+" 4294967294", id.set(f, math.MaxUint32-1), edit{id.field, base256(math.MaxUint32-1, 8)})
		refuse(id.name+" 4294967295", "is not a valid user and group", edit{id.field, base256(math.MaxUint32, 8)})
		refuse(id.name+" 4294967296", "is not a valid user and group", edit{id.field, base256(1<<32, 8)})
		refuse(id.name+" -1", "is not a valid user and group", edit{id.field, base256(-1, 8)})
		refuse(id.name+" of the least number", "is not a valid user and group", edit{id.field, "\xc0" + strings.Repeat("\x00", 7)})
		refuse(id.name+" of no octal digits", unreadable, edit{id.field, "99999999"})
		refuse(id.name+" of letters", unreadable, edit{id.field, "root\x00"})
	}
	cases = append(cases, fine("field/owners of a symlink and a directory", Listing{"l": isLink("x").owner(7, 8), "d": isDir().owner(9, 10)},
		tarred(symlink("l", "x", edit{fUID, "0000007\x00"}, edit{fGID, "0000010\x00"}), dir("d", edit{fUID, "0000011\x00"}, edit{fGID, "0000012\x00"}))))

	mounted("time empty", f.time(0, 0), edit{fMTime, ""})
	mounted("time 0", f.time(0, 0), edit{fMTime, "00000000000\x00"})
	mounted("time 2038-01-19", f.time(1<<31, 0), edit{fMTime, "20000000000\x00"})
	// ext4 has no times after 2446 for extracted files.
	late := fine("field/time of all digits, in 4147", Listing{"f": f.time(0o777777777777, 0)}, tarred(file("f", "x", edit{fMTime, "777777777777"})))
	cases = append(cases, late.clamped(f, maxTime))
	cases = append(cases, fine("field/time of the year 9999", Listing{"f": f.time(253402300799, 0)}, tarred(file("f", "x", edit{fMTime, base256(253402300799, 12)}))).clamped(f, maxTime))
	cases = append(cases, fine("field/time before the epoch", Listing{"f": f.time(-1, 0)}, tarred(file("f", "x", edit{fMTime, base256(-1, 12)}))))
	cases = append(cases, fine("field/time of the year 1", Listing{"f": f.time(-62135596800, 0)}, tarred(file("f", "x", edit{fMTime, base256(-62135596800, 12)}))).clamped(f, minTime))
	refuse("time of letters", unreadable, edit{fMTime, "yesterday\x00"})

	const truncated = "the archive is truncated"
	refuse("size over its content", truncated, edit{fSize, "00000077777\x00"})
	refuse("size of all digits", truncated, edit{fSize, "777777777777"})
	refuse("size 2^62", `member "f"`, edit{fSize, base256(1<<62, 12)})
	refuse("size 2^63-1", "the archive", edit{fSize, base256(math.MaxInt64, 12)})
	refuse("size 2^63-512", "the archive", edit{fSize, base256(math.MaxInt64-511, 12)})
	refuse("size -1", unreadable, edit{fSize, base256(-1, 12)})
	refuse("size -512", unreadable, edit{fSize, base256(-512, 12)})
	refuse("size over 64 bits", unreadable, edit{fSize, "\x80\x01" + strings.Repeat("\x00", 10)})
	refuse("size of letters", unreadable, edit{fSize, "large\x00"})
	refuse("size of no octal digits", unreadable, edit{fSize, "00000000009\x00"})
	cases = append(cases,
		bad("field/size below its content", tarred(file("f", strings.Repeat("x", 2*block), edit{fSize, "00000001000\x00"})), unreadable),
		fine("field/size empty", Listing{"f": isFile("")}, tarred(file("f", "", edit{fSize, ""}))),
		fine("field/size in base 256", Listing{"f": isFile("xyz")}, tarred(file("f", "xyz", edit{fSize, base256(3, 12)}))),
		fine("field/size of a whole block", Listing{"f": isFile(strings.Repeat("x", block)), "g": isFile("y")}, tarred(file("f", strings.Repeat("x", block)), file("g", "y"))),
		fine("field/content that is a header", Listing{"f": isFile(file("/etc/passwd", "x"))}, tarred(file("f", file("/etc/passwd", "x")))),
		fine("field/content that is the end of an archive", Listing{"f": isFile(mark + mark)}, tarred(file("f", mark+mark))),
		fine("field/padding that is not zero", Listing{"f": isFile("x"), "g": isFile("y")}, tarred(file("f", "x")[:block+1]+strings.Repeat("p", block-1), file("g", "y"))),
	)

	refuse("checksum wrong by one", unreadable, edit{fChecksum, "000000\x00 "})
	refuse("checksum empty", unreadable, edit{fChecksum, ""})
	refuse("checksum of letters", unreadable, edit{fChecksum, "checksum"})
	mounted("owner names, which are ignored", f, edit{fUname, "root"}, edit{fGname, "wheel"})
	mounted("names of owners that fill their fields", f, edit{fUname, strings.Repeat("u", 32)}, edit{fGname, strings.Repeat("\xff", 32)})
	mounted("magic of GNU tar", f, edit{fMagic, "ustar "}, edit{fVersion, " \x00"})
	mounted("unknown magic", f, edit{fMagic, "USTAR\x00"})
	mounted("unknown version", f, edit{fVersion, "99"})
	mounted("bytes after the last field", f, edit{fRest, "\xff\xff\xff\xffabcdefgh"})
	refuse("numbers of a device of letters", unreadable, edit{fMajor, "letters\x00"})
	return cases
}

// The times that ext4 can store (Documentation/filesystems/ext4/inodes.rst, "Inode
// Timestamps"). The kernel clamps others (fs/inode.c, timestamp_truncate).
const (
	minTime = -1 << 31
	maxTime = 1<<34 - 1<<31 - 1
)

// clamped expects the clamped time for files on disk.
func (c Case) clamped(e Entry, sec int64) Case {
	c.Ext4 = true
	return c.unlike(mounts(Listing{"f": e.time(sec, 0)}), Extracted, Linked, Copied, Files)
}

// paxCases are extended headers.
func paxCases() (cases []Case) {
	const unreadable = "the archive cannot be read"
	f := isFile("x")
	mounted := func(name string, e Entry, records ...string) {
		cases = append(cases, fine("pax/"+name, Listing{"f": e}, tarred(pax(records...), file("f", "x"))))
	}
	refuse := func(name, says string, records ...string) {
		cases = append(cases, bad("pax/"+name, tarred(pax(records...), file("f", "x")), says))
	}
	mounted("no records", f)
	mounted("an empty value", f, record("path", ""), record("uid", ""), record("size", ""), record("mtime", ""))
	mounted("the last of two counts", f.owner(2, 0), record("uid", "1"), record("uid", "2"))
	mounted("unknown records", f, record("comment", "x"), record("charset", "BINARY"), record("hdrcharset", "BINARY"), record("realtime.x", "y"))
	mounted("records of vendors", f, record("SCHILY.dev", "1"), record("SCHILY.ino", "-1"), record("SCHILY.nlink", "9"), record("LIBARCHIVE.creationtime", "x"), record("SCHILY.fflags", "immutable"))
	mounted("labels and lists of vendors", f, record("RHT.security.selinux", "unconfined"), record("SCHILY.acl.access", "user::rwx"), record("LIBARCHIVE.xattr.user.x", "eA=="))
	mounted("names of owners", f, record("uname", "root"), record("gname", strings.Repeat("g", 5000)))
	mounted("access and change times", f, record("atime", "-1.5"), record("ctime", "99999999999"))
	mounted("a value with an equals sign and newlines", f, record("comment", "a=b\n12 path=/etc\n"))
	mounted("a record of 5 bytes", f, "5 a=\n")
	mounted("a length with zeros before it", f.owner(7, 0), "0011 uid=7\n")
	mounted("a key in capitals is another key", f, record("PATH", "/etc/passwd"), record("UID", "7"))
	mounted("a million bytes of a comment", f, record("comment", strings.Repeat("c", 1000000)))
	mounted("a thousand records", f, strings.Repeat(record("comment", "c"), 1000))

	mounted("user 4294967294", f.owner(math.MaxUint32-1, 0), record("uid", "4294967294"))
	mounted("group 4294967294", f.owner(0, math.MaxUint32-1), record("gid", "4294967294"))
	for _, id := range []string{"uid", "gid"} {
		refuse(id+" 4294967295", "is not a valid user and group", record(id, "4294967295"))
		refuse(id+" -1", "is not a valid user and group", record(id, "-1"))
		refuse(id+" -2147483648", "is not a valid user and group", record(id, "-2147483648"))
		refuse(id+" 2^63-1", "is not a valid user and group", record(id, "9223372036854775807"))
		refuse(id+" 2^64", unreadable, record(id, "18446744073709551616"))
		refuse(id+" with a fraction", unreadable, record(id, "1.5"))
		refuse(id+" of letters", unreadable, record(id, "root"))
		refuse(id+" in hexadecimal", unreadable, record(id, "0x10"))
		refuse(id+" with a space", unreadable, record(id, " 1"))
	}
	mounted("time with nanoseconds", f.time(1, 123456789), record("mtime", "1.123456789"))
	mounted("time of more digits than nanoseconds", f.time(1, 999999999), record("mtime", "1.999999999999999999"))
	mounted("time with few digits", f.time(1, 500000000), record("mtime", "1.5"))
	mounted("time before the epoch, with a fraction", f.time(-2, 500000000), record("mtime", "-1.5"))
	for _, c := range []struct {
		what, value string
	}{{"of two points", "1.5.5"}, {"of letters", "now"}, {"over 64 bits", "9223372036854775808"}, {"with an exponent", "1e9"}, {"without an integer part", ".5"}} {
		refuse("time "+c.what, unreadable, record("mtime", c.value))
	}
	for _, c := range []struct {
		what, value string
		sec         int64
	}{{"2^62", "4611686018427387904", 1 << 62}, {"-2^62", "-4611686018427387904", -1 << 62}} {
		late := fine("pax/time "+c.what, Listing{"f": f.time(c.sec, 0)}, tarred(pax(record("mtime", c.value)), file("f", "x")))
		end := int64(maxTime)
		if c.sec < 0 {
			end = minTime
		}
		cases = append(cases, late.clamped(f, end))
	}

	cases = append(cases,
		fine("pax/size instead of the header's", Listing{"f": isFile("xyz"), "g": isFile("y")},
			tarred(pax(record("size", "3")), file("f", "xyz", edit{fSize, "00000000000\x00"}), file("g", "y"))),
		bad("pax/size over the content", tarred(pax(record("size", "99999")), file("f", "x")), "the archive is truncated"),
		bad("pax/size 2^63-1", tarred(pax(record("size", "9223372036854775807")), file("f", "x")), "the archive"),
		bad("pax/size 2^63", tarred(pax(record("size", "9223372036854775808")), file("f", "x")), unreadable),
		bad("pax/size -1", tarred(pax(record("size", "-1")), file("f", "x")), unreadable),
		bad("pax/size with a fraction", tarred(pax(record("size", "1.0")), file("f", "x")), unreadable),
		fine("pax/a listed directory", Listing{"d": isDir(), "d/f": f}, tarred(pax(record("GNU.dumpdir", "Yf\x00Ygone\x00\x00")), dir("d"), file("d/f", "x"))),
		fine("pax/size of a directory", Listing{"d": isDir(), "f": f}, tarred(pax(record("size", "4096")), dir("d"), file("f", "x"))),
		fine("pax/two headers, the second one counts", Listing{"f": f.owner(0, 2)}, tarred(pax(record("uid", "1")), pax(record("gid", "2")), file("f", "x"))),
		fine("pax/a header applies to one member only", Listing{"f": f.owner(1, 0), "g": f}, tarred(pax(record("uid", "1")), file("f", "x"), file("g", "x"))),
		bad("pax/a header without a member", tarred(file("f", "x"), pax(record("path", "g"))), "the archive"),
		bad("pax/a header of 2 MiB", tarred(pax(record("comment", strings.Repeat("c", 2<<20))), file("f", "x")), unreadable),
		bad("pax/a header that claims 8 GiB", tarred(member('x', "p", "", edit{fSize, "77777777777\x00"}), file("f", "x")), "the archive"),
	)
	refuse("a length of letters", unreadable, "xx path=g\n")
	refuse("a length of nothing", unreadable, " path=g\n")
	refuse("a length of 0", unreadable, "0 path=g\n")
	refuse("a length below zero", unreadable, "-9 path=g\n")
	refuse("a length too short", unreadable, "5 path=g\n")
	refuse("a length too long", unreadable, "99 path=g\n")
	refuse("a length over 64 bits", unreadable, "99999999999999999999 path=g\n")
	refuse("no newline at the end", unreadable, "9 path=g!")
	refuse("no equals sign", unreadable, "9 path:g\n")
	refuse("no key", unreadable, "6 =ab\n")
	refuse("a NUL in a path", unreadable, record("path", "a\x00b"))
	refuse("a NUL in a key", unreadable, record("a\x00b", "x"))
	refuse("a NUL in a target", unreadable, record("linkpath", "a\x00b"))
	refuse("a NUL in a name of an owner", unreadable, record("uname", "a\x00b"))
	return append(cases, globalCases()...)
}

// globalCases are global extended headers. Neither containerd nor Docker applies them.
// Ignoring them would mount files without attributes that the archive states, and applying
// them would mount other files than those tools do.
func globalCases() (cases []Case) {
	global := func(records ...string) string { return member('g', "pax_global_header", strings.Join(records, "")) }
	f := isFile("x")
	for what, records := range map[string][]string{
		"of a commit, by git": {record("comment", strings.Repeat("0", 40))}, "of no records": nil, "of names of owners": {record("uname", "root")},
		"of access and change times": {record("atime", "1"), record("ctime", "1")}, "of a character set": {record("hdrcharset", "BINARY")},
		"of empty values": {record("path", ""), record("uid", "")}, "of a volume's label": {record("GNU.volume.label", "label")},
	} {
		cases = append(cases, fine("pax/global header "+what, Listing{"f": f}, tarred(global(records...), file("f", "x"))))
	}
	for _, r := range [][2]string{
		{"path", "g"}, {"path", "/etc/passwd"}, {"linkpath", "x"}, {"uid", "7"}, {"gid", "7"}, {"size", "0"}, {"size", "-1"}, {"mtime", "1"},
		{"SCHILY.xattr.user.x", "y"}, {"GNU.sparse.major", "1"},
	} {
		cases = append(cases, bad("pax/global header with "+r[0]+" "+r[1], tarred(global(record(r[0], r[1])), file("f", "x")), "global"))
	}
	return append(sorted(cases),
		bad("pax/global header with an invalid number, and a path", tarred(global(record("uid", "x"), record("path", "g")), file("f", "x")), "the archive cannot be read"),
		bad("pax/global header that is malformed", tarred(global("99 path=g\n"), file("f", "x")), "the archive cannot be read"),
		fine("pax/global header alone", Listing{}, tarred(global(record("comment", "x")))),
		fine("pax/global header between a header and its member", Listing{"f": f}, tarred(global(record("comment", "x")), pax(), file("f", "x"))),
	)
}
