// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import "time"

// The time-outs of the driver. The calls' own are kubelet's.
const (
	// hold is how long a call without a deadline waits.
	hold = 110 * time.Second
	// answer is the part of a call's time that is for its answer, and maxAnswer the most of it.
	answer    = 10 // one in
	maxAnswer = 5 * time.Second
)
