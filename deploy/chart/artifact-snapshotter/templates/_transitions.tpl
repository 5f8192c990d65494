{{/*
SPDX-FileCopyrightText: The artifact-snapshotter Authors
SPDX-License-Identifier: Apache-2.0

What a node is set up by. It is kept in an annotation of the ConfigMap, so that an upgrade knows
what the nodes have. `helm template` cannot look it up, nor can what is built on it, such as Argo
CD: nothing is refused there.
*/}}
{{- define "setup" -}}
{{- $setup := pick .Values "scope" "daemon" "runtimeHandler" "root" "state" "uninstall" -}}
{{- $_ := set $setup "frontends.snapshotter" .Values.frontends.snapshotter -}}
{{- $_ := set $setup "containerd.config" .Values.containerd.config -}}
{{- $_ := set $setup "containerd.root" .Values.containerd.root -}}
{{- toJson $setup -}}
{{- end -}}

{{/* Fails if the nodes cannot go from what they have to these values. */}}
{{- define "checkTransition" -}}
{{- $was := dig "metadata" "annotations" "artifact-snapshotter.dev/setup" "" (lookup "v1" "ConfigMap" .Release.Namespace (include "fullname" .)) -}}
{{- if $was -}}
{{- $was = fromJson $was -}}
{{- $set := lookup "apps/v1" "DaemonSet" .Release.Namespace (include "fullname" .) -}}
{{- $ready := dig "status" "numberReady" 0 $set | int -}}
{{- $nodes := dig "status" "desiredNumberScheduled" 0 $set | int -}}
{{- $updated := dig "status" "updatedNumberScheduled" 0 $set | int -}}
{{- $done := and $was.uninstall (eq $ready $nodes) (eq $updated $nodes) -}}
{{- $installed := index $was "frontends.snapshotter" -}}
{{- range $name, $value := fromJson (include "setup" .) -}}
{{- $before := index $was $name -}}
{{- if and (ne $name "uninstall") (ne $value $before) (not $done) -}}
{{- if and $installed (or (not $was.uninstall) $.Values.uninstall) -}}
{{- fail (printf "%s is %v on the nodes and cannot become %v while they have the snapshotter: first upgrade with the values of before and uninstall=true, and wait for `kubectl --namespace %s rollout status daemonset/%s`" $name $before $value $.Release.Namespace (include "fullname" $)) -}}
{{- else if $installed -}}
{{- fail (printf "%s cannot become %v yet: the snapshotter is still being uninstalled, and %d of %d nodes are done" $name $value $ready $nodes) -}}
{{- else if or (eq $name "root") (eq $name "state") -}}
{{- fail (printf "%s is %v on the nodes and cannot become %v: delete the pods that have artifacts, `helm uninstall` and install again" $name $before $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
