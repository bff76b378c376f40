"""Both HTTP hosts, each as a rig of one shape: a gate's inspecting half in front of the strict origin."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path

from policies.hostnames import parse_hostname
from proxy.inspector import Bounds, Configuration
from tests.proxy.conformance.client import Client
from tests.proxy.conformance.origins import StrictOrigin
from tests.proxy.conformance.rows import HOST, LISTED, POLICY, SLASHES, SOCKETS
from tests.proxy.inspecting import Rig

NAMES = (HOST, LISTED, SLASHES, SOCKETS)
HOSTS = ("mitmproxy", "lane")


@dataclass
class TableRig(Rig):
    """Either host, with the policy of the table."""

    policy: str = POLICY
    origin_names: tuple[str, ...] = NAMES
    make_origin: type[StrictOrigin] = StrictOrigin
    trust: ssl.SSLContext = field(init=False)

    def configuration(self) -> Configuration:
        hosts = tuple((parse_hostname(name), ("127.0.0.1",), self.origin.port) for name in self.origin_names)
        return replace(super().configuration(), hosts=hosts)

    @property
    def strict(self) -> StrictOrigin:
        assert isinstance(self.origin, StrictOrigin)
        return self.origin

    def client(self, host: str = HOST) -> Client:
        if not hasattr(self, "trust"):
            self.trust = ssl.create_default_context(cafile=str(self.roots))
        return Client(self.port, self.trust, host)


def rig_of(host: str, directory: Path, bounds: Bounds | None = None) -> TableRig:
    """The rig of a host, to be entered."""
    return TableRig(directory, bounds=bounds or Bounds(), in_lane=host == "lane")
