"""Imports point downwards only, and the core touches no socket, clock, file or log. A failure names the line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proxy", "addons", "pki", "policies")
MAY_IMPORT = {
    "proxy": {"proxy", "addons", "pki", "policies"},
    "addons": {"addons", "pki", "policies"},
    "pki": {"pki"},
    "policies": {"policies"},
}
CORE = (
    "policies/*.py", "proxy/wire/*.py", "proxy/layout.py", "proxy/ruleset.py", "proxy/injection/*.py",
    "proxy/relays/ntp/sample.py", "proxy/relays/ntp/selection.py", "proxy/relays/ntp/estimate.py",
)  # fmt: skip
PURE_CRYPTO = (
    "pki/authority.py", "pki/profile.py", "pki/constraints.py", "pki/chains.py", "pki/rotation.py", "pki/plan.py",
    "pki/lint.py", "pki/state.py", "pki/layout.py", "pki/distribution.py", "pki/jks.py", "pki/der.py",
)  # fmt: skip
IMPURE = {
    "asyncio", "datetime.now", "glob", "io", "logging", "os", "pathlib", "random", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "structlog", "subprocess", "tempfile", "threading", "time", "multiprocessing",
}  # fmt: skip
WIRING = {
    "proxy/runtime.py", "proxy/options.py", "proxy/run.py", "proxy/serve.py", "proxy/relay.py", "proxy/advisory.py",
    "proxy/config/reading.py", "proxy/service/supervisor.py", "proxy/service/reloading.py", "proxy/service/compiler.py",
    "proxy/worker/host.py", "proxy/worker/main.py", "proxy/worker/wiring.py", "proxy/webhook.py",
}  # fmt: skip
ENTRY = {"proxy/cli.py", "proxy/__main__.py"}
LOADED_BY_MITMPROXY = {"addons/stock.py", "addons/outgate.py"}  # an entry of its own: it wires what it needs


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""


def test_packages_import_only_what_lies_below() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {package} may not import {name}"
        for package in PACKAGES
        for path in sources(f"{package}/**/*.py")
        for line, name in imports(path)
        if name.split(".")[0] in {*PACKAGES, "tests", "demo"} - MAY_IMPORT[package]
        and str(path.relative_to(ROOT)) not in LOADED_BY_MITMPROXY
    ]
    assert wrong == []


@pytest.mark.parametrize("patterns", [CORE, PURE_CRYPTO], ids=["core", "crypto"])
def test_pure_code_imports_no_input_or_output(patterns: tuple[str, ...]) -> None:
    allowed = {"ssl"} if patterns is PURE_CRYPTO else set()
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: a pure module may not import {name}"
        for path in sources(*patterns)
        for line, name in imports(path)
        if name.split(".")[0] in IMPURE - allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("patterns", [CORE, PURE_CRYPTO], ids=["core", "crypto"])
def test_pure_code_reads_no_clock_and_opens_no_file(patterns: tuple[str, ...]) -> None:
    wrong = []
    for path in sources(*patterns):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"open", "input", "print", "exec", "eval"} or called.endswith((".now", ".utcnow", ".today")):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}()")
    assert wrong == []


def test_core_does_not_import_shells() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: the core may not import {name}"
        for path in sources("proxy/wire/*.py")
        for line, name in imports(path)
        if name.startswith("proxy.") and not name.startswith("proxy.wire")
    ]
    assert wrong == []


def test_nothing_imports_entry_or_wiring_from_below() -> None:
    entries = ENTRY | LOADED_BY_MITMPROXY
    above = {path.removesuffix(".py").replace("/", ".") for path in WIRING | entries}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name} is above it"
        for path in sources("proxy/**/*.py", "addons/**/*.py")
        for line, name in imports(path)
        if name in above
        and str(path.relative_to(ROOT)) not in WIRING | entries
        and not str(path.relative_to(ROOT)).startswith("proxy/commands/")
    ]
    assert wrong == []


def test_judge_imports_no_mitmproxy() -> None:
    for name in ("addons/judge.py", "addons/answers.py"):
        wrong = [f"{name}:{line}: {module}" for line, module in imports(ROOT / name) if "mitmproxy" in module]
        assert wrong == []


@pytest.mark.parametrize(
    ("patterns", "most"), [(tuple(f"{p}/**/*.py" for p in PACKAGES), 450), (("tests/**/*.py",), 800)]
)
def test_no_file_outgrows_a_reader(patterns: tuple[str, ...], most: int) -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*patterns)}
    assert {name: length for name, length in lengths.items() if length > most} == {}
