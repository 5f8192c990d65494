// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
)

// object is a Kubernetes object or a part of one.
type object map[string]any

// at is the value below the keys, nil if there is none.
func (o object) at(keys ...string) any {
	var value any = map[string]any(o)
	for _, key := range keys {
		m, ok := value.(map[string]any)
		if !ok {
			return nil
		}
		value = m[key]
	}
	return value
}

func (o object) text(keys ...string) string {
	s, _ := o.at(keys...).(string)
	return s
}

func (o object) list(keys ...string) []object {
	items, _ := o.at(keys...).([]any)
	var all []object
	for _, item := range items {
		if m, ok := item.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

// request asks the API server as the cluster's administrator. Answers that are no success
// are errors, with the server's message.
func (c *Cluster) request(method, path string, body any) ([]byte, error) {
	var reader io.Reader = http.NoBody
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		reader = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(c.ctx, method, "https://"+apiAddress+path, reader)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer, err
}

// Get reads the object or list at a path of the API, "/api/v1/…".
func (c *Cluster) Get(path string, into any) error {
	answer, err := c.request(http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(answer, into)
}

// Create creates an object in the list at a path.
func (c *Cluster) Create(path string, o any) error {
	_, err := c.request(http.MethodPost, path, o)
	return err
}

// Kubectl runs kubectl as the cluster's administrator and returns its output. The error
// includes standard error.
func (c *Cluster) Kubectl(args ...string) (string, error) {
	return c.run("nsenter", append([]string{"--net=" + c.network.path(), filepath.Join(c.tools, "kubernetes"), "kubectl"}, args...)...)
}

// Apply applies manifests, YAML or JSON.
func (c *Cluster) Apply(manifests string) error {
	f, err := os.CreateTemp(c.Dir, "apply-")
	if err != nil {
		return err
	}
	_, err = f.WriteString(manifests)
	if err := f.Close(); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	_, err = c.Kubectl("apply", "-f", f.Name())
	return err
}

// Helm runs helm as the cluster's administrator and returns its output. The error
// includes standard error.
func (c *Cluster) Helm(args ...string) (string, error) {
	return c.run("nsenter", append([]string{"--net=" + c.network.path(), filepath.Join(c.tools, "helm")}, args...)...)
}
