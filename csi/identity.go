// SPDX-FileCopyrightText: The artifact-snapshotter Authors
// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"

	csiapi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// GetPluginInfo implements the Identity service.
func (d *Driver) GetPluginInfo(context.Context, *csiapi.GetPluginInfoRequest) (*csiapi.GetPluginInfoResponse, error) {
	return &csiapi.GetPluginInfoResponse{Name: Name, VendorVersion: d.Version}, nil
}

// GetPluginCapabilities implements the Identity service: there is no controller.
func (d *Driver) GetPluginCapabilities(context.Context, *csiapi.GetPluginCapabilitiesRequest) (*csiapi.GetPluginCapabilitiesResponse, error) {
	return &csiapi.GetPluginCapabilitiesResponse{}, nil
}

// Probe implements the Identity service.
func (d *Driver) Probe(context.Context, *csiapi.ProbeRequest) (*csiapi.ProbeResponse, error) {
	return &csiapi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}
