// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package doctor

import "strings"

// The results of a verdict, the worst first.
const (
	ResultProblem = "problem"
	ResultUnknown = "unknown"
	ResultAdvice  = "advice"
	ResultOK      = "ok"
)

// Verdict sums findings up.
type Verdict struct {
	// Result is the worst of the findings.
	Result string `json:"result"`
	// Problems, Unknown and Advice are the checks with each.
	Problems []string `json:"problems"`
	Unknown  []string `json:"unknown"`
	Advice   []string `json:"advice"`
}

// Judge returns the verdict about the findings.
func Judge(findings []Finding) Verdict {
	v := Verdict{Result: ResultOK, Problems: []string{}, Unknown: []string{}, Advice: []string{}}
	for _, found := range findings {
		if found.Problem != "" {
			v.Problems = append(v.Problems, found.Check)
		}
		if found.Unknown != "" {
			v.Unknown = append(v.Unknown, found.Check)
		}
		if len(found.Advice) > 0 {
			v.Advice = append(v.Advice, found.Check)
		}
	}
	switch {
	case len(v.Problems) > 0:
		v.Result = ResultProblem
	case len(v.Unknown) > 0:
		v.Result = ResultUnknown
	case len(v.Advice) > 0:
		v.Result = ResultAdvice
	}
	return v
}

// String is the verdict as a sentence.
func (v Verdict) String() string {
	var text string
	switch v.Result {
	case ResultProblem:
		return "artifacts cannot be mounted, see the problems of: " + strings.Join(v.Problems, ", ")
	case ResultUnknown:
		text = "no problem found, but this could not be examined: " + strings.Join(v.Unknown, ", ")
	default:
		text = "artifacts can be mounted"
	}
	if len(v.Advice) > 0 {
		text += "; there is advice about: " + strings.Join(v.Advice, ", ")
	}
	return text
}
