// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
)

// name255 is as long as a file name can be (NAME_MAX).
var name255 = strings.Repeat("n", 255)

// badPaths are invalid file names, each with the reason.
var badPaths = map[string]struct{ name, says string }{
	"above the volume":                  {"../escaped", `contains ".."`},
	"far above the volume":              {strings.Repeat("../", 60) + "tmp/escaped", `contains ".."`},
	"above the volume, from a file":     {"a/../../escaped", `contains ".."`},
	"above and back":                    {"a/../b", `contains ".."`},
	"above, back to the volume":         {"a/..", `contains ".."`},
	"above, alone":                      {"..", `contains ".."`},
	"above, after a dot":                {"./..", `contains ".."`},
	"above, after slashes":              {"a///..///b", `contains ".."`},
	"above, at the end":                 {"a/b/..", `contains ".."`},
	"above, alone, in a directory":      {"a/b/../../..", `contains ".."`},
	"a dot alone":                       {".", "names no file"},
	"dots and slashes":                  {".//././.", "names no file"},
	"a name of 256 bytes":               {name255 + "n", "has a name of 256 bytes, over the limit of 255"},
	"a directory of 256 bytes":          {name255 + "n/f", "has a name of 256 bytes, over the limit of 255"},
	"a name of 100,000 bytes":           {strings.Repeat("n", 100000), "has a name of 100000 bytes, over the limit of 255"},
	"128 letters of 2 bytes":            {strings.Repeat("é", 128), "has a name of 256 bytes, over the limit of 255"},
	"64 letters of 4 bytes":             {strings.Repeat("😀", 64), "has a name of 256 bytes, over the limit of 255"},
	"a path of 4096 bytes":              {strings.Repeat(name255+"/", 15) + "m/" + strings.Repeat("m", 254), "has 4096 bytes, over the limit of 4095"},
	"below 129 directories":             {strings.Repeat("d/", 129) + "f", "is below 129 directories, over the limit of 128"},
	"below 50,000 directories":          {strings.Repeat("d/", 50000) + "f", "over the limit of"},
	"below 2,000 directories, and back": {strings.Repeat("d/", 2000) + strings.Repeat("../", 2000) + "f", `contains ".."`},
}

// absolutePaths are refused for a raw layer. Every tar program strips leading slashes of
// members and hard link targets; the second value is the rest.
var absolutePaths = map[string][2]string{
	"absolute":                     {"/etc/passwd", "etc/passwd"},
	"absolute, of two slashes":     {"//etc/passwd", "etc/passwd"},
	"absolute, of slashes and dot": {"///././/etc//passwd", "etc/passwd"},
	"absolute, of one letter":      {"/x", "x"},
}

// finePaths look invalid but are valid, because Linux names are bytes. The second value is
// the mounted path, or "" if it is equal.
var finePaths = map[string][2]string{
	"three dots":                     {"...", ""},
	"dots before a name":             {"..a", ""},
	"dots after a name":              {"a..", ""},
	"a hidden directory of dots":     {".../..../f", ""},
	"a dot before it":                {"./f", "f"},
	"dots and slashes in it":         {"a//.///b/./c", "a/b/c"},
	"a space":                        {" ", ""},
	"spaces around":                  {" f ", ""},
	"a backslash":                    {`a\b`, ""},
	"backslashes and dots":           {`..\..\escaped`, ""},
	"a drive letter":                 {`C:\Windows\system32`, ""},
	"a device of Windows":            {"CON", ""},
	"a stream of NTFS":               {"f:stream", ""},
	"a newline":                      {"a\nb", ""},
	"a newline at the end":           {"f\n", ""},
	"a tab":                          {"a\tb", ""},
	"a carriage return":              {"a\rb", ""},
	"an escape sequence":             {"\x1b[2J\x1b[31mred", ""},
	"a bell":                         {"\x07", ""},
	"a control character":            {"\x01", ""},
	"a deleted character":            {"\x7f", ""},
	"a dash":                         {"-", ""},
	"an option":                      {"-rf", ""},
	"a tilde":                        {"~", ""},
	"a home":                         {"~root/f", ""},
	"a variable":                     {"$HOME", ""},
	"a command":                      {"$(reboot)", ""},
	"a command in quotes":            {"`reboot`;'\"|&", ""},
	"a pattern":                      {"*?[a-z]", ""},
	"a percent sign":                 {"%s%n%2e%2e%2f", ""},
	"an encoded path":                {"%2e%2e/%2fetc", ""},
	"a URL":                          {"file:///etc/passwd", "file:/etc/passwd"},
	"options of a mount":             {"f,upperdir=/,workdir=/tmp", ""},
	"layers of an overlay":           {"a:b::c", ""},
	"the names of a tree":            {"fs/data/image", ""},
	"the name of a tree's file":      {"tree.json", ""},
	"the name of a content":          {"0", ""},
	"the name of no device":          {"nowhere", ""},
	"lost and found":                 {"lost+found/f", ""},
	"proc":                           {"proc/self/exe", ""},
	"dev":                            {"dev/null", ""},
	"a digest":                       {digest.FromString("x").String(), ""},
	"a name of 255 bytes":            {name255, ""},
	"a directory of 255 bytes":       {name255 + "/" + name255, ""},
	"128 directories":                {strings.Repeat("d/", 128) + "f", ""},
	"64 letters of 3 bytes":          {strings.Repeat("€", 64), ""},
	"a path of 4095 bytes":           {strings.Repeat(name255+"/", 15) + strings.Repeat("m", 255), ""},
	"a file of Python's":             {"__pycache__/m.cpython-312.pyc", ""},
	"the name of a whiteout's kin":   {".whx", ""},
	"a name that ends in a number":   {"f.000000000000000000000001", ""},
	"a name of one digit, many dirs": {"1/2/3/4/5/6/7/8/9/0", ""},
}

// pathCases try the names in every place where a layer can state one.
func pathCases() (cases []Case) {
	for _, what := range sortedKeys(badPaths) {
		p := badPaths[what]
		cases = append(cases,
			bad("path/raw, "+what, raw(p.name, "content"), fmt.Sprintf("path %.255q", p.name), p.says),
			bad("path/title, "+what, layer{mediaType: "application/octet-stream", content: "content", annotations: object{{titleKey, quote(p.name)}}}, p.says),
			bad("path/tar, "+what, tarred(named(p.name, '0', "content")), "member ", p.says),
			bad("path/target of a hard link, "+what, tarred(file("f", "content"), pax(record("linkpath", p.name))+hardLink("l", "x")), "hard link to ", p.says),
		)
		// Some names that are invalid for files are valid for the volume's root directory.
		if p.says != "names no file" {
			cases = append(cases, bad("path/tar directory, "+what, tarred(named(p.name, '5', "")), "member ", p.says))
		}
	}
	for _, what := range sortedKeys(absolutePaths) {
		name, left := absolutePaths[what][0], absolutePaths[what][1]
		to := func(target string) string { return pax(record("linkpath", target)) }
		cases = append(cases,
			bad("path/raw, "+what, raw(name, "content"), fmt.Sprintf("path %q is absolute", name)),
			bad("path/title, "+what, layer{mediaType: "application/octet-stream", content: "content", annotations: object{{titleKey, quote(name)}}}, "is absolute"),
			fine("path/tar, "+what, Listing{left: isFile("content")}, tarred(named(name, '0', "content"))),
			fine("path/tar, "+what+", by a PAX name", Listing{left: isFile("content")}, tarred(pax(record("path", name)), file("f", "content"))),
			fine("path/tar directory, "+what, Listing{left: isDir()}, tarred(named(name, '5', "", edit{fMode, "0000755\x00"}))),
			fine("path/target of a hard link, "+what, Listing{left: isFile("content"), "l": isFile("content")}, tarred(named(left, '0', "content"), to(name)+hardLink("l", "x"))),
			fine("path/target of a hard link, not "+what, Listing{left: isFile("content"), "l": isFile("content")}, tarred(named(name, '0', "content"), to(left)+hardLink("/l", "x"))),
			bad("path/target of a hard link, "+what+", of the node", tarred(to(name)+hardLink("l", "x")), fmt.Sprintf("hard link to %q", name), "neither a regular file nor a symlink before it"),
			fine("path/target of a symlink, "+what, Listing{"l": isLink(name)}, tarred(to(name)+symlink("l", "x"))),
		)
	}
	for _, what := range sortedKeys(finePaths) {
		p := finePaths[what]
		at := p[0]
		if p[1] != "" {
			at = p[1]
		}
		above := Listing{at: isFile("content"), path.Dir(at): isDir()}
		if !strings.Contains(at, "/") {
			above = Listing{at: isFile("content")}
		}
		dirOf := ""
		if strings.Contains(at, "/") {
			dirOf = named(path.Dir(p[0]), '5', "", edit{fMode, "0000755\x00"})
			if strings.HasPrefix(what, "a URL") {
				dirOf = named("file:/etc", '5', "", edit{fMode, "0000755\x00"})
			}
		}
		cases = append(cases,
			fine("path/raw, "+what, Listing{at: isRaw("content")}, raw(p[0], "content")),
			fine("path/tar, "+what, above, tarred(dirOf, named(p[0], '0', "content"))),
		)
	}
	return append(cases, namesOfAWay()...)
}

// namesOfAWay tests the precedence of annotations and headers.
func namesOfAWay() []Case {
	hexName := digestOf("content").Encoded()
	annotated := func(a object) layer {
		return layer{mediaType: rawType, content: "content", annotations: a}
	}
	mounted := func(what, name string, a object) Case {
		return fine("path/annotations, "+what, Listing{name: isRaw("content")}, annotated(a))
	}
	const legacy = "org.cnai.model.filepath"
	return []Case{
		mounted("none", hexName, nil),
		mounted("an empty one", hexName, object{{filepathKey, `""`}}),
		mounted("all empty", hexName, object{{filepathKey, `""`}, {titleKey, `""`}, {legacy, `""`}}),
		mounted("path before title", "path", object{{titleKey, `"title"`}, {filepathKey, `"path"`}}),
		mounted("the legacy path before a title", "legacy", object{{titleKey, `"title"`}, {legacy, `"legacy"`}}),
		mounted("path before the legacy path", "path", object{{legacy, `"legacy"`}, {filepathKey, `"path"`}}),
		mounted("an empty legacy path before a title", "title", object{{legacy, `""`}, {titleKey, `"title"`}}),
		mounted("the legacy path", "legacy", object{{legacy, `"legacy"`}}),
		mounted("an empty path before a title", "title", object{{filepathKey, `""`}, {titleKey, `"title"`}}),
		mounted("a key in capitals is another key", hexName, object{{"ORG.CNCF.MODEL.FILEPATH", `"f"`}}),
		mounted("an escaped name", "a/é\nb", object{{filepathKey, `"a\/\u00e9\nb"`}}),
		mounted("a name of two surrogates", "😀", object{{filepathKey, `"\ud83d\ude00"`}}),
		bad("path/annotations, an invalid legacy path before a good title", annotated(object{{legacy, `".."`}, {titleKey, `"f"`}}), `contains ".."`),
		bad("path/annotations, an escaped NUL", annotated(object{{filepathKey, `"a\u0000b"`}}), "contains a NUL byte"),
		bad("path/annotations, dots in escapes", annotated(object{{filepathKey, `"\u002e\u002e\u002fescaped"`}}), `contains ".."`),
		bad("path/annotations, a slash in an escape", annotated(object{{filepathKey, `"\u002fetc"`}}), "is absolute"),

		fine("path/ustar, a prefix", Listing{"p/r/f": isFile("x")}, tarred(file("f", "x", edit{fPrefix, "p/r"}))),
		fine("path/ustar, a prefix that fills its field", Listing{strings.Repeat("p", 155) + "/f": isFile("x")}, tarred(file("f", "x", edit{fPrefix, strings.Repeat("p", 155)}))),
		fine("path/ustar, a name that fills its field", Listing{strings.Repeat("n", 100): isFile("x")}, tarred(file(strings.Repeat("n", 100), "x"))),
		fine("path/ustar, text after the end of a name", Listing{"f": isFile("x")}, tarred(file("f\x00/../../escaped", "x"))),
		fine("path/ustar, a prefix before a PAX path", Listing{"g": isFile("x")}, tarred(pax(record("path", "g")), file("f", "x", edit{fPrefix, "p"}))),
		fine("path/ustar, a prefix in the oldest format is ignored", Listing{"f": isFile("x")}, tarred(file("f", "x", edit{fMagic, ""}, edit{fVersion, ""}, edit{fPrefix, "../.."}))),
		bad("path/ustar, dots in the prefix", tarred(file("f", "x", edit{fPrefix, "a/../.."})), `contains ".."`),
		fine("path/ustar, an absolute prefix", Listing{"etc/f": isFile("x")}, tarred(file("f", "x", edit{fPrefix, "/etc"}))),
		bad("path/raw, the root of the node", raw("/", "content"), "is absolute"),
		bad("path/raw, absolute, with dots", raw("/../etc/passwd", "content"), "is absolute"),
		bad("path/tar, absolute, with dots", tarred(file("/../etc/passwd", "x")), `contains ".."`),
		bad("path/tar, absolute, with dots inside", tarred(file("/etc/../../passwd", "x")), `contains ".."`),
		bad("path/target of a hard link, absolute, with dots", tarred(file("f", "x"), hardLink("l", "/../f")), `hard link to "/../f"`, `contains ".."`),
		bad("path/target of a hard link, the root of the node", tarred(hardLink("l", "/")), "names no file"),
		bad("path/tar, a symlink in the place of the root of the node", tarred(symlink("/", "/etc")), "names no file"),
		bad("path/tar, through a symlink of an absolute name", tarred(symlink("/l", "/etc"), file("l/f", "x")), "passes through a symlink"),
		bad("path/tar, absolute, through a symlink", tarred(symlink("l", "/etc"), file("/l/f", "x")), "passes through a symlink"),
		fine("path/tar, absolute, in the place of a file", Listing{"f": isFile("y")}, tarred(file("f", "x"), file("/f", "y"))),
		bad("path/ustar, no name at all", tarred(file("", "x")), "names no file"),
		fine("path/tar, the root of the node is the volume", Listing{".": isDir().mode(0o711)}, tarred(dir("/", edit{fMode, "0000711\x00"}))),
		fine("path/tar, the volume itself", Listing{".": isDir().mode(0o711).owner(7, 8)}, tarred(dir("./", edit{fMode, "0000711\x00"}, edit{fUID, "0000007\x00"}, edit{fGID, "0000010\x00"}))),
		fine("path/tar, the volume, again and again", Listing{".": isDir().mode(0o700)}, tarred(dir("."), dir(".///"), dir("./././", edit{fMode, "0000700\x00"}))),
		fine("path/tar, a directory of no name", Listing{".": isDir()}, tarred(dir(""))),
		bad("path/tar, a symlink in the place of the volume", tarred(symlink(".", "/etc")), "names no file"),
		bad("path/tar, a hard link in the place of the volume", tarred(file("f", "x"), hardLink("./", "f")), "names no file"),
		// GNU tar and bsdtar extract a file with such a name as a directory, containerd as
		// a file.
		fine("path/tar, a slash after a file makes a directory", Listing{"d": isDir().mode(0o644)}, tarred(file("d/", ""))).notAsFiles(),
		fine("path/tar, slashes after a file make a directory", Listing{"d": isDir().mode(0o644), "d/f": isFile("x")}, tarred(file("d//", ""), file("d/f", "x"))).notAsFiles(),
		fine("path/tar, a slash after a contiguous file makes a directory", Listing{"d": isDir().mode(0o644)}, tarred(member('7', "d/", ""))),
		fine("path/tar, a slash after a file's PAX name makes a directory", Listing{"d": isDir().mode(0o644)}, tarred(pax(record("path", "d/")), file("f", ""))).notAsFiles(),
		fine("path/tar, a file that is the volume by its slash", Listing{".": isDir().mode(0o711)}, tarred(file("./", "", edit{fMode, "0000711\x00"}))).notAsFiles(),
		bad("path/tar, a slash after a file with content", tarred(file("d/", "x")), "its name ends in a slash"),
		bad("path/tar, a slash after a sparse file", tarred(sparse1("d/", "1048576", "0\n", "")), "its name ends in a slash"),
		bad("path/tar, a slash after a file, in the place of one", tarred(file("d", "x"), file("d/", "")), "must be a directory"),
		bad("path/tar, a slash after a file, in the place of a symlink", tarred(symlink("d", "/etc"), file("d/", "")), "passes through a symlink"),
		fine("path/tar, a slash after a file of the old format makes a directory", Listing{"d": isDir().mode(0o644)}, tarred(member(0, "d/", "", edit{fMagic, ""}, edit{fVersion, ""}))),
		fine("path/tar, a slash after a symlink", Listing{"l": isLink("x")}, tarred(symlink("l/", "x"))),
	}
}

// unicodeCases are names that look or sort alike. Each is a separate file with exactly
// these bytes.
func unicodeCases() (cases []Case) {
	for _, c := range []struct {
		what  string
		names []string
	}{
		{"composed and decomposed", []string{"caf\u00e9", "cafe\u0301"}},
		{"composed and decomposed, Hangul", []string{"\ud55c", "\u1112\u1161\u11ab"}},
		{"composed and decomposed, in a directory's name", []string{"\u00e9/f", "e\u0301/f"}},
		{"marks in two orders", []string{"a\u0323\u0307", "a\u0307\u0323"}},
		{"a ligature and its letters", []string{"\ufb01le", "file"}},
		{"full width and half width", []string{"\uff21", "A"}},
		{"the Ångström sign and the letter", []string{"\u212b", "\u00c5", "A\u030a"}},
		{"the Kelvin sign and the letter", []string{"\u212a", "K", "k"}},
		{"capitals", []string{"README", "readme", "ReadMe"}},
		{"capitals in Turkish", []string{"I", "i", "\u0130", "\u0131"}},
		{"a sharp s", []string{"\u00df", "ss", "SS", "\u1e9e"}},
		{"Latin and Cyrillic", []string{"a", "\u0430"}},
		{"characters similar to a slash", []string{"a\u2215b", "a\u2044b", "a\uff0fb"}},
		{"characters similar to dots", []string{"\u2024\u2024", "\uff0e\uff0e", "\u2025"}},
		{"characters without width", []string{"a", "a\u200b", "a\u200d", "a\ufeff", "a\u00ad"}},
		{"written from right to left", []string{"gpj.exe", "\u202egpj.exe"}},
		{"a byte order mark", []string{"f", "\ufefff"}},
		{"spaces", []string{"a b", "a\u00a0b", "a\u2003b", "a\u3000b"}},
		{"line ends", []string{"a\u0085b", "a\u2028b"}},
		{"noncharacters", []string{"\ufffe", "\uffff", "\U0010ffff"}},
		{"the replacement character", []string{"\ufffd", "\ufffd\ufffd"}},
		{"255 bytes of marks", []string{"a" + strings.Repeat("\u0301", 127)}},
		{"a dot and a space at the end", []string{"f", "f.", "f ", "f. "}},
	} {
		var members []string
		var layers []layer
		inTar, inLayers := Listing{}, Listing{}
		for i, name := range c.names {
			content := fmt.Sprintf("%d", i)
			members = append(members, named(name, '0', content))
			layers = append(layers, raw(name, content))
			inTar[name], inLayers[name] = isFile(content), isRaw(content)
		}
		cases = append(cases,
			fine("unicode/tar, "+c.what, inTar, tarred(members...)),
			fine("unicode/raw, "+c.what, inLayers, layers...))
	}
	// A tar can contain any bytes, JSON only text.
	for what, name := range map[string]string{
		"a lone byte": "\xff", "an overlong slash": "\xc0\xaf", "overlong dots": "\xc0\xae\xc0\xae", "a surrogate": "\xed\xa0\x80",
		"a cut letter": "caf\xc3", "Latin 1": "caf\xe9", "beyond Unicode": "\xf4\x90\x80\x80", "UTF-16": "\xff\xfef",
	} {
		cases = append(cases,
			fine("unicode/invalid UTF-8 in a tar, "+what, Listing{name: isFile("x")}, tarred(named(name, '0', "x"))),
			Case{
				Name: "unicode/invalid UTF-8 in a manifest, " + what,
				Make: func() *Artifact { return pack(good(), raw(name, "x")).done() },
				Want: refused("UTF-8"),
			})
	}
	sortCases(cases)
	return append(cases, Case{
		Name: "unicode/two names with invalid UTF-8 that would become equal",
		Make: func() *Artifact { return pack(raw("a\xfe", "1"), raw("a\xff", "2")).done() },
		Want: refused("UTF-8"),
	})
}

// linkCases are symlinks and hard links.
func linkCases() (cases []Case) {
	// The container resolves symlinks in its own root; our code follows none.
	for what, target := range map[string]string{
		"to the node's root": "/", "to a file of the node": "/etc/shadow", "above the volume": "../../../../etc/shadow", "to itself": "l",
		"to nothing": "absent", "to the volume": ".", "above": "..", "of one space": " ", "with a newline": "a\nb", "of invalid UTF-8": "\xff\xfe",
		"to proc": "/proc/self/root/etc/shadow", "of 4095 bytes": strings.Repeat("a/", 2047) + "b", "to an absolute path of many slashes": "////etc",
	} {
		cases = append(cases, fine("link/symlink "+what, Listing{"l": isLink(target)}, tarred(pax(record("linkpath", target))+symlink("l", "x"))))
	}
	for what, members := range map[string][]string{
		"a file through it":                   {symlink("l", "/tmp"), file("l/f", "x")},
		"a directory through it":              {symlink("l", "/tmp"), dir("l/d")},
		"a symlink through it":                {symlink("l", "/tmp"), symlink("l/s", "x")},
		"a hard link through it":              {file("f", "x"), symlink("l", "/tmp"), hardLink("l/h", "f")},
		"a directory in its place":            {symlink("l", "/tmp"), dir("l")},
		"a directory in its place, by a file": {symlink("l", "d"), dir("d"), file("l/f", "x")},
		"a file through two":                  {symlink("l", "m"), symlink("m", "/tmp"), file("l/f", "x")},
		"a file through a relative one":       {dir("d"), symlink("d/l", "../.."), file("d/l/f", "x")},
		"a file through one to the volume":    {symlink("l", "."), file("l/f", "x")},
		"a file deep below":                   {symlink("a", "/"), file("a/b/c/d/e", "x")},
	} {
		cases = append(cases, bad("link/through a symlink, "+what, tarred(members...), "passes through a symlink"))
	}
	for what, members := range map[string][]string{
		"to nothing":                     {hardLink("h", "absent")},
		"to itself":                      {hardLink("h", "h")},
		"to a directory":                 {dir("d"), hardLink("h", "d")},
		"to a later file":                {hardLink("h", "f"), file("f", "x")},
		"through a symlink":              {symlink("s", "/etc"), hardLink("h", "s/shadow")},
		"to what a symlink points to":    {symlink("s", "absent"), hardLink("h", "absent")},
		"to a later symlink":             {hardLink("h", "s"), symlink("s", "x")},
		"to a directory's name, twice":   {dir("d"), file("d/f", "x"), hardLink("h", "d/")},
		"to another layer's file":        {hardLink("h", "good.txt")},
		"to two that lead to each other": {hardLink("a", "b"), hardLink("b", "a")},
	} {
		cases = append(cases, bad("link/hard link "+what, tarred(members...), "hard link to ", "neither a regular file nor a symlink before it"))
	}
	s, owned := symlink("s", "/etc/shadow", edit{fUID, "0000007\x00"}), edit{fUID, "0000007\x00"}
	is := isLink("/etc/shadow").owner(7, 0)
	cases = append(cases,
		bad("link/symlink of no target", tarred(symlink("l", "")), "and this one has 0 bytes"),
		bad("link/symlink of 4096 bytes", tarred(pax(record("linkpath", strings.Repeat("x", 4096)))+symlink("l", "x")), "and this one has 4096 bytes"),
		bad("link/symlink with a NUL", tarred(pax(record("linkpath", "a\x00b"))+symlink("l", "x")), "the archive cannot be read"),
		bad("link/hard link to no name", tarred(hardLink("h", "")), "names no file"),
		bad("link/directory and hard link of it", tarred(dir("d"), file("f", "x"), hardLink("d", "f")), "is a directory"),
		// Here both names have the attributes of the first symlink; containerd gives both
		// those of the second.
		fine("link/hard link to a symlink", Listing{"s": is, "h": is}, tarred(s, hardLink("h", "s", owned))),
		fine("link/hard link to a symlink, with an owner of its own", Listing{"s": is, "h": is}, tarred(s, hardLink("h", "s"))).notAsFiles(),
		fine("link/hard link to a symlink, with attributes", Listing{"s": is, "h": is}, tarred(s, pax(record("SCHILY.xattr.user.x", "y")), hardLink("h", "s", owned))),
		fine("link/chain of hard links to a symlink", Listing{"s": is, "h": is, "i": is, "d/j": is}, tarred(s, hardLink("h", "./s", owned), hardLink("i", "h", owned), hardLink("d/j", "/i", owned))),
		fine("link/hard link to a symlink that is replaced", Listing{"s": isFile("x"), "h": is}, tarred(s, hardLink("h", "s", owned), file("s", "x"))),
		fine("link/hard link to a file that has become a symlink", Listing{"s": is, "h": is}, tarred(file("s", "x"), s, hardLink("h", "s", owned))),
		fine("link/hard link to a symlink that has become a file", Listing{"s": isFile("x"), "h": isFile("x")}, tarred(s, file("s", "x"), hardLink("h", "s", edit{fMode, "0000644\x00"}))),
		fine("link/hard link to a symlink, over a file", Listing{"s": is, "h": is}, tarred(file("h", "x"), s, hardLink("h", "s", owned))),
		fine("link/hard link to a symlink, over itself", Listing{"s": is}, tarred(s, hardLink("s", "s", owned))),
		bad("link/file through a hard link to a symlink", tarred(s, hardLink("h", "s"), file("h/f", "x")), "passes through a symlink"),
		bad("link/directory in the place of a hard link to a symlink", tarred(s, hardLink("h", "s"), dir("h")), "passes through a symlink"),
		bad("link/hard link to a symlink, in the place of a directory", tarred(s, dir("h"), hardLink("h", "s")), "is a directory"),
		fine("link/symlink over a file", Listing{"f": isLink("x")}, tarred(file("f", "x"), symlink("f", "x"))),
		fine("link/file over a symlink", Listing{"f": isFile("x")}, tarred(symlink("f", "/etc/shadow"), file("f", "x"))),
		fine("link/hard link over its own file", Listing{"f": isFile("x")}, tarred(file("f", "x"), hardLink("f", "f"))),
		fine("link/hard link over a symlink", Listing{"f": isFile("x"), "h": isFile("x")}, tarred(file("f", "x"), symlink("h", "/etc/shadow"), hardLink("h", "f"))),
		fine("link/hard link of a file that is replaced", Listing{"f": isFile("new"), "h": isFile("old")}, tarred(file("f", "old"), hardLink("h", "f"), file("f", "new"))),
		fine("link/chain of hard links", Listing{"a": isFile("x"), "b": isFile("x"), "c": isFile("x")}, tarred(file("a", "x"), hardLink("b", "a"), hardLink("c", "./b"))),
		fine("link/hard link into a directory that no layer describes", Listing{"a": isFile("x"), "d/e/b": isFile("x")}, tarred(file("a", "x"), hardLink("d/e/b", "a"))),
		fine("link/attributes of a hard link are the file's", Listing{"f": isFile("x").mode(0o600), "h": isFile("x").mode(0o600)},
			tarred(file("f", "x", edit{fMode, "0000600\x00"}), hardLink("h", "f", edit{fMode, "0000777\x00"}, edit{fUID, "0000011\x00"}))).notAsFiles(),
	)
	chain, all := []string{file("end", "x")}, Listing{"end": isFile("x")}
	for i := range 1000 {
		name, target := fmt.Sprintf("l%d", i), fmt.Sprintf("l%d", i+1)
		if i == 999 {
			target = "end"
		}
		chain, all[name] = append(chain, symlink(name, target)), isLink(target)
	}
	cases = append(cases, fine("link/chain of a thousand symlinks", all, tarred(chain...)))
	sortCases(cases)
	return cases
}
