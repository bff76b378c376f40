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
# another owner. In a path and in free text a value is one segment, whose dots are harmless. Strictest first.
_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_FORMS = {
    _PORT: "port",
    _LABEL: "label (letters, digits, - inside)",
    _SEGMENT: "segment (letters, digits, . _ -)",
}
_FORM_OF = {**dict.fromkeys(("ports", "plain"), _PORT), **dict.fromkeys(("allow", "deny"), _SEGMENT)}
_FORM_OF |= dict.fromkeys(("name", "reason", "owner"), _SEGMENT)


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
    forms = parameters(rules)
    if problems := list(_misfits(use, forms)):
        raise Wrong(problems)
    try:
        return _read(rules, use.parameters, f"{use.label}/{use.name}")
    except Wrong as e:
        if not forms:
            raise
        at = f" (as used at {use.place})"  # with other values it might be right
        raise Wrong([replace(problem, message=problem.message + at) for problem in e.problems]) from e


def check(rules: RuleSet) -> None:
    """Raises Wrong for a set that could not be used, whatever the values of its parameters and the imported tags."""
    untagged = replace(rules, scope=replace(rules.scope, tags=None))
    samples = {
        name: Scalar("1" if form is _PORT else "x", True, rules.place.line, rules.place.column)
        for name, form in parameters(rules).items()
    }
    _read(untagged, samples, f"sets/{rules.name}")


def parameters(rules: RuleSet) -> dict[str, re.Pattern[str]]:
    """The set's parameters, each with the form its values must have in the strictest of its places."""
    found: dict[str, set[re.Pattern[str]]] = {}
    for name, form in (each for node in rules.rules for each in _parameters(node, _LABEL)):
        found.setdefault(name, set()).add(form)
    return {name: next(form for form in _FORMS if form in forms) for name, forms in found.items()}


def _parameters(node: Node, form: re.Pattern[str]) -> Iterator[tuple[str, re.Pattern[str]]]:
    match node:
        case Scalar():
            for found in PARAMETER.finditer(node.text):
                after_colon = form is _LABEL and ":" in node.text[: found.start()]
                yield found[1], _PORT if after_colon else form
        case ListNode():
            for item in node.items:
                yield from _parameters(item, form)
        case MapNode():
            for key, value in node.entries:
                yield from _parameters(value, _FORM_OF.get(key.text, _LABEL))


def _read(rules: RuleSet, values: Mapping[str, Scalar], label: str) -> tuple[AnyRule, ...]:
    return read_each(
        lambda index, node: read_rule(_fill(node, values) if values else node, rules.scope, f"{label}[{index}]"),
        rules.rules,
    )


def _fill(node: Node, values: Mapping[str, Scalar]) -> Node:
    """`node` with its parameters replaced. A plain `<port>` becomes a plain number."""
    match node:
        case Scalar():
            return node._replace(text=PARAMETER.sub(lambda found: values[found[1]].text, node.text))
        case ListNode():
            return node._replace(items=tuple(_fill(item, values) for item in node.items))
        case MapNode():
            return node._replace(entries=tuple((key, _fill(value, values)) for key, value in node.entries))


def _misfits(use: Use, forms: Mapping[str, re.Pattern[str]]) -> Iterator[Problem]:
    for name in sorted(forms.keys() - use.parameters.keys()):
        repair = f"write {{set: {use.name}, {name}: …}}" if name != "set" else "rename it in the set"
        yield Problem(use.place, f'set "{use.name}" needs a value for its parameter "{name}"', repair)
    for name, value in use.parameters.items():
        place = Place(use.place.file, value.line, value.column)
        if name not in forms:
            repair = did_you_mean(name, forms) if forms else "it has no parameters"
            yield Problem(place, f'set "{use.name}" has no parameter {quote(name)}', repair)
        elif not forms[name].fullmatch(value.text):
            message = f'parameter "{name}" is {quote(value.text)}, not one {_FORMS[forms[name]]}'
            yield Problem(place, message, "anything else could widen the set")
