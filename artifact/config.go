// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package artifact

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	modelspec "github.com/modelpack/model-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
)

// config is what an artifact's config says about its files.
type config struct {
	created time.Time // unixEpoch if the config names no time
	diffIDs []digest.Digest
}

// unixEpoch is the creation time of an artifact whose config names none.
var unixEpoch = time.Unix(0, 0).UTC()

// parseConfig reads the creation time and the DiffIDs from a config. A ModelPack config
// must be well-formed. A config of any other type may hold anything; a section that cannot
// be read counts as absent.
//
// The ModelPack config is defined in
// https://github.com/modelpack/model-spec/blob/main/docs/config.md; created and rootfs are
// those of an OCI image config, which other packers and early versions of ModelPack use.
func parseConfig(mediaType string, raw []byte) (config, error) {
	var top *sections
	cfg := config{created: unixEpoch}
	err := json.Unmarshal(raw, &top)
	if err == nil && top == nil {
		err = errors.New("null")
	}
	if err == nil {
		err = checkUnambiguous[sections](raw)
	}
	if err == nil {
		descriptor := section[struct {
			CreatedAt time.Time `json:"createdAt"`
		}]("descriptor", top.Descriptor, &err)
		created := section[time.Time]("created", top.Created, &err)
		modelFS := section[struct {
			DiffIDs       []digest.Digest `json:"diffIds"`
			LegacyDiffIDs []digest.Digest `json:"diff_ids"`
		}]("modelfs", top.ModelFS, &err)
		rootFS := section[struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		}]("rootfs", top.RootFS, &err)

		for _, t := range []time.Time{descriptor.CreatedAt, created} {
			if !t.IsZero() {
				cfg.created = t
				break
			}
		}
		for _, ids := range [][]digest.Digest{modelFS.DiffIDs, modelFS.LegacyDiffIDs, rootFS.DiffIDs} {
			if len(ids) != 0 {
				cfg.diffIDs = ids
				break
			}
		}
	}
	isModel := mediaType == modelspec.MediaTypeModelConfig || mediaType == legacy(modelspec.MediaTypeModelConfig)
	if err != nil && isModel {
		return config{}, fmt.Errorf("malformed model config: %.300v: %w", err, errdefs.ErrInvalidArgument)
	}
	return cfg, nil
}

// sections are the parts of a config that are parsed one by one.
type sections struct {
	Descriptor json.RawMessage `json:"descriptor"`
	Created    json.RawMessage `json:"created"`
	ModelFS    json.RawMessage `json:"modelfs"`
	RootFS     json.RawMessage `json:"rootfs"`
}

// section returns what raw holds, or the zero T if raw is absent or malformed. It stores
// the first error in err.
func section[T any](name string, raw json.RawMessage, err *error) T {
	var v, zero T
	if len(raw) == 0 {
		return zero
	}
	e := json.Unmarshal(raw, &v)
	if e == nil {
		e = checkUnambiguous[T](raw)
	}
	if e != nil {
		if *err == nil {
			*err = fmt.Errorf("%s: %w", name, e)
		}
		return zero
	}
	return v
}
