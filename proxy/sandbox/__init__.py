"""A place to run one command whose only way out is the gate: rootless on Linux, the same as root.

`launch` is called before any thread or event loop exists. See docs/threat-model.md for what it holds and what remains.
"""

from __future__ import annotations

from proxy.sandbox.closed_ports import ClosedPorts
from proxy.sandbox.launch import launch
from proxy.sandbox.network import Ports
from proxy.sandbox.running import Bound, Sandbox
from proxy.sandbox.unavailable import SandboxUnavailable

__all__ = ["Bound", "ClosedPorts", "Ports", "Sandbox", "SandboxUnavailable", "launch"]
