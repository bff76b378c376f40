"""Which table of nft stands under a name, to and from netlink (linux/netfilter/nf_tables.h): libnftables would list
every element of every set to say it."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.wire.netlink import ACK, REQUEST, MalformedNetlink, attribute, attributes, netfilter_body, netfilter_message

_SUBSYSTEM, _GET_TABLE = 10, 1
_INET = 1
_NAME, _FLAGS, _HANDLE = 1, 2, 4
_DORMANT = 1


@dataclass(frozen=True, slots=True)
class Table:
    """`handle` is another for every table that is made, also under the same name. A dormant one bears on no packet."""

    handle: int
    is_dormant: bool


def ask_table(name: str, sequence: int) -> bytes:
    """For the table of that name in the family inet."""
    wanted = attribute(_NAME, name.encode() + b"\0")
    return netfilter_message(_SUBSYSTEM, _GET_TABLE, REQUEST | ACK, sequence, _INET, wanted)


def read_table(body: bytes) -> Table:
    """Raises MalformedNetlink."""
    _, rest = netfilter_body(body)
    found = attributes(rest)
    if _HANDLE not in found:
        raise MalformedNetlink("a table without a handle")
    return Table(int.from_bytes(found[_HANDLE]), bool(int.from_bytes(found.get(_FLAGS, b"")) & _DORMANT))
