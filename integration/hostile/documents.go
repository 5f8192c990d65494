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

// wrong has JSON values of every type.
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

// manifestCases set each manifest field to every JSON type.
func manifestCases() (cases []Case) {
	base := func() *packed { return pack(good(), raw("f", "x")) }
	mounted := mounts(Listing{"good.txt": isRaw(good().content), "f": isRaw("x")})
	add := func(name string, want Verdict, make func() *Artifact) {
		cases = append(cases, Case{Name: "manifest/" + name, Make: make, Want: want})
	}
	// Fields that do not describe files are not checked.
	for _, key := range []string{"schemaVersion", "annotations", "subject", "x-unknown"} {
		for _, w := range wrong {
			add(key+" is "+w.what, mounted, func() *Artifact { p := base(); return p.asText(p.manifest.set(key, w.text).String()) })
		}
	}
	// All other fields must have the right type; null counts as absent.
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
			want = mounted
		}
		add("mediaType is "+w.what, want, edit("mediaType"))

		want = malformed
		if w.kind == "string" || w.kind == "null" {
			want = mounted
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
			want = mounted
		case "list":
			want = refused("both layers and manifests are present")
		}
		add("manifests is "+w.what+", in addition to layers", want, edit("manifests"))
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
	whole("with trailing text", malformed, func(s string) string { return s + "x" })
	whole("with a trailing NUL", malformed, func(s string) string { return s + "\x00" })
	whole("with a comment", malformed, func(s string) string { return "// a manifest\n" + s })
	whole("with a comma at the end", malformed, func(s string) string { return s[:len(s)-1] + ",}" })
	whole("in single quotes", malformed, func(s string) string { return strings.ReplaceAll(s, `"`, `'`) })
	whole("with space around", mounted, func(s string) string { return "\n\t " + s + " \r\n" })
	whole("with a control character in a string", malformed, func(s string) string { return strings.Replace(s, `"f"`, "\"f\x01\"", 1) })
	whole("with NaN", malformed, func(s string) string { return strings.Replace(s, `"schemaVersion":2`, `"schemaVersion":NaN`, 1) })
	whole("nested a million deep", malformed, func(s string) string {
		return s[:len(s)-1] + `,"x":` + strings.Repeat("[", 1000000) + strings.Repeat("]", 1000000) + "}"
	})
	whole("nested 5,000 deep", mounted, func(s string) string {
		return s[:len(s)-1] + `,"x":` + strings.Repeat(`{"x":[`, 2500) + strings.Repeat("]}", 2500) + "}"
	})
	whole("with a string of 4 MiB", mounted, func(s string) string { return s[:len(s)-1] + `,"x":"` + strings.Repeat("x", 4<<20) + `"}` })
	whole("with 100,000 keys", mounted, func(s string) string {
		var b strings.Builder
		for i := range 100000 {
			fmt.Fprintf(&b, `,"x%d":0`, i)
		}
		return s[:len(s)-1] + b.String() + "}"
	})
	whole("over 8 MiB", refused("over the limit of"), func(s string) string { return s + strings.Repeat(" ", 8<<20) })
	whole("with a million empty layers", refused("descriptors in", "cannot have digests"), fixed(`{"layers":[`+strings.Repeat("{},", 1000000)+"{}]}"))
	whole("with a million empty manifests", refused("descriptors in", "cannot have digests"), fixed(`{"manifests":[`+strings.Repeat("{},", 1000000)+"{}]}"))
	whole("of no media type", mounted, func(s string) string {
		return strings.Replace(s, `"mediaType":`+quote(ocispec.MediaTypeImageManifest)+",", "", 1)
	})
	whole("of Docker", mounted, func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json", 1)
	})
	whole("of a media type in capitals", mounted, func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, strings.ToUpper(ocispec.MediaTypeImageManifest), 1)
	})
	whole("of Docker's first schema", refused("is not the media type"), func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v1+json", 1)
	})
	whole("with the media type of an index", refused("does not match the media type"), func(s string) string {
		return strings.Replace(s, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, 1)
	})
	whole("of the OCI artifact manifest, with blobs", refused("is not the media type"), fixed(`{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","blobs":[]}`))

	// JSON readers differ in which of two members with the same name they use (RFC 8259,
	// section 4).
	twice := refused("duplicate object member name")
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
		add("a path with half a surrogate pair, "+what, refused("invalid surrogate pair"), func() *Artifact {
			p := base()
			l := layer{mediaType: rawType, content: "x", annotations: object{{filepathKey, `"` + escape + `"`}}}
			return p.asText(p.manifest.set("layers", array(l.descriptor().String())).String())
		})
	}
	sortCases(cases)
	add("annotations of two layers, each once", mounted, func() *Artifact { return base().done() })
	add("two annotations that differ in capitals", mounted, func() *Artifact {
		l := raw("f", "x")
		l.annotations = append(l.annotations, property{"ORG.CNCF.MODEL.FILEPATH", `"g"`})
		return pack(good(), l).done()
	})
	return cases
}

// descriptorCases set each field of the layer and config descriptors to every JSON type.
func descriptorCases() (cases []Case) {
	content := "content"
	l := raw("f", content)
	manifest := func(d object) *Artifact {
		p := pack(l)
		return p.asText(p.manifest.set("layers", array(d.String())).String())
	}
	mounted := mounts(Listing{"f": isRaw(content)})
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
			want = mounted // an unknown media type is a file
		}
		add("mediaType is "+w.what, want, l.descriptor().set("mediaType", w.text))

		want = malformed
		if w.kind == "null" || w.kind == "string" {
			want = refused("layer 0 (" + rawType + "): digest")
		}
		add("digest is "+w.what, want, l.descriptor().set("digest", w.text))

		want = malformed
		switch {
		case w.kind == "null", w.text == "0": // the size of an empty blob, whose digest differs
			want = refused("layer 0 (", "0 bytes")
		case w.text == "-1":
			want = refused("layer 0 (", "negative size -1")
		}
		add("size is "+w.what, want, l.descriptor().set("size", w.text))

		want = malformed
		if w.kind == "null" || w.kind == "object" {
			want = mounts(Listing{digestOf(content).Encoded(): isRaw(content)})
		}
		add("annotations is "+w.what, want, l.descriptor().set("annotations", w.text))

		want = malformed
		switch {
		case w.kind == "null", w.text == `""`:
			want = mounts(Listing{digestOf(content).Encoded(): isRaw(content)})
		case w.text == `"x"`:
			want = mounts(Listing{"x": isRaw(content)})
		}
		add("a path is "+w.what, want, l.descriptor().set("annotations", object{{filepathKey, w.text}}.String()))

		// Even an ignored annotation must be a string.
		want = malformed
		if w.kind == "null" || w.kind == "string" {
			want = mounted
		}
		add("an unknown annotation is "+w.what, want, l.descriptor().set("annotations", append(l.annotations, property{"x", w.text}).String()))

		for _, key := range []string{"urls", "platform", "data", "artifactType"} {
			want = malformed
			switch {
			case w.kind == "null",
				key == "urls" && (w.kind == "list" || w.kind == "list of strings"),
				key == "platform" && (w.kind == "object" || w.kind == "object of objects"),
				key == "data" && (w.text == `""`),
				key == "artifactType" && w.kind == "string":
				want = mounted
			}
			if key == "data" && w.kind == "list" {
				continue // encoding/json reads [] as no bytes, which is valid here
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
		"of an unknown algorithm": "sha257:" + hex, "of BLAKE3": "blake3:" + hex, "that leaves the directory": "sha256:../../../../../../etc/passwd",
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
	add("digest of a missing blob", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"layer 0 (", "delete the image and pull it again"}}, l.descriptor().set("digest", quote(digestOf("absent").String())))
	add("digest of the manifest's config", Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"layer 0 ("}}, l.descriptor().set("digest", quote(digestOf("{}").String())))
	add("digest of no bytes, with another size", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"layer 0 ("}}, l.descriptor().set("digest", quote(digestOf("").String())))

	configured := func(name string, want Verdict, change func(object) object) {
		cases = append(cases, Case{Name: "descriptor/config, " + name, Want: want, Make: func() *Artifact {
			p := pack(l)
			o := object{{"mediaType", quote(modelConfig)}, {"digest", quote(digestOf("{}").String())}, {"size", "2"}}
			return p.asText(p.manifest.set("config", change(o).String()).String())
		}})
	}
	set := func(key, text string) func(object) object { return func(o object) object { return o.set(key, text) } }
	configured("no media type", mounted, func(o object) object { return o.without("mediaType") })
	configured("any media type", mounted, set("mediaType", `"text/plain"`))
	configured("no size", mounted, func(o object) object { return o.without("size") })
	configured("a wrong size", Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"descriptor says"}}, set("size", "3"))
	configured("a size of a fraction", malformed, set("size", "2.5"))
	configured("no digest", refused("config: digest"), func(o object) object { return o.without("digest") })
	configured("a digest that leaves the directory", refused("config: digest"), set("digest", `"sha256:../../../../etc/passwd"`))
	configured("a digest of a missing blob", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"config ", "pull it again"}}, set("digest", quote(digestOf("absent").String())))
	configured("the digest of a layer", refused("malformed model config"), func(o object) object {
		return o.set("digest", quote(digestOf(content).String())).set("size", fmt.Sprint(len(content)))
	})
	configured("of an image", ordinary(), set("mediaType", quote(ocispec.MediaTypeImageConfig)))
	configured("of an image, in capitals", ordinary(), set("mediaType", quote(strings.ToUpper(ocispec.MediaTypeImageConfig))))
	configured("of an image, with a parameter", ordinary(), set("mediaType", quote(ocispec.MediaTypeImageConfig+"; charset=utf-8")))
	configured("of an image of Docker", ordinary(), set("mediaType", `"application/vnd.docker.container.image.v1+json"`))
	configured("of almost an image", mounted, set("mediaType", quote(ocispec.MediaTypeImageConfig+"x")))
	cases = append(cases, Case{
		Name: "descriptor/config, whose blob has other bytes", Want: Verdict{Refused: errdefs.ErrDataLoss, Says: []string{"is corrupt"}},
		Make: func() *Artifact {
			const config = `{"other":"bytes"}`
			a := pack(l).withConfig(modelConfig, config).done()
			a.Blobs[digestOf(config)] = []byte(strings.ToUpper(config))
			return a
		},
	}, Case{
		Name: "descriptor/a manifest, whose blob has other bytes", Want: Verdict{Refused: errdefs.ErrDataLoss, Says: []string{"is corrupt"}},
		Make: func() *Artifact {
			a := pack(l, raw("other", "bytes")).done()
			a.Blobs[a.Target] = []byte(`{"layers":[]}`)
			return a
		},
	})
	return sorted(cases)
}

// indexCases are image indexes.
func indexCases() (cases []Case) {
	inner := func() *Artifact { return pack(raw("f", "x")).done() }
	mounted := mounts(Listing{"f": isRaw("x")})
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
	add("of one", mounted, one(""))
	add("of one for this platform", mounted, one(here))
	add("of one for another platform", mounted, one(foreign))
	add("of none", refused("lists no manifest"), func(digest.Digest) []string { return nil })
	add("of an attestation alone", refused("lists no manifest"), one(attestation))
	add("of one and an attestation", mounted, func(d digest.Digest) []string { return []string{entry(absent, attestation), entry(d, "")} })
	add("of two, one for this platform", mounted, func(d digest.Digest) []string { return []string{entry(absent, foreign), entry(d, here)} })
	add("of two for other platforms", refused("no manifest for"), func(d digest.Digest) []string { return []string{entry(d, foreign), entry(absent, foreign)} })
	add("of two for none", refused("no manifest for"), func(d digest.Digest) []string { return []string{entry(d, ""), entry(d, "")} })
	add("of 10,000 for other platforms", refused("no manifest for"), func(d digest.Digest) []string {
		return strings.Split(strings.Repeat(entry(d, foreign)+"|", 9999)+entry(d, foreign), "|")
	})
	add("of one that is missing", Verdict{Refused: errdefs.ErrNotFound, Says: []string{"manifest ", "pull it again"}}, func(digest.Digest) []string { return []string{entry(absent, "")} })
	add("of a digest that leaves the directory", refused("digest"), func(digest.Digest) []string { return []string{entry("sha256:../../../etc/passwd", "")} })
	add("of an empty digest", refused("digest"), func(digest.Digest) []string { return []string{entry("", "")} })
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
		want := mounted
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
