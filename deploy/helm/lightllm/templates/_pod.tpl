{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The template of a pod. `component`: server, or follower, which only computes for a server on another host. */}}
{{- define "lightllm.pod" -}}
{{- $isServer := eq .component "server" }}
{{- with .root -}}
metadata:
  labels:
    {{- include "lightllm.selector" . | nindent 4 }}
    app.kubernetes.io/component: {{ $.component }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  # Variables such as LIGHTLLM_PORT, which Kubernetes makes of a Service called lightllm, would be taken for settings.
  enableServiceLinks: false
  automountServiceAccountToken: false
  {{- with .Values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- if $isServer }}
  # The pause before SIGTERM, the running requests' time, and at most 26 s for the launch command to stop everything.
  terminationGracePeriodSeconds: {{ add .Values.preStopSeconds (ceil .Values.settings.shutdown_timeout_s) 30 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{ toJson . }}
  {{- end }}
  {{- with .Values.model.download }}
  {{- if .repository }}
  initContainers:
    - name: download
      image: {{ include "lightllm.image" $.root | quote }}
      imagePullPolicy: {{ $.root.Values.image.pullPolicy }}
      command:
        - hf
        - download
        - {{ .repository | quote }}
        - {{ printf "--revision=%s" .revision | quote }}
        - {{ printf "--local-dir=%s" (include "lightllm.modelDirectory" $.root) | quote }}
        {{- range .exclude }}
        - {{ printf "--exclude=%s" . | quote }}
        {{- end }}
      env:
        - {name: HF_HOME, value: /tmp/huggingface}
        {{- if .tokenSecret.name }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {{ pick .tokenSecret "name" "key" | toJson }}}
        {{- end }}
      securityContext:
        {{- include "lightllm.containerSecurity" $.root | nindent 8 }}
      resources:
        requests: {cpu: "1", memory: 1Gi}
        limits: {memory: 4Gi}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  {{- end }}
  containers:
    - name: lightllm
      image: {{ include "lightllm.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- if not $isServer }}
      command: [python3, -m, lightllm_backend.worker]
      {{- end }}
      args:
        {{- include "lightllm.settings" . | trim | nindent 8 }}
        {{- if not $isServer }}
        - --node_rank=$(LWS_WORKER_INDEX)
        - --master_addr=$(LWS_LEADER_ADDRESS)
        {{- else if gt (int .Values.hosts) 1 }}
        - --master_addr=$(POD_IP)
        {{- end }}
        {{- if $isServer }}
        - --openai_port=9000
        {{- end }}
        {{- if and $isServer .Values.apiKeys.secret }}
        - --api_key_file=/run/secrets/lightllm/api-keys
        {{- end }}
      {{- if and $isServer (gt (int .Values.hosts) 1) }}
      env:
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
      {{- end }}
      {{- if $isServer }}
      ports:
        - {name: front, containerPort: 9000}
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 8001}
        - {name: metrics, containerPort: 8002}
      startupProbe:
        {{- include "lightllm.probe" . | nindent 8 }}
        periodSeconds: 5
        failureThreshold: {{ divf .Values.startup.seconds 5 | ceil }}
      readinessProbe:
        {{- include "lightllm.probe" . | nindent 8 }}
        periodSeconds: 5
        failureThreshold: 2
      # The launch command replaces what fails; this is for the case that the launch command itself stands still.
      livenessProbe:
        {{- include "lightllm.probe" . | nindent 8 }}
        periodSeconds: 30
        failureThreshold: {{ divf .Values.startup.seconds 15 | ceil }}
      lifecycle:
        preStop: {sleep: {seconds: {{ .Values.preStopSeconds }}}}
      {{- end }}
      securityContext:
        {{- include "lightllm.containerSecurity" . | nindent 8 }}
      resources:
        {{- include "lightllm.resources" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        - {name: home, mountPath: /home/lightllm}
        {{- if include "lightllm.modelDirectory" . }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if and $isServer .Values.apiKeys.secret }}
        - {name: api-keys, mountPath: /run/secrets/lightllm, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}}
    - {{ merge (dict "name" "home") (.Values.home | default (dict "emptyDir" dict)) | toJson }}
    {{- if include "lightllm.modelDirectory" . }}
    - {{ merge (dict "name" "models") (.Values.model.volume | default (dict "emptyDir" dict)) | toJson }}
    {{- end }}
    {{- with .Values.apiKeys }}
    {{- if and $isServer .secret }}
    - name: api-keys
      secret: {secretName: {{ .secret }}, defaultMode: 0440, items: [{key: {{ .key }}, path: api-keys}]}
    {{- end }}
    {{- end }}
  {{- if $isServer }}
  topologySpreadConstraints:
    {{- range .Values.topologyKeys }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "lightllm.server" $.root | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" }}
  {{- with index $.root.Values $name }}
  {{ $name }}: {{ toJson . }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "lightllm.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if ne (.Values.settings.device | default "auto") "cpu" }}
{{- if mod .Values.settings.tp .Values.hosts }}
{{- fail (printf "settings.tp is %v; allowed: a multiple of hosts, which is %v" .Values.settings.tp .Values.hosts) }}
{{- end }}
{{- $gpus := dict "limits" (dict .Values.gpu.resource (div .Values.settings.tp .Values.hosts)) }}
{{- $resources = mergeOverwrite $resources $gpus }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
