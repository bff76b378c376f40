"""Rule sets unfolded: a `use` becomes the rules of its set, with a value in place of each `<parameter>`.

Sets are those of the policy's own files and of the shipped catalogue; one's own wins over a shipped one of its name. A
set uses no sets. A catalogue file is a policy file with `sets` only: `azure/kubernetes-service` holds the sets of that
name and below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from policies.document import Document, RuleSet, Use, read_document
from policies.errors import Problem
from policies.keys import Scope, Wrong, read_each
from policies.model import AnyRule, Place
from policies.rules import read_rule
from policies.spelling import did_you_mean, quote
from policies.tree import ListNode, MapNode, Node, Scalar, Source, parse
from policies.values import PARAMETER

# A value must never widen the pattern it is put into: no `*`, no `<`, and in a name no dot, which would move it below
# another owner. In a path and in free text a value is one segment, whose dots are harmless.
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_SEGMENT_KEYS = frozenset({"allow", "deny", "name", "reason", "owner"})


class Shelf:
    """Every set that a `use` may name. A catalogue file is read when one of its sets is first asked for."""

    def __init__(self, documents: Iterable[Document], catalogue: Mapping[str, Source], scope: Scope) -> None:
        """`problems` tells of sets that two files define."""
        self.problems: list[Problem] = []
        self.own: dict[str, RuleSet] = {}
        for rules in (rules for document in documents for rules in document.sets.values()):
            first = self.own.setdefault(rules.name, rules)
            if first is not rules:
                message = f'set "{rules.name}" is defined twice, first at {first.place}'
                self.problems.append(Problem(rules.place, message, "give one of them another name"))
        self._catalogue = catalogue
        self._scope = scope
        self._shipped: dict[str, Mapping[str, RuleSet]] = {}

    def find(self, name: str) -> RuleSet | None:
        if name in self.own:
            return self.own[name]
        file = name
        while file not in self._catalogue:
            file, slash, _ = file.rpartition("/")
            if not slash:
                return None
        return self._read_shipped(file).get(name)

    def names(self) -> set[str]:
        return set(self.own).union(*(self._read_shipped(file) for file in self._catalogue))

    def _read_shipped(self, file: str) -> Mapping[str, RuleSet]:
        if file not in self._shipped:
            source = self._catalogue[file]
            self._shipped[file] = read_document(parse(source), replace(self._scope, file=source.file)).sets
        return self._shipped[file]


def unfold(use: Use, shelf: Shelf) -> tuple[AnyRule, ...]:
    """The rules that `use` stands for. Raises Wrong: unknown set, a parameter too few or too many, a bad value."""
    rules = shelf.find(use.name)
    if rules is None:
        hint = did_you_mean(use.name, shelf.names())
        raise Wrong([Problem(use.place, f"unknown set {quote(use.name)}", hint)])
    wanted = parameters(rules)
    if problems := list(_misfits(use, wanted)):
        raise Wrong(problems)
    try:
        return read_set(rules, use.parameters, f"{use.label}/{use.name}", use.place.file)
    except Wrong as e:
        if not wanted:
            raise
        raise Wrong([_cited(problem, use) for problem in e.problems]) from e


def check(rules: RuleSet) -> None:
    """Raises Wrong for a set that could not be used, whatever the values of its parameters."""
    names = parameters(rules)
    trials = [Scalar(sample, True, rules.place.line, rules.place.column) for sample in ("1", "x")]
    for trial in trials if names else trials[:1]:
        try:
            read_set(rules, dict.fromkeys(names, trial), f"sets/{rules.name}", rules.place.file)
        except Wrong:
            if trial is trials[-1] or not names:
                raise
        else:
            return


def parameters(rules: RuleSet) -> set[str]:
    """The names of the set's parameters."""
    return {name for node in rules.rules for text in _texts(node) for name in PARAMETER.findall(text)}


def read_set(rules: RuleSet, values: Mapping[str, Scalar], label: str, file: str) -> tuple[AnyRule, ...]:
    """The rules of a set with its parameters replaced; `file` is where the values were written. Raises Wrong."""

    def read(index: int, node: Node) -> AnyRule:
        filled = _fill(node, values, file) if values else node
        return read_rule(filled, rules.scope, f"{label}[{index}]")

    return read_each(read, rules.rules)


def _misfits(use: Use, wanted: set[str]) -> Iterator[Problem]:
    given = set(use.parameters)
    for name in sorted(wanted - given):
        repair = f"write {{set: {use.name}, {name}: …}}" if name != "set" else "rename it in the set"
        yield Problem(use.place, f'set "{use.name}" needs a value for its parameter "{name}"', repair)
    for name in sorted(given - wanted):
        value = use.parameters[name]
        place = Place(use.place.file, value.line, value.column)
        repair = did_you_mean(name, wanted) if wanted else "it has no parameters"
        yield Problem(place, f'set "{use.name}" has no parameter {quote(name)}', repair)


def _cited(problem: Problem, use: Use) -> Problem:
    return replace(problem, message=f"{problem.message} (as used at {use.place})")


def _texts(node: Node) -> Iterator[str]:
    match node:
        case Scalar():
            yield node.text
        case ListNode():
            for item in node.items:
                yield from _texts(item)
        case MapNode():
            for _, value in node.entries:
                yield from _texts(value)


def _fill(node: Node, values: Mapping[str, Scalar], file: str, form: re.Pattern[str] = _LABEL) -> Node:
    """`node` with its parameters replaced. A plain `<port>` becomes a plain number."""
    match node:
        case Scalar():
            return node._replace(text=PARAMETER.sub(lambda found: _value(found[1], values, file, form), node.text))
        case ListNode():
            return node._replace(items=tuple(_fill(item, values, file, form) for item in node.items))
        case MapNode():
            entries = (
                (key, _fill(value, values, file, _SEGMENT if key.text in _SEGMENT_KEYS else _LABEL))
                for key, value in node.entries
            )
            return node._replace(entries=tuple(entries))


def _value(name: str, values: Mapping[str, Scalar], file: str, form: re.Pattern[str]) -> str:
    value = values[name]
    if form.fullmatch(value.text):
        return value.text
    what = "one label (letters, digits, - inside)" if form is _LABEL else "one segment (letters, digits, . _ - inside)"
    message = f'parameter "{name}" is {quote(value.text)}, not {what}'
    raise Wrong([Problem(Place(file, value.line, value.column), message, "anything else could widen the set")])
