"""Netlink's messages as the kernel has them, and garbage; connections found as `conntrack` finds them, and cut."""

from __future__ import annotations

import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conntrack import cut, marked
from proxy.netlink import Netfilter
from proxy.ruleset import MARK
from proxy.wire.conntrack import Connection, ask_marked, delete, read_connection
from proxy.wire.netlink import MalformedNetlink, attribute, attributes, messages, nested
from proxy.wire.nft_table import ask_table, read_table
from tests.proxy.kernel_rules import NEEDS_ROOT, in_namespace

PORTS = st.integers(0, 65535)
ADDRESSES = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1).map(IPv4Address), st.integers(0, 2**32 - 1).map(IPv4Address)),
    st.tuples(st.integers(0, 2**128 - 1).map(IPv6Address), st.integers(0, 2**128 - 1).map(IPv6Address)),
)
CONNECTIONS = st.builds(
    lambda ends, source_port, port, protocol, number, zone: Connection(
        ends[0], source_port, ends[1], port, protocol, 0, number, zone
    ),
    ADDRESSES, PORTS, PORTS, st.integers(0, 255), st.integers(0, 2**32 - 1), PORTS,
)  # fmt: skip


@given(CONNECTIONS)
def test_what_is_deleted_is_read_back_as_the_same_connection(connection: Connection) -> None:
    """Both have the same attributes; a deletion says nothing of the mark."""
    [message] = messages(delete(connection, 7))
    assert (message.type, message.sequence) == (0x0102, 7)
    assert read_connection(message.body) == connection


@given(st.binary(max_size=200))
def test_garbage_is_a_value_or_malformed(text: bytes) -> None:
    for read in (lambda: list(messages(text)), lambda: read_connection(text), lambda: read_table(text)):
        try:
            read()
        except MalformedNetlink:
            pass


@given(CONNECTIONS, st.data())
def test_a_message_that_is_cut_or_changed_is_a_value_or_malformed(connection: Connection, data: st.DataObject) -> None:
    [message] = messages(delete(connection, 1))
    body = bytearray(message.body)
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    for text in (bytes(body), message.body[: data.draw(st.integers(0, len(body)))]):
        try:
            found = read_connection(text)
        except MalformedNetlink:
            continue
        assert found is None or isinstance(found, Connection)


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=30)))
def test_attributes_are_read_as_they_were_written(values: dict[int, bytes]) -> None:
    assert attributes(b"".join(attribute(kind, value) for kind, value in values.items())) == values
    assert attributes(b"".join(nested(kind, value) for kind, value in values.items())) == values


def test_several_messages_of_one_datagram_are_told_apart() -> None:
    found = list(messages(ask_marked(MARK, 1) + ask_table("x", 2)))
    assert [(one.type, one.sequence) for one in found] == [(0x0101, 1), (0x0A01, 2)]


@pytest.mark.parametrize(
    "text",
    [
        bytes(15),
        struct.pack("=IHHII", 15, 2, 0, 0, 0),
        struct.pack("=IHHII", 17, 2, 0, 0, 0),
    ],
    ids=["half a header", "shorter than its header", "longer than what came"],
)
def test_a_message_whose_length_cannot_be_is_malformed(text: bytes) -> None:
    with pytest.raises(MalformedNetlink):
        list(messages(text))


# --- the kernel's own

RULES = f"""
table inet outgate {{
    chain out {{
        type filter hook output priority 0; policy accept;
        meta l4proto {{ tcp, udp }} th dport {{ 7001, 7002 }} ct mark set ct mark | {MARK:#x}
        udp dport 7003 ct mark set 0x1
    }}
}}
"""


@pytest.fixture
def netfilter() -> Iterator[Netfilter]:
    with in_namespace():
        subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)
        made = Netfilter()
        yield made
        made.close()


def listed() -> set[tuple[str, ...]]:
    """What the program `conntrack` finds with our mark."""
    found: set[tuple[str, ...]] = set()
    for family in ("ipv4", "ipv6"):
        line = ["conntrack", "-L", "-f", family, "--mark", f"{MARK}/{MARK}"]
        for row in subprocess.run(line, capture_output=True, text=True, check=False).stdout.splitlines():
            protocol = row.split()[0]
            values = [re.search(rf"{key}=(\S+)", row) for key in ("src", "dst", "sport", "dport")]
            ends = [value[1] for value in values if value]
            found.add((protocol, str(ip_address(ends[0])), str(ip_address(ends[1])), *ends[2:]))
    return found


class TestKernel:
    pytestmark = NEEDS_ROOT

    @pytest.mark.skipif(shutil.which("conntrack") is None, reason="conntrack is not installed")
    def test_connections_with_our_mark_are_found_as_conntrack_lists_them_and_cut(self, netfilter: Netfilter) -> None:
        socks = []
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for port in (7001, 7002, 7003):
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sock.connect((address, port))
                sock.send(b"x")
                socks.append(sock)
            door = socket.create_server((address, 7001), family=family)
            socks += [door, socket.create_connection((address, 7001))]
        found = marked(netfilter)
        names = {6: "tcp", 17: "udp"}
        assert {
            (names[one.protocol], str(one.source), str(one.destination), str(one.source_port), str(one.port))
            for one in found
        } == listed()
        assert len(found) == 6
        assert all(one.mark == MARK for one in found)
        tcp = [one for one in found if one.protocol == 6]
        assert cut(netfilter, tcp) == 2
        assert {one.protocol for one in marked(netfilter)} == {17}
        assert cut(netfilter, tcp) == 0  # they are gone
        assert cut(netfilter, marked(netfilter)) == 4
        assert listed() == set()
        for sock in socks:
            sock.close()

    def test_a_table_is_known_by_its_handle(self, netfilter: Netfilter) -> None:
        def look() -> tuple[int, bool]:
            [sequence] = netfilter.numbers()
            [message] = netfilter.ask(ask_table("outgate", sequence), sequence)
            found = read_table(message.body)
            return found.handle, found.is_dormant

        before = look()
        subprocess.run(["nft", "delete table inet outgate"], check=True)
        with pytest.raises(OSError, match="No such file"):
            look()
        subprocess.run(["nft", "-f", "-"], input=RULES.replace("{", "{ flags dormant;", 1), text=True, check=True)
        assert before[1] is False
        assert look()[1] is True
        assert look()[0] != before[0]

    def test_more_connections_than_fit_one_datagram_are_all_found_and_cut(self, netfilter: Netfilter) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for number in range(1, 1000):
                sock.sendto(b"x", (f"127.0.{number // 250}.{number % 250 + 1}", 7001))
        found = marked(netfilter)
        assert len({one.destination for one in found}) == 999
        assert cut(netfilter, found) == 999
        assert marked(netfilter) == []
