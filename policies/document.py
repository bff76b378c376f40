"""The keys of a policy file, and one file read by them: nodes become workloads with their rules, sets and tests.

The tables here and in `rules` are the language: reading, the JSON Schema and the nearest right key all come from them.
Sets are unfolded in `sets`, files are merged in `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies import values
from policies.keys import (
    FLAG,
    Json,
    Key,
    Scope,
    Shape,
    Table,
    by_name,
    choice,
    line,
    listing,
    numbered,
    one_of,
    read_text,
    the_one,
    word,
)
from policies.model import UNKNOWN, Action, AnyRule, HostRule, KubernetesMatch, Match, Mode, Place, Test
from policies.rules import GUARD_SCHEMA, RULE_SCHEMA, read_guard, read_rule
from policies.spelling import quote
from policies.tree import ListNode, MapNode, Node, Scalar


@dataclass(frozen=True, slots=True)
class Use:
    """One entry of `use`: a set by name, with a value for each of its parameters."""

    place: Place
    label: str
    name: str
    parameters: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draft:
    """One workload as one file writes it. None: this file does not say."""

    name: str
    place: Place
    rules: tuple[AnyRule, ...] = ()
    uses: tuple[Use, ...] = ()
    match: Match | None = None
    mode: Mode | None = None
    log_query: bool | None = None
    ech: bool | None = None


@dataclass(frozen=True, slots=True)
class RuleSet:
    """One set as written; its rules are read when it is used, with the parameters of that use."""

    name: str
    place: Place
    scope: Scope
    rules: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One policy file, read."""

    file: str
    mode: Mode | None
    guard: tuple[HostRule, ...]
    workloads: Mapping[str, Draft]
    sets: Mapping[str, RuleSet]
    tests: tuple[Test, ...]


# --- the tables ----------------------------------------------------------------------------------------------------


def _read_version(node: Node, scope: Scope) -> int:
    if type(node) is Scalar and node.whole == 1:
        return 1
    shown = quote(node.text) if type(node) is Scalar else node.kind
    raise scope.wrong(node, f"{shown} is no version of this language", "write version: 1")


def _read_kubernetes(node: Node, scope: Scope) -> KubernetesMatch:
    fields = _KUBERNETES.read(node, scope)
    if not fields:
        raise scope.wrong(node, "kubernetes matches every pod", "write a namespace, a serviceAccount or labels")
    labels = sorted((key, value) for key, (_, value) in fields.pop("labels", {}).items())
    return KubernetesMatch(labels=tuple(labels), **fields)


def _read_match(node: Node, scope: Scope) -> Match:
    if scope.label == UNKNOWN:
        hint = "it is the workload of the sources that no match names"
        raise scope.wrong(node, f'"{UNKNOWN}" has no match', hint)
    fields = _MATCH.read(node, scope)
    the_one(node, scope, "match", _SOURCES)
    return Match(scope.place(node), **fields)


def _read_use(node: Node, scope: Scope, label: str) -> Use:
    place = scope.place(node)
    if type(node) is not MapNode:
        return Use(place, label, SET_NAME.read(node, scope))
    written = {key.text: value for key, value in node.entries}
    if "set" not in written:
        raise scope.wrong(node, "this use names no set", "write {set: NAME, PARAMETER: VALUE}")
    name = SET_NAME.read(written.pop("set"), scope)
    parameters = {key: _read_parameter(value, scope) for key, value in written.items()}
    return Use(place, label, name, parameters)


def _read_parameter(node: Node, scope: Scope) -> Scalar:
    if type(node) is Scalar and node.whole is None:
        read_text(node, scope)
    elif type(node) is not Scalar:
        raise scope.wrong(node, f"{node.kind} where the value of a parameter must stand", "write text or a number")
    return node


def _read_set(node: Node, scope: Scope) -> tuple[Node, ...]:
    if type(node) is not ListNode:
        raise scope.wrong(node, f"{node.kind} where the rules of a set must stand", "begin each rule with -")
    return node.items


def _case(expect: Action) -> Shape[Test]:
    words = line(2000)
    return Shape(
        lambda node, scope: Test(scope.place(node), scope.label, words.read(node, scope), expect), words.schema
    )


_KUBERNETES_NAME = word("[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", "a Kubernetes name", "lower case, digits, - and .")
_LABEL_KEY = word("[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,315}[A-Za-z0-9])?", "a label key")
_LABEL_VALUE = word("(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", "a label value")
_KUBERNETES = Table(
    "kubernetes",
    {
        "namespace": Key(_KUBERNETES_NAME, "The namespace of the pod."),
        "serviceAccount": Key(_KUBERNETES_NAME, "The service account of the pod."),
        "labels": Key(by_name(_LABEL_KEY, _LABEL_VALUE, "labels"), "Labels of the pod; it must have all of them."),
    },
)
_SOURCES = {
    "kubernetes": Key(
        Shape(_read_kubernetes, _KUBERNETES.schema | {"minProperties": 1}),
        "Pods, by namespace, service account and labels.",
    ),
    "address": Key(values.NETWORKS.named("addresses"), "Source addresses or prefixes; the longest prefix wins."),
    "user": Key(line(200), "The user name of the proxy credentials."),
}
_MATCH = Table("match", _SOURCES)

_WORKLOAD_NAME = word(
    "[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", "a workload name", "letters, digits, and - . _ between them"
)
_SET_PART = "[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
SET_NAME = word(f"{_SET_PART}(?:/{_SET_PART}){{0,5}}", "a set name", "such as ubuntu or azure/kubernetes-service")
_USE_SCHEMA: Json = {
    "anyOf": [
        SET_NAME.schema,
        {
            "type": "object",
            "properties": {"set": {"description": "The name of the set.", **SET_NAME.schema}},
            "additionalProperties": {"description": "A parameter of the set.", "type": ["string", "integer"]},
            "required": ["set"],
        },
    ]
}
_RULE: Json = {"$ref": "#/$defs/rule"}
_MODE = choice({mode.value: mode for mode in Mode})

_WORKLOAD = Table(
    "a workload",
    {
        "match": Key(
            Shape(_read_match, _MATCH.schema | one_of(_SOURCES)),
            "Which sources are this workload: one of kubernetes, address and user.",
        ),
        "use": Key(numbered(_read_use, "{}/use", _USE_SCHEMA), "Sets, local or shipped, whose rules it has.", "uses"),
        "rules": Key(numbered(read_rule, "{}/rules", _RULE), "What it may reach. Order never matters."),
        "mode": Key(_MODE, "enforce (default), or audit: what no rule allows passes and is recorded."),
        "logQuery": Key(FLAG, "true: decision records keep query strings as they are."),
        "ech": Key(
            choice({"allow": True, "deny": False}),
            "allow: Encrypted Client Hello may pass undecrypted, unless a rule says otherwise.",
        ),
    },
    {"sets": "sets stand at the top of the file; a workload names them under use"},
)
_CASES = Table(
    "tests",
    {
        "allow": Key(listing(_case(Action.ALLOW)), "Attempts that must be allowed."),
        "deny": Key(listing(_case(Action.DENY)), "Attempts that must be denied."),
    },
)
_POLICY = Table(
    "a policy",
    {
        "version": Key(Shape(_read_version, {"const": 1}), "The version of this language.", required=True),
        "mode": Key(_MODE, "The mode of the workloads that only this file defines and that name none themselves."),
        "guard": Key(
            numbered(read_guard, "guard", {"$ref": "#/$defs/guard"}), "Denies for every workload; nothing undoes them."
        ),
        "workloads": Key(by_name(_WORKLOAD_NAME, _WORKLOAD.shape, "workloads"), "The workloads by name."),
        "sets": Key(
            by_name(SET_NAME, Shape(_read_set, {"type": "array", "items": _RULE}), "sets"),
            "Rules under one name. <parameter> is replaced by the value that a use gives.",
        ),
        "tests": Key(by_name(_WORKLOAD_NAME, _CASES.shape, "tests"), "Attempts by workload, and what each must get."),
    },
    {"rules": "rules stand in a workload: workloads: {NAME: {rules: …}}"},
)

POLICY_SCHEMA: Json = _POLICY.schema
DEFINITIONS: Mapping[str, Json] = {
    "rule": RULE_SCHEMA,
    "guard": GUARD_SCHEMA,
    "pattern": values.HOST_PATTERN.schema,
    "name": values.HOSTNAME.schema,
    "ports": values.PORTS.schema,
    "addresses": values.NETWORKS.schema,
    "entries": values.ENTRIES.schema,
    "denies": values.DENY.schema,
}


def read_document(node: Node, scope: Scope) -> Document:
    """One file. Raises Wrong with every problem found in it."""
    fields = _POLICY.read(node, scope)
    workloads: dict[str, tuple[Scalar, dict[str, Any]]] = fields.get("workloads", {})
    sets: dict[str, tuple[Scalar, tuple[Node, ...]]] = fields.get("sets", {})
    tests: dict[str, tuple[Scalar, dict[str, tuple[Test, ...]]]] = fields.get("tests", {})
    return Document(
        file=scope.file,
        mode=fields.get("mode"),
        guard=fields.get("guard", ()),
        workloads={name: Draft(name, scope.place(key), **draft) for name, (key, draft) in workloads.items()},
        sets={name: RuleSet(name, scope.place(key), scope, rules) for name, (key, rules) in sets.items()},
        tests=tuple(test for _, cases in tests.values() for tests_ in cases.values() for test in tests_),
    )
