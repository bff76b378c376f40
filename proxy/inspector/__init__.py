"""The process that hosts mitmproxy for the judge: `host` is the gate's side of it, `main` its own entry."""

from proxy.inspector.handover import Bounds, Configuration, Handover
from proxy.inspector.host import Inspector

__all__ = ["Bounds", "Configuration", "Handover", "Inspector"]
