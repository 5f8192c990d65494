// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/measure"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// dataset is a model with the same bytes in every run.
type dataset struct {
	name, title string
	files       []file // in lexical order
	rounds      int    // of pulls, if the command line does not set it
}

// file is a file of a data set, or the beginning of one.
type file struct {
	path string // relative
	size int64
}

// datasets returns the data sets, with their sizes divided by scale.
func datasets(scale int64) []*dataset {
	few := &dataset{name: "11-files", title: "2 GiB in 11 files", rounds: 5}
	few.files = append(few.files, file{"config.json", 1234})
	for i := range 9 {
		few.files = append(few.files, file{fmt.Sprintf("model-%05d-of-00009.safetensors", i+1), 2*measure.GiB/scale/9 - 1001})
	}
	few.files = append(few.files, file{"tokenizer.json", 9 * (1001 - 100)})
	many := &dataset{name: "2000-files", title: "2 GiB in 2,000 files", rounds: 5}
	for i := range int(max(2000/scale, 20)) {
		many.files = append(many.files, file{fmt.Sprintf("shards/%02d/%04d.safetensors", i/100, i), 2 * measure.GiB / scale / max(2000/scale, 20)})
	}
	one := &dataset{name: "8-gib", title: "8 GiB in one file", rounds: 3}
	one.files = []file{{"model.gguf", 8 * measure.GiB / scale}}
	return []*dataset{few, many, one}
}

func (d *dataset) bytes() (sum int64) {
	for _, f := range d.files {
		sum += f.size
	}
	return sum
}

// beginning returns the first limit bytes of the data set: whole files and the beginning of
// the last one.
func (d *dataset) beginning(limit int64) (files []file) {
	for _, f := range d.files {
		if limit == 0 {
			break
		}
		f.size = min(f.size, limit)
		limit -= f.size
		files = append(files, f)
	}
	return files
}

// write writes files of the data set, or their beginnings, below dir. It returns their
// SHA-256 by path.
func (d *dataset) write(ctx context.Context, dir string, files []file) map[string]string {
	sums := map[string]string{}
	for i, f := range files {
		measure.Check(ctx.Err())
		name := filepath.Join(dir, f.path)
		measure.Check(os.MkdirAll(filepath.Dir(name), 0o755))
		out := measure.Must(os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644))
		sum := sha256.New()
		from := &weights{random: rand.NewPCG(uint64(i), uint64(len(d.files)))}
		measure.Must(io.CopyN(io.MultiWriter(out, sum), contextReader{ctx, from}, f.size))
		measure.Check(out.Close())
		measure.Check(os.Chtimes(name, pack.Created, pack.Created))
		sums[f.path] = hex.EncodeToString(sum.Sum(nil))
	}
	return sums
}

// weights are bfloat16 numbers with a normal distribution around 0 and a standard deviation
// of 0.02, as in trained models. Signs and mantissas are noise, exponents are not, so gzip
// and zstd compress them to about three quarters.
type weights struct {
	random *rand.PCG
	rest   []byte
	buf    [1 << 16]byte
}

func (w *weights) Read(p []byte) (int, error) {
	if len(w.rest) == 0 {
		for i := 0; i < len(w.buf); i += 8 {
			r := w.random.Uint64()
			binary.LittleEndian.PutUint64(w.buf[i:], uint64(bfloat16[r&0xffff])|uint64(bfloat16[r>>16&0xffff])<<16|
				uint64(bfloat16[r>>32&0xffff])<<32|uint64(bfloat16[r>>48])<<48)
		}
		w.rest = w.buf[:]
	}
	n := copy(p, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// bfloat16 is a table of the 65,536 quantiles of the distribution, each the upper half of a
// float32.
var bfloat16 = func() (table [1 << 16]uint16) {
	for i := range table {
		p := (float64(i) + 0.5) / float64(len(table))
		table[i] = uint16(math.Float32bits(float32(0.02*math.Sqrt2*math.Erfinv(2*p-1))) >> 16)
	}
	return table
}()

// contextReader stops when the context ends, so that a run can be interrupted.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
