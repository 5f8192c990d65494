// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package deploy holds the files that a node needs beside the binary, as they are
// installed.
package deploy

import _ "embed" // for Unit

// Unit is the systemd unit of the daemon, artifact-snapshotter.service. Its one
// ExecStart= line runs [UnitBinary].
//
//go:embed systemd/artifact-snapshotter.service
var Unit string

// UnitBinary is the path of the binary in [Unit].
const UnitBinary = "/usr/local/bin/artifact-snapshotter"
