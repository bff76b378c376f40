"""What the documents tell a reader to type, as tests type it. It reads the pages and runs nothing."""

from __future__ import annotations

import re

from tests.end_to_end.world import CHECKOUT

SERVICE = "docs/service.md"
GATEWAY, SIDECAR = "A gateway for machines and pods", "Beside one program, in its network namespace (sidecar)"


def section(page: str, heading: str) -> str:
    """The text below a heading, to the next one of its rank or above."""
    text = (CHECKOUT / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert found, f"{page} has no heading {heading!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def commands(page: str, heading: str) -> list[str]:
    """The lines to type below a heading, without what is said beside them."""
    lines = re.findall(r"^    (\S.*)$", section(page, heading), re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def command(page: str, heading: str, start: str, end: str = "") -> str:
    """The one of them that starts so, and ends so."""
    found = [line for line in commands(page, heading) if line.startswith(start) and line.endswith(end)]
    assert len(found) == 1, f"{len(found)} commands {start!r} in {page} below {heading!r}"
    return found[0]
