// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// given returns the result of one round of a download, an image and this project.
func given(form pack.Form, pull, disk, cache, speed float64) *datasetResult {
	reads := map[string]reading{}
	for _, name := range readColumns() {
		reads[name] = reading{Speed: measure.Sample{100}, Ratio: measure.Sample{speed}}
	}
	return &datasetResult{Name: "11-files", Title: "a model", Bytes: 1000, Rows: []*row{
		{Form: form, Variant: download, Pull: measure.Sample{10}, Bare: measure.Sample{1}, Disk: measure.Sample{1000}},
		{Form: form, Variant: "overlayfs", Pull: measure.Sample{20}, Pod: measure.Sample{1}, Bare: measure.Sample{1}, Disk: measure.Sample{2000}},
		{
			Form: form, Variant: ours, Compressed: 800, Uncompressed: 1000, Pull: measure.Sample{pull}, Pod: measure.Sample{1}, Bare: measure.Sample{1},
			Disk: measure.Sample{disk}, Cache: measure.Sample{cache}, Reads: reads,
		},
	}}
}

func TestABoundThatIsNotMetIsANo(t *testing.T) {
	for name, c := range map[string]struct {
		form                     pack.Form
		pull, disk, cache, speed float64
		noes                     int
	}{
		"raw, all met":                         {pack.Raw, 10.3, 1010, 1050, 0.95, 0},
		"raw, slow pull":                       {pack.Raw, 10.4, 1010, 1050, 0.95, 1},
		"raw, too much disk":                   {pack.Raw, 10.3, 1011, 1050, 0.95, 1},
		"raw, cached twice":                    {pack.Raw, 10.3, 1010, 2000, 0.95, 1},
		"raw, slow reads":                      {pack.Raw, 10.3, 1010, 1050, 0.94, 1},
		"tar, nothing met":                     {pack.Tar, 11, 2000, 2000, 0.5, 4},
		"gzip, as fast as the image":           {pack.TarGzip, 20, 1818, 1050, 0.95, 0},
		"gzip, slower than the image":          {pack.TarGzip, 20.1, 1818, 1050, 0.95, 1},
		"zstd, more than both layers together": {pack.TarZstd, 20, 1819, 1050, 0.95, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			(&results{Scale: 1, Datasets: []*datasetResult{given(c.form, c.pull, c.disk, c.cache, c.speed)}}).print(&out)
			if noes := strings.Count(out.String(), "**NO**"); noes != c.noes {
				t.Errorf("%d bounds are missed, want %d:\n%s", noes, c.noes, &out)
			}
		})
	}
}

func TestAFailureIsALineOfEachTable(t *testing.T) {
	d := given(pack.Tar, 10, 1000, 1000, 1)
	d.Rows[1] = &row{Form: pack.Tar, Variant: "overlayfs"}
	d.Rows[1].fail(errors.New("crictl create: exit status 1\ntime=now level=fatal msg=\"it is | broken"))
	var out bytes.Buffer
	(&results{Scale: 1, Datasets: []*datasetResult{d}}).print(&out)
	if lines := strings.Count(out.String(), "| tar | image, overlayfs | not measured: it is / broken"); lines != len(tables) {
		t.Errorf("%d lines have the reason of the failure, want %d:\n%s", lines, len(tables), &out)
	}
}

func TestChartsAreXML(t *testing.T) {
	dir := t.TempDir()
	(&results{Datasets: []*datasetResult{given(pack.Tar, 10, 1000, 1000, 1)}}).draw(dir)
	for _, c := range charts {
		f, err := os.Open(filepath.Join(dir, "11-files-"+c.name+".svg"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		bars := 0
		for d := xml.NewDecoder(f); ; {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if e, ok := token.(xml.StartElement); ok && e.Name.Local == "rect" {
				bars++
			}
		}
		if bars < 2 { // one is the background
			t.Errorf("%s has no bars", c.name)
		}
	}
}

func TestWeightsCompressAsThoseOfModelsDo(t *testing.T) {
	const size = 4 * measure.MiB
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := io.CopyN(w, &weights{random: rand.NewPCG(1, 2)}, size); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if factor := size / float64(out.Len()); factor < 1.2 || factor > 1.4 {
		t.Errorf("gzip's compression factor is %.2f, want 1.2 to 1.4", factor)
	}
}

func TestTheBeginningOfADatasetHasItsBytes(t *testing.T) {
	d := &dataset{files: []file{{"a", 100}, {"b/c", 70000}}}
	whole, part := t.TempDir(), t.TempDir()
	sums := d.write(t.Context(), whole, d.files)
	d.write(t.Context(), part, d.beginning(50000))
	for name, size := range map[string]int{"a": 100, "b/c": 49900} {
		all, err := os.ReadFile(filepath.Join(whole, name))
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(all); hex.EncodeToString(sum[:]) != sums[name] {
			t.Errorf("the digest of %s is not the one that write returned", name)
		}
		begin, err := os.ReadFile(filepath.Join(part, name))
		if err != nil {
			t.Fatal(err)
		}
		if len(begin) != size || !bytes.Equal(begin, all[:size]) {
			t.Errorf("the beginning of %s differs from the whole file, or is not %d bytes", name, size)
		}
	}
}
