"""The values table of the chart's README, from the comments of values.yaml: `python -m tests.helm.values_table`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from tests.helm.rendering import CHART

README = CHART / "README.md"
BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"
_KEY = re.compile(r"^( *)([A-Za-z]+):(.*)$")


def rows() -> Iterator[tuple[str, str, str]]:
    """Path, default and meaning of each value that is no group of others."""
    comment: list[str] = []
    path: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        found = _KEY.match(line)
        depth = len(found[1]) // 2 if found else 99
        if found and depth <= len(path) and not _is_inside_a_default(path[:depth]):
            path = [*path[:depth], found[2]]
            value = value_at(path)
            if not _is_group(path):
                yield ".".join(path), json.dumps(value), " ".join(comment)
        comment = []


def value_at(path: list[str]) -> object:
    held = _values()
    for key in path:
        held = held[key]
    return held


@cache
def _values() -> Any:  # Any: YAML
    return yaml.safe_load((CHART / "values.yaml").read_text())


def _is_group(path: list[str]) -> bool:
    value = value_at(path)
    return isinstance(value, dict) and bool(value) and path[-1] not in ("resources", "files")


def _is_inside_a_default(above: list[str]) -> bool:
    return bool(above) and not _is_group(above)


def table() -> str:
    lines = ["| value | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{path}` | `{default}` | {meaning} |".replace("{{", "{ {") for path, default, meaning in rows()
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def written() -> str:
    """README.md as it should be."""
    before, _, rest = README.read_text().partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(written())
