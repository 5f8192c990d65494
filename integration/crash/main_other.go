// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package crash

// Main does nothing.
func Main() {}
