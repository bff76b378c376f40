"""Puts the rules of a layout in force, takes them away, and says whether they are as they should be.

Whatever is not ours is neither changed nor read, but for its name.
"""

from __future__ import annotations

import difflib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.elements import restore_text
from proxy.layout import Layout, MalformedLayout, Mode, read_words
from proxy.nft import Nft, NftRefused, Shown, ask, read_openings
from proxy.policy_routing import add_routing, is_routed, remove_routing
from proxy.ruleset import EGRESS, SET4, SET6, SIGN, SINCE, TABLE, families_of, has_openings, render

_SIOCGIFFLAGS, _IFF_UP, _IFF_LOOPBACK = 0x8913, 0x1, 0x8  # linux/sockios.h, linux/if.h
_CAP_NET_ADMIN = 12  # linux/capability.h
_NO_CAPABILITY = "needs CAP_NET_ADMIN in this network namespace: run it as root there"
_BRIDGED = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")
_OF_ANOTHER_VERSION = "made by another version of outgate"
_SETS = {name: [kind, kind, "inet_proto", "inet_service"] for name, kind in ((SET4, "ipv4_addr"), (SET6, "ipv6_addr"))}
_AS_WRITTEN = Shown.STATELESS | Shown.TERSE  # without counts, and without what a DNS guard opened


class FirewallRefused(Exception):
    """Nothing was changed. `str()` is one line: what, why, repair."""


@dataclass(frozen=True, slots=True)
class InForce:
    """The rules that the kernel has.

    words        the flags that they were made from, as they stand there; `layout` is None where this version has no
                 such flags
    since        when `apply` put them there; empty where something else loaded them
    counted      packets and bytes by what became of them
    open         elements in the sets that a DNS guard opens
    differences  what is not as `render` has it for these flags: empty when all is well
    """

    words: tuple[str, ...]
    layout: Layout | None
    since: str
    counted: dict[str, tuple[int, int]]
    open: int
    differences: tuple[str, ...]


def require_capability() -> None:
    """Raises FirewallRefused without CAP_NET_ADMIN. Asked first, for libnftables tells its own standard error too."""
    with open("/proc/self/status") as status:
        held = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    if not held & 1 << _CAP_NET_ADMIN:
        raise FirewallRefused(_NO_CAPABILITY)


def apply(nft: Nft, layout: Layout, *, since: str, is_check: bool = False) -> int:
    """Put the rules in force, in place of ours that are there, and give how many openings were kept.

    All or nothing: before and after, some complete set of rules is in force. `is_check` changes nothing. Raises
    FirewallRefused.
    """
    _require_devices(layout)
    ours = _our_families(nft)
    former = "".join(f"delete table {family} {TABLE}\n" for family in ours if family not in families_of(layout))
    try:
        kept = read_openings(nft) if has_openings(layout) and _has_sets(nft, ours) else []
        text = former + render(layout, since=since) + restore_text(kept)
        nft.run(text, is_check=True)
        if not is_check:
            _put(nft, layout, text)
    except NftRefused as error:
        raise FirewallRefused(explained(error)) from error
    except OSError as error:
        raise FirewallRefused(f"the route for --udp-port: {error.strerror or error}") from error
    return len(kept)


def _put(nft: Nft, layout: Layout, text: str) -> None:
    """The route before the marks that need it, and the marks away before their route."""
    take_back: Callable[[], None] = (lambda: None) if layout.udp_port is None else add_routing()
    try:
        nft.run(text)
    except NftRefused:
        take_back()
        raise
    if layout.udp_port is None:
        remove_routing()


def what_hinders(layout: Layout) -> str:
    """Why the UDP relay would get nothing although the rules lead it there; empty: nothing does.

    A bridge that shows its packets to the chains of IP forgets the socket that TPROXY has found.
    """
    bridges = [device for device in layout.workload_devices if os.path.isdir(f"/sys/class/net/{device}/bridge")]
    seen = [switch for switch in _BRIDGED if _reads_one(switch)]
    if layout.udp_port is None or not seen or not (bridges or layout.mode is Mode.BRIDGE):
        return ""
    repair = " ".join(f"net.bridge.{switch}=0" for switch in seen)
    return f"--udp-port {layout.udp_port}: the relay gets nothing from a bridge here: sysctl -w {repair}"


def _reads_one(switch: str) -> bool:
    try:
        with open(f"/proc/sys/net/bridge/{switch}") as file:  # of this network namespace
            return file.read().strip() == "1"
    except OSError:  # no br_netfilter: bridges show nothing
        return False


def remove(nft: Nft) -> bool:
    """Take away what `apply` put there, and say whether anything was. Raises FirewallRefused."""
    ours = _our_families(nft)
    try:
        if ours:
            nft.run("".join(f"delete table {family} {TABLE}\n" for family in ours))
        was_routed = remove_routing()
    except NftRefused as error:
        raise FirewallRefused(explained(error)) from error
    except OSError as error:
        raise FirewallRefused(f"the route for --udp-port: {error.strerror or error}") from error
    return bool(ours) or was_routed


def look(nft: Nft) -> InForce | None:
    """What is in force; None: none of our rules. Raises FirewallRefused."""
    ours = _our_families(nft)
    if not ours:
        return None
    try:
        return _looked(nft, ours)
    except NftRefused as error:
        raise FirewallRefused(explained(error)) from error


def require_openings(nft: Nft) -> Layout:
    """The layout whose rules are in force, where they have sets to open. Raises FirewallRefused."""
    ours = _our_families(nft)
    if not ours:
        raise FirewallRefused("none of our rules is in force: outgate firewall apply loads them")
    try:
        layout = read_words(_words(_said(nft, ours)))
        kinds = {each["set"]["name"]: each["set"]["type"] for each in ask(nft, "list sets") if _is_our_set(each)}
    except NftRefused as error:
        raise FirewallRefused(explained(error)) from error
    except MalformedLayout as error:
        raise FirewallRefused(f"{_OF_ANOTHER_VERSION}: {error}: outgate firewall apply") from error
    if not has_openings(layout):
        repair = "outgate firewall apply --mode gateway, or bridge"
        raise FirewallRefused(f"the rules in force are a {layout.mode}'s, which let nothing past the gate: {repair}")
    if kinds != _SETS:
        raise FirewallRefused(f"sets {SET4} and {SET6}: {_OF_ANOTHER_VERSION}: outgate firewall apply")
    return layout


def _said(nft: Nft, ours: list[str]) -> list[str]:
    listed = ask(nft, f"list chain {ours[0]} {TABLE} {SIGN}")
    return [each["rule"].get("comment", "") for each in listed if "rule" in each]


def _words(said: list[str]) -> tuple[str, ...]:
    return tuple(word for word in said if word.startswith("--"))


def _looked(nft: Nft, ours: list[str]) -> InForce:
    said = _said(nft, ours)
    words = _words(said)
    since = next((word.removeprefix(SINCE) for word in said if word.startswith(SINCE)), "")
    counted = {
        counter["name"]: (counter["packets"], counter["bytes"])
        for family in ours
        for counter in (each.get("counter") for each in ask(nft, f"list counters table {family} {TABLE}"))
        if counter
    }
    try:
        layout = read_words(words)
    except MalformedLayout as error:
        return InForce(words, None, since, counted, 0, (f"{_OF_ANOTHER_VERSION}: {error}",))
    return InForce(
        words,
        layout,
        since,
        counted,
        len(read_openings(nft)) if _has_sets(nft, ours) else 0,
        tuple(_differences(nft, layout, since, ours)),
    )


def _differences(nft: Nft, layout: Layout, since: str, ours: list[str]) -> Iterator[str]:
    """Line by line, as the kernel writes what is there and what should be: it is loaded beside it for a moment, under
    another name and dormant."""
    wanted = families_of(layout)
    yield from (f"table {family} {TABLE}: not there" for family in wanted if family not in ours)
    yield from (f"table {family} {TABLE}: of other flags" for family in ours if family not in wanted)
    beside = f"{TABLE}_expected_{os.getpid()}"
    try:
        nft.run(render(layout, since=since, table=beside, dormant=True))
    except NftRefused as error:
        yield f"cannot be loaded any more: {explained(error)}"
        return
    try:
        for family in wanted:
            if family in ours:
                expected = _lines(nft, family, beside)
                expected.remove("flags dormant")
                yield from _changes(expected, _lines(nft, family, TABLE), family)
    finally:
        nft.run("".join(f"delete table {family} {beside}\n" for family in wanted))
    if layout.udp_port is not None and not is_routed():
        yield "the route for --udp-port: not there"


def _lines(nft: Nft, family: str, table: str) -> list[str]:
    listed = nft.run(f"list table {family} {table}", shown=_AS_WRITTEN)
    return [line.strip() for line in listed.splitlines()[1:] if line.strip()]


def _changes(expected: list[str], found: list[str], family: str) -> Iterator[str]:
    words = {"-": "lacks", "+": "has besides"}
    for line in difflib.ndiff(expected, found):
        if line[0] in words:
            yield f"table {family} {TABLE}: {words[line[0]]} {line[2:]}"


def _our_families(nft: Nft) -> list[str]:
    """Of the tables that are ours. Raises FirewallRefused where one with our name is somebody else's."""
    try:
        tables = {each["table"]["family"] for each in ask(nft, "list tables") if _is_named(each, "table", TABLE)}
        chains = [each["chain"] for each in ask(nft, "list chains") if _is_named(each, "chain", SIGN)]
    except NftRefused as error:
        raise FirewallRefused(explained(error)) from error
    signed = {chain["family"] for chain in chains if chain["table"] == TABLE}
    mine = [family for family in ("inet", "netdev") if family in tables]
    for family in mine:
        if family not in signed:
            raise FirewallRefused(
                f"table {family} {TABLE}: another program's, or written by hand (it has no chain {SIGN}); look with "
                f"`nft list table {family} {TABLE}`, and if nobody needs it: nft delete table {family} {TABLE}"
            )
    return mine


def _is_named(each: dict[str, dict[str, str]], kind: str, name: str) -> bool:
    return kind in each and each[kind]["name"] == name


def _has_sets(nft: Nft, ours: list[str]) -> bool:
    return "inet" in ours and any(map(_is_our_set, ask(nft, "list sets")))


def _is_our_set(each: dict[str, dict[str, str]]) -> bool:
    return "set" in each and (each["set"]["family"], each["set"]["table"]) == ("inet", TABLE)


def _require_devices(layout: Layout) -> None:
    """A device that is not there is a slip of the pen, behind which nothing is guarded. Raises FirewallRefused."""
    there = {name for _, name in socket.if_nameindex()}
    flag = "--upstream-device" if layout.mode is Mode.SIDECAR else "--workload-device"
    named = layout.upstream_devices if layout.mode is Mode.SIDECAR else layout.workload_devices
    for device in named:
        if device not in there:
            raise FirewallRefused(f"{flag} {device}: no such device; there are {', '.join(sorted(there))}")
    if layout.mode is Mode.SIDECAR and (open_ones := sorted(filter(_leads_out, there - set(named)))):
        raise FirewallRefused(
            f"{open_ones[0]}: up, and no packet socket would be stopped there; name every device: "
            + " ".join(f"{flag} {device}" for device in (*named, *open_ones))
        )


def _leads_out(device: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            reply = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s16x", device.encode()))
        except OSError:  # gone meanwhile
            return False
    (flags,) = struct.unpack_from("=H", reply, 16)
    return bool(flags & _IFF_UP and not flags & _IFF_LOOPBACK)


def explained(error: NftRefused) -> str:
    """nft's text in one line, and what it means where that is known."""
    text = str(error)
    said = "; ".join(line.strip() for line in text.splitlines() if "rror:" in line) or text
    if "Operation not permitted" in text:
        return f"{_NO_CAPABILITY} ({said})"
    if "not supported" in text and f"chain {EGRESS}" in text:
        return f"this kernel has no hook for what packet sockets send (Linux 5.16, CONFIG_NETFILTER_EGRESS): {said}"
    return f"nft: {said}"
