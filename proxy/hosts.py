"""What the operator and the machine say about names: `--host`, a hosts file, resolv.conf. It asks no server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from policies.addresses import Address
from policies.hostnames import Hostname, MalformedName, parse_hostname

type Nameserver = tuple[str, int]  # address as text (`fe80::1%eth0` with its interface) and port

DNS_PORT = 53
MAX_NAMESERVERS = 3  # resolv.conf(5): what every other program on the machine uses


class MalformedHostOption(ValueError):
    """A `--host` that cannot be meant. `message` says what is wrong and what to write, `text` which it is."""

    def __init__(self, text: str, message: str) -> None:
        self.text = text
        self.message = message
        super().__init__(f'--host "{text}": {message}')


@dataclass(frozen=True, slots=True)
class HostsEntry:
    """What the operator says a name is; `port` replaces the port that was asked for."""

    addresses: tuple[Address, ...]
    port: int | None = None


def parse_host_option(text: str) -> tuple[Hostname, HostsEntry]:
    """`NAME=ADDR`, `NAME=ADDR:PORT` or `NAME=[ADDR6]:PORT`. Raises MalformedHostOption."""
    name_text, equals, target = text.partition("=")
    if not equals:
        raise MalformedHostOption(text, "write NAME=ADDRESS or NAME=ADDRESS:PORT")
    try:
        name = parse_hostname(name_text)
    except MalformedName as error:
        raise MalformedHostOption(text, str(error)) from error
    address_text, port_text = _split_port(target)
    address = _parse_dialable(address_text)
    if address is None:
        repair = "write [ADDRESS]:PORT for IPv6" if ":" in target else "NAME=ADDRESS takes an IPv4 or IPv6 address"
        raise MalformedHostOption(text, f'"{address_text}" is not an address; {repair}')
    return name, HostsEntry((address,), None if port_text is None else _parse_port(port_text, text))


def parse_host_options(texts: Iterable[str]) -> dict[Hostname, HostsEntry]:
    """All `--host` options together: addresses of one name add up. Raises MalformedHostOption, also on two ports."""
    entries: dict[Hostname, HostsEntry] = {}
    for text in texts:
        name, entry = parse_host_option(text)
        before = entries.setdefault(name, entry)
        if before.port != entry.port:
            raise MalformedHostOption(text, f"{name} has another port already; give all its addresses one port")
        entries[name] = HostsEntry(tuple(dict.fromkeys(before.addresses + entry.addresses)), entry.port)
    return entries


def read_hosts_file(path: str = "/etc/hosts") -> dict[Hostname, tuple[Address, ...]]:
    """The entries of a hosts(5) file. What is not an entry there is passed over; no file, no entries."""
    entries: dict[Hostname, tuple[Address, ...]] = {}
    for address_text, *names in _lines(path):
        address = _parse_dialable(address_text)
        if address is None:
            continue
        for name in _hostnames(names):
            if address not in entries.get(name, ()):
                entries[name] = (*entries.get(name, ()), address)
    return entries


def system_nameservers(path: str = "/etc/resolv.conf") -> list[Nameserver]:
    """The nameservers of a resolv.conf(5); this machine itself where it names none."""
    found = [words[1] for words in _lines(path) if words[0] == "nameserver" and len(words) > 1]
    valid = [text for text in found if _parse_address(text) is not None]
    return [(text, DNS_PORT) for text in valid[:MAX_NAMESERVERS] or ("127.0.0.1", "::1")]


def system_search(path: str = "/etc/resolv.conf") -> tuple[Hostname, ...]:
    """The domains that programs of this machine append to names; the last `search` or `domain` line counts."""
    domains: list[str] = []
    for keyword, *rest in _lines(path):
        if keyword in ("search", "domain"):
            domains = rest
    return tuple(_hostnames(domains))


def _hostnames(texts: Iterable[str]) -> Iterator[Hostname]:
    for text in texts:
        try:
            yield parse_hostname(text)
        except MalformedName:
            continue


def _lines(path: str) -> Iterator[list[str]]:
    """The words of each line that has any. A comment starts at `#` or `;`."""
    try:
        text = Path(path).read_text("utf-8", "replace")
    except OSError:
        return
    for line in text.splitlines():
        if words := line.partition("#")[0].partition(";")[0].split():
            yield words


def _split_port(target: str) -> tuple[str, str | None]:
    if target.startswith("["):
        address, closing, rest = target[1:].partition("]")
        if rest.startswith(":"):
            return address, rest[1:]
        return (address if closing and not rest else target), None
    if target.count(":") == 1:
        address, _, port = target.partition(":")
        return address, port
    return target, None


def _parse_port(text: str, option: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536:
        return int(text)
    raise MalformedHostOption(option, f'"{text}" is not a port from 1 to 65535')


def _parse_address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _parse_dialable(text: str) -> Address | None:
    return None if "%" in text else _parse_address(text)  # an interface's own address is nothing to send a workload to
