// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// wrong are JSON values of all types.
var wrong = []struct{ what, text, kind string }{
	{"null", "null", "null"},
	{"true", "true", "boolean"},
	{"0", "0", "number"},
	{"-1", "-1", "number"},
	{"a fraction", "1.5", "fraction"},
	{"1e999", "1e999", "fraction"},
	{"a number of a thousand digits", strings.Repeat("9", 1000), "fraction"},
	{"an empty string", `""`, "string"},
	{"a string", `"x"`, "string"},
	{"an empty list", "[]", "list"},
	{"a list", `["x"]`, "list of strings"},
	{"a list of lists", "[[]]", "list of lists"},
	{"an empty object", "{}", "object"},
	{"an object", `{"x":{}}`, "object of objects"},
}

// manifestCases are manifests whose fields have each type.
func manifestCases() (cases []Case) {
	base := func() *packed { return pack(good(), raw("f", "x")) }
	shown := shows(Listing{"good.txt": isRaw(good().content), "f": isRaw("x")})
	add := func(name string, want Verdict, make func() *Artifact) {
		cases = append(cases, Case{Name: "manifest/" + name, Make: make, Want: want})
	}
	// What says nothing about files is not looked at.
	for _, key := range []string{"schemaVersion", "annotations", "subject", "x-unknown"} {
		for _, w := range wrong {
			add(key+" is "+w.what, shown, func() *Artifact { p := base(); return p.asText(p.manifest.set(key, w.text).String()) })
		}
	}
	// What does must be of its type; null is as good as absent.
	malformed := refused("malformed JSON")
	for _, w := range wrong {
		edit := func(key string) func() *Artifact {
			return func() *Artifact { p := base(); return p.asText(p.manifest.set(key, w.text).String()) }
		}
		want := malformed
		switch {
		case w.text == `"x"`:
			want = refused("is not the media type of a manifest or an index")
		case w.text == `""`, w.kind == "null":
			want = shown
		}
		add("mediaType is "+w.what, want, edit("mediaType"))

		want = malformed
		if w.kind == "string" || w.kind == "null" {
			want = shown
		}
		add("artifactType is "+w.what, want, edit("artifactType"))

		want = malformed
		if w.kind == "null" || w.kind == "object" || w.kind == "object of objects" {
			want = refused("config: digest")
		}
		add("config is "+w.what, want, edit("config"))

		want = malformed
		switch w.kind {
		case "null", "list":
			want = refused("the artifact has no layers")
		}
		add("layers is "+w.what, want, edit("layers"))

		want = malformed
		switch w.kind {
		case "null":
			want = shown
		case "list":
			want = refused("both layers and manifests are present")
		}
		add("manifests is "+w.what+", beside layers", want, edit("manifests"))
	}
	text := func() string { return base().manifest.String() }
	whole := func(name string, want Verdict, change func(string) string) {
		add(name, want, func() *Artifact { return base().asText(change(text())) })
	}
	fixed := func(s string) func(string) string { return func(string) string { return s } }
	whole("of no bytes", malformed, fixed(" "))
	whole("null", refused("not a manifest"), fixed("null"))
	whole("an empty object", refused("not a manifest"), fixed("{}"))
	whole("a list", malformed, fixed("[]"))
	whole("a string", malformed, fixed(`"manifest"`))
	whole("a number", malformed, fixed("2"))
	whole("text", malformed, fixed("manifest"))
	whole("cut off", malformed, func(s string) string { return s[:len(s)-1] })
	whole("with a byte order mark", malformed, func(s string) string { return "\ufeff" + s })
	whole("in UTF-16", malformed, func(s string) string { return "\xff\xfe" + strings.Join(strings.Split(s, ""), "\x00") + "\x00" })
	whole("twice", malformed, func(s string) string { return s + s })
	whole("with text behind", malformed, func(s string) string { return s + "x" })
	whole("with a NUL behind", malformed, func(s string) string { return s + "\x00" })
	whole("with a comment", malformed, func(s string) string { return "// a manifest\n" + s })
	whole("with a comma at the end", malformed, func(s string) string { return s[:len(s)-1] + ",}" })
	whole("in single quotes", malformed, func(s string) string { return strings.ReplaceAll(s, `"`, `'`) })
	whole("with space around", shown, func(s string) string { return "\n\t " + s + " \r\n" })
	whole("with a control character in a string", malformed, func(s string) string { return strings.Replace(s, `"f"`, "\"f\x01\"", 1) })
	whole("with NaN", malformed, func(s string) string { return strings.Replace(s, `"schemaVersion":2`, `"schemaVersion":NaN`, 1) })
	whole("nested a million deep", malformed, func(s string) string {
		return s[:len(s)-1] + `,"x":` + strings.Repeat("[", 1000000) + strings.Repeat("]", 1000000) + "}"
	})
	whole("nested 5,000 deep", shown, func(s string) string {
		return s[:len(s)-1] + `,"x":` + strings.Repeat(`{"x":[`, 2500) + strings.Repeat("]}", 2500) + "}"
	})
	whole("with a string of 4 MiB", shown, func(s string) string { return s[:len(s)-1] + `,"x":"` + strings.Repeat("x", 4<<20) + `"}` })
	whole("with 100,000 keys", shown, func(s string) string {
		var b strings.Builder
		for i := range 100000 {
			fmt.Fprintf(&b, `,"x%d":0`, i)
		}
		return s[:len(s)-1] + b.String() + "}"
	})
	whole("over 8 MiB", refused("over the limit of"), func(s string) string { return s + strings.Repeat(" ", 8<<20) })
	whole("with a million layers that are none", refused("descriptors in", "cannot have digests"), fixed(`{"layers":[`+strings.Repeat("{},", 1000000)+"{}]}"))
	whole("with a million manifests that are none", refused("descriptors in", "cannot have digests"), fixed(`{"manifests":[`+strings.Repeat("{},", 1000000)+"{}]}"))
	whole("of no media type", shown, func(s string) string {
		return strings.Replace(s, `"mediaType":`+quote(ocispec.MediaTypeImageManifest)+",", "", 1)
	})
	whole("of Docker", shown, func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json", 1)
	})
	whole("of a media type in capitals", shown, func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, strings.ToUpper(ocispec.MediaTypeImageManifest), 1)
	})
	whole("of Docker's first schema", refused("is not the media type"), func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v1+json", 1)
	})
	whole("said to be an index", refused("does not match the media type"), func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, 1)
	})
	whole("of the OCI artifact manifest, with blobs", refused("is not the media type"), fixed(`{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[]}`))

	// Of two values of one name each reader may take another one (RFC 8259, 4).
	twice := refused("twice")
	second := array(raw("f", "y").descriptor().String())
	add("layers twice", twice, func() *Artifact {
		p := base()
		return p.asText(append(p.manifest, property{"layers", second}).String())
	})
	add("layers twice, once in capitals", twice, func() *Artifact {
		p := base()
		return p.asText(append(p.manifest, property{"LAYERS", second}).String())
	})
	add("config twice", twice, func() *Artifact { p := base(); return p.asText(append(p.manifest, property{"config", "{}"}).String()) })
	add("a path twice", twice, func() *Artifact {
		l := raw("f", "x")
		l.annotations = append(l.annotations, property{filepathKey, `"g"`})
		return pack(good(), l).done()
	})
	add("a digest twice", twice, func() *Artifact {
		p := base()
		d := append(raw("f", "x").descriptor(), property{"digest", quote(digestOf("y").String())})
		return p.asText(p.manifest.set("layers", array(d.String())).String())
	})
	for what, escape := range map[string]string{"the first": `\ud800`, "the second": `\udc00`, "both, in the wrong order": `\udc00\ud800`} {
		add("a path with half a surrogate pair, "+what, refused("UTF-8"), func() *Artifact {
			p := base()
			l := layer{mediaType: rawType, content: "x", annotations: object{{filepathKey, `"` + escape + `"`}}}
			return p.asText(p.manifest.set("layers", array(l.descriptor().String())).String())
		})
	}
	sortCases(cases)
	add("annotations of two layers, each once", shown, func() *Artifact { return base().done() })
	add("two annotations that differ in capitals", shown, func() *Artifact {
		l := raw("f", "x")
		l.annotations = append(l.annotations, property{"ORG.CNCF.MODEL.FILEPATH", `"g"`})
		return pack(good(), l).done()
	})
	return cases
}

// descriptorCases are the descriptors of layer and config with fields of each type.
func descriptorCases() (cases []Case) {
	content := "content"
	l := raw("f", content)
	manifest := func(d object) *Artifact {
		p := pack(l)
		return p.asText(p.manifest.set("layers", array(d.String())).String())
	}
	shown := shows(Listing{"f": isRaw(content)})
	add := func(name string, want Verdict, d object) {
		cases = append(cases, Case{Name: "descriptor/" + name, Want: want, Make: func() *Artifact { return manifest(d) }})
	}
	malformed := refused("malformed JSON")
	for _, w := range wrong {
		want := malformed
		switch {
		case w.kind == "null", w.text == `""`:
			want = refused("layer 0: \"\" is not a media type")
		case w.text == `"x"`:
			want = shown // a type of no rule is a file
		}
		add("mediaType is "+w.what, want, l.descriptor().set("mediaType", w.text))

		want = malformed
		if w.kind == "null" || w.kind == "string" {
			want = refused("layer 0 (" + rawType + "): digest")
		}
		add("digest is "+w.what, want, l.descriptor().set("digest", w.text))

		want = malformed
		switch {
		case w.kind == "null", w.text == "0": // the size of no bytes, and the digest is not theirs
			want = refused("layer 0 (", "0 bytes")
		case w.text == "-1":
			want = refused("layer 0 (", "negative size -1")
		}
		add("size is "+w.what, want, l.descriptor().set("size", w.text))

		want = malformed
		if w.kind == "null" || w.kind == "object" {
			want = shows(Listing{digestOf(content).Encoded(): isRaw(content)})
		}
		add("annotations is "+w.what, want, l.descriptor().set("annotations", w.text))

		want = malformed
		switch {
		case w.kind == "null", w.text == `""`:
			want = shows(Listing{digestOf(content).Encoded(): isRaw(content)})
		case w.text == `"x"`:
			want = shows(Listing{"x": isRaw(content)})
		}
		add("a path is "+w.what, want, l.descriptor().set("annotations", object{{filepathKey, w.text}}.String()))

		// An annotation that says nothing here must be a string all the same.
		want = malformed
		if w.kind == "null" || w.kind == "string" {
			want = shown
		}
		add("an annotation of no meaning is "+w.what, want, l.descriptor().set("annotations", append(l.annotations, property{"x", w.text}).String()))

		for _, key := range []string{"urls", "platform", "data", "artifactType"} {
			want = malformed
			switch {
			case w.kind == "null",
				key == "urls" && (w.kind == "list" || w.kind == "list of strings"),
				key == "platform" && (w.kind == "object" || w.kind == "object of objects"),
				key == "data" && (w.text == `""`),
				key == "artifactType" && w.kind == "string":
				want = shown
			}
			if key == "data" && w.kind == "list" {
				continue // encoding/json takes it for no bytes, and they mean nothing here
			}
			add(key+" is "+w.what, want, l.descriptor().set(key, w.text))
		}
	}
	huge := func(name, size string, want Verdict) { add("size is "+name, want, l.descriptor().set("size", size)) }
	other := Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"layer 0 (", "descriptor says"}}
	huge("one more", fmt.Sprint(len(content)+1), other)
	huge("one less", fmt.Sprint(len(content)-1), other)
	huge("2^40", "1099511627776", other)
	huge("2^63", "9223372036854775808", malformed)
	huge("-2^63", "-9223372036854775808", refused("negative size"))
	huge("a whole number with an exponent", "7e0", malformed)
	huge("a whole number with a point", "7.0", malformed)
	huge("the number in a string", `"7"`, malformed)

	hex := digestOf(content).Encoded()
	for what, d := range map[string]string{
		"of nothing": "", "without an algorithm": hex, "of no hex": "sha256:", "too short": "sha256:" + hex[:63], "too long": "sha256:" + hex + "0",
		"in capitals": "sha256:" + strings.ToUpper(hex), "of an algorithm in capitals": "SHA256:" + hex, "of MD5": "md5:d41d8cd98f00b204e9800998ecf8427e",
		"of an algorithm of nobody": "sha257:" + hex, "of BLAKE3": "blake3:" + hex, "that leaves the directory": "sha256:../../../../../../etc/passwd",
		"that is a path": "/etc/passwd", "that leaves it by its algorithm": "../../..:" + hex, "with a NUL": "sha256:" + hex[:63] + "\x00", "with a newline": "sha256:" + hex + "\n",
		"of a megabyte": "sha256:" + strings.Repeat("0", 1<<20), "with a slash": "sha256:" + hex[:32] + "/" + hex[:31], "of two": "sha256:" + hex + ",sha256:" + hex,
	} {
		add("digest "+what, refused("layer 0 (", "digest "), l.descriptor().set("digest", quote(d)))
	}
	for _, algorithm := range []digest.Algorithm{digest.SHA384, digest.SHA512} {
		l := l
		l.digest = algorithm.FromString(content)
		cases = append(cases, fine("descriptor/digest of "+string(algorithm), Listing{"f": isRaw(content)}, l))
	}
	add("digest of a blob that is not there", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"layer 0 (", "delete the image and pull it again"}}, l.descriptor().set("digest", quote(digestOf("absent").String())))
	add("digest of the manifest's config", Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"layer 0 ("}}, l.descriptor().set("digest", quote(digestOf("{}").String())))
	add("digest of no bytes, for a size", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"layer 0 ("}}, l.descriptor().set("digest", quote(digestOf("").String())))

	// The config's.
	configured := func(name string, want Verdict, change func(object) object) {
		cases = append(cases, Case{Name: "descriptor/config, " + name, Want: want, Make: func() *Artifact {
			p := pack(l)
			o := object{{"mediaType", quote(modelConfig)}, {"digest", quote(digestOf("{}").String())}, {"size", "2"}}
			return p.asText(p.manifest.set("config", change(o).String()).String())
		}})
	}
	set := func(key, text string) func(object) object { return func(o object) object { return o.set(key, text) } }
	configured("no media type", shown, func(o object) object { return o.without("mediaType") })
	configured("any media type", shown, set("mediaType", `"text/plain"`))
	configured("no size", shown, func(o object) object { return o.without("size") })
	configured("a wrong size", Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"descriptor says"}}, set("size", "3"))
	configured("a size of a fraction", malformed, set("size", "2.5"))
	configured("no digest", refused("config: digest"), func(o object) object { return o.without("digest") })
	configured("a digest that leaves the directory", refused("config: digest"), set("digest", `"sha256:../../../../etc/passwd"`))
	configured("a digest of no blob", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"config ", "pull it again"}}, set("digest", quote(digestOf("absent").String())))
	configured("the digest of a layer", refused("malformed model config"), func(o object) object {
		return o.set("digest", quote(digestOf(content).String())).set("size", fmt.Sprint(len(content)))
	})
	configured("of an image", ordinary(), set("mediaType", quote(ocispec.MediaTypeImageConfig)))
	configured("of an image, in capitals", ordinary(), set("mediaType", quote(strings.ToUpper(ocispec.MediaTypeImageConfig))))
	configured("of an image, with a parameter", ordinary(), set("mediaType", quote(ocispec.MediaTypeImageConfig+"; charset=utf-8")))
	configured("of an image of Docker", ordinary(), set("mediaType", `"application/vnd.docker.container.image.v1+json"`))
	configured("of almost an image", shown, set("mediaType", quote(ocispec.MediaTypeImageConfig+"x")))
	cases = append(cases, Case{
		Name: "descriptor/config, the blob of which has other bytes", Want: Verdict{Refused: errdefs.ErrDataLoss, Says: []string{"is corrupt"}},
		Make: func() *Artifact {
			const config = `{"other":"bytes"}`
			a := pack(l).withConfig(modelConfig, config).done()
			a.Blobs[digestOf(config)] = []byte(strings.ToUpper(config))
			return a
		},
	}, Case{
		Name: "descriptor/a manifest, the blob of which has other bytes", Want: Verdict{Refused: errdefs.ErrDataLoss, Says: []string{"is corrupt"}},
		Make: func() *Artifact {
			a := pack(l, raw("other", "bytes")).done()
			a.Blobs[a.Target] = []byte(`{"layers":[]}`)
			return a
		},
	})
	return sorted(cases)
}

// configCases are configs. That of a model must be well-formed; of others that is
// nobody's business, and what is not understood there is as good as absent.
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
		return shows(Listing{".": Entry{Type: Directory, Mode: 0o755, Sec: sec}, "f": isRaw("x").time(sec, 0)})
	}
	epoch := at(0)
	malformed := refused("malformed model config")
	both := func(name, text string, v Verdict) { add(name, text, v, v) }
	broken := func(name, text string) { add(name, text, malformed, epoch) }

	both("an empty object", "{}", epoch)
	both("keys of no meaning", `{"x":[{}],"config":1,"history":[[]]}`, epoch)
	broken("a list", "[]")
	broken("null", "null")
	broken("text", "config")
	broken("no bytes", " ")
	broken("a byte order mark", "\ufeff{}")
	broken("cut off", `{"created":`)
	broken("nested too deep", strings.Repeat("[", 1000000))
	both("nested deep in what means nothing", `{"x":`+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)+"}", epoch)
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
	add("a time twice", `{"created":"1999-01-01T00:00:00Z","created":"2001-02-03T04:05:06Z"}`, refused("malformed model config", "twice"), epoch)
	add("DiffIDs twice, once in capitals", `{"modelfs":{"diffIds":[]},"ModelFS":{"diffIds":["sha256:x"]}}`, refused("malformed model config", "twice"), epoch)
	add("bytes that are no UTF-8", "{\"name\":\"\xff\"}", refused("malformed model config", "UTF-8"), epoch)
	own := quote(digestOf("x").String())
	both("the layer's DiffID", `{"modelfs":{"diffIds":[`+own+`]}}`, epoch)
	both("the layer's DiffID, as in an image", `{"rootfs":{"diff_ids":[`+own+`]}}`, epoch)
	both("no DiffIDs", `{"modelfs":{"diffIds":[]}}`, epoch)
	both("another DiffID", `{"modelfs":{"diffIds":[`+quote(digestOf("y").String())+`]}}`, refused("layer 0 (", "the config's DiffID is"))
	both("a DiffID too many", `{"modelfs":{"diffIds":[`+own+","+own+`]}}`, refused("lists 2 DiffIDs for 1 layers"))
	both("10,000 DiffIDs", `{"modelfs":{"diffIds":[`+strings.Repeat(own+",", 9999)+own+`]}}`, refused("lists 10000 DiffIDs for 1 layers"))
	both("a DiffID that is none", `{"modelfs":{"diffIds":["sha256:x"]}}`, refused("layer 0 (", "DiffID in the config"))
	both("a DiffID that leaves the directory", `{"modelfs":{"diffIds":["sha256:../../../etc/passwd"]}}`, refused("layer 0 (", "DiffID in the config"))
	both("a DiffID of nothing", `{"modelfs":{"diffIds":[""]}}`, refused("layer 0 (", "DiffID in the config"))
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

// metadataCases are annotations with the attributes of a raw layer's file.
func metadataCases() (cases []Case) {
	f := isRaw("x")
	shown := func(name, text string, e Entry) {
		cases = append(cases, fine("metadata/"+name, Listing{"f": e}, described("f", "x", text)))
	}
	refuse := func(name, text string, says ...string) {
		cases = append(cases, bad("metadata/"+name, described("f", "x", text), append([]string{metadataKey}, says...)...))
	}
	const malformed = "malformed file metadata"
	shown("none", "", f)
	shown("an empty object", "{}", f)
	shown("all of it", `{"name":"x","mode":416,"uid":1,"gid":2,"size":1,"mtime":"2001-02-03T04:05:06.000000007Z","typeflag":48}`, f.mode(0o640).owner(1, 2).time(981173106, 7))
	shown("a name that is another path", `{"name":"../../etc/passwd"}`, f)
	shown("a size that is another", `{"size":9223372036854775807}`, f)
	shown("keys of no meaning", `{"x":[[]],"xattrs":{"security.capability":"x"}}`, f)
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
				shown(name, text, f)
			case w.text == "0":
				shown(name, text, f.mode(0))
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
	shown("mode, all permissions", `{"mode":511}`, f.mode(0o777))
	shown("mode, a file's with its type", `{"mode":33188}`, f)
	shown("mode, setuid, setgid and sticky", `{"mode":36351}`, f.mode(0o777))
	shown("mode, of 16 bits", `{"mode":65535}`, f.mode(0o777))
	refuse("mode, of 17 bits", `{"mode":65536}`, "is not a Unix file mode")
	refuse("mode, as Go has it for setuid", `{"mode":8389101}`, "is not a Unix file mode")
	refuse("mode, of 32 bits", `{"mode":4294967295}`, "is not a Unix file mode")
	refuse("mode, of 33 bits", `{"mode":4294967296}`, malformed)
	refuse("mode, in octal", `{"mode":0644}`, malformed)
	refuse("mode, as text", `{"mode":"0644"}`, malformed)
	for _, id := range []string{"uid", "gid"} {
		shown(id+" 4294967294", `{"`+id+`":4294967294}`, map[string]Entry{"uid": f.owner(4294967294, 0), "gid": f.owner(0, 4294967294)}[id])
		refuse(id+" 4294967295", `{"`+id+`":4294967295}`, "is no user or group")
		refuse(id+" 4294967296", `{"`+id+`":4294967296}`, malformed)
	}
	shown("time of the year 0", `{"mtime":"0000-01-01T00:00:00Z"}`, f.time(-62167219200, 0))
	shown("time of the year 1, which stands for none", `{"mtime":"0001-01-01T00:00:00Z"}`, f)
	shown("time of the year 9999", `{"mtime":"9999-12-31T23:59:59.999999999Z"}`, f.time(253402300799, 999999999))
	cases[len(cases)-1] = onExt4(cases[len(cases)-1].unlike(shows(Listing{"f": f.time(maxTime, 0)}), Copied, Extracted))
	cases[len(cases)-3] = onExt4(cases[len(cases)-3].unlike(shows(Listing{"f": f.time(minTime, 0)}), Copied, Extracted))
	shown("time of the last zone", `{"mtime":"2001-02-03T04:05:06-23:59"}`, f.time(981173106+86340, 0))
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
	refuse("a mode twice", `{"mode":420,"mode":511}`, "twice")
	refuse("a user twice, once in capitals", `{"uid":1000,"UID":0}`, "twice")
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

// mediaTypeCases are types of layers.
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

// indexCases are indexes of manifests.
func indexCases() (cases []Case) {
	inner := func() *Artifact { return pack(raw("f", "x")).done() }
	shown := shows(Listing{"f": isRaw("x")})
	here := fmt.Sprintf(`{"os":"linux","architecture":%q}`, runtime.GOARCH)
	const foreign, attestation = `{"os":"linux","architecture":"mips64"}`, `{"os":"unknown","architecture":"unknown"}`
	entry := func(d digest.Digest, platform string) string {
		o := object{{"mediaType", quote(ocispec.MediaTypeImageManifest)}, {"digest", quote(d.String())}, {"size", "1"}}
		if platform != "" {
			o = append(o, property{"platform", platform})
		}
		return o.without("size").String()
	}
	index := func(a *Artifact, entries ...string) *Artifact {
		text := object{{"schemaVersion", "2"}, {"mediaType", quote(ocispec.MediaTypeImageIndex)}, {"manifests", array(entries...)}}.String()
		a.Blobs[digestOf(text)] = []byte(text)
		a.Target, a.MediaType = digestOf(text), ocispec.MediaTypeImageIndex
		return a
	}
	add := func(name string, want Verdict, entries func(d digest.Digest) []string) {
		cases = append(cases, Case{Name: "index/" + name, Want: want, Make: func() *Artifact { a := inner(); return index(a, entries(a.Target)...) }})
	}
	one := func(platform string) func(digest.Digest) []string {
		return func(d digest.Digest) []string { return []string{entry(d, platform)} }
	}
	absent := digestOf("absent")
	add("of one", shown, one(""))
	add("of one for this platform", shown, one(here))
	add("of one for another platform", shown, one(foreign))
	add("of none", refused("lists no manifest"), func(digest.Digest) []string { return nil })
	add("of an attestation alone", refused("lists no manifest"), one(attestation))
	add("of one and an attestation", shown, func(d digest.Digest) []string { return []string{entry(absent, attestation), entry(d, "")} })
	add("of two, one for this platform", shown, func(d digest.Digest) []string { return []string{entry(absent, foreign), entry(d, here)} })
	add("of two for other platforms", refused("no manifest for"), func(d digest.Digest) []string { return []string{entry(d, foreign), entry(absent, foreign)} })
	add("of two for none", refused("no manifest for"), func(d digest.Digest) []string { return []string{entry(d, ""), entry(d, "")} })
	add("of 10,000 for other platforms", refused("no manifest for"), func(d digest.Digest) []string {
		return strings.Split(strings.Repeat(entry(d, foreign)+"|", 9999)+entry(d, foreign), "|")
	})
	add("of one that is not there", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"manifest ", "pull it again"}}, func(digest.Digest) []string { return []string{entry(absent, "")} })
	add("of a digest that leaves the directory", refused("digest"), func(digest.Digest) []string { return []string{entry("sha256:../../../etc/passwd", "")} })
	add("of a digest of nothing", refused("digest"), func(digest.Digest) []string { return []string{entry("", "")} })
	add("of a layer", refused("malformed JSON"), func(digest.Digest) []string { return []string{entry(digestOf("x"), "")} })
	add("of a platform of letters in capitals and slashes", refused("no manifest for"), func(d digest.Digest) []string {
		odd := `{"os":"../..\u001b","architecture":"` + strings.Repeat("A", 5000) + `"}`
		return []string{entry(d, odd), entry(d, odd)}
	})
	for _, w := range wrong {
		want := refused("malformed JSON")
		switch w.kind {
		case "null", "list":
			want = refused("lists no manifest")
		}
		cases = append(cases, Case{Name: "index/manifests is " + w.what, Want: want, Make: func() *Artifact {
			a := inner()
			text := object{{"schemaVersion", "2"}, {"mediaType", quote(ocispec.MediaTypeImageIndex)}, {"manifests", w.text}}.String()
			a.Blobs[digestOf(text)] = []byte(text)
			a.Target, a.MediaType = digestOf(text), ocispec.MediaTypeImageIndex
			return a
		}})
	}
	for depth := 2; depth <= 5; depth++ {
		want := shown
		if depth > 3 {
			want = refused("nested more than 3 deep")
		}
		cases = append(cases, Case{Name: fmt.Sprintf("index/%d deep", depth), Want: want, Make: func() *Artifact {
			a := inner()
			for range depth {
				a = index(a, entry(a.Target, ""))
			}
			return a
		}})
	}
	cases = append(cases, Case{Name: "index/of an image", Want: ordinary(), Make: func() *Artifact {
		a := pack(raw("f", "x")).withConfig(ocispec.MediaTypeImageConfig, "{}").done()
		return index(a, entry(a.Target, here))
	}})
	return cases
}
