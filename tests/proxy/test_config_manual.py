"""docs/configuration.md and docs/gate.schema.json are what the table of keys gives, and their examples load."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from policies.errors import PolicyError
from policies.keys import Scope, Wrong
from policies.tree import Source, parse
from proxy.commands.serve import serve
from proxy.config import Config, GateMode
from proxy.config.file import gate_schema, read_gate
from proxy.config.key import ConfigKey
from proxy.config.keys import KEYS
from proxy.config.manual import example, manual
from proxy.config.reading import read_config
from tests.policies.trees import read_python
from tests.proxy.config_spellings import ids, in_file

DOCS = Path(__file__).parents[2] / "docs"
VALIDATOR = Draft202012Validator(gate_schema())


def read(text: str) -> None:
    list(read_gate(parse(Source("gate.yaml", text)), Scope("gate.yaml", None, lambda _: False)))


def test_the_manual_is_the_one_that_the_table_gives() -> None:
    kept = (DOCS / "configuration.md").read_text()

    assert kept == manual(), "a key changed: python -m proxy.config.manual > docs/configuration.md"


def test_the_schema_is_the_one_that_the_table_gives() -> None:
    kept = json.loads((DOCS / "gate.schema.json").read_text())

    assert kept == gate_schema(), "a key changed: outgate schema --gate > docs/gate.schema.json"


def test_the_manual_is_written_as_it_says_itself() -> None:
    command = [sys.executable, "-m", "proxy.config.manual"]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, timeout=60, check=True)

    assert " ".join(command[1:]) in done.stdout
    assert done.stdout == manual()


@pytest.mark.parametrize("key", KEYS, ids=ids())
def test_the_manual_has_each_key_with_its_names_and_example(key: ConfigKey) -> None:
    [row] = [line for line in manual().splitlines() if line.startswith(f"| `{key.path}` |")]
    _, _, example_cell, names, default, meaning, _ = re.split(r" ?(?<!\\)\| ?", row)

    assert example_cell == f"`{key.example}`"
    assert key.flag in names
    assert f"`{key.variable}`" in names
    assert default
    assert key.says in meaning


DEFAULTS = {
    "mode": "`gateway`",
    "onLogFailure": "`continue`",
    "admin": "`127.0.0.1:9901`",
    "workers": "1",
    "drainS": "0",
    "graceS": "5",
    "limits.maxConnections": "8192, inspected: 4096",
    "limits.dialS": "10",
    "limits.idleS": "3600, inspected: 300",
    "listen": "gateway: `[::]:15001`; sidecar: `127.0.0.1:15001` and `[::1]:15001`; proxy: none",
    "proxyListen": "proxy: `127.0.0.1:3128`; gateway and sidecar: none",
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_the_manual_says_what_holds_where_nobody_says(path: str) -> None:
    [row] = [line for line in manual().splitlines() if line.startswith(f"| `{path}` |")]

    assert f" | {DEFAULTS[path]} | " in row


def test_the_doors_in_the_manual_are_those_of_the_model() -> None:
    rows = {key.path: key.unsaid for key in KEYS}
    for mode in GateMode:
        for door in Config(policy=(), mode=mode).doors():
            host, port = door.address
            shown = f"`[{host}]:{port}`" if ":" in host else f"`{host}:{port}`"
            assert re.search(f"{mode}: [^;]*{re.escape(shown)}", rows[door.kind])


@pytest.mark.parametrize("mode", GateMode)
def test_the_example_of_each_mode_loads(tmp_path: Path, mode: GateMode) -> None:
    text = example(mode)
    (tmp_path / "gate.yaml").write_text(text)

    assert read_config(str(tmp_path / "gate.yaml"), {}, {}).mode is mode
    assert f"```yaml\n{text}```" in manual()
    assert VALIDATOR.is_valid(read_python(text))


@pytest.mark.parametrize("mode", GateMode)
def test_the_example_of_each_mode_loads_with_every_comment_made_a_key(tmp_path: Path, mode: GateMode) -> None:
    text = re.sub(r"^( *)#(?=\w+:)", r"\1", example(mode), flags=re.MULTILINE)
    (tmp_path / "gate.yaml").write_text(text)
    config = read_config(str(tmp_path / "gate.yaml"), {}, {})

    assert (config.mode, config.workers, config.bounds.head_s) == (mode, 2, 10)
    assert config.upstream_proxy
    assert not re.search(r"^ *#\w+:", text, re.MULTILINE)
    assert VALIDATOR.is_valid(read_python(text))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_gate_yaml_in_the_documents_loads(page: Path) -> None:
    """A block is one if it names a mode of a gate."""
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if re.search(f"^mode: ({'|'.join(GateMode)})$", block, re.MULTILINE):
            read(block)


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_every_command_in_the_documents_can_be_meant(page: Path) -> None:
    for words in re.findall(r"^ .*?\boutgate serve (.+)$", page.read_text(), re.MULTILINE):
        said = serve.make_context("serve", shlex.split(words, comments=True)).params
        if not said.pop("file"):
            read_config(None, {}, said)


# --- the schema ------------------------------------------------------------------------------------------------------


def test_the_schema_is_a_schema_in_which_every_key_is_described() -> None:
    schema = gate_schema()
    Draft202012Validator.check_schema(schema)
    top = schema["properties"]
    described = [top, top["limits"]["properties"], top["upstreamProxy"]["properties"]]

    assert all(inner["description"] for keys in described for inner in keys.values())


@pytest.mark.parametrize("key", KEYS, ids=ids())
def test_the_schema_accepts_what_is_read(key: ConfigKey) -> None:
    read(in_file(key))

    assert [error.message for error in VALIDATOR.iter_errors(read_python(in_file(key)))] == []


BOTH_ACCEPT = [
    "",
    "listen: ['[fe80::1%eth0]:1', 1.2.3.4:0]\nnameservers: ['fe80::1%eth0', '::1', '[::1]:53', 1.1.1.1:53]",
    "admin: none\nlog: '-'\ngraceS: 0\nlimits: {}\nhosts: {}",
    "hosts: {bücher.example: '::1', a: ['[::1]:80', '[::2]:80']}",
    "upstreamProxy: {url: 'http://[::1]:3128/', direct: a.example}",
    "proxyProtocolFrom: ['::ffff:10.0.0.0/104', 10.0.0.1]",
]


@pytest.mark.parametrize("text", BOTH_ACCEPT)
def test_both_accept_what_is_right(text: str) -> None:
    read(text)

    assert [error.message for error in VALIDATOR.iter_errors(read_python(text))] == []


BOTH_REFUSE = [
    "[]",
    "polcy: x",
    "policy: []",
    "policy: {a: b}",
    "policy: 5",
    "mode: none",
    "workload: ''",
    "listen: 10.0.0.1",
    "listen: localhost:80",
    "listen: ['::1:80']",
    "workers: 0",
    "workers: 65",
    "workers: '2'",
    "workers: 1.5",
    "graceS: -1",
    "graceS: 1m",
    "limits: {idleS: 0}",
    "limits: {workers: 1}",
    "limits: []",
    "nameservers: dns.example",
    "hosts: [a]",
    "hosts: {'*.a': 1.1.1.1}",
    "hosts: {a: b.example}",
    "hosts: {a: []}",
    "upstreamProxy: http://p.example:1",
    "upstreamProxy: {url: 'https://p.example:1'}",
    "upstreamProxy: {url: 'http://p.example'}",
    "upstreamProxy: {url: 'http://user:word@p.example:1'}",
    "proxyProtocolFrom: balancer.example",
    "admin: off",
    "onLogFailure: ignore",
]


@pytest.mark.parametrize("text", BOTH_REFUSE)
def test_both_refuse_what_is_wrong(text: str) -> None:
    with pytest.raises((PolicyError, Wrong)):
        read(text)

    assert list(VALIDATOR.iter_errors(read_python(text)))
