{{/*
SPDX-FileCopyrightText: The artifact-snapshotter Authors
SPDX-License-Identifier: Apache-2.0
*/}}

{{- define "fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/*
The common parent directory of the daemon's root and of the runtime's blobs. It is one mount in
the daemon's container, because link(2) refuses hard links between two mounts (EXDEV), even of
the same file system.
*/}}
{{- define "hostRoot" -}}
{{- $common := splitList "/" .Values.root -}}
{{- range $path := prepend .Values.blobRoots .Values.containerd.root -}}
{{- $other := splitList "/" $path -}}
{{- $until := 0 -}}
{{- range $i, $name := $common -}}
{{- if and (eq $i $until) (lt $i (len $other)) (eq $name (index $other $i)) -}}
{{- $until = add1 $until | int -}}
{{- end -}}
{{- end -}}
{{- $common = slice $common 0 $until -}}
{{- end -}}
{{- join "/" $common -}}
{{- end -}}

{{/* Fails with the reason if values contradict each other. */}}
{{- define "check" -}}
{{- if not .Values.image.repository -}}
{{- fail "image.repository is required: push the image of `make image` to your registry and set it" -}}
{{- end -}}
{{- $front := .Values.frontends -}}
{{- if not (or $front.csi $front.nri $front.snapshotter) -}}
{{- fail "frontends: at least one of csi, nri and snapshotter must be true" -}}
{{- end -}}
{{- if not $front.snapshotter -}}
{{- if eq .Values.scope "node" -}}
{{- fail "scope: node is for frontends.snapshotter, which is false" -}}
{{- end -}}
{{- if eq .Values.daemon "systemd" -}}
{{- fail "daemon: systemd needs frontends.snapshotter: without it, run the daemon as a service by hand (docs/nri.md)" -}}
{{- end -}}
{{- if .Values.uninstall -}}
{{- fail "uninstall is for frontends.snapshotter: nothing else changes the configuration of a node, so that `helm uninstall` is enough" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.scope "node") (eq .Values.daemon "pod") -}}
{{- fail "scope: node needs daemon: systemd: after a reboot the daemon's own pod could not start without the snapshotter that it provides" -}}
{{- end -}}
{{- if eq .Values.daemon "pod" -}}
{{- $hostRoot := include "hostRoot" . -}}
{{- if not $hostRoot -}}
{{- fail (printf "root (%s), containerd.root (%s) and blobRoots have no directory in common but /, and the daemon's container must have them in one mount: choose a root beside or below %[2]s" .Values.root .Values.containerd.root) -}}
{{- end -}}
{{- if hasPrefix (printf "%s/" .Values.state) (printf "%s/" $hostRoot) -}}
{{- fail (printf "state (%s) must not contain root and the runtime's blobs (%s): choose a directory of its own, as /run/artifact-snapshotter" .Values.state $hostRoot) -}}
{{- end -}}
{{- if and (hasPrefix "unix://" .Values.metrics.address) (not (hasPrefix (printf "unix://%s/" .Values.state) .Values.metrics.address)) -}}
{{- fail (printf "metrics.address (%s): a socket outside of state (%s) could not be seen outside of the daemon's container" .Values.metrics.address .Values.state) -}}
{{- end -}}
{{- else if .Values.env -}}
{{- fail "env is for daemon: pod; give the service of the host a drop-in with Environment= instead" -}}
{{- end -}}
{{- end -}}

{{/* Flags of both install and uninstall. */}}
{{- define "installFlags" -}}
- --host=/host
- --config=/etc/artifact-snapshotter/config.toml
- --scope={{ .Values.scope }}
{{- if eq .Values.scope "runtime-handler" }}
- --runtime-handler={{ .Values.runtimeHandler }}
{{- end }}
{{- with .Values.containerd.config }}
- --containerd-config={{ . }}
{{- end }}
{{- if eq .Values.daemon "pod" }}
- --no-service
{{- end }}
{{- end -}}

{{- define "container" -}}
image: {{ include "image" . }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end -}}

{{/*
It runs as the host's root user, but is not privileged: it changes its root directory to the
host's, writes files of root there, and talks to systemd and containerd over their sockets.
*/}}
{{- define "installer" -}}
{{ include "container" . }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    add: [CHOWN, DAC_OVERRIDE, FOWNER, SYS_CHROOT]
  # The default profiles do not let a container talk to the host's systemd.
  appArmorProfile:
    type: Unconfined
  seLinuxOptions:
    type: spc_t
volumeMounts:
  - name: config
    mountPath: /etc/artifact-snapshotter
    readOnly: true
  # With None the container would hold a copy of every mount of the host, and the host
  # could not detach volumes.
  - name: host
    mountPath: /host
    mountPropagation: HostToContainer
{{- end -}}

{{/* The daemon's container, without its name and probes. */}}
{{- define "daemon" -}}
{{ include "container" . }}
args: [serve]
{{- if or .Values.frontends.csi .Values.env }}
env:
  {{- if .Values.frontends.csi }}
  # The node's certificate authorities.
  - name: SSL_CERT_DIR
    value: /host/etc/ssl/certs:/host/etc/pki/ca-trust/extracted/pem
  {{- end }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
securityContext:
  # Only privileged containers can make mounts that the host sees.
  privileged: true
  readOnlyRootFilesystem: true
# The default, /dev/termination-log, would be a file in the host's /dev.
terminationMessagePath: /termination-log
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  - name: config
    mountPath: /etc/artifact-snapshotter
    readOnly: true
  # All paths are the same as on the host, because the daemon passes them to containerd.
  - name: root
    mountPath: {{ include "hostRoot" . }}
    mountPropagation: HostToContainer
  - name: state
    mountPath: {{ .Values.state }}
    mountPropagation: Bidirectional
  # The directory instead of the socket, which containerd creates anew when it starts.
  - name: containerd
    mountPath: {{ dir .Values.containerd.socket }}
    mountPropagation: HostToContainer
    readOnly: true
  # A container's own /dev does not have loop devices that are created later.
  - name: dev
    mountPath: /dev
    mountPropagation: HostToContainer
  {{- if .Values.frontends.nri }}
  - name: nri
    mountPath: /var/run/nri
    mountPropagation: HostToContainer
    readOnly: true
  {{- end }}
  {{- if .Values.frontends.csi }}
  - name: kubelet
    mountPath: {{ .Values.kubeletRoot }}
    mountPropagation: Bidirectional
  # Mirrors, and the node's certificate authorities.
  - name: etc
    mountPath: /host/etc
    mountPropagation: HostToContainer
    readOnly: true
  {{- end }}
{{- end -}}

{{/* The lines of a table of TOML. */}}
{{- define "keys" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- $lines = append $lines (printf "%s = %s" $key (toJson $value)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{/* Not empty if the chart removes the startup taint. */}}
{{- define "untaint" -}}
{{- if and .Values.startupTaint.remove (not .Values.uninstall) -}}true{{- end -}}
{{- end -}}

{{/* The container that only waits, without its name and probe. It removes the startup taint. */}}
{{- define "stay" -}}
{{ include "container" . }}
args:
  - pause
  {{- if include "untaint" . }}
  - --untaint=$(NODE_NAME)
  - --address={{ .Values.state }}/artifact-snapshotter.sock
  {{- end }}
{{- if include "untaint" . }}
env:
  - name: NODE_NAME
    valueFrom:
      fieldRef:
        fieldPath: spec.nodeName
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- if not .Values.uninstall }}
volumeMounts:
  - name: state
    mountPath: {{ .Values.state }}
    mountPropagation: HostToContainer
    readOnly: true
  {{- if include "untaint" . }}
  - name: token
    mountPath: /var/run/secrets/kubernetes.io/serviceaccount
    readOnly: true
  {{- end }}
{{- end }}
{{- end -}}
