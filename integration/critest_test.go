// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
)

// notRun are critest's specs that cannot run here. critest skips its benchmarks by default.
var notRun = []string{
	// Needs an image by its digest, which only its public registry has.
	"public image with digest should be pulled",
	// Needs the CNI plugin portmap, which leaves chains in the host's iptables.
	"port mapping with host port and container port",
	// Masks /bin/ls, but the shell of Debian's busybox runs its built-in ls.
	"runtime should support MaskedPaths",
	// Loads profiles into the host's kernel with sudo and does not remove them.
	`\[k8s.io\] AppArmor`,
}

// specsToPass is ten below the number that passes on Linux 6.18: older kernels skip the six
// specs on user namespaces and the four on recursive read-only mounts.
const specsToPass = 95

// Two halves of about a minute each run concurrently.
const securityContext = `\[k8s.io\] Security Context`

// Kubernetes' CRI validation suite passes with this snapshotter serving the root file
// systems of all pods.
func TestCRIValidationSuite(t *testing.T) {
	removeNewCgroup(t)
	n := nodeForCritest(t, node.Options{})
	halves := [][]string{{"--ginkgo.focus", securityContext}, {"--ginkgo.skip", securityContext}}
	results := make([][]spec, len(halves))
	t.Run("critest", func(t *testing.T) {
		for i, half := range halves {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				results[i] = critest(t, n, half...)
			})
		}
	})
	states := map[string]int{}
	var failed []spec
	for _, s := range slices.Concat(results...) {
		states[s.State]++
		if s.State == "skipped" {
			t.Logf("%s: skipped itself: %s", s.name(), s.Failure.Message)
		} else if s.State != "passed" {
			failed = append(failed, s)
		}
	}
	t.Logf("specs by result: %v", states)
	if states["passed"] < specsToPass {
		t.Errorf("%d specs passed, want at least %d", states["passed"], specsToPass)
	}
	if len(failed) > 0 {
		reportFailed(t, failed)
		return
	}
	pods, err := n.Crictl("pods", "--quiet")
	check(t, err)
	if pods != "" {
		t.Errorf("critest left the pods %s", pods)
	}
	snapshots, err := n.Ctr("snapshots", "--snapshotter", "artifact", "ls")
	check(t, err)
	if !strings.Contains(snapshots, " Committed") || strings.Contains(snapshots, " Active") {
		t.Errorf("want snapshots of images (Committed) and none of containers (Active):\n%s", snapshots)
	}
}

// reportFailed reports for each failed spec whether it also fails with containerd's own
// snapshotter.
func reportFailed(t *testing.T, failed []spec) {
	t.Helper()
	var focus []string
	for _, s := range failed {
		focus = append(focus, "--ginkgo.focus", regexp.QuoteMeta(s.name()))
	}
	overlayfs := map[string]string{}
	for _, s := range critest(t, nodeForCritest(t, node.Options{Stock: true}), focus...) {
		overlayfs[s.name()] = s.State
	}
	for _, s := range failed {
		t.Errorf("%s: %s (with overlayfs: %s)\n%s", s.name(), s.State, overlayfs[s.name()], s.Failure.Message)
	}
}

// spec is a spec in ginkgo's JSON report (ginkgo/v2/types, SpecReport).
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeText            string
	LeafNodeType            string // "It", or "BeforeSuite" and others for code outside of specs
	State                   string
	Failure                 struct{ Message string }
}

func (s spec) name() string {
	return strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
}

// critest runs the selected specs, without those of notRun. It returns the specs that ran
// or skipped themselves, and failures outside of specs.
func critest(t *testing.T, n *node.Node, args ...string) []spec {
	t.Helper()
	report := filepath.Join(t.TempDir(), "report.json")
	dir := critestDir(n)
	// Ginkgo's time-out is a minute before that of Critest, so that the report names the
	// spec that was running.
	args = append(args, "--ginkgo.no-color", "--ginkgo.timeout", "9m", "--ginkgo.json-report", report)
	for _, pattern := range notRun {
		args = append(args, "--ginkgo.skip", pattern)
	}
	out, runErr := n.Critest([]string{"TMPDIR=" + dir, "PATH=" + filepath.Join(dir, "bin") + ":" + os.Getenv("PATH")}, args...)
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("critest wrote no report: %v\n%s", runErr, out)
	}
	var suites []struct{ SpecReports []spec }
	check(t, json.Unmarshal(text, &suites))
	var specs []spec
	failed := false
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			bad := s.State != "passed" && s.State != "skipped"
			// A spec that was not chosen is skipped too, but without a message.
			if bad || s.LeafNodeType == "It" && (s.State == "passed" || s.Failure.Message != "") {
				specs = append(specs, s)
			}
			failed = failed || bad
		}
	}
	if runErr != nil && !failed {
		t.Fatalf("critest failed, but none of its specs: %v\n%s", runErr, out)
	}
	return specs
}

// critestDir is the directory for critest's temporary files. Stop unmounts and removes it.
func critestDir(n *node.Node) string { return filepath.Join(n.Dir, "critest") }

// nodeForCritest starts a node with the images of critest. containerd pulls those of the
// public registries from the node's registry.
func nodeForCritest(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	hosts := t.TempDir()
	o.ContainerdConfig = fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '%s'\n", hosts)
	n := node.ForTest(t, o)
	for _, host := range []string{"gcr.io", "k8s.gcr.io", "registry.k8s.io"} {
		check(t, os.Mkdir(filepath.Join(hosts, host), 0o755))
		check(t, os.WriteFile(filepath.Join(hosts, host, "hosts.toml"), fmt.Appendf(nil, "server = 'http://%s'\n", n.Registry), 0o644))
	}
	layer := standInFiles(t, n)
	for name, config := range standIns {
		image, err := pack.Image(config, false, layer)
		check(t, err)
		repo, tag, _ := strings.Cut(name, ":")
		_, err = image.Push(t.Context(), n.Registry, repo, tag)
		check(t, err)
	}
	check(t, os.MkdirAll(filepath.Join(critestDir(n), "bin"), 0o711))
	removeSharedMemory(t, n)
	return n
}

// standIns are the images of critest by repository and tag, since their registries may be
// out of reach. They consist of busybox and what the specs need: a user, a server, or just
// an image ID of its own.
var standIns = map[string]ocispec.ImageConfig{
	"e2e-test-images/busybox:1.29-2": {Cmd: []string{"sh"}},
	"e2e-test-images/nginx:1.14-2":   {Entrypoint: []string{"/usr/sbin/nginx", "80", "master process"}},
	"e2e-test-images/httpd:2.4.39-4": {Entrypoint: []string{"/usr/sbin/httpd", "80"}},
	"e2e-test-images/nonewprivs:1.3": {Entrypoint: []string{"/nonewprivs"}},
	"pause:3.9":                      idle("pause"),

	"k8s-staging-cri-tools/hostnet-nginx-" + runtime.GOARCH + ":latest": {Entrypoint: []string{"/usr/sbin/nginx", "12003"}},
	"k8s-staging-cri-tools/test-image-latest:latest":                    idle("latest"),
	"k8s-staging-cri-tools/test-image-tag:test":                         idle("test"),
	"k8s-staging-cri-tools/test-image-tag:all":                          idle("all"),
	"k8s-staging-cri-tools/test-image-1:latest":                         idle("1"),
	"k8s-staging-cri-tools/test-image-2:latest":                         idle("2"),
	"k8s-staging-cri-tools/test-image-3:latest":                         idle("3"),
	"k8s-staging-cri-tools/test-image-tags:1":                           idle("tags"),
	"k8s-staging-cri-tools/test-image-tags:2":                           idle("tags"),
	"k8s-staging-cri-tools/test-image-tags:3":                           idle("tags"),
	"k8s-staging-cri-tools/test-image-user-uid:latest":                  {User: "1002"},
	"k8s-staging-cri-tools/test-image-user-uid-group:latest":            {User: "1003:users"},
	"k8s-staging-cri-tools/test-image-user-username:latest":             {User: "www-data"},
	"k8s-staging-cri-tools/test-image-user-username-group:latest":       {User: "www-data:www-data"},
	"k8s-staging-cri-tools/test-image-predefined-group:latest":          {User: "1000"},
}

// idle is the config of an image that waits; the label gives it its own ID.
func idle(name string) ocispec.ImageConfig {
	return ocispec.ImageConfig{Cmd: []string{"sleep", "1000"}, Labels: map[string]string{"name": name}}
}

// scripts are programs of the stand-ins that busybox does not have.
var scripts = map[string]string{
	// The specs look for these names in the process list and in the log.
	"usr/sbin/nginx": server,
	"usr/sbin/httpd": server,
	// The guest is setuid and /root belongs to root, so a successful write there means that
	// the program runs as root.
	"nonewprivs": `#!/bin/sh
uid=$(id -u)
[ "$(/guest write /root/file)" = written ] && uid=0
echo "Effective uid: $uid"
`,
	"bin/ipcs":  "#!/bin/sh\nexec cat /proc/sysvipc/shm\n",
	"bin/pgrep": "#!/bin/sh\nexec pidof \"$@\"\n",
}

const server = `#!/bin/sh
echo $$ >/var/run/${0##*/}.pid
echo ${0##*/}
httpd -f -p "$1" -h /var/www
`

// standInFiles returns the root file system of all stand-ins.
func standInFiles(t *testing.T, n *node.Node) []byte {
	t.Helper()
	const busybox = "/bin/busybox" // Debian's package busybox-static
	applets, err := exec.CommandContext(t.Context(), busybox, "--list").Output()
	check(t, err)
	program, err := os.ReadFile(busybox)
	check(t, err)
	guest, err := n.GuestProgram()
	check(t, err)

	var members []pack.Member
	add := func(name string, mode int64, text string) {
		members = append(members, pack.Member{Header: tar.Header{Name: name, Mode: mode}, Data: []byte(text)})
	}
	for _, dir := range []string{"bin/", "etc/", "usr/", "usr/sbin/", "var/", "var/run/", "var/www/"} {
		add(dir, 0o755, "")
	}
	add("root/", 0o700, "")
	add("tmp/", 0o1777, "")
	add("bin/busybox", 0o755, string(program))
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			members = append(members, pack.Member{Header: tar.Header{Name: "bin/" + applet, Mode: 0o755, Typeflag: tar.TypeLink, Linkname: "bin/busybox"}})
		}
	}
	for name, text := range scripts {
		add(name, 0o755, text)
	}
	add("guest", 0o4755, string(guest))
	add("etc/passwd", 0o644, `root:x:0:0::/root:/bin/sh
www-data:x:33:33::/var/www:/bin/sh
default-user:x:1000:1000::/:/bin/sh
nobody:x:65534:65534::/:/bin/sh
`)
	add("etc/group", 0o644, `root:x:0:
www-data:x:33:
users:x:100:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nogroup:x:65534:
`)
	add("var/www/index.html", 0o644, "It works!\n")
	layer, err := pack.TarOf(members...)
	check(t, err)
	return layer
}

// removeSharedMemory removes at the end of the test the shared memory segments that specs
// in the host's IPC namespace create with ipcmk and do not remove.
func removeSharedMemory(t *testing.T, n *node.Node) {
	t.Helper()
	made := filepath.Join(critestDir(n), "ipcmk.log")
	script := fmt.Sprintf("#!/bin/sh\n/usr/bin/ipcmk \"$@\" | tee -a '%s'\n", made)
	check(t, os.WriteFile(filepath.Join(critestDir(n), "bin", "ipcmk"), []byte(script), 0o755))
	t.Cleanup(func() {
		text, err := os.ReadFile(made)
		if errors.Is(err, fs.ErrNotExist) {
			return // these specs did not run
		}
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(text)) {
			id, err := strconv.Atoi(strings.TrimPrefix(strings.TrimSpace(line), "Shared memory id: "))
			if err == nil {
				_, err = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
			}
			if err != nil {
				t.Errorf("remove the segment of ipcmk (%q): %v", line, err)
			}
		}
	})
}

// removeNewCgroup removes at the end of the test the parent control group of pods that name
// none, like critest's. It keeps the group if it existed before or if other pods use it.
func removeNewCgroup(t *testing.T) {
	t.Helper()
	find := func() []string {
		found, err := filepath.Glob("/sys/fs/cgroup/*/k8s.io")
		check(t, err)
		unified, err := filepath.Glob("/sys/fs/cgroup/k8s.io")
		check(t, err)
		return append(found, unified...)
	}
	before := find()
	t.Cleanup(func() {
		for _, dir := range find() {
			if slices.Contains(before, dir) {
				continue
			}
			if err := os.Remove(dir); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	})
}
