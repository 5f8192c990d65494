// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Default media types.
const (
	modelConfig = "application/vnd.cncf.model.config.v1+json"
	rawType     = "application/vnd.cncf.model.weight.v1.raw"
	tarType     = "application/vnd.cncf.model.weight.v1.tar"
	gzipType    = tarType + "+gzip"
	zstdType    = tarType + "+zstd"

	filepathKey = "org.cncf.model.filepath"
	metadataKey = "org.cncf.model.file.metadata+json"
	titleKey    = "org.opencontainers.image.title"
)

// object is a JSON object. Its keys and values may be invalid JSON.
type object []property

type property struct{ key, text string }

func (o object) String() string {
	var parts []string
	for _, p := range o {
		parts = append(parts, quote(p.key)+":"+p.text)
	}
	return "{" + strings.Join(parts, ",") + "}"
}

// set replaces or adds a member.
func (o object) set(key, text string) object {
	c := append(object{}, o...)
	for i := range c {
		if c[i].key == key {
			c[i].text = text
			return c
		}
	}
	return append(c, property{key, text})
}

// without removes a member.
func (o object) without(key string) object {
	var c object
	for _, p := range o {
		if p.key != key {
			c = append(c, p)
		}
	}
	return c
}

// quote returns s as a JSON string. Invalid UTF-8 stays unchanged.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			b.WriteString(`\` + string(rune(c)))
		case c < 0x20:
			fmt.Fprintf(&b, `\u%04x`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func array(texts ...string) string { return "[" + strings.Join(texts, ",") + "]" }

func digestOf(content string) digest.Digest { return digest.FromString(content) }

// layer is a descriptor with its blob, if that is not absent.
type layer struct {
	mediaType   string
	content     string
	annotations object
	digest      digest.Digest // "" means the digest of the content
	size        string        // JSON; "" means the size of the content
	absent      bool
}

func raw(path, content string) layer {
	return layer{mediaType: rawType, content: content, annotations: object{{filepathKey, quote(path)}}}
}

// described returns a raw layer with file metadata.
func described(path, content, metadata string) layer {
	l := raw(path, content)
	l.annotations = append(l.annotations, property{metadataKey, quote(metadata)})
	return l
}

func tarred(members ...string) layer {
	return layer{mediaType: tarType, content: strings.Join(members, "") + mark}
}

// isRaw is the entry of a raw layer that states only a path.
func isRaw(content string) Entry {
	return Entry{Type: File, Mode: 0o644, Size: int64(len(content)), SHA256: sum(content), Raw: true}
}

func (l layer) name() digest.Digest {
	if l.digest != "" {
		return l.digest
	}
	return digestOf(l.content)
}

func (l layer) descriptor() object {
	size := l.size
	if size == "" {
		size = fmt.Sprint(len(l.content))
	}
	o := object{{"mediaType", quote(l.mediaType)}, {"digest", quote(l.name().String())}, {"size", size}}
	if l.annotations != nil {
		o = append(o, property{"annotations", l.annotations.String()})
	}
	return o
}

// packed builds an artifact.
type packed struct {
	layers     []layer
	configType string
	config     string
	manifest   object
	blobs      map[digest.Digest][]byte
}

// pack builds an artifact from layers, with an empty ModelPack config.
func pack(layers ...layer) *packed {
	p := &packed{layers: layers, configType: modelConfig, config: "{}", blobs: map[digest.Digest][]byte{}}
	var descriptors []string
	for _, l := range layers {
		descriptors = append(descriptors, l.descriptor().String())
		if !l.absent {
			p.blobs[l.name()] = []byte(l.content)
		}
	}
	p.manifest = object{
		{"schemaVersion", "2"},
		{"mediaType", quote(ocispec.MediaTypeImageManifest)},
		{"artifactType", quote("application/vnd.cncf.model.manifest.v1+json")},
		{"config", ""},
		{"layers", array(descriptors...)},
	}
	return p.withConfig(p.configType, p.config)
}

func (p *packed) withConfig(mediaType, text string) *packed {
	p.configType, p.config = mediaType, text
	p.blobs[digestOf(text)] = []byte(text)
	p.manifest = p.manifest.set("config", object{
		{"mediaType", quote(mediaType)}, {"digest", quote(digestOf(text).String())}, {"size", fmt.Sprint(len(text))},
	}.String())
	return p
}

// ofLayers finishes an artifact that can also be unpacked layer by layer.
func (p *packed) ofLayers() *Artifact {
	a := p.done()
	a.Layers = []ocispec.Descriptor{}
	for _, l := range p.layers {
		d := ocispec.Descriptor{MediaType: l.mediaType, Digest: l.name(), Size: int64(len(l.content)), Annotations: map[string]string{}}
		if l.size != "" {
			if _, err := fmt.Sscan(l.size, &d.Size); err != nil {
				panic(err)
			}
		}
		for _, a := range l.annotations {
			d.Annotations[a.key] = unquote(a.text)
		}
		a.Layers = append(a.Layers, d)
	}
	return a
}

// unquote decodes a JSON string.
func unquote(text string) (s string) {
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		panic(err)
	}
	return s
}

// done finishes the artifact with its manifest.
func (p *packed) done() *Artifact { return p.asText(p.manifest.String()) }

// asText finishes the artifact with this text as its manifest.
func (p *packed) asText(manifest string) *Artifact {
	p.blobs[digestOf(manifest)] = []byte(manifest)
	return &Artifact{Blobs: p.blobs, Target: digestOf(manifest), MediaType: ocispec.MediaTypeImageManifest}
}

// good is a valid layer. A refusal must refuse the whole artifact, including this layer.
func good() layer { return raw("good.txt", "a good file\n") }

// bad is a case that is refused because of its second layer.
func bad(name string, l layer, says ...string) Case {
	return Case{
		Name: name,
		Make: func() *Artifact { return pack(good(), l).ofLayers() },
		Want: refused(append([]string{"layer 1 (" + l.mediaType + ", " + l.name().String()}, says...)...),
	}
}

// fine is a case that is mounted with these entries.
func fine(name string, l Listing, layers ...layer) Case {
	return Case{Name: name, Make: func() *Artifact { return pack(layers...).ofLayers() }, Want: mounts(l)}
}

// imageLayer is part of the error of the differ for a layer that containerd would extract
// differently in an image.
const imageLayer = "snapshot would be used"

// notAsFiles expects this error with Files.
func (c Case) notAsFiles() Case {
	return c.unlike(refused(imageLayer), Files)
}

func (c Case) unlike(v Verdict, ways ...Way) Case {
	unlike := map[Way]Verdict{}
	for w, v := range c.Unlike {
		unlike[w] = v
	}
	for _, w := range ways {
		unlike[w] = v
	}
	c.Unlike = unlike
	return c
}
