// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

// Package measure is what the benchmark programs share: the frame that cleans
// up after them however they end, a new disk, reading files with and without
// the page cache, and the statistics of rounds. It knows neither nodes nor
// artifacts.
//
// Its functions do not return errors. They end the program by a panic that
// [Main] or [Try] catches, so that on the way all that was deferred cleans up.
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

// failure is what Check panics with.
type failure struct{ error }

// status is what the program ends with.
var status int

// Main runs a benchmark and ends the program. SIGINT and SIGTERM cancel ctx.
func Main(name string, run func(ctx context.Context)) {
	// Held to the end, so that a second Ctrl-C does not interrupt the cleaning up.
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

// Tidy is for defer: cleaning up goes on after an error, which the program's
// exit status tells.
func Tidy(f func() error) {
	if err := f(); err != nil {
		Progress("cleaning up: %v", err)
		status = 1
	}
}

// Progress goes to standard error, where it does not get into the tables.
func Progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "==> "+format+"\n", args...)
}

// Seconds is how long f takes.
func Seconds(f func()) float64 {
	start := time.Now()
	f()
	return time.Since(start).Seconds()
}

// Milliseconds is a duration as a number.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Load is the machine's load average of the last minute.
func Load() string { return Field("/proc/loadavg", `^(\S+)`) }

// Machine is a sentence's beginning about when and on what a table was measured.
func Machine() string {
	var kernel unix.Utsname
	Check(unix.Uname(&kernel))
	return fmt.Sprintf("Measured on %s: Linux %s, %s, %d cores, ext4 on a loop device with direct I/O",
		time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(kernel.Release[:]),
		Field("/proc/cpuinfo", `(?m)^model name\s*: (.*)$`), runtime.NumCPU())
}

// Field is what the pattern's group matches in a file, "" if nothing does.
func Field(file, pattern string) string {
	found := regexp.MustCompile(pattern).FindSubmatch(Must(os.ReadFile(file)))
	if found == nil {
		return ""
	}
	return string(found[1])
}

// Mebibytes is the value of a line "name:  123 kB" of a file in /proc.
func Mebibytes(file, name string) float64 {
	return Must(strconv.ParseFloat(Field(file, `(?m)^`+name+`:\s*(\d+) kB$`), 64)) / 1024
}
