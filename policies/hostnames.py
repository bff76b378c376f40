"""Hostnames in one normal form, and the patterns that name them. It knows spelling; it never looks anything up.

The normal form is lower case ASCII (IDNA A-labels, UTS #46 without transitional mappings) without a trailing dot.
Inside the gate two names are equal exactly when their strings are, so nothing else compares, folds or trims a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import NewType

Hostname = NewType("Hostname", str)

MAX_NAME = 253  # RFC 1035 2.3.4: 255 octets on the wire are 253 characters of text
MAX_LABEL = 63

# WHATWG URL "ends in a number": a resolver reads 127.1, 0x7f.1 and 2130706433 as addresses, so such a name is none.
_NUMBER = r"(?:[0-9]+|0x[0-9a-f]*)\Z"
_LABEL = r"[a-z0-9_-]{1,63}+(?<!-)"
# Names that are normal already, as nearly every name is. A-labels go the slow way, which decodes them.
_NORMAL = re.compile(rf"(?:(?!xn--|-){_LABEL}\.)*+(?!xn--|-|{_NUMBER}){_LABEL}")
_ENDS_IN_NUMBER = re.compile(rf"(?:.*\.)?{_NUMBER}", re.DOTALL)
_FOREIGN_ASCII = re.compile(r"[\x00-\x7f](?<![A-Za-z0-9_.-])")
_REPAIRS = {
    ":": "a name stands without port",
    "/": "a name stands without scheme and path",
    "@": "a name stands without user",
    "*": 'a wildcard is one leading "*." where a pattern may stand',
}


class MalformedName(ValueError):
    """Text that is no hostname. `message` says what is wrong, `repair` what to write where that is known.

    `is_address` tells an address literal (127.0.0.1, [::1], 0x7f.1, also with a port or prefix length) from nonsense.
    """

    def __init__(self, message: str, repair: str | None = None, *, is_address: bool = False) -> None:
        self.message = message
        self.repair = repair
        self.is_address = is_address
        super().__init__(f"{message}; {repair}" if repair else message)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One name, or with `wildcard` every name below `host` at any depth, never `host` itself."""

    host: Hostname
    wildcard: bool

    def matches(self, name: Hostname) -> bool:
        return name.endswith("." + self.host) if self.wildcard else name == self.host

    def __str__(self) -> str:
        return f"*.{self.host}" if self.wildcard else self.host


def parse_hostname(text: str) -> Hostname:
    """The normal form of `text`.

    Raises MalformedName for what is no hostname, also for an address in any spelling. Bytes from the network are
    decoded as ASCII before they come here (RFC 6066 3): the origin must not receive another spelling than was judged.
    """
    if _NORMAL.fullmatch(text) and len(text) <= MAX_NAME:
        return Hostname(text)
    if text.isascii():  # only then: str.lower() turns a Kelvin sign into k
        lower = text.lower().removesuffix(".")
        if _NORMAL.fullmatch(lower) and len(lower) <= MAX_NAME:
            return Hostname(lower)
    return _normalise(text)


def parse_pattern(text: str) -> Pattern:
    """A hostname, or one leading `*.` and a hostname. Raises MalformedName with the repair."""
    if text in ("*", "*."):
        raise MalformedName(f"{_shown(text)} would be every name", 'name a domain, such as "*.example.com"')
    wildcard = text.startswith("*.")
    rest = text[2:] if wildcard else text
    if "*" in rest:
        raise MalformedName(f"{_shown(text)}: a wildcard is one leading *. and nothing else", _wildcard_repair(rest))
    return Pattern(parse_hostname(rest), wildcard)


def parents(host: Hostname) -> Iterator[Hostname]:
    """The names above `host`, nearest first: `a.b.c` gives `b.c` and `c`."""
    dot = host.find(".")
    while dot >= 0:
        yield Hostname(host[dot + 1 :])
        dot = host.find(".", dot + 1)


def _normalise(text: str) -> Hostname:
    """The slow way: maps a name to A-labels, or finds what is wrong with it."""
    if not text:
        raise MalformedName("the name is empty")
    if len(text) > MAX_NAME + 1:  # one for the dot; and nothing below is slow on a text this short
        raise _too_long(text)
    _refuse_foreign(text, text)
    mapped = (text.lower() if text.isascii() else _map(text)).removesuffix(".")
    _refuse_foreign(mapped, text)  # whatever the mapping let in: fullwidth % and / among others
    labels = mapped.split(".")
    if "" in labels:
        raise MalformedName(f"{_shown(text)} has an empty label")
    if _ENDS_IN_NUMBER.fullmatch(mapped):
        raise _address(text)
    name = ".".join(_a_label(label, text) for label in labels)
    if len(name) > MAX_NAME:
        raise _too_long(text)
    return Hostname(name)


def _refuse_foreign(name: str, text: str) -> None:
    foreign = _FOREIGN_ASCII.search(name)
    if not foreign:
        return
    if _is_address(name.lower()):
        raise _address(text)
    character = foreign.group()
    raise MalformedName(f"{_shown(text)} has {_shown(character)}, which no hostname has", _REPAIRS.get(character))


def _is_address(text: str) -> bool:
    """An address in brackets, with a port or with a prefix length, or any IPv6 address."""
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") < 2:
        return bool(_ENDS_IN_NUMBER.fullmatch(re.split("[:/%]", host, maxsplit=1)[0]))
    try:
        IPv6Address(host.partition("/")[0])
    except ValueError:
        return False
    return True


def _map(text: str) -> str:
    import idna  # here: its tables cost more than the whole core, and ASCII names need none of them

    try:
        return idna.uts46_remap(text, std3_rules=True, transitional=False)
    except UnicodeError as error:  # IDNAError is one
        raise MalformedName(f"{_shown(text)} is no internationalised name: {_ascii(str(error))}") from error


def _a_label(label: str, text: str) -> str:
    if label.startswith("-") or label.endswith("-"):
        raise MalformedName(f"{_shown(text)}: a label neither begins nor ends with a hyphen")
    if len(label) > MAX_LABEL:  # an A-label is never shorter than what it encodes
        raise MalformedName(f"{_shown(text)} has a label longer than {MAX_LABEL} characters")
    return label if label.isascii() and not label.startswith("xn--") else _encode(label, text)


def _encode(label: str, text: str) -> str:
    import idna

    try:
        encoded = idna.alabel(idna.ulabel(label)).decode("ascii")
    except UnicodeError as error:
        raise MalformedName(f"{_shown(text)} has an invalid label: {_ascii(str(error))}") from error
    if label.isascii() and encoded != label:  # RFC 5890 2.3.2.1: a second spelling of one label; older idna decodes it
        raise MalformedName(f"{_shown(text)} has an invalid label: {label} is another spelling of {encoded}")
    return encoded


def _address(text: str) -> MalformedName:
    return MalformedName(f"{_shown(text)} is an address, not a name", is_address=True)


def _too_long(text: str) -> MalformedName:
    return MalformedName(f"{_shown(text)} is longer than {MAX_NAME} characters")


def _wildcard_repair(rest: str) -> str:
    try:
        return f'did you mean "*.{parse_hostname(rest.rpartition("*")[2].partition(".")[2])}"?'
    except MalformedName:
        return 'write it as "*.example.com"'


def _shown(text: str) -> str:
    """Quoted for a message: short, and no control or look-alike character reaches a terminal."""
    return f'"{_ascii(text if len(text) <= 80 else text[:77] + "...")}"'


def _ascii(text: str) -> str:
    return ascii(text)[1:-1]
