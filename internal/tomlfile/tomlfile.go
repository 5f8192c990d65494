// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package tomlfile reads TOML files of other programs, and turns go-toml's errors into one
// line.
package tomlfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Read decodes the file at path into v, and ignores keys that v does not have. It returns
// false if there is no file. Anything but a regular file is errdefs.ErrInvalidArgument.
func Read(path string, v any) (exists bool, err error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, NotRegular(path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	if err := toml.Unmarshal(text, v); err != nil {
		return false, fmt.Errorf("%s: %w", path, OneLine(err))
	}
	return true, nil
}

// NotRegular returns the error for a path that is not a regular file: reading a FIFO could
// block forever.
func NotRegular(path string) error {
	return fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
}

// OneLine returns an error of go-toml as one line with the key and the line number.
func OneLine(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var keys []string
		for _, missing := range strict.Errors {
			line, _ := missing.Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(missing.Key(), "."), line))
		}
		return fmt.Errorf("unknown key: %s", strings.Join(keys, ", "))
	}
	if decode, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, _ := decode.Position()
		return fmt.Errorf("line %d: %w", line, err)
	}
	return err
}
