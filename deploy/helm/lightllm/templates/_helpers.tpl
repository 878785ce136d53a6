{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{- define "lightllm.selector" -}}
app.kubernetes.io/name: lightllm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Those pods of a replica that take requests; the others only compute. */}}
{{- define "lightllm.server" -}}
{{ include "lightllm.selector" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "lightllm.metadata" -}}
name: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "lightllm.labels" . | nindent 2 }}
{{- end }}

{{/* LeaderWorkerSet makes a headless Service of its own name, which must not be the release's. */}}
{{- define "lightllm.workload" -}}
{{ .Release.Name }}{{ if gt (int .Values.hosts) 1 }}-hosts{{ end }}
{{- end }}

{{- define "lightllm.labels" -}}
{{ include "lightllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "lightllm.image" -}}
{{- with .Values.image -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ with .digest }}@{{ . }}{{ end }}
{{- end }}
{{- end }}

{{/* The model's directory in the container; empty for the embedded model. */}}
{{- define "lightllm.modelDirectory" -}}
{{- with .Values.model }}
{{- if or .volume .download.repository -}}
{{ list "/models" (.path | default .download.repository) | join "/" | trimSuffix "/" }}
{{- else if .path -}}
{{ fail (printf "model.path is %s; allowed: with model.volume or model.download.repository" .path) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The arguments of the launch command and of `python -m lightllm_backend.worker` alike. */}}
{{- define "lightllm.settings" -}}
{{- with include "lightllm.modelDirectory" . }}
- {{ printf "--model_dir=%s" . | quote }}
{{- end }}
{{- range $name, $value := .Values.settings }}
- {{ printf "--%s=%s" $name (kindIs "string" $value | ternary $value (toJson $value)) | quote }}
{{- end }}
{{- if gt (int .Values.hosts) 1 }}
- --nnodes={{ .Values.hosts }}
{{- end }}
{{- end }}

{{/* Whether clients may reach Triton server's own ports, where no key is asked for. */}}
{{- define "lightllm.tritonPorts" -}}
{{- if not .Values.apiKeys.secret }}yes{{ end }}
{{- end }}

{{- define "lightllm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- with .Values.addCapabilities }}
  add: {{ toJson . }}
  {{- end }}
{{- end }}

{{/* The front passes the question on to the model `health`, which knows of dead, stopped and stuck processes. */}}
{{- define "lightllm.probe" -}}
httpGet: {path: /health, port: front}
timeoutSeconds: 5
{{- end }}
