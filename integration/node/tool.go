// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package node

import (
	"os"
	"path/filepath"
)

// Tool runs a program of the tools' directory, or one in PATH if it is not
// there, and returns what it printed. The error holds its standard error.
func (n *Node) Tool(name string, args ...string) (string, error) {
	program := filepath.Join(n.tools, name)
	if _, err := os.Stat(program); err != nil {
		program = name
	}
	return n.run(program, args...)
}
