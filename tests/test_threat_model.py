"""Every line of what docs/threat-model.md says is held names a test that there is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
HELD = [
    line
    for part in re.findall(r"^### Held$(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^\| (?!attempt \||---)(.+)\|$", part, re.MULTILINE)
]


def everything() -> set[str]:
    """Of functions and of files."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return functions | {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.parametrize("line", HELD, ids=lambda line: line[:40])
def test_each_line_that_is_held_names_its_test(line: str) -> None:
    assert re.search(r"`(test_\w+|tests/[\w/]+\.py)`", line)


def test_every_test_that_is_named_there_exists() -> None:
    named = set(re.findall(r"`(test_\w+|tests/[\w/]+/test_\w+\.py)`", PAGE))
    assert len(HELD) > 60
    assert named - everything() == set()
