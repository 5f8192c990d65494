// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package deploy has the files that are installed on a node together with the binary.
package deploy

import _ "embed" // for Unit

// Unit is the daemon's systemd unit, artifact-snapshotter.service. Its only ExecStart=
// line runs [UnitBinary].
//
//go:embed systemd/artifact-snapshotter.service
var Unit string

// UnitBinary is the path of the binary that [Unit] runs.
const UnitBinary = "/usr/local/bin/artifact-snapshotter"
