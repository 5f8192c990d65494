// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
)

// Release is the name of the chart's release and of its DaemonSet, in the namespace
// Namespace.
const (
	Release   = "artifact-snapshotter"
	Namespace = "kube-system"
)

// BuildImage makes the daemon's image as `make image` does and pushes it with the tag.
func (c *Cluster) BuildImage(tag string) error {
	layout, err := os.MkdirTemp(c.Dir, "image-")
	if err != nil {
		return err
	}
	if _, err := node.BuildImage(c.ctx, layout); err != nil {
		return err
	}
	return c.PushImage(layout, Release+":"+tag)
}

// Upgrade installs the chart in deploy/ or upgrades it, and does not wait for the nodes.
// The values, names as in `helm --set-json` with JSON, replace those of before.
func (c *Cluster) Upgrade(tag string, values map[string]string) error {
	repository, err := node.Repository()
	if err != nil {
		return err
	}
	args := []string{
		"upgrade", "--install", "--reset-values", Release, filepath.Join(repository, "deploy", "chart", "artifact-snapshotter"), "--namespace", Namespace,
		"--set", "image.repository=" + Registry + "/" + Release, "--set", "image.tag=" + tag,
	}
	for name, json := range values {
		args = append(args, "--set-json", name+"="+json)
	}
	_, err = c.Helm(args...)
	return err
}

// Rollout waits until the chart's DaemonSet is as it was last upgraded on all nodes, and
// returns what kubectl says.
func (c *Cluster) Rollout() (string, error) {
	return c.Kubectl("--namespace", Namespace, "rollout", "status", "daemonset/"+Release, "--timeout=300s")
}

// Uninstall uninstalls the chart, which has these values, as docs/install.md says.
func (c *Cluster) Uninstall(tag string, values map[string]string) error {
	if strings.Contains(values["frontends"], `"snapshotter":true`) {
		uninstall := map[string]string{"uninstall": "true"}
		maps.Copy(uninstall, values)
		if err := c.Upgrade(tag, uninstall); err != nil {
			return err
		}
		if _, err := c.Rollout(); err != nil {
			return err
		}
	}
	_, err := c.Helm("uninstall", Release, "--namespace", Namespace, "--wait")
	return err
}
