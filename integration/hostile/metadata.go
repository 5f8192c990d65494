// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"strings"
)

// configCases are configs. The config of a model must be well-formed; other configs are
// ignored if they cannot be parsed.
func configCases() (cases []Case) {
	const other = "application/vnd.example.config.v1+json"
	add := func(name, text string, model, any Verdict) {
		for mediaType, want := range map[string]Verdict{modelConfig: model, "application/vnd.cnai.model.config.v1+json": model, other: any} {
			cases = append(cases, Case{Name: fmt.Sprintf("config/%s (%s)", name, mediaType), Want: want, Make: func() *Artifact {
				return pack(raw("f", "x")).withConfig(mediaType, text).done()
			}})
		}
	}
	const when = 981173106 // 2001-02-03T04:05:06Z
	at := func(sec int64) Verdict {
		return mounts(Listing{".": Entry{Type: Directory, Mode: 0o755, Sec: sec}, "f": isRaw("x").time(sec, 0)})
	}
	epoch := at(0)
	malformed := refused("malformed model config")
	both := func(name, text string, v Verdict) { add(name, text, v, v) }
	broken := func(name, text string) { add(name, text, malformed, epoch) }

	both("an empty object", "{}", epoch)
	both("unknown keys", `{"x":[{}],"config":1,"history":[[]]}`, epoch)
	broken("a list", "[]")
	broken("null", "null")
	broken("text", "config")
	broken("no bytes", " ")
	broken("a byte order mark", "\ufeff{}")
	broken("cut off", `{"created":`)
	broken("nested too deep", strings.Repeat("[", 1000000))
	both("nested deep in an unknown key", `{"x":`+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)+"}", epoch)
	both("a time", `{"descriptor":{"createdAt":"2001-02-03T04:05:06Z"}}`, at(when))
	both("a time of an image's config", `{"created":"2001-02-03T04:05:06Z"}`, at(when))
	both("two times", `{"created":"1999-01-01T00:00:00Z","descriptor":{"createdAt":"2001-02-03T04:05:06Z"}}`, at(when))
	both("a time in another zone", `{"created":"2001-02-03T05:05:06+01:00"}`, at(when))
	both("a time before the epoch", `{"created":"1969-12-31T23:59:59Z"}`, at(-1))
	broken("a time in words", `{"created":"yesterday"}`)
	broken("a time of the year 10000", `{"created":"10000-01-01T00:00:00Z"}`)
	broken("a time of 25 hours", `{"created":"2001-02-03T25:05:06Z"}`)
	broken("a time as a number", `{"created":981173106}`)
	for _, section := range []string{"descriptor", "modelfs", "rootfs"} {
		for _, w := range wrong {
			text := `{"` + section + `":` + w.text + "}"
			switch w.kind {
			case "null", "object", "object of objects":
				both(section+" is "+w.what, text, epoch)
			default:
				broken(section+" is "+w.what, text)
			}
		}
	}
	add("a time twice", `{"created":"1999-01-01T00:00:00Z","created":"2001-02-03T04:05:06Z"}`, refused("malformed model config", "duplicate object member name"), epoch)
	add("DiffIDs twice, once in capitals", `{"modelfs":{"diffIds":[]},"ModelFS":{"diffIds":["sha256:x"]}}`, refused("malformed model config", "duplicate object member name"), epoch)
	add("invalid UTF-8", "{\"name\":\"\xff\"}", refused("malformed model config", "UTF-8"), epoch)
	own := quote(digestOf("x").String())
	both("the layer's DiffID", `{"modelfs":{"diffIds":[`+own+`]}}`, epoch)
	both("the layer's DiffID, as in an image", `{"rootfs":{"diff_ids":[`+own+`]}}`, epoch)
	both("no DiffIDs", `{"modelfs":{"diffIds":[]}}`, epoch)
	both("another DiffID", `{"modelfs":{"diffIds":[`+quote(digestOf("y").String())+`]}}`, refused("layer 0 (", "the config's DiffID is"))
	both("a DiffID too many", `{"modelfs":{"diffIds":[`+own+","+own+`]}}`, refused("lists 2 DiffIDs for 1 layers"))
	both("10,000 DiffIDs", `{"modelfs":{"diffIds":[`+strings.Repeat(own+",", 9999)+own+`]}}`, refused("lists 10000 DiffIDs for 1 layers"))
	both("an invalid DiffID", `{"modelfs":{"diffIds":["sha256:x"]}}`, refused("layer 0 (", "DiffID in the config"))
	both("a DiffID that leaves the directory", `{"modelfs":{"diffIds":["sha256:../../../etc/passwd"]}}`, refused("layer 0 (", "DiffID in the config"))
	both("an empty DiffID", `{"modelfs":{"diffIds":[""]}}`, refused("layer 0 (", "DiffID in the config"))
	broken("a DiffID that is a number", `{"modelfs":{"diffIds":[1]}}`)
	broken("DiffIDs in an object", `{"modelfs":{"diffIds":{}}}`)
	cases = append(cases, Case{
		Name: "config/over 8 MiB", Want: refused("over the limit of"),
		Make: func() *Artifact {
			return pack(raw("f", "x")).withConfig(modelConfig, "{}"+strings.Repeat(" ", 8<<20)).done()
		},
	})
	return sorted(cases)
}

// metadataCases are annotations with the file attributes of raw layers.
func metadataCases() (cases []Case) {
	f := isRaw("x")
	mounted := func(name, text string, e Entry) {
		cases = append(cases, fine("metadata/"+name, Listing{"f": e}, described("f", "x", text)))
	}
	refuse := func(name, text string, says ...string) {
		cases = append(cases, bad("metadata/"+name, described("f", "x", text), append([]string{metadataKey}, says...)...))
	}
	const malformed = "malformed file metadata"
	mounted("none", "", f)
	mounted("an empty object", "{}", f)
	mounted("all of it", `{"name":"x","mode":416,"uid":1,"gid":2,"size":1,"mtime":"2001-02-03T04:05:06.000000007Z","typeflag":48}`, f.mode(0o640).owner(1, 2).time(981173106, 7))
	mounted("a name that is another path", `{"name":"../../etc/passwd"}`, f)
	mounted("a size that is another", `{"size":9223372036854775807}`, f)
	mounted("unknown keys", `{"x":[[]],"xattrs":{"security.capability":"x"}}`, f)
	for _, w := range wrong {
		if w.kind != "object" && w.kind != "object of objects" {
			refuse("it is "+w.what, w.text, malformed)
		}
		if w.text == `""` {
			continue
		}
		for _, key := range []string{"mode", "uid", "gid", "typeflag", "size"} {
			name := key + " is " + w.what
			text := `{"` + key + `":` + w.text + "}"
			switch {
			case w.kind == "null", w.text == "0" && key != "mode":
				mounted(name, text, f)
			case w.text == "0":
				mounted(name, text, f.mode(0))
			case w.text == "-1" && key == "size":
				refuse(name, text, "negative size -1")
			default:
				refuse(name, text, malformed)
			}
		}
		if w.kind != "null" {
			refuse("mtime is "+w.what, `{"mtime":`+w.text+`}`, malformed)
		}
		if w.kind != "null" && w.kind != "string" {
			refuse("name is "+w.what, `{"name":`+w.text+`}`, malformed)
		}
	}
	mounted("mode, all permissions", `{"mode":511}`, f.mode(0o777))
	mounted("mode, a file's with its type", `{"mode":33188}`, f)
	mounted("mode, setuid, setgid and sticky", `{"mode":36351}`, f.mode(0o777))
	mounted("mode, of 16 bits", `{"mode":65535}`, f.mode(0o777))
	refuse("mode, of 17 bits", `{"mode":65536}`, "is not a Unix file mode")
	refuse("mode, setuid in Go's fs.FileMode", `{"mode":8389101}`, "is not a Unix file mode")
	refuse("mode, of 32 bits", `{"mode":4294967295}`, "is not a Unix file mode")
	refuse("mode, of 33 bits", `{"mode":4294967296}`, malformed)
	refuse("mode, in octal", `{"mode":0644}`, malformed)
	refuse("mode, as text", `{"mode":"0644"}`, malformed)
	for _, id := range []string{"uid", "gid"} {
		mounted(id+" 4294967294", `{"`+id+`":4294967294}`, map[string]Entry{"uid": f.owner(4294967294, 0), "gid": f.owner(0, 4294967294)}[id])
		refuse(id+" 4294967295", `{"`+id+`":4294967295}`, "is no user or group")
		refuse(id+" 4294967296", `{"`+id+`":4294967296}`, malformed)
	}
	mounted("time of the year 0", `{"mtime":"0000-01-01T00:00:00Z"}`, f.time(-62167219200, 0))
	mounted("time of the year 1, which means no time", `{"mtime":"0001-01-01T00:00:00Z"}`, f)
	mounted("time of the year 9999", `{"mtime":"9999-12-31T23:59:59.999999999Z"}`, f.time(253402300799, 999999999))
	cases[len(cases)-1] = onExt4(cases[len(cases)-1].unlike(mounts(Listing{"f": f.time(maxTime, 0)}), Copied, Extracted))
	cases[len(cases)-3] = onExt4(cases[len(cases)-3].unlike(mounts(Listing{"f": f.time(minTime, 0)}), Copied, Extracted))
	mounted("time of the last zone", `{"mtime":"2001-02-03T04:05:06-23:59"}`, f.time(981173106+86340, 0))
	for what, text := range map[string]string{
		"in words": "yesterday", "of a day alone": "2001-02-03", "of the year 10000": "10000-01-01T00:00:00Z", "of a 30th of February": "2001-02-30T00:00:00Z",
		"without a zone": "2001-02-03T04:05:06", "in seconds": "981173106", "below zero": "-0001-01-01T00:00:00Z",
	} {
		refuse("time "+what, `{"mtime":"`+text+`"}`, malformed)
	}
	for flag := range 128 {
		if strings.ContainsRune("1234567xgS", rune(flag)) {
			refuse(fmt.Sprintf("type flag %d", flag), fmt.Sprintf(`{"typeflag":%d}`, flag), "is not a regular file")
		}
	}
	refuse("type flag 256", `{"typeflag":256}`, malformed)
	refuse("cut off", `{"mode":420`, malformed)
	refuse("not JSON", "mode=0644", malformed)
	refuse("two objects", "{}{}", malformed)
	refuse("a byte order mark", "\ufeff{}", malformed)
	refuse("nested too deep", strings.Repeat("[", 100000), malformed)
	refuse("a mode twice", `{"mode":420,"mode":511}`, "duplicate object member name")
	refuse("a user twice, once in capitals", `{"uid":1000,"UID":0}`, "duplicate object member name")
	cases = append(cases,
		fine("metadata/the legacy annotation", Listing{"f": f.mode(0o600)},
			layer{mediaType: rawType, content: "x", annotations: object{{filepathKey, `"f"`}, {"org.cnai.model.file.metadata+json", quote(`{"mode":384}`)}}}),
		fine("metadata/both annotations", Listing{"f": f.mode(0o640)},
			layer{mediaType: rawType, content: "x", annotations: object{{filepathKey, `"f"`}, {"org.cnai.model.file.metadata+json", quote(`{"mode":384}`)}, {metadataKey, quote(`{"mode":416}`)}}}),
		fine("metadata/of a tar, which has its own", Listing{"f": isFile("x")},
			layer{mediaType: tarType, content: file("f", "x") + mark, annotations: object{{metadataKey, quote(`{"mode":`)}, {filepathKey, quote("../..")}}}),
	)
	return sorted(cases)
}

// mediaTypeCases are media types of layers.
func mediaTypeCases() (cases []Case) {
	archive := file("f", "x") + mark
	for _, base := range []string{"weight", "weight.config", "doc", "code", "dataset"} {
		for _, vendor := range []string{"cncf", "cnai"} {
			name := fmt.Sprintf("application/vnd.%s.model.%s.v1", vendor, base)
			cases = append(cases,
				fine("type of a layer/"+name+".raw", Listing{"p": isRaw("x")}, layer{mediaType: name + ".raw", content: "x", annotations: object{{filepathKey, `"p"`}}}),
				fine("type of a layer/"+name+".tar", Listing{"f": isFile("x")}, layer{mediaType: name + ".tar", content: archive}),
				fine("type of a layer/"+name+".tar+gzip", Listing{"f": isFile("x")}, layer{mediaType: name + ".tar+gzip", content: gzipped(archive)}),
				fine("type of a layer/"+name+".tar+zstd", Listing{"f": isFile("x")}, layer{mediaType: name + ".tar+zstd", content: zstded(archive)}),
			)
		}
	}
	for mediaType, content := range map[string]string{
		"application/x.tar": archive, "application/x+tar": archive, "application/x.tar+gzip": gzipped(archive), "application/x.tar.gzip": gzipped(archive),
		"application/x+tar+gzip": gzipped(archive), "application/x.tar+zstd": zstded(archive), "application/x.tar.zstd": zstded(archive),
		strings.ToUpper(tarType): archive, tarType + ";version=1": archive, tarType + " ; x=.raw": archive, " " + tarType: archive,
	} {
		cases = append(cases, fine(fmt.Sprintf("type of a layer/%q is an archive", mediaType), Listing{"f": isFile("x")}, layer{mediaType: mediaType, content: content}))
	}
	for _, mediaType := range []string{
		"x", "application/octet-stream", "text/html", "../../etc/passwd", "application/x.tar.xz", "application/tar+x", "application/x.tarball", "tar", "application/x+gzip",
		tarType + "x", strings.Repeat("x", 255), `"`, "%s%n", "application/vnd.oci.empty.v1+json",
	} {
		cases = append(cases, fine(fmt.Sprintf("type of a layer/%.40q is a file", mediaType), Listing{"p": isRaw("x")}, layer{mediaType: mediaType, content: "x", annotations: object{{filepathKey, `"p"`}}}))
	}
	for what, mediaType := range map[string]string{
		"of nothing": "", "of spaces": "  ", "of a parameter alone": "; x=y", "of 256 bytes": strings.Repeat("x", 256), "with a newline": "x\ny", "with an escape sequence": "\x1b[31mx",
		"with a NUL": "x\x00", "of other letters": "text/plän", "of a megabyte": strings.Repeat("x", 1<<20),
	} {
		cases = append(cases, Case{
			Name: "type of a layer/" + what, Want: refused("layer 0: ", "is not a media type"),
			Make: func() *Artifact { return pack(layer{mediaType: mediaType, content: "x"}).ofLayers() },
		})
	}
	for _, mediaType := range []string{tarType + "+encrypted", rawType + "+encrypted", gzipType + "+Encrypted", "x+encrypted"} {
		cases = append(cases, bad("type of a layer/"+mediaType, layer{mediaType: mediaType, content: archive}, "an encrypted layer is not supported"))
	}
	for _, mediaType := range []string{
		"application/vnd.oci.image.layer.nondistributable.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.foreign.diff.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
	} {
		cases = append(cases, bad("type of a layer/"+mediaType, layer{mediaType: mediaType, content: archive}, "a non-distributable layer"))
	}
	return sorted(cases)
}
