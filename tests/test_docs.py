"""What the documents list is what the code has, and what they link to exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.model import Reason
from proxy.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
WRITERS = (
    "record.py",
    "connection.py",
    "relays/dns_answers.py",
    "relays/dns_pace.py",
    "relays/dnstap.py",
    "relays/ntp/records.py",
    "relays/udp_records.py",
    "inspector/outcome.py",
    "log/lines.py",
    "log/decision_log.py",
)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def test_every_reason_is_explained_and_no_other() -> None:
    table = (ROOT / "docs" / "decision-record.md").read_text().partition("## Reasons")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [reason.value for reason in Reason]


def keys_filled(module: Path) -> Iterator[str]:
    functions = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef)]
    for node in (node for function in functions if function.name != "describe" for node in ast.walk(function)):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        elif isinstance(node, ast.Dict):
            keys = node.keys
        yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def test_every_field_of_a_record_is_explained_and_no_other() -> None:
    """What is written is read from the code: the keys of every mapping that is filled where records are made."""
    table = (ROOT / "docs" / "decision-record.md").read_text().partition("## Reasons")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    explained = {"server.names", *(field for row in rows for field in re.findall(r"`([a-z_.]+)`", row))}
    written = {key for module in WRITERS for key in keys_filled(ROOT / "proxy" / module)}
    assert written - {"event", "count", "since"} == explained  # those are of the line about lost records


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"outgate {name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
