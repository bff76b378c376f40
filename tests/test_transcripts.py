"""What the documents show of a terminal is what a terminal shows.

An indented block whose first line begins with `$ ` is a transcript: commands and what they print, errors included.
The transcripts of a page run in order, in one shell, in a directory of their own, which the pages call /srv. A line of
three dots is any number of lines, and three dots at a line's end are the rest of it. What differs from run to run
(identifiers, fingerprints, dates) is compared by its form.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("pki.md", "azure-firewall.md", "aks.md")
MARK = "::outgate-transcript::"
VOLATILE = (  # longest first
    (re.compile(r"(?:[0-9A-F]{2}:){31}[0-9A-F]{2}"), "<fingerprint>"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "<id>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:Z| UTC)?)?"), "<date>"),
    (re.compile(r"\b(root|CA) [0-9a-f]{8}\b"), r"\1 <digits>"),
    (re.compile(r"\b\d+ days?\b"), "<days>"),
    (re.compile(r"\b\d+\.\d+\.\d+\b"), "<version>"),
    (re.compile(r":\d{4,5}/"), ":<port>/"),
    (re.compile(r"\s+$"), ""),
)


@dataclass(slots=True)
class Step:
    """A command as typed, what is to be printed, and where it stands."""

    line: int
    command: str
    printed: list[str] = field(default_factory=list)


def transcript(page: Path) -> list[Step]:
    steps: list[Step] = []
    open_step: Step | None = None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        text = line.removeprefix("    ")
        if line.startswith("    $ "):
            open_step = Step(number, text[2:])
            steps.append(open_step)
        elif open_step is None:
            continue
        elif line and text == line:  # not indented: the block is over
            open_step = None
        elif open_step.command.endswith("\\") and not open_step.printed:
            open_step.command += "\n" + text
        else:
            open_step.printed.append(text)
    return steps


def _without_blank_ends(lines: list[str]) -> list[str]:
    return "\n".join(lines).strip("\n").split("\n") if any(lines) else []


def shaped(line: str) -> str:
    for pattern, shape in VOLATILE:
        line = pattern.sub(shape, line)
    return re.sub(r" {2,}", "  ", line)  # columns are as wide as what stands in them


def run(steps: list[Step], directory: Path) -> list[list[str]]:
    """What each command printed, in one shell."""
    script = "".join(f"{step.command}\necho '{MARK}'\n" for step in steps)
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]]),
        "HOME": str(directory),
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-s"], input=script, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=240,
    )  # fmt: skip
    return [
        _without_blank_ends(part.split("\n")) for part in done.stdout.replace(str(directory), "/srv").split(MARK + "\n")
    ]


def matches(expected: list[str], found: list[str]) -> bool:
    """Line by line; `...` is any number of lines."""
    if not expected:
        return not found
    if expected[0] == "...":
        return any(matches(expected[1:], found[start:]) for start in range(len(found) + 1))
    return bool(found) and _is_line(expected[0], found[0]) and matches(expected[1:], found[1:])


def _is_line(expected: str, found: str) -> bool:
    return found.startswith(expected.removesuffix("...")) if expected.endswith(" ...") else found == expected


@pytest.mark.client
@pytest.mark.parametrize("name", PAGES)
def test_a_transcript_is_what_the_terminal_shows(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / name
    steps = transcript(page)
    shutil.copytree(ROOT / "policies" / "examples", tmp_path / "policies" / "examples")
    assert steps, f"{name} has no transcript"
    found = run(steps, tmp_path)
    for step, lines in zip(steps, found, strict=False):
        expected, shown = [shaped(line) for line in _without_blank_ends(step.printed)], [shaped(line) for line in lines]
        assert matches(expected, shown), f"{name}:{step.line}: {step.command} printed:\n" + "\n".join(lines)
    assert len(found) == len(steps) + 1, f"{name}: the shell ended early"


@pytest.mark.parametrize(
    ("expected", "found", "answer"),
    [
        pytest.param(["a"], ["a"], True, id="the same"),
        pytest.param(["a"], ["b"], False, id="another line"),
        pytest.param(["a"], ["a", "b"], False, id="a line more"),
        pytest.param(["a", "..."], ["a", "b", "c"], True, id="any lines at the end"),
        pytest.param(["...", "c"], ["a", "b", "c"], True, id="any lines before"),
        pytest.param(["...", "d"], ["a", "b", "c"], False, id="any lines and then none that fits"),
        pytest.param([], ["a"], False, id="nothing expected"),
        pytest.param(["a ..."], ["a b"], True, id="any end of a line"),
        pytest.param(["a ..."], ["b a"], False, id="another line with any end"),
    ],
)
def test_lines_are_compared(expected: list[str], found: list[str], answer: bool) -> None:
    assert matches(expected, found) is answer


def test_what_differs_between_runs_is_compared_by_its_form() -> None:
    one = "CN=Outgate root 1a2b3c4d  expires 2036-11-22T10:00:00Z  in 3650 days  0123456789abcdef"
    other = "CN=Outgate root 99887766  expires 2037-01-01T00:00:01Z  in 3649 days  fedcba9876543210"
    assert shaped(one) == shaped(other) != shaped(one.replace("root", "leaf"))
