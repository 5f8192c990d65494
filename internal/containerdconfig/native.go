// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdconfig

import (
	_ "embed"
	"io"
	"text/template"

	"github.com/containerd/platforms"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
)

var (
	//go:embed native.toml.tmpl
	nativeFile     string
	nativeTemplate = template.Must(template.New("native.toml").Parse(nativeFile))
)

// nativeFormat is a format of artifacts that containerd's own unpacker can unpack: their
// configs have rootfs.diff_ids.
type nativeFormat struct {
	// Platform is the platform to request. containerd takes the first entry of a
	// snapshotter that matches (getSupportedPlatform in core/transfer/local/pull.go), so
	// each entry has an OS feature that the others lack.
	Platform   string
	ConfigType string
	LayerTypes []string
}

// dockerTypes are the layers of Docker's models
// (https://github.com/docker/model-spec/blob/main/spec.md, and
// https://github.com/docker/model-runner/blob/main/pkg/distribution/types/config.go
// for those that it lacks).
var dockerTypes = []string{
	"application/vnd.docker.ai.gguf.v3",
	"application/vnd.docker.ai.gguf.v3.lora",
	"application/vnd.docker.ai.gguf.v3.mmproj",
	"application/vnd.docker.ai.mmproj",
	"application/vnd.docker.ai.safetensors",
	"application/vnd.docker.ai.model.file",
	"application/vnd.docker.ai.dduf",
	"application/vnd.docker.ai.license",
	"application/vnd.docker.ai.chat.template.jinja",
	"application/vnd.docker.ai.vllm.config.tar",
	"application/vnd.docker.ai.dir.tar",
}

// modelPackTypes are the layers of ModelPack.
var modelPackTypes = []string{
	modelspec.MediaTypeModelWeightRaw, modelspec.MediaTypeModelWeight, modelspec.MediaTypeModelWeightGzip, modelspec.MediaTypeModelWeightZstd,
	modelspec.MediaTypeModelWeightConfigRaw, modelspec.MediaTypeModelWeightConfig, modelspec.MediaTypeModelWeightConfigGzip, modelspec.MediaTypeModelWeightConfigZstd,
	modelspec.MediaTypeModelDocRaw, modelspec.MediaTypeModelDoc, modelspec.MediaTypeModelDocGzip, modelspec.MediaTypeModelDocZstd,
	modelspec.MediaTypeModelCodeRaw, modelspec.MediaTypeModelCode, modelspec.MediaTypeModelCodeGzip, modelspec.MediaTypeModelCodeZstd,
	modelspec.MediaTypeModelDatasetRaw, modelspec.MediaTypeModelDataset, modelspec.MediaTypeModelDatasetGzip, modelspec.MediaTypeModelDatasetZstd,
}

// WriteNative writes the tables that make containerd's own unpacker unpack artifacts, too. They
// belong after those of [Needs.Write]. It needs containerd 2.3.
func WriteNative(w io.Writer) error {
	return nativeTemplate.Execute(w, []nativeFormat{
		{withFeature("docker-model"), "application/vnd.docker.ai.model.config.v0.1+json", dockerTypes},
		{withFeature("docker-model-v0.2"), "application/vnd.docker.ai.model.config.v0.2+json", dockerTypes},
		{withFeature("modelpack"), modelspec.MediaTypeModelConfig, modelPackTypes},
	})
}

// withFeature is the platform of this node with an OS feature.
func withFeature(feature string) string {
	p := platforms.DefaultSpec()
	p.OSFeatures = []string{feature}
	return platforms.FormatAll(p)
}
