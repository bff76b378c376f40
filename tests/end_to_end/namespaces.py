"""Machines of a test: named network namespaces and the links between them. What runs in them is the test's business."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_ENTER = 'mount --bind "$0" /etc/hosts && exec "$@"'


_WORLDS = count()


class Namespaces:
    """Some machines, each with a loopback device that is up. `close` takes them down with all their devices."""

    def __init__(self, *machines: str) -> None:
        world = f"outgate-{os.getpid()}-{next(_WORLDS)}"
        self._names = {machine: f"{world}-{machine}" for machine in machines}
        try:
            for machine, name in self._names.items():
                _ip("netns", "add", name)
                self.ip(machine, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)

    # --- building ---

    def ip(self, machine: str, *words: str) -> None:
        _ip("-netns", self._names[machine], *words)

    def link(self, machine: str, device: str, other: str, other_device: str) -> None:
        """A cable between two machines, up on both sides."""
        peer = ("peer", "name", other_device, "netns", self._names[other])
        self.ip(machine, "link", "add", device, "type", "veth", *peer)
        self.ip(machine, "link", "set", device, "up")
        self.ip(other, "link", "set", other_device, "up")

    def address(self, machine: str, device: str, *addresses: str) -> None:
        """Addresses with prefix lengths, usable at once."""
        for address in addresses:
            self.ip(machine, "address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))

    def default(self, machine: str, *gateways: str) -> None:
        for gateway in gateways:
            self.ip(machine, "route", "add", "default", "via", gateway)

    def forward(self, machine: str) -> None:
        """Make it a router, of both families."""
        for family in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
            self.run(machine, ["sysctl", "-qw", f"net.{family}=1"])

    def rules(self, machine: str, ruleset: str) -> None:
        """Load nft's text."""
        subprocess.run(self.inside(machine, ["nft", "-f", "-"]), input=ruleset, text=True, check=True)

    # --- being there ---

    def inside(self, machine: str, command: Sequence[str], *, hosts: Path | None = None) -> list[str]:
        """The command line that runs `command` there, with `hosts` as its /etc/hosts."""
        named = [] if hosts is None else ["sh", "-c", _ENTER, str(hosts)]
        return ["ip", "netns", "exec", self._names[machine], *named, *command]

    def run(self, machine: str, command: Sequence[str]) -> None:
        subprocess.run(self.inside(machine, command), check=True)

    def open_socket(self, machine: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of that machine, held by this process."""
        return self.made_there(machine, lambda: socket.socket(family, kind, protocol))

    def made_there[T](self, machine: str, make: Callable[[], T]) -> T:
        """What `make` gives on that machine. A thread goes there to call it."""
        made: list[T] = []

        def go() -> None:
            with open(f"/run/netns/{self._names[machine]}") as there:
                os.setns(there.fileno(), os.CLONE_NEWNET)
            made.append(make())

        thread = threading.Thread(target=go)
        thread.start()
        thread.join()
        return made[0]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def machines(*names: str) -> Iterator[Namespaces]:
    """Machines that are gone when the context ends."""
    made = Namespaces(*names)
    try:
        yield made
    finally:
        made.close()
