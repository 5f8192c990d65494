// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"maps"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/artifact-snapshotter/artifact-snapshotter/client"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/pack"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/treelist"
)

// unpack can be killed at any time. It leaves a lease that expires, and a snapshot that the
// next run reuses or a garbage collection deletes.
func TestUnpackCanBeKilledAtAnyTime(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	ref := pulled(t, n, writeModel(t), pack.TarGzip)
	c := connect(t, n)
	ctx := c.Context(t.Context())
	image, err := c.Image(t.Context(), ref)
	check(t, err)
	began := time.Now()
	name := unpack(t, n, ref)
	duration := time.Since(began)
	const label = "containerd.io/gc.ref.snapshot.artifact"
	leased := func() []leases.Lease {
		all, err := c.LeasesService().List(ctx)
		check(t, err)
		return all
	}
	killed, left := 0, 0
	for round := range 60 {
		// Restore the initial state.
		_, err := c.ContentStore().Update(ctx, content.Info{Digest: image.Manifest, Labels: map[string]string{label: ""}}, "labels."+label)
		check(t, err)
		collect(t, c)
		if there := snapshotsOf(t, n); len(there) > 0 {
			t.Fatalf("round %d begins with the snapshots %v", round, there)
		}

		cmd, err := n.ArtifactCommand("unpack", ref)
		check(t, err)
		check(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		span := duration
		if round%4 >= 2 { // kill it during its lease, which is a small part of the time
			for len(leased()) == 0 && len(ended) == 0 {
			}
			span /= 10
		}
		select {
		case err = <-ended:
		case <-time.After(rand.N(span)):
			_ = cmd.Process.Kill()
			err = <-ended
		}
		if err != nil {
			killed++
		}

		if round%2 == 0 {
			if again := unpack(t, n, ref); again != name {
				t.Errorf("the second run returned the snapshot %s, want %s", again, name)
			}
		}
		// containerd may still be processing the last request of the killed run.
		waitFor(t, "only the snapshot that the manifest references to be left", func() bool {
			all := leased()
			left += len(all)
			for _, lease := range all {
				expire(t, c, lease)
			}
			collect(t, c)
			tied, err := c.Unpacked(t.Context(), image)
			check(t, err)
			want := map[string]string{}
			if tied != "" {
				want[tied] = "Committed"
			}
			all, got := leased(), snapshotsOf(t, n)
			clean := len(all) == 0 && maps.Equal(got, want) && (round%2 != 0 || tied == name)
			if !clean {
				t.Logf("round %d: leases %v, snapshots %v, the manifest references %q", round, all, got, tied)
			}
			return clean
		})
	}
	t.Logf("%d of 60 runs were killed and left %d leases", killed, left)
	if killed == 0 || left == 0 {
		t.Error("no run was killed during its lease")
	}
}

// expire simulates the expiration of the lease: it replaces the lease by an expired one
// with the same resources.
func expire(t *testing.T, c *client.Client, lease leases.Lease) {
	t.Helper()
	ends, err := time.Parse(time.RFC3339, lease.Labels["containerd.io/gc.expire"])
	if in := time.Until(ends); err != nil || in > 5*time.Minute {
		t.Errorf("lease %s ends in %s, %v; want less than 5 minutes", lease.ID, in, err)
	}
	ctx := c.Context(t.Context())
	resources, err := c.LeasesService().ListResources(ctx, lease)
	if errdefs.IsNotFound(err) { // it was deleted in the meantime
		return
	}
	check(t, err)
	ended, err := c.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(-time.Second))
	check(t, err)
	for _, r := range resources {
		if err := c.LeasesService().AddResource(ctx, ended, r); !errdefs.IsNotFound(err) { // containerd may have deleted the lease
			check(t, err)
		}
	}
	if err := c.LeasesService().Delete(ctx, lease); !errdefs.IsNotFound(err) {
		check(t, err)
	}
}

func TestUnpackGoesOnWhenTheDaemonIsKilled(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{DaemonConfig: "max_expansion = 100000\ndecompress_on_pull = false\n"})
	before := daemonUsage(t, n)
	layer, want := zeros(t, "zeros")
	ref := push(t, n, "killed", layer)
	cmd, err := n.ArtifactCommand("unpack", ref)
	check(t, err)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	check(t, cmd.Start())
	waitFor(t, "the daemon to decompress", func() bool { return len(halfDone(t, n)) > 0 })
	check(t, n.KillDaemon())
	check(t, n.StartDaemon())
	if err := cmd.Wait(); err != nil {
		t.Fatalf("unpack: %v\n%s", err, errs.String())
	}
	name := strings.TrimSpace(out.String())
	if got, want := snapshotsOf(t, n), map[string]string{name: "Committed"}; !maps.Equal(got, want) {
		t.Errorf("the snapshots are %v, want %v", got, want)
	}
	wantSnapshot(t, n, name, []treelist.Entry{want})
	removeImage(t, n, ref)
	wantUsage(t, n, before)
}

func TestUnpackReportsEachProblem(t *testing.T) {
	t.Parallel()
	n := node.ForTest(t, node.Options{})
	stock := node.ForTest(t, node.Options{Stock: true})
	good := pulled(t, n, writeModel(t), pack.Raw)
	h := hostile{t, t.TempDir()}
	bad := push(t, n, "bad", h.raw("../../etc/passwd"))
	other := writeModel(t, "src/__init__.py")
	there := n.Registry + "/models/elsewhere:latest"
	model, err := pack.Model(other, pack.Options{Form: pack.Raw})
	check(t, err)
	_, err = model.Push(t.Context(), n.Registry, "models/elsewhere", "latest")
	check(t, err)
	_, err = n.Tool("ctr", "--address", n.Address, "--namespace", "elsewhere", "images", "pull", "--plain-http", there)
	check(t, err)
	_, err = model.Push(t.Context(), stock.Registry, "models/elsewhere", "latest")
	check(t, err)
	onStock := stock.Registry + "/models/elsewhere:latest"
	_, err = stock.Pull(onStock)
	check(t, err)

	none := filepath.Join(t.TempDir(), "none.sock")
	for _, tt := range []struct {
		name string
		node *node.Node
		args []string
		want []string
	}{
		{"an unknown reference", n, []string{"example.com/no/such:model"}, []string{`no image "example.com/no/such:model" in namespace k8s.io`, "pull it"}},
		{"an unknown digest", n, []string{digest.FromString("nothing").String()}, []string{"no image ", " in namespace k8s.io"}},
		{"a wrong namespace", n, []string{there}, []string{"no image ", "in namespace k8s.io; it is in namespace elsewhere: use -n elsewhere"}},
		{"a namespace that does not exist", n, []string{"-n", "k8s", "example.com/no/such:model"}, []string{`containerd has no namespace "k8s"`, "it has elsewhere, k8s.io"}},
		{"no containerd", n, []string{"--address", none, good}, []string{"containerd does not answer on " + none, "no such file or directory"}},
		{"no such snapshotter", stock, []string{onStock}, []string{`containerd has no snapshotter "artifact"`, "`artifact-snapshotter config containerd`"}},
		{"another snapshotter", n, []string{"--snapshotter", "overlayfs", good}, []string{`the snapshotter "overlayfs" is not artifact-snapshotter`}},
		{"a container image", n, []string{n.GuestImage}, []string{n.GuestImage, "is a container image, not an artifact"}},
		{"an artifact that is refused", n, []string{bad}, []string{"layer 0", `path "../../etc/passwd" contains ".."`}},
		{"no argument", n, nil, []string{"unpack requires exactly 1 argument (REF), got 0"}},
		{"an unknown output", n, []string{"--output", "yaml", good}, []string{`--output "yaml" is neither text nor json`}},
	} {
		t.Run(tt.name, func(t *testing.T) { wantUnpackFails(t, tt.node, tt.args, tt.want...) })
	}
	t.Run("no daemon", func(t *testing.T) {
		check(t, n.StopDaemon())
		wantUnpackFails(t, n, []string{good}, "waiting: containerd cannot reach the daemon", "artifact-snapshotter: unpack", "`artifact-snapshotter serve`")
		check(t, n.StartDaemon())
		waitForDaemon(t, n)
		unpack(t, n, good)
	})
}

// wantUnpackFails checks that unpack fails with exit code 1 and one line on standard error
// with all wanted texts, apart from hints, and that it leaves no lease.
func wantUnpackFails(t *testing.T, n *node.Node, args []string, wanted ...string) {
	t.Helper()
	out, errs, err := n.Artifact(append([]string{"unpack"}, args...)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("unpack ends with %v, want exit code 1", err)
	}
	if out != "" || strings.Count(errs, "\n") != 1+strings.Count(errs, "waiting: ") {
		t.Errorf("printed %q and %q, want nothing and one line", out, errs)
	}
	for _, want := range wanted {
		if !strings.Contains(errs, want) {
			t.Errorf("the error does not contain %q: %s", want, errs)
		}
	}
	c := connect(t, n)
	all, err := c.LeasesService().List(c.Context(t.Context()))
	check(t, err)
	for _, lease := range all {
		if lease.Labels["containerd.io/gc.expire"] != "" {
			t.Errorf("the lease %v was not deleted", lease)
		}
	}
}
