"""The trust bundle in a Kubernetes cluster: `objects` says what is written, `api` speaks to the server, `job` decides
when. Nothing else of ours imports lightkube; who watches pods for a gate asks by `api` too."""
