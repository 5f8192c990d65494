// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package snapshot

import "time"

// unpackWait is how long a call with UnpackKey or MountKey waits for a tree. The caller asks
// again. Image volumes wait up to store.MaxWait.
const unpackWait = time.Second
