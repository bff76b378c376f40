{{/* The name of everything in the release's own namespace; short enough for what follows it. */}}
{{- define "outgate.fullname" -}}
{{- if contains "." .Release.Name }}{{ fail (printf "release %q: a dot is not for names of Services; choose another name" .Release.Name) }}{{ end -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- if gt (len $full) 44 }}{{ printf "%s-%s" ($full | trunc 35 | trimSuffix "-") ($full | sha256sum | trunc 8) }}{{ else }}{{ $full }}{{ end -}}
{{- end }}

{{/* Of what stands outside of that namespace. No namespace has a dot, so two releases never share one. (helm 4 lints without one) */}}
{{- define "outgate.clusterName" -}}
{{ default "default" .Release.Namespace }}.{{ include "outgate.fullname" . }}
{{- end }}

{{/* What selects pods: of the release and the part alone, for it can never be changed. (list $ "gateway") */}}
{{- define "outgate.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "outgate.labels" -}}
{{- $root := index . 0 -}}
{{ include "outgate.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name ($root.Chart.Version | replace "+" "_") | quote }}
{{- end }}

{{- define "outgate.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end }}

{{- define "outgate.pkiSecret" -}}
{{- if and (eq .Values.pki.source "secret") (not .Values.pki.secretName) }}{{ fail "pki.source: secret needs pki.secretName, the Secret that holds tls.crt, tls.key and ca.crt" }}{{ end -}}
{{ default (printf "%s-pki" (include "outgate.fullname" .)) .Values.pki.secretName }}
{{- end }}

{{- define "outgate.hasPki" -}}
{{- if ne .Values.pki.source "none" }}yes{{ end -}}
{{- end }}

{{- define "outgate.hasTrust" -}}
{{- if and .Values.trust.enabled (include "outgate.hasPki" .) }}yes{{ end -}}
{{- end }}

{{- define "outgate.trustName" -}}
{{ default (printf "%s-trust" (include "outgate.clusterName" .)) .Values.trust.name }}
{{- end }}

{{/* The end of a Job's name: a Job cannot be changed, so one that would be is another Job. (the spec as text) */}}
{{- define "outgate.jobSuffix" -}}
{{ . | sha256sum | trunc 8 }}
{{- end }}

{{/* What the label of a namespace says, so that of two releases one injects there: a label has 63 characters. */}}
{{- define "outgate.injects" -}}
{{- $name := include "outgate.clusterName" . -}}
{{- if gt (len $name) 63 }}{{ printf "%s-%s" ($name | trunc 54 | trimSuffix "-" | trimSuffix ".") ($name | sha256sum | trunc 8) }}{{ else }}{{ $name }}{{ end -}}
{{- end }}

{{- define "outgate.webhookSecret" -}}
{{ default (printf "%s-webhook-tls" (include "outgate.fullname" .)) .Values.injection.certificate.secretName }}
{{- end }}

{{/* What puts gates into pods: webhook, admissionPolicy, or nothing. */}}
{{- define "outgate.injectsBy" -}}
{{- if .Values.injection.enabled }}{{ .Values.injection.form }}{{ end -}}
{{- end }}
