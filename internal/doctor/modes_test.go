// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"slices"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/unpack"
)

func TestOnlyABetterModeIsAdvised(t *testing.T) {
	const works, fails = true, false
	trial := func(r unpack.Mode, works bool, remedy string) unpack.ModeTrial {
		return unpack.ModeTrial{Mode: r, Works: works, Remedy: remedy}
	}
	auto := `set tar_mode to "auto"`
	for name, test := range map[string]struct {
		taken, forced unpack.Mode
		trials        []unpack.ModeTrial
		want          []string // what to do
	}{
		"the best is taken":   {unpack.EROFS, "", []unpack.ModeTrial{trial(unpack.EROFS, works, ""), trial(unpack.EROFSLoop, fails, "a")}, nil},
		"one in the middle":   {unpack.EROFSLoop, "", []unpack.ModeTrial{trial(unpack.EROFS, fails, "a"), trial(unpack.EROFSLoop, works, ""), trial(unpack.EROFSBuffered, fails, "b")}, []string{"a"}},
		"the same twice":      {unpack.Extract, "", []unpack.ModeTrial{trial(unpack.EROFS, fails, "a"), trial(unpack.EROFSLoop, fails, "a"), trial(unpack.Extract, works, "")}, []string{"a"}},
		"two remedies":        {unpack.Extract, "", []unpack.ModeTrial{trial(unpack.EROFS, fails, "a"), trial(unpack.EROFSLoop, fails, "b"), trial(unpack.Extract, works, "")}, []string{"a", "b"}},
		"no remedy":           {unpack.EROFSLoop, "", []unpack.ModeTrial{trial(unpack.EROFS, fails, ""), trial(unpack.EROFSLoop, works, "")}, nil},
		"nothing works":       {"", "", []unpack.ModeTrial{trial(unpack.EROFS, fails, "a"), trial(unpack.Extract, fails, "b")}, []string{"a", "b"}},
		"the best is forced":  {unpack.EROFS, unpack.EROFS, []unpack.ModeTrial{trial(unpack.EROFS, works, ""), trial(unpack.Extract, works, "")}, nil},
		"a worse is forced":   {unpack.Extract, unpack.Extract, []unpack.ModeTrial{trial(unpack.EROFS, works, ""), trial(unpack.EROFSLoop, fails, "a"), trial(unpack.Extract, works, "")}, []string{auto}},
		"a broken is forced":  {"", unpack.EROFSLoop, []unpack.ModeTrial{trial(unpack.EROFS, works, ""), trial(unpack.EROFSLoop, fails, "a"), trial(unpack.EROFSBuffered, fails, "b")}, []string{auto, "a"}},
		"all broken, one set": {"", unpack.Extract, []unpack.ModeTrial{trial(unpack.EROFS, fails, "a"), trial(unpack.Extract, fails, "")}, []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, a := range modeAdvice(unpack.ModeDiagnosis{Taken: test.taken, Trials: test.trials}, "tar_mode", test.forced) {
				got = append(got, a.Do)
				if a.Gain == "" {
					t.Errorf("%q gains nothing", a.Do)
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}
