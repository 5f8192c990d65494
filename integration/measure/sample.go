// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"fmt"
	"math"
	"slices"
)

// Sample has one value per round.
type Sample []float64

// Quantile returns the value at q, from 0, the least, to 1, the greatest. It is NaN for an
// empty sample.
func (s Sample) Quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return slices.Sorted(slices.Values(s))[int(q*float64(len(s)-1)+0.5)]
}

// Median returns the middle value.
func (s Sample) Median() float64 { return s.Quantile(0.5) }

// Format prints the median and the range, each with a verb of package fmt.
func (s Sample) Format(verb, unit string) string {
	return fmt.Sprintf("**"+verb+"**%s ("+verb+" to "+verb+", %d rounds)", s.Median(), unit, s.Quantile(0), s.Quantile(1), len(s))
}
