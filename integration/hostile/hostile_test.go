// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package hostile

import (
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/artifact"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/fswatch"
)

type descriptor = ocispec.Descriptor

func utf8Descriptor(d descriptor) bool {
	for key, value := range d.Annotations {
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return false
		}
	}
	return utf8.ValidString(d.MediaType)
}

// Filters for debugging single cases or ways.
var (
	only   = flag.String("cases", "", "a regular expression for the names of the cases")
	onlyOn = flag.String("ways", "", "a regular expression for the ways to mount them")
)

// long enables the cases that take minutes or gigabytes.
func long() bool { return os.Getenv("ARTIFACT_SNAPSHOTTER_LONG") != "" }

const (
	// maxResident is a daemon's memory limit without the long cases: a plan of 100,000
	// entries (150 MB), a zstd window of 128 MiB, a decoded manifest of 8 MiB, and the same
	// amount of garbage, because Go's heap may double before a collection.
	maxResident = 512 << 20
	// maxResidentLong is the limit with the long cases: docs/operations.md says 1.5 GB for
	// a plan of 1,048,576 entries, one at a time, in addition to the above.
	maxResidentLong = 2560 << 20
)

// chosen returns the front ends for the ith case: all of them in a long run, otherwise the
// next one in turn that can receive it.
func chosen(frontEnds []FrontEnd, i int, c Case, a *Artifact) []FrontEnd {
	if long() {
		return frontEnds
	}
	for n := range frontEnds {
		if frontEnd := frontEnds[(i+n)%len(frontEnds)]; skipped(frontEnd, c, a) == "" {
			return []FrontEnd{frontEnd}
		}
	}
	return nil
}

// skipped returns the reason why a front end cannot receive a case, or "".
func skipped(frontEnd FrontEnd, c Case, a *Artifact) string {
	if c.Ext4 && frontEnd.Way().Extracts() && !isExt4() {
		return "the test's directory is not on ext4"
	}
	if s, ok := frontEnd.(Skips); ok {
		return s.Skip(c, a)
	}
	return ""
}

// ways returns the tested pairs of modes, with each mode at least once.
func ways() []Way {
	w := []Way{Index, Extracted, Linked, Copied}
	if long() {
		w = append(w, IndexOnLoops, IndexBuffered, LinkedIndex)
	}
	return w
}

func TestNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Cases() {
		if seen[c.Name] {
			t.Errorf("two cases have the name %q", c.Name)
		}
		seen[c.Name] = true
	}
	t.Logf("%d cases", len(seen))
	if len(seen) < 300 {
		t.Errorf("%d cases, want at least 300", len(seen))
	}
}

func TestCasesAreTheSameEachTime(t *testing.T) {
	first, second := Cases(), Cases()
	for i, c := range first {
		if strings.HasPrefix(c.Name, "bomb/") {
			continue
		}
		if a, b := c.Make(), second[i].Make(); c.Name != second[i].Name || a.Target != b.Target {
			t.Errorf("%s: %s and %s", c.Name, a.Target, b.Target)
		}
	}
}

// Every front end and mode mounts an artifact exactly or refuses it with the reason.
// Nothing changes outside the daemons' state, no daemon exceeds its memory limit, and
// nothing is left over.
func TestEveryArtifactGetsItsVerdict(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	blobs := shelf(filepath.Join(dir, "content"))
	if err := os.MkdirAll(filepath.Join(string(blobs), "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	frontEnds, daemons := frontEnds(t, dir, blobs, ways())
	frontEnds = slices.DeleteFunc(frontEnds, func(d FrontEnd) bool { return !regexp.MustCompile(*onlyOn).MatchString(string(d.Way())) })
	pids := []int{os.Getpid()}
	for _, d := range daemons {
		pids = append(pids, d.pid())
		d.peak(t)
	}
	// The daemon sets the read-ahead of every mount (docs/design.md).
	watch, err := fswatch.Start(pids, append(fswatch.OfTheTest(), dir, "/sys/devices/virtual/bdi/*/read_ahead_kb", "/sys/devices/virtual/block/*/queue/read_ahead_kb")...)
	if err != nil {
		t.Fatal(err)
	}
	counts := newTally()
	turn := 1 // with -short every third case is tried, each with the next front end
	if testing.Short() {
		turn = 3
	}
	began := time.Now()
	for i, c := range Cases() {
		if c.Long && !long() {
			continue
		}
		if i%turn != 0 {
			continue
		}
		if !regexp.MustCompile(*only).MatchString(c.Name) {
			continue
		}
		a := c.Make()
		if err := blobs.put(a); err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		var group sync.WaitGroup
		for _, frontEnd := range chosen(frontEnds, i/turn, c, a) {
			if why := skipped(frontEnd, c, a); why != "" {
				counts.skip(frontEnd, why)
				continue
			}
			group.Go(func() {
				Check(t.Context(), t, frontEnd, c, a)
				counts.add(c, frontEnd)
			})
			if c.Long { // the machine has not enough memory for all daemons at once
				group.Wait()
			}
		}
		group.Wait()
		counts.took(c, time.Since(started))
		for _, d := range daemons {
			counts.memory(c, d.peak(t))
		}
		if err := blobs.drop(a); err != nil {
			t.Fatal(err)
		}
		for _, change := range watch.Changes() {
			t.Fatalf("%s: a change outside of the daemons' state: %s", c.Name, change)
		}
		if t.Failed() && counts.failed(t) {
			t.Fatal("too many failures")
		}
	}
	took := time.Since(began)
	wantNothingLeft(t, daemons)
	changes, seen, err := watch.Stop()
	if err != nil || len(changes) > 0 {
		t.Errorf("changes outside of the daemons' state: %q (%v)", changes, err)
	}
	if seen[dir] == 0 {
		t.Error("the watch saw no change inside either, so it proves nothing")
	}
	limit := int64(maxResident)
	if long() {
		limit = maxResidentLong
	}
	if counts.most > limit {
		t.Errorf("a daemon had %d MiB of resident memory in the case %q; the limit is %d", counts.most>>20, counts.mostBy, limit>>20)
	}
	t.Logf("%s\nin %s; %d changes on %d watched file systems, none outside of the daemons' state", counts, took.Round(time.Second), seen[dir], watch.FileSystems())
}

// wantNothingLeft checks that the daemons have no trees, mounts and contents after all
// mounts and blobs are gone.
func wantNothingLeft(t *testing.T, daemons []*process) {
	t.Helper()
	for _, d := range daemons {
		if left := left(t, d, 2*time.Minute); left != "" {
			t.Errorf("%s: %s", treeFrontEnd{d}.Way(), left)
		}
	}
}

// left describes what a daemon has not removed within the limit, or returns "".
func left(t *testing.T, d *process, limit time.Duration) string {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		left = nil
		for _, pattern := range []string{"root/trees/*", "root/blobs/*/*", "root/overlayfs/snapshots/*", "state/mounts/*"} {
			found, err := filepath.Glob(filepath.Join(d.dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			left = append(left, found...)
		}
		if len(left) == 0 {
			return ""
		}
		err := cleanup(t, d)
		if time.Now().After(deadline) {
			return fmt.Sprintf("%d entries are left, for example %q: %v", len(left), left[0], err)
		}
	}
}

// isExt4 reports whether temporary directories are on ext4.
var isExt4 = sync.OnceValue(func() bool {
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil {
		panic(err)
	}
	return st.Type == unix.EXT4_SUPER_MAGIC
})

// tally counts verdicts.
type tally struct {
	mu                       sync.Mutex
	cases                    map[string]bool
	mounted, refused, images int
	ways                     map[Way]int
	skipped                  map[Way]map[string]int // by reason
	most                     int64
	mostBy                   string
	slowest                  time.Duration
	slowestBy                string
	failures                 int
}

func newTally() *tally {
	return &tally{cases: map[string]bool{}, ways: map[Way]int{}, skipped: map[Way]map[string]int{}}
}

// skip counts a case that a front end cannot receive.
func (n *tally) skip(frontEnd FrontEnd, why string) {
	if n.skipped[frontEnd.Way()] == nil {
		n.skipped[frontEnd.Way()] = map[string]int{}
	}
	n.skipped[frontEnd.Way()][why]++
}

func (n *tally) add(c Case, frontEnd FrontEnd) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ways[frontEnd.Way()]++
	if n.cases[c.Name] {
		return
	}
	n.cases[c.Name] = true
	switch refused := c.For(Index).Refused; {
	case refused == nil:
		n.mounted++
	case errors.Is(refused, artifact.ErrNotArtifact):
		n.images++
	default:
		n.refused++
	}
}

func (n *tally) took(c Case, took time.Duration) {
	if took > n.slowest {
		n.slowest, n.slowestBy = took, c.Name
	}
}

func (n *tally) memory(c Case, bytes int64) {
	if bytes > n.most {
		n.most, n.mostBy = bytes, c.Name
	}
}

// failed reports whether there are too many failures to continue.
func (n *tally) failed(*testing.T) bool {
	n.failures++
	return n.failures > 2000
}

func (n *tally) String() string {
	var by []string
	total := 0
	for _, way := range slices.Sorted(maps.Keys(n.ways)) {
		by = append(by, fmt.Sprintf("%s %d", way, n.ways[way]))
		total += n.ways[way]
	}
	var skipped strings.Builder
	for _, way := range slices.Sorted(maps.Keys(n.skipped)) {
		for _, why := range slices.Sorted(maps.Keys(n.skipped[way])) {
			fmt.Fprintf(&skipped, "\nskipped with %s, %s: %d", way, why, n.skipped[way][why])
		}
	}
	return fmt.Sprintf("%d cases: %d mounted, %d refused, %d container images; %d verdicts (%s); at most %d MiB resident (%s); the slowest took %s (%s)%s",
		len(n.cases), n.mounted, n.refused, n.images, total, strings.Join(by, ", "), n.most>>20, n.mostBy, n.slowest.Round(time.Millisecond), n.slowestBy, &skipped)
}

// A listing shows every difference that verdicts depend on.
func TestAListingDetectsEveryDifference(t *testing.T) {
	want := Listing{"d": isDir(), "d/f": isFile("content"), "l": isLink("d")}
	make := func(t *testing.T) string {
		t.Helper()
		dir := t.TempDir()
		when := unix.NsecToTimespec(at * 1e9)
		for _, err := range []error{
			os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d/f"), []byte("content"), 0o644), os.Symlink("d", filepath.Join(dir, "l")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"d/f", "d", "l"} {
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	differs := func(t *testing.T, dir string) string {
		t.Helper()
		got, err := List(dir)
		if err != nil {
			return err.Error()
		}
		return want.diff(got, Index)
	}
	if diff := differs(t, make(t)); diff != "" {
		t.Errorf("an unchanged directory differs:\n%s", diff)
	}
	for what, change := range map[string]func(dir string) error{
		"a mode":        func(dir string) error { return os.Chmod(filepath.Join(dir, "d"), 0o700) },
		"an owner":      func(dir string) error { return os.Lchown(filepath.Join(dir, "l"), 1, 0) },
		"a group":       func(dir string) error { return os.Lchown(filepath.Join(dir, "d/f"), 0, 1) },
		"a byte":        func(dir string) error { return os.WriteFile(filepath.Join(dir, "d/f"), []byte("Content"), 0o644) },
		"a time":        func(dir string) error { return os.Chtimes(filepath.Join(dir, "d"), time.Time{}, time.Unix(at, 1)) },
		"an attribute":  func(dir string) error { return unix.Setxattr(filepath.Join(dir, "d/f"), "user.x", nil, 0) },
		"a trusted one": func(dir string) error { return unix.Setxattr(filepath.Join(dir, "d"), "trusted.x", nil, 0) },
		"a file less":   func(dir string) error { return os.Remove(filepath.Join(dir, "l")) },
		"a file more":   func(dir string) error { return os.WriteFile(filepath.Join(dir, "more"), nil, 0o644) },
		"a FIFO":        func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "more"), 0o644) },
		"another target": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "l")), os.Symlink("D", filepath.Join(dir, "l")))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := make(t)
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			if differs(t, dir) == "" {
				t.Error("the difference was not detected")
			}
		})
	}
	if _, err := List(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v, want ErrNotExist", err)
	}
}

// zeros writes its streams by hand, and the bombs made of them are refused before their
// end.
func TestZerosAreGzipOfZeros(t *testing.T) {
	for _, mib := range []int{1, 2, 5} {
		r, err := gzip.NewReader(strings.NewReader(zeros(mib)))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil || len(b) != mib<<20 || strings.Trim(string(b), "\x00") != "" {
			t.Errorf("zeros(%d): %d bytes, %v", mib, len(b), err)
		}
	}
}
