"""The JSON Schema: kept in docs/, right about every file we ship, and refusing what loading refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from policies.cases import run
from policies.document import DEFINITIONS
from policies.errors import PolicyError
from policies.load import Source, load
from policies.schema import schema
from proxy.policy_files import read_policy
from tests.policies.trees import read_python

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "policies" / "examples").glob("*.yaml"), *(ROOT / "policies" / "catalogue").rglob("*.yaml")])
VALIDATOR = Draft202012Validator(schema())


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema())


def test_the_schema_in_docs_is_the_one_the_tables_give() -> None:
    kept = json.loads((ROOT / "docs" / "policy.schema.json").read_text())

    assert kept == schema(), "the language changed: outgate schema > docs/policy.schema.json"


def test_the_schema_is_for_editors_plain_json_without_loose_references() -> None:
    text = json.dumps(schema())

    assert all(f'"#/$defs/{name}"' in text for name in DEFINITIONS)
    assert text.count('"$ref"') == sum(text.count(f'"#/$defs/{name}"') for name in DEFINITIONS)


def test_every_key_is_described() -> None:
    def undescribed(part: object) -> list[str]:
        if isinstance(part, list):
            return [found for item in part for found in undescribed(item)]
        if not isinstance(part, dict):
            return []
        keys = part.get("properties", {})
        missing = [name for name, inner in keys.items() if not inner.get("description")]
        return missing + [found for inner in part.values() for found in undescribed(inner)]

    assert undescribed(schema()) == []


def keys_of(part: object) -> set[str]:
    if isinstance(part, list):
        return {key for item in part for key in keys_of(item)}
    if not isinstance(part, dict):
        return set()
    return set(part.get("properties", {})) | {key for inner in part.values() for key in keys_of(inner)}


def test_the_manual_names_every_key() -> None:
    manual = (ROOT / "docs" / "policy.md").read_text()

    assert [key for key in sorted(keys_of(schema())) if f"`{key}`" not in manual and f".{key}`" not in manual] == []


def test_the_first_policy_of_the_manual_loads_and_its_tests_pass(tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "policy.md").read_text()
    file = tmp_path / "p.yaml"
    file.write_text(manual.partition("```yaml\n")[2].partition("```")[0])

    results = run(read_policy([str(file)]), 0.0)
    assert [result.is_pass for result in results] == [True, True]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_is_valid(path: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(read_python(path.read_text()))] == []


GOOD = [
    "version: 1",
    "version: 1\nmode: audit\nguard: []\nworkloads: {}\nsets: {}\ntests: {}",
    "version: 1\nworkloads: {a: {rules: [{host: bücher.example, ports: 8000-8100, plain: ['8080', 1-2]}]}}",
    "version: 1\nworkloads: {a: {rules: [{host: A.example., tls: inspect, allow: ['GET,M-SEARCH  /a']}]}}",
    "version: 1\nworkloads: {a: {rules: [{host: '*.x.example', deny: all, until: 2027-01-31, upgrade: websocket}]}}",
    "version: 1\nworkloads: {a: {rules: [{tcp: '[2001:db8::/32]:443'}, {udp: {address: [10.0.0.1], ports: 2-3}}]}}",
    "version: 1\nworkloads: {a: {rules: [{udp: 'h.example:1', budget: 10MiB/h, quic: sni, private: true}]}}",
    "version: 1\nworkloads: {a: {match: {kubernetes: {labels: {app.example/x: '1', b: ''}}}}, b: {match: {user: x y}}}",
    "version: 1\nsets: {a/b: [{host: <x>.example}, {tcp: '<h>:<p>'}, {tcp: {host: <h>, ports: [<p>]}}]}",
]


@pytest.mark.parametrize("text", GOOD)
def test_both_accept_what_is_right(text: str) -> None:
    load([Source("p.yaml", text)], catalogue={}, tags={}, is_public_suffix=lambda name: False)

    assert [error.message for error in VALIDATOR.iter_errors(read_python(text))] == []


IN_A_RULE = [
    "{}",
    "{hots: a.example}",
    "{host: a.example, prots: 1}",
    "{host: a.example, tcp: 'b.example:1'}",
    "{host: '*'}",
    "{host: 'a*.example'}",
    "{host: 'a.example:443'}",
    "{host: https://a.example/}",
    "{host: ''}",
    "{host: 12}",
    "{host: a.example, ports: []}",
    "{host: a.example, ports: 0}",
    "{host: a.example, ports: 65536}",
    "{host: a.example, ports: https}",
    "{host: a.example, tls: bump}",
    "{host: a.example, tls: inspect, allow: all}",
    "{host: a.example, tls: inspect, allow: []}",
    "{host: a.example, tls: inspect, allow: [GET]}",
    "{host: a.example, tls: inspect, allow: [get /x]}",
    "{host: a.example, tls: inspect, allow: [GET x]}",
    "{host: a.example, tls: inspect, allow: ['GET /x?y']}",
    "{host: a.example, tls: inspect, deny: [all]}",
    "{host: a.example, tls: inspect, deny: GET /x}",
    "{host: a.example, private: 'true'}",
    "{host: a.example, private: yes}",
    "{host: a.example, encodedSlash: refuse}",
    "{host: a.example, ech: true}",
    "{host: a.example, upgrade: []}",
    "{host: a.example, upgrade: h2c}",
    "{host: a.example, until: 31.1.2027}",
    "{host: a.example, name: ''}",
    "{host: a.example, name: 5}",
    "{host: a.example, budget: 1MiB/h}",
    "{tcp: a.example}",
    "{tcp: 'a.example:ssh'}",
    "{tcp: '*.a.example:1'}",
    "{tcp: '2001:db8::1:443'}",
    "{tcp: {host: a.example}}",
    "{tcp: {ports: 1}}",
    "{tcp: {host: a.example, tag: T, ports: 1}}",
    "{tcp: {address: nonsense, ports: 1}}",
    "{tcp: 'a.example:1', budget: 1MiB/h}",
    "{tcp: 'a.example:1', ports: 1}",
    "{udp: 'a.example:1', budget: 1MB/h}",
    "{udp: 'a.example:1', quic: yes}",
    "{ntp: '*.a.example'}",
    "{ntp: a.example, ports: 123}",
    "{dns: [a.example]}",
]
IN_A_FILE = [
    "{}",
    "[]",
    "version: 2",
    "version: '1'",
    "version: 1\nmode: report",
    "version: 1\nrules: []",
    "version: 1\nguard: [{host: a.example}]",
    "version: 1\nguard: [{host: a.example, deny: all, allow: ['GET /']}]",
    "version: 1\nguard: [{tcp: 'a.example:1', deny: all}]",
    "version: 1\nworkloads: []",
    "version: 1\nworkloads: {a: }",
    "version: 1\nworkloads: {a/b: {}}",
    "version: 1\nworkloads: {a: {use: ubuntu}}",
    "version: 1\nworkloads: {a: {use: [{location: x}]}}",
    "version: 1\nworkloads: {a: {use: [{set: s, x: [1]}]}}",
    "version: 1\nworkloads: {a: {match: {}}}",
    "version: 1\nworkloads: {a: {match: {user: x, address: 10.0.0.1}}}",
    "version: 1\nworkloads: {a: {match: {kubernetes: {}}}}",
    "version: 1\nworkloads: {a: {match: {kubernetes: {namespace: 'x*'}}}}",
    "version: 1\nworkloads: {a: {logQuery: on}}",
    "version: 1\nsets: {a b: []}",
    "version: 1\nsets: {a: {}}",
    "version: 1\nworkloads: {a: {}}\ntests: {a: [x]}",
    "version: 1\nworkloads: {a: {}}\ntests: {a: {allow: [1]}}",
]


@pytest.mark.parametrize(
    "text", [*IN_A_FILE, *(f"version: 1\nworkloads: {{a: {{rules: [{rule}]}}}}" for rule in IN_A_RULE)]
)
def test_both_refuse_what_is_wrong(text: str) -> None:
    with pytest.raises(PolicyError):
        load([Source("p.yaml", text)], catalogue={}, tags={"T": ()}, is_public_suffix=lambda name: False)

    assert list(VALIDATOR.iter_errors(read_python(text)))
