// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/log"
)

func TestRunWaitsLongerAfterEachFailureAndWarnsOnce(t *testing.T) {
	var logged bytes.Buffer
	log.L.Logger.SetOutput(&logged)
	t.Cleanup(func() { log.L.Logger.SetOutput(os.Stderr) })
	synctest.Test(t, func(t *testing.T) {
		const fail, succeed = "fail", "succeed"
		script := []string{fail, fail, fail, fail, succeed, fail, fail}
		want := []time.Duration{0, 1, 3, 7, 11, 71, 72} // seconds from the start
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var got []time.Duration
		start := time.Now()
		Policy{Min: time.Second, Max: 4 * time.Second, WarnAfter: 3}.Run(ctx, "it failed", func() (time.Duration, error) {
			got = append(got, time.Since(start)/time.Second)
			if len(got) == len(script) {
				cancel()
			}
			if script[len(got)-1] == succeed {
				return time.Minute, nil
			}
			return 0, errors.New("not ready")
		})
		if !slices.Equal(got, want) {
			t.Errorf("the calls come after %d s, want %d", got, want)
		}
	})
	if n := strings.Count(logged.String(), "level=warning"); n != 1 || !strings.Contains(logged.String(), "it failed") {
		t.Errorf("%d warnings, want one, in:\n%s", n, logged.String())
	}
}

func TestSleepEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Sleep(ctx, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it is canceled", err)
	}
	if err := Sleep(t.Context(), 0); err != nil {
		t.Error(err)
	}
}
