"""What is let past the gate, as elements of the sets in `ruleset`, and the nft text that opens and closes them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from policies.addresses import Address
from proxy.ruleset import SET4, SET6, TABLE

type Transport = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True)
class Element:
    """Who may reach what. Both addresses are of one family; another source has no part in it."""

    source: Address
    address: Address
    protocol: Transport
    port: int

    def __str__(self) -> str:
        return f"{self.source} . {self.address} . {self.protocol} . {self.port}"

    @property
    def set(self) -> str:
        return SET4 if self.address.version == 4 else SET6


@dataclass(frozen=True, slots=True)
class Opening:
    """An element as the kernel has it: for how long from its last refresh, and for how long from now."""

    element: Element
    timeout_s: int
    left_s: int


def open_text(times_s: Mapping[Element, float]) -> str:
    """Opens elements for so long from now, whether or not they are open already.

    Older kernels do not refresh an element that is there, so it is made anew, within one transaction.
    """
    add = "".join(
        f"add element inet {TABLE} {name} {{ {', '.join(f'{one} timeout {_whole(times_s[one])}s' for one in mine)} }}\n"
        for name, mine in _by_set(times_s)
    )
    return add + _delete(times_s) + add


def close_text(elements: Iterable[Element]) -> str:
    """Closes elements, whether or not they are open."""
    elements = tuple(elements)
    # One that is not there cannot be deleted, and nft 1.0.6 has no `destroy`.
    return open_text(dict.fromkeys(elements, 1)) + _delete(elements) if elements else ""


def restore_text(openings: Iterable[Opening]) -> str:
    """Opens elements for as long as they have left."""
    return "".join(
        f"add element inet {TABLE} {one.element.set} "
        f"{{ {one.element} timeout {one.timeout_s}s expires {one.left_s}s }}\n"
        for one in openings
        if one.left_s > 0
    )


def empty_text() -> str:
    """Closes all that is open."""
    return f"flush set inet {TABLE} {SET4}\nflush set inet {TABLE} {SET6}\n"


def _delete(elements: Iterable[Element]) -> str:
    return "".join(
        f"delete element inet {TABLE} {name} {{ {', '.join(map(str, mine))} }}\n" for name, mine in _by_set(elements)
    )


def _by_set(elements: Iterable[Element]) -> Iterable[tuple[str, list[Element]]]:
    found: defaultdict[str, list[Element]] = defaultdict(list)
    for one in elements:
        found[one.set].append(one)
    return found.items()


def _whole(time_s: float) -> int:
    return max(1, math.ceil(time_s))  # `timeout 0s` would have it stay for good
