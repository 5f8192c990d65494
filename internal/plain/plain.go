// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package plain words errors and sizes for people. Errors carry a kind (package errdefs of containerd)
// and what connected to a socket, which are for programs.
package plain

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/containerd/errdefs"
)

// kinds are those whose text adds nothing to a sentence that ends with it. "not found",
// "already exists" and others may be all that an error says.
var kinds = []error{
	errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable,
	errdefs.ErrAborted, errdefs.ErrDataLoss, errdefs.ErrInternal, errdefs.ErrUnknown,
}

// What Go's net package and gRPC say before the reason why a Unix socket does not answer.
// The sentences around it name the socket.
var (
	grpcDial = regexp.MustCompile(`connection error: desc = \\?"transport: Error while dialing: (.*?)\\?"`)
	dialUnix = regexp.MustCompile(`dial unix:? \S*: connect: |dial unix \S+: `)
)

// Error is the text of err without the kinds at its end, and without how a socket was
// connected to.
func Error(err error) string {
	text := err.Error()
	for cut := true; cut; {
		cut = false
		for _, kind := range kinds {
			if short, ok := strings.CutSuffix(text, ": "+kind.Error()); ok && short != "" && errors.Is(err, kind) {
				text, cut = short, true
			}
		}
	}
	return dialUnix.ReplaceAllString(grpcDial.ReplaceAllString(text, "$1"), "")
}

// Size is a number of bytes as all commands print it: 59 B, 3.0 MiB.
func Size(bytes int64) string {
	if bytes < 1<<10 {
		return fmt.Sprintf("%d B", bytes)
	}
	return progress.Bytes(bytes).String()
}
