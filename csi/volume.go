// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/artifact-snapshotter/artifact-snapshotter/pull"
	"github.com/artifact-snapshotter/artifact-snapshotter/pull/credentials"
)

// The attributes of a volume: volumeAttributes in a pod or in a PersistentVolume.
const (
	attributeReference  = "reference"
	attributePullPolicy = "pullPolicy"
	// kubernetes is the prefix of the attributes that kubelet adds
	// (https://kubernetes-csi.github.io/docs/pod-info.html).
	kubernetes   = "csi.storage.k8s.io/"
	podNamespace = kubernetes + "pod.namespace"
	podName      = kubernetes + "pod.name"
	podUID       = kubernetes + "pod.uid"
	// secretKey is the key of a secret of the type kubernetes.io/dockerconfigjson.
	secretKey = ".dockerconfigjson" //nolint:gosec // the name of a key, and no secret
)

// volume is a request to publish a volume.
type volume struct {
	id, target string
	reference  pull.Reference
	policy     pull.Policy
	// pod is for people: its namespace and name. uid is "" if kubelet does not say.
	pod, uid string
	secret   credentials.Config
}

// parse returns what the request asks for. An error is errdefs.ErrInvalidArgument, and does not
// say what is in a secret.
func parse(req *csiapi.NodePublishVolumeRequest) (v volume, err error) {
	if v.target, err = checkPath("target_path", req.GetTargetPath()); err != nil {
		return v, err
	}
	if v.id = req.GetVolumeId(); v.id == "" {
		return v, invalid("volume_id is missing")
	}
	capability := req.GetVolumeCapability()
	switch {
	case capability == nil:
		return v, invalid("volume_capability is missing")
	case capability.GetBlock() != nil:
		return v, invalid("volumes of artifacts are file systems, not block devices: set volumeMode: Filesystem")
	case !readOnly(req):
		return v, invalid("volumes of artifacts are read-only: set readOnly: true beside driver: " + Name)
	}
	attributes := req.GetVolumeContext()
	for _, key := range slices.Sorted(maps.Keys(attributes)) {
		switch {
		case key == attributeReference, key == attributePullPolicy, strings.HasPrefix(key, kubernetes):
		case strings.HasPrefix(key, "storage.kubernetes.io/"): // of a provisioner
		default:
			// A newer version may know it, and ignoring it could show the wrong files.
			return v, invalid("the volume attribute %.100q is not known; known are %s and %s", key, attributeReference, attributePullPolicy)
		}
	}
	if attributes[attributeReference] == "" {
		return v, invalid("the volume attribute %s is missing: set it to a full reference like registry.example.com/models/llama:v1", attributeReference)
	}
	if v.reference, err = pull.ParseReference(attributes[attributeReference]); err != nil {
		return v, err
	}
	if v.policy, err = v.reference.ParsePolicy(attributes[attributePullPolicy]); err != nil {
		return v, err
	}
	if secrets := req.GetSecrets(); len(secrets) > 0 {
		text, ok := secrets[secretKey]
		if !ok {
			return v, invalid("the secret of nodePublishSecretRef has no key %s: it must have the type kubernetes.io/dockerconfigjson", secretKey)
		}
		if v.secret, err = credentials.Parse([]byte(text)); err != nil {
			return v, fmt.Errorf("the secret of nodePublishSecretRef: %w", err)
		}
	}
	v.uid = attributes[podUID]
	if v.pod = attributes[podName]; v.pod != "" {
		v.pod = attributes[podNamespace] + "/" + v.pod
	}
	return v, nil
}

// readOnly reports whether the request is for a volume that nobody writes to.
func readOnly(req *csiapi.NodePublishVolumeRequest) bool {
	switch req.GetVolumeCapability().GetAccessMode().GetMode() {
	case csiapi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csiapi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return true
	default:
		return req.GetReadonly()
	}
}

// checkPath checks a path that kubelet says.
func checkPath(what, path string) (string, error) {
	if path == "" {
		return "", invalid("%s is missing", what)
	}
	if !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
		return "", invalid("%s %.255q is not the absolute path of a volume", what, path)
	}
	return filepath.Clean(path), nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
