// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package measure is shared by the benchmark programs: cleaning up however a program ends,
// new disks, reading files with and without the page cache, and statistics. It knows
// neither nodes nor artifacts.
//
// Its functions do not return errors. They panic, which runs the deferred clean-up; [Main]
// or [Try] recovers.
package measure

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Units of bytes.
const (
	MiB = 1 << 20
	GiB = 1 << 30
	TiB = 1 << 40
)

// failure is the value that Check panics with.
type failure struct{ error }

// status is the exit status of the program.
var status int

// Main runs a benchmark and ends the program. SIGINT and SIGTERM cancel ctx.
func Main(name string, run func(ctx context.Context)) {
	// The registration lasts until the end, so that a second Ctrl-C does not interrupt the
	// clean-up.
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	if err := Try(func() { run(ctx) }); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		status = 1
	}
	os.Exit(status)
}

// Check ends the program if err is not nil.
func Check(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// Must returns v and ends the program if err is not nil.
func Must[T any](v T, err error) T {
	Check(err)
	return v
}

// Try runs f and returns the error that would have ended the program.
func Try(f func()) (err error) {
	defer func() {
		if r := recover(); r != nil {
			ended, ok := r.(failure)
			if !ok {
				panic(r)
			}
			err = ended.error
		}
	}()
	f()
	return nil
}

// Tidy runs a deferred clean-up. After an error the other clean-ups still run, and the
// program exits with status 1.
func Tidy(f func() error) {
	if err := f(); err != nil {
		Progress("cleaning up: %v", err)
		status = 1
	}
}

// Progress prints to standard error, so that it stays out of the tables on standard output.
func Progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...)
}

// Seconds returns the duration of f.
func Seconds(f func()) float64 {
	start := time.Now()
	f()
	return time.Since(start).Seconds()
}

// Milliseconds converts a duration to a number.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Load returns the one-minute load average.
func Load() string { return Field("/proc/loadavg", `^(\S+)`) }

// Machine returns the beginning of the sentence that says when and where a table was
// measured.
func Machine() string {
	var kernel unix.Utsname
	Check(unix.Uname(&kernel))
	return fmt.Sprintf("Measured on %s: Linux %s, %s, %d cores, ext4 on a loop device with direct I/O",
		time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(kernel.Release[:]),
		Field("/proc/cpuinfo", `(?m)^model name\s*: (.*)$`), runtime.NumCPU())
}

// Field returns the first group of pattern in a file, or "" without a match.
func Field(file, pattern string) string {
	found := regexp.MustCompile(pattern).FindSubmatch(Must(os.ReadFile(file)))
	if found == nil {
		return ""
	}
	return string(found[1])
}

// Mebibytes returns the value of a line "name:  123 kB" of a file in /proc.
func Mebibytes(file, name string) float64 {
	return Must(strconv.ParseFloat(Field(file, `(?m)^`+name+`:\s*(\d+) kB$`), 64)) / 1024
}
