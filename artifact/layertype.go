// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"maps"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layerType is what a layer's media type says about its blob.
type layerType struct {
	format      Format
	compression Compression
	// refused is why layers of this type are refused, "" if they are not.
	refused string
}

var (
	rawType     = layerType{format: FormatRaw}
	tarType     = layerType{format: FormatTar}
	tarGzipType = layerType{format: FormatTar, compression: CompressionGzip}
	tarZstdType = layerType{format: FormatTar, compression: CompressionZstd}

	// The registry and the node alone do not have the content of these layers.
	nonDistributable = layerType{refused: "a non-distributable layer, which registries need not hold, is not supported: pack the artifact with a distributable layer type"}
	encrypted        = layerType{refused: "an encrypted layer is not supported: pack the artifact without encryption"}
)

// modelTypes are the layer types of ModelPack v1, see
// https://github.com/modelpack/model-spec/blob/main/docs/spec.md#oci-image-manifest-specification-for-model-artifacts.
var modelTypes = map[string]layerType{
	modelspec.MediaTypeModelWeightRaw:        rawType,
	modelspec.MediaTypeModelWeight:           tarType,
	modelspec.MediaTypeModelWeightGzip:       tarGzipType,
	modelspec.MediaTypeModelWeightZstd:       tarZstdType,
	modelspec.MediaTypeModelWeightConfigRaw:  rawType,
	modelspec.MediaTypeModelWeightConfig:     tarType,
	modelspec.MediaTypeModelWeightConfigGzip: tarGzipType,
	modelspec.MediaTypeModelWeightConfigZstd: tarZstdType,
	modelspec.MediaTypeModelDocRaw:           rawType,
	modelspec.MediaTypeModelDoc:              tarType,
	modelspec.MediaTypeModelDocGzip:          tarGzipType,
	modelspec.MediaTypeModelDocZstd:          tarZstdType,
	modelspec.MediaTypeModelCodeRaw:          rawType,
	modelspec.MediaTypeModelCode:             tarType,
	modelspec.MediaTypeModelCodeGzip:         tarGzipType,
	modelspec.MediaTypeModelCodeZstd:         tarZstdType,
	modelspec.MediaTypeModelDatasetRaw:       rawType,
	modelspec.MediaTypeModelDataset:          tarType,
	modelspec.MediaTypeModelDatasetGzip:      tarGzipType,
	modelspec.MediaTypeModelDatasetZstd:      tarZstdType,
}

// exactTypes are matched as a whole, in lower case, before any suffix.
var exactTypes = func() map[string]layerType {
	types := map[string]layerType{
		"application/vnd.cnai.model.layer.v1.tar":      tarType,
		"application/vnd.cnai.model.layer.v1.tar+gzip": tarGzipType,

		"application/vnd.oci.image.layer.nondistributable.v1.tar":      nonDistributable,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": nonDistributable,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": nonDistributable,
		images.MediaTypeDockerSchema2LayerForeign:                      nonDistributable,
		images.MediaTypeDockerSchema2LayerForeignGzip:                  nonDistributable,
	}
	maps.Copy(types, modelTypes)
	for name, t := range modelTypes {
		types[legacy(name)] = t
	}
	return types
}()

// suffixTypes are matched with the end of any other type; the first match counts. They
// cover the layer types of OCI and Docker images.
var suffixTypes = []struct {
	suffix string
	layerType
}{
	{".tar", tarType},
	{"+tar", tarType},
	{".tar+gzip", tarGzipType},
	{".tar.gzip", tarGzipType},
	{"+tar+gzip", tarGzipType},
	{"tar+zstd", tarZstdType},
	{".tar.zstd", tarZstdType},
	{"+encrypted", encrypted},
}

// typeOf returns what mediaType says. A type that matches no rule is a raw file.
func typeOf(mediaType string) layerType {
	name := bareType(mediaType)
	if t, ok := exactTypes[name]; ok {
		return t
	}
	for _, rule := range suffixTypes {
		if strings.HasSuffix(name, rule.suffix) {
			return rule.layerType
		}
	}
	return rawType
}

// bareType returns mediaType in lower case and without parameters: RFC 6838,
// section 4.2, makes type names case-insensitive.
func bareType(mediaType string) string {
	name, _, _ := strings.Cut(mediaType, ";")
	return strings.ToLower(strings.TrimSpace(name))
}

// validType reports whether a string can be a media type: not empty, printable and not too
// long. It is laxer than RFC 6838, because packers let people choose types freely and
// registries accept them.
func validType(mediaType string) bool {
	return bareType(mediaType) != "" && len(mediaType) <= maxMediaType &&
		!strings.ContainsFunc(mediaType, func(r rune) bool { return r < ' ' || r > '~' })
}

// Refetch says, for errors, how to get a blob that the runtime does not have. containerd
// leaves a layer of an image's layer type to the unpacker, which waits for a config that is
// an image's or that unpack_config names (core/unpack/unpacker.go, Unpack): for CRI it does
// not fetch such layers of other artifacts, and reports nothing.
func Refetch(layer ocispec.Descriptor) string {
	if images.IsLayerType(layer.MediaType) {
		return "containerd does not fetch layers of an image's layer type for crictl and kubelet unless the config is an image's or unpack_config names it; pull the artifact with `artifact-snapshotter pull`, or pack it with other layer types"
	}
	return "delete the image and pull it again"
}
