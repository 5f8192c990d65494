// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package containerdconfig

import (
	_ "embed" // for the template
	"io"
	"strings"
	"text/template"

	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"

	"github.com/artifact-snapshotter/artifact-snapshotter/daemon"
)

var (
	//go:embed containerd.toml.tmpl
	needsFile     string
	needsTemplate = template.Must(template.New("containerd.toml").Parse(needsFile))
)

// Needs is what the daemon needs of containerd's configuration.
type Needs struct {
	Daemon daemon.Config
	// Handler is the runtime handler whose pods use the snapshotter; "" for all pods.
	Handler string
	// MapsOwners says whether the kernel maps the owners of layers for user namespaces
	// ([snapshot.MapsOwners]).
	MapsOwners bool
}

// Write writes the text of a drop-in, with comments.
func (n Needs) Write(w io.Writer) error {
	return needsTemplate.Execute(w, map[string]any{
		"Address":      n.Daemon.SocketAddress(),
		"Root":         n.Daemon.Root,
		"Platform":     platforms.DefaultString(),
		"Handler":      n.Handler,
		"Capabilities": n.Daemon.Overlayfs.Capabilities(n.MapsOwners),
	})
}

// Tables are the tables of that text.
func (n Needs) Tables() (tables map[string]any, err error) {
	var text strings.Builder
	if err := n.Write(&text); err != nil {
		return nil, err
	}
	err = toml.Unmarshal([]byte(text.String()), &tables)
	return tables, err
}
