// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"

	"github.com/containerd/log"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Registration tells kubelet of the driver, when kubelet finds its socket in the directory
// plugins_registry
// (https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/device-plugins/#device-plugin-registration
// has the like for devices).
type Registration struct {
	registerapi.UnimplementedRegistrationServer
	// Endpoint is the path of the socket of the CSI services.
	Endpoint string
	// Registered is told whether kubelet accepts the driver.
	Registered func(bool)
}

// GetInfo implements registerapi.RegistrationServer.
func (r *Registration) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: Name, Endpoint: r.Endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements registerapi.RegistrationServer.
func (r *Registration) NotifyRegistrationStatus(ctx context.Context, status *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	if status.GetPluginRegistered() {
		log.G(ctx).Info("kubelet has registered the CSI driver")
	} else {
		log.G(ctx).WithField("error", status.GetError()).Error("kubelet has not registered the CSI driver")
	}
	r.Registered(status.GetPluginRegistered())
	return &registerapi.RegistrationStatusResponse{}, nil
}
