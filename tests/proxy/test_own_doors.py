"""The gate's own doors: known by port first, and a wildcard's by the kernel's routes."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from policies.model import Address
from proxy.own_doors import OwnDoors, is_local_address


def nowhere(_address: Address) -> bool:
    raise AssertionError("asked about an address of a port that is not ours")


@pytest.mark.parametrize(
    ("door", "address", "port", "is_ours"),
    [
        (("192.0.2.1", 3128), "192.0.2.1", 3128, True),
        (("192.0.2.1", 3128), "::ffff:192.0.2.1", 3128, True),
        (("::ffff:192.0.2.1", 3128), "192.0.2.1", 3128, True),
        (("2001:db8::1", 3128), "2001:db8::1", 3128, True),
        (("192.0.2.1", 3128), "192.0.2.2", 3128, False),
        (("192.0.2.1", 3128), "192.0.2.1", 443, False),
        (("192.0.2.1", 3128), "0.0.0.0", 3128, True),  # to the kernel this is the machine itself
        (("0.0.0.0", 3128), "192.0.2.1", 443, False),
    ],
    ids=["same", "mapped", "mapped door", "IPv6", "another address", "another port", "unspecified", "wildcard's port"],
)
def test_door_is_ours_by_address_and_port(door: tuple[str, int], address: str, port: int, is_ours: bool) -> None:
    assert OwnDoors([door], is_local=nowhere).holds(ip_address(address), port) is is_ours


@pytest.mark.parametrize("door", ["0.0.0.0", "::"])
@pytest.mark.parametrize(
    ("address", "is_ours"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True)]
)
def test_wildcard_door_is_every_address_of_this_machine(door: str, address: str, is_ours: bool) -> None:
    if ":" in address and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert OwnDoors([(door, 3128)]).holds(ip_address(address), 3128) is is_ours


@pytest.mark.parametrize("address", ["192.0.2.77", "203.0.113.9", "2001:db8::77"])
def test_address_elsewhere_is_not_this_machine(address: str) -> None:
    assert is_local_address(ip_address(address)) is False


def test_address_of_an_interface_is_local() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if sock.connect_ex(("192.0.2.77", 9)):  # a datagram socket: nothing is sent
            pytest.skip("no interface but loopback")
        assert is_local_address(ip_address(sock.getsockname()[0]))


def test_kernel_that_does_not_tell_makes_every_address_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise PermissionError

    monkeypatch.setattr("proxy.own_doors.socket.socket", refuse)
    assert is_local_address(ip_address("192.0.2.77"))
