// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import "testing"

func TestTheVerdictIsTheWorstFinding(t *testing.T) {
	good := Finding{Check: "kernel"}
	advised := Finding{Check: "tar layers", Advice: []Advice{{Do: "move root"}}}
	unknown := Finding{Check: "socket", Unknown: "nobody answers"}
	bad := Finding{Check: "containerd config", Problem: "no pod uses the snapshotter"}
	for want, findings := range map[string][]Finding{
		"ok: artifacts can be mounted":                                                                         {good},
		"advice: artifacts can be mounted; there is advice about: tar layers":                                  {good, advised},
		"unknown: no problem found, but this could not be examined: socket; there is advice about: tar layers": {advised, good, unknown},
		"problem: artifacts cannot be mounted, see the problems of: containerd config":                         {unknown, bad, advised},
	} {
		if v := Judge(findings); v.Result+": "+v.String() != want {
			t.Errorf("got %s: %s, want %s", v.Result, v, want)
		}
	}
}
