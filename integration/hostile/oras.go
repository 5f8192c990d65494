// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	imageType     = "application/vnd.oci.image.layer.v1.tar"
	emptyType     = "application/vnd.oci.empty.v1+json"
	orasUnpackKey = "io.deis.oras.content.unpack"
	orasDigestKey = "io.deis.oras.content.digest"
)

// titled returns a layer with a title, which is the file name in ORAS.
func titled(mediaType, title, content string) layer {
	return layer{mediaType: mediaType, content: content, annotations: object{{titleKey, quote(title)}}}
}

// with adds an annotation.
func (l layer) with(key, value string) layer {
	l.annotations = append(object{}, append(l.annotations, property{key, quote(value)})...)
	return l
}

// orasCases are ORAS artifacts, whose media types say little about the bytes, and abuses of
// the rules of ORAS (oras-go, content/file).
func orasCases() (cases []Case) {
	archive := dir("docs") + file("docs/f", "x") + mark
	mounted := Listing{"docs": isDir(), "docs/f": isFile("x")}
	packings := map[string]string{"gzip": gzipped(archive), "zstd": zstded(archive), "no compression": archive}
	directory := func(mediaType, content string) layer {
		return titled(mediaType, "docs", content).with(orasUnpackKey, "true").with(orasDigestKey, digestOf(archive).String())
	}
	for _, packing := range sortedKeys(packings) {
		content := packings[packing]
		for _, mediaType := range []string{"application/vnd.acme.docs.layer.v1+tar", "application/octet-stream", imageType, imageType + "+gzip"} {
			cases = append(cases, fine(fmt.Sprintf("oras/a directory in %s as %s", packing, mediaType), mounted, directory(mediaType, content)))
		}
		cases = append(cases,
			fine("oras/a file that is an archive in "+packing, mounted, titled(imageType, "docs.tar", content)),
			fine("oras/an archive whose title is not a path, in "+packing, mounted, titled(imageType, "../../etc", content)),
			fine("oras/an archive in "+packing+" with unpack=false and a type that is not an image's", Listing{"docs": isRaw(content)},
				titled("application/octet-stream", "docs", content).with(orasUnpackKey, "false")).notAsFilesIf(packing == "no compression"),
			bad("oras/another digest of a directory in "+packing, titled("application/x+tar", "docs", content).with(orasUnpackKey, "true").with(orasDigestKey, digestOf("y").String()),
				"the annotation "+orasDigestKey+" says the DiffID "+digestOf("y").String()),
		)
	}
	cases = append(cases,
		fine("oras/a directory without a digest", mounted, titled("application/x+tar", "docs", gzipped(archive)).with(orasUnpackKey, "true")),
		fine("oras/a directory with an empty digest", mounted, titled("application/x+tar", "docs", gzipped(archive)).with(orasUnpackKey, "true").with(orasDigestKey, "")),
		fine("oras/a digest of a file without unpack", Listing{"f": isRaw("x")}, titled("text/plain", "f", "x").with(orasDigestKey, "sha256:x")),
		bad("oras/a directory whose blob is a file", titled("application/x+tar", "docs", "text").with(orasUnpackKey, "true"), "the archive"),
		bad("oras/a directory that leaves the volume", titled("application/x", "docs", gzipped(file("../f", "x")+mark)).with(orasUnpackKey, "true"), `contains ".."`),
		bad("oras/a digest that leaves the directory", titled("application/x", "docs", gzipped(archive)).with(orasUnpackKey, "true").with(orasDigestKey, "sha256:../../etc/passwd"), "annotation "+orasDigestKey),
		bad("oras/a bomb", titled("application/x", "docs", gzipped(strings.Repeat("\x00", 65<<20))).with(orasUnpackKey, "true"), "max_expansion"),
		bad("oras/an encrypted directory", titled(imageType+"+encrypted", "docs", gzipped(archive)).with(orasUnpackKey, "true"), "an encrypted layer is not supported"),
	)

	for _, mediaType := range []string{
		imageType, imageType + "+gzip", imageType + "+zstd", strings.ToUpper(imageType) + "; x=y",
		"application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip",
	} {
		cases = append(cases,
			fine("oras/a file as "+mediaType, Listing{"hi.txt": isRaw("hi\n")}, titled(mediaType, "hi.txt", "hi\n")),
			bad("oras/neither an archive nor a title, as "+mediaType, layer{mediaType: mediaType, content: strings.Repeat("no archive ", 100)}, "the archive cannot be read"),
		)
	}
	for what, content := range map[string]string{
		"text in gzip": gzipped("text"), "text in zstd": zstded("text"), "xz": "\xfd7zXZ\x00", "half a header": archive[:511], "a header in gzip that is cut off": gzipped(archive)[:20],
		"JSON": `{"schemaVersion":2}`, "noise": noise(5000), "an archive in gzip, twice": gzipped(gzipped(archive)), "a bomb": gzipped("x" + strings.Repeat("\x00", 65<<20)),
		"the preimage of a chain ID": digestOf("x").String() + " " + digestOf("y").String(),
	} {
		c := fine("oras/a file of "+what, Listing{"f": isRaw(content)}, titled(imageType, "f", content))
		if what == "the preimage of a chain ID" { // its snapshot would have the name of another layer's
			c = c.unlike(refused("the chain ID of other layers"), Layers, Files)
		}
		cases = append(cases, c)
	}
	for what, content := range map[string]string{"no bytes": "", "zeros": strings.Repeat("\x00", 10240)} {
		cases = append(cases, fine("oras/a file of "+what, Listing{"f": isRaw(content)}, titled(imageType, "f", content)).notAsFiles())
	}
	cases = append(cases,
		fine("oras/a file with a path of ModelPack", Listing{"d/f": isRaw("x")}, titled(imageType, "t", "x").with(filepathKey, "d/f")),
		fine("oras/a file with attributes", Listing{"f": isRaw("x").mode(0o600).owner(7, 8)}, titled(imageType, "f", "x").with(metadataKey, `{"mode":384,"uid":7,"gid":8}`)),
		bad("oras/a file of an absolute title", titled(imageType, "/etc/passwd", "x"), "is absolute"),
		bad("oras/a file of a title that leaves the volume", titled(imageType, "../f", "x"), `contains ".."`),
		bad("oras/an archive that is cut off", titled(imageType, "f", archive[:block+100]), ""),
	)

	// The empty descriptor (OCI image-spec, manifest.md) and similar descriptors.
	empty := layer{mediaType: emptyType, content: "{}"}
	absent := empty
	absent.absent = true
	lying := empty
	lying.size = "3"
	cases = append(cases,
		fine("oras/only the empty descriptor", Listing{}, empty),
		fine("oras/the empty descriptor, ten times", Listing{}, many(10, func(int) layer { return empty })...),
		fine("oras/the empty descriptor and a file", Listing{"good.txt": isRaw(good().content)}, good(), empty),
		fine("oras/the empty descriptor with a title", Listing{"empty.json": isRaw("{}")}, titled(emptyType, "empty.json", "{}")),
		fine("oras/the type of the empty descriptor, of other bytes", Listing{digestOf("{ }").Encoded(): isRaw("{ }")}, layer{mediaType: emptyType, content: "{ }"}),
		Case{Name: "oras/the empty descriptor whose blob is missing", Want: mounts(Listing{"good.txt": isRaw(good().content)}), Make: func() *Artifact {
			return pack(good(), absent).withConfig("application/x", `{"x":1}`).ofLayers()
		}},
		Case{Name: "oras/the empty descriptor of another size", Want: Verdict{Refused: errdefs.ErrFailedPrecondition, Says: []string{"layer 0 (", "descriptor says 3"}}, Make: func() *Artifact { return pack(lying).ofLayers() }},
	)
	sortCases(cases)
	return cases
}

// notAsFilesIf is notAsFiles if condition is true.
func (c Case) notAsFilesIf(condition bool) Case {
	if condition {
		return c.notAsFiles()
	}
	return c
}
