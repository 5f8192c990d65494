// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/artifact-snapshotter/artifact-snapshotter/integration/node"
	"github.com/artifact-snapshotter/artifact-snapshotter/integration/process"
)

// maxMachines is how many tokens there are: the API server reads them once.
const maxMachines = 8

const adminToken = "token-admin"

// startPart starts a program in the cluster's network.
func (c *Cluster) startPart(name string, command ...string) error {
	p, err := process.Start(c.ctx, process.Options{
		Name: name,
		Args: append([]string{"nsenter", "--net=" + c.network.path()}, command...),
		Env:  c.env(),
		Log:  c.path("logs/" + name),
	})
	if err == nil {
		c.parts[name] = p
	}
	return err
}

// startControlPlane returns when the API server is ready and the others have started.
func (c *Cluster) startControlPlane() error {
	tokens := adminToken + ",admin,admin,system:masters\n"
	for i := range maxMachines {
		name := machineName(i)
		tokens += fmt.Sprintf("%s,system:node:%s,%s,system:nodes\n", machineToken(name), name, name)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	keyText := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	if err := errors.Join(
		os.WriteFile(c.path("tokens.csv"), []byte(tokens), 0o600),
		os.WriteFile(c.path("service-accounts.key"), keyText, 0o600),
	); err != nil {
		return err
	}
	program := c.tools + "/kubernetes"
	if err := c.startPart("etcd", program, "etcd", "--data-dir", c.path("etcd"), "--log-level", "warn", "--unsafe-no-fsync"); err != nil {
		return err
	}
	if err := c.startPart("kube-apiserver", program, "kube-apiserver",
		"--etcd-servers", "http://127.0.0.1:2379",
		"--bind-address", "0.0.0.0", "--advertise-address", apiAddress, "--secure-port", "443",
		"--cert-dir", c.path("certs"), "--token-auth-file", c.path("tokens.csv"),
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction",
		"--kubelet-preferred-address-types", "InternalIP",
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file", c.path("service-accounts.key"),
		"--service-account-signing-key-file", c.path("service-accounts.key"),
		"--service-cluster-ip-range", "10.96.0.0/16",
		"--allow-privileged", "--profiling=false"); err != nil {
		return err
	}
	if err := c.await("the API server", c.ready); err != nil {
		return err
	}
	admin, err := c.kubeconfig(adminToken)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.path("admin.conf"), []byte(admin), 0o600); err != nil {
		return err
	}
	return errors.Join(
		c.startPart("kube-controller-manager", program, "kube-controller-manager",
			"--kubeconfig", c.path("admin.conf"), "--leader-elect=false", "--cert-dir", c.path("certs"),
			"--service-account-private-key-file", c.path("service-accounts.key"), "--root-ca-file", c.path("authority.crt"),
			"--node-monitor-grace-period", "16s"), // 50 s: a machine that is off is noticed sooner
		c.startPart("kube-scheduler", program, "kube-scheduler",
			"--kubeconfig", c.path("admin.conf"), "--leader-elect=false", "--cert-dir", c.path("certs")),
	)
}

// ready makes the client when the API server has made its certificate, and asks whether
// it is ready.
func (c *Cluster) ready() error {
	if err := errors.Join(c.parts["etcd"].Ended(), c.parts["kube-apiserver"].Ended()); err != nil {
		return err
	}
	if c.client == nil {
		text, err := os.ReadFile(c.path("certs/apiserver.crt"))
		if err != nil {
			return err
		}
		// The server's certificate, then that of the authority, which signs no other.
		_, authority := pem.Decode(text)
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(authority) {
			return errors.New("the API server's certificate is not complete yet")
		}
		if err := os.WriteFile(c.path("authority.crt"), authority, 0o644); err != nil {
			return err
		}
		c.client = &http.Client{
			Timeout:   30 * time.Second,
			Transport: &http.Transport{DialContext: c.network.dial, TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
		}
	}
	_, err := c.request(http.MethodGet, "/readyz", nil)
	return err
}

// kubeconfig is the content of a kubeconfig with a token.
func (c *Cluster) kubeconfig(token string) (string, error) {
	authority, err := os.ReadFile(c.path("authority.crt"))
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://%s", certificate-authority-data: %s}}]
users: [{name: test, user: {token: %s}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`, apiAddress, base64.StdEncoding.EncodeToString(authority), token), err
}

const registryConfig = `version: 0.1
log:
  level: warn
  accesslog: {disabled: true}
storage:
  delete: {enabled: true}
  filesystem: {rootdirectory: %s}
http:
  addr: %s:80
`

const privateConfig = registryConfig + `auth:
  htpasswd: {realm: test, path: %s}
`

// StartRegistries starts both registries.
func (c *Cluster) StartRegistries() error {
	content, users := c.path("registry"), c.path("htpasswd")
	if err := errors.Join(
		os.WriteFile(c.path("registry.yaml"), fmt.Appendf(nil, registryConfig, content, registryAddress), 0o644),
		os.WriteFile(c.path("private.yaml"), fmt.Appendf(nil, privateConfig, content, privateAddress, users), 0o644),
		os.WriteFile(users, []byte(node.PrivateUsers), 0o644),
		c.startPart("registry", c.tools+"/registry", "serve", c.path("registry.yaml")),
		c.startPart("private", c.tools+"/registry", "serve", c.path("private.yaml")),
	); err != nil {
		return err
	}
	return c.await("the registries", func() error {
		for _, address := range []string{registryAddress, privateAddress} {
			conn, err := c.network.dial(c.ctx, "tcp", address+":80")
			if err != nil {
				return err
			}
			_ = conn.Close()
		}
		return nil
	})
}

// StopRegistries makes both registries unreachable.
func (c *Cluster) StopRegistries() error {
	return errors.Join(c.parts["registry"].Stop(syscall.SIGTERM), c.parts["private"].Stop(syscall.SIGTERM))
}

func machineName(i int) string { return fmt.Sprintf("n%d", i+1) }

func machineToken(name string) string { return strings.Join([]string{"token", name}, "-") }
