{{- define "outgate.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1337
runAsGroup: 1337
fsGroup: 1337
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "outgate.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What every pod begins with. (list $ "account" needsApi) enableServiceLinks: variables that begin with OUTGATE_ are ours. */}}
{{- define "outgate.podHead" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ index . 1 }}
automountServiceAccountToken: {{ index . 2 }}
enableServiceLinks: false
securityContext:
  {{- include "outgate.podSecurity" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What every container begins with. Why one ended stands in the pod's status, too. */}}
{{- define "outgate.container" -}}
image: {{ include "outgate.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- include "outgate.containerSecurity" . | nindent 2 }}
{{- end }}

{{/* The admin port, which the kubelet asks. (the port's name) */}}
{{- define "outgate.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 2
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /readyz, port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* For a program that has no drain of its own: a pod that ends is asked until every API server knows of it. */}}
{{- define "outgate.preStop" -}}
preStop:
  exec: {command: [python3, -c, "import time; time.sleep({{ .Values.drainS }})"]}
{{- end }}

{{/* Policy files as flags. */}}
{{- define "outgate.policyArgs" -}}
{{- range $file, $_ := .Values.policy.files }}
- --policy=/etc/outgate/policy/{{ $file }}
{{- end }}
{{- range .Values.policy.configMaps }}
{{- range .keys }}
- --policy=/etc/outgate/policy/{{ . }}
{{- end }}
{{- end }}
{{- range .Values.policy.tags }}
{{- range .keys }}
- --tags=/etc/outgate/policy/{{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* One projected volume: the kubelet changes all files of it in one step. Never a subPath: that is never changed. */}}
{{- define "outgate.policyVolume" -}}
{{- $seen := dict -}}
{{- range $file, $_ := .Values.policy.files }}{{ $_ := set $seen $file true }}{{ end -}}
{{- range concat .Values.policy.configMaps .Values.policy.tags }}
{{- range .keys }}
{{- if hasKey $seen . }}{{ fail (printf "policy: the file %q comes from two places; give one another name" .) }}{{ end -}}
{{- $_ := set $seen . true }}
{{- end }}
{{- end -}}
name: policy
projected:
  sources:
    {{- if .Values.policy.files }}
    - configMap:
        name: {{ include "outgate.fullname" . }}-policy
    {{- end }}
    {{- range concat .Values.policy.configMaps .Values.policy.tags }}
    - configMap:
        name: {{ .name }}
        items:
          {{- range .keys }}
          - {key: {{ . | quote }}, path: {{ . | quote }}}
          {{- end }}
    {{- end }}
{{- end }}

{{/* The issuing CA alone; whatever else the Secret holds is not shown to the pod. */}}
{{- define "outgate.caVolume" -}}
name: ca
secret:
  secretName: {{ include "outgate.pkiSecret" . }}
  defaultMode: 0440
  items:
    - {key: tls.crt, path: tls.crt}
    - {key: tls.key, path: tls.key}
    - {key: ca.crt, path: ca.crt}
{{- end }}
