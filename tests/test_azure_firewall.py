"""Each requirement in docs/azure-firewall.md names the tests that cover it, and each of those tests is listed."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "azure-firewall.md").read_text()


def found() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_every_requirement_names_tests_that_exist() -> None:
    rows = [
        line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("|--", "| requirement"))
    ]
    named = [set(re.findall(r"`(test_\w+)`", row)) for row in rows]
    assert len(rows) > 15
    assert [row for row, tests in zip(rows, named, strict=True) if not tests] == []
    assert set().union(*named) - found() == set()


def test_every_test_of_a_requirement_is_listed() -> None:
    listed = set(re.findall(r"`(test_\w+)`", PAGE))
    asked = {name for name in found() if name.startswith(("test_azure_asks_for_", "test_aws_asks_for_"))}
    assert len(asked) > 9
    assert asked - listed == set()
