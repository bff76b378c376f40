"""Shapes of values and tables of keys: each reads a node of the tree and describes itself as JSON Schema.

One table does both, so an editor that completes by the schema never offers a key that loading does not know. No key of
the policy language stands here; they are in `rules` and `document`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from policies.errors import Problem
from policies.hostnames import Hostname
from policies.model import Network, Place
from policies.spelling import MAX_PROBLEMS, did_you_mean, nearest, quote
from policies.tree import ListNode, MapNode, Node, Scalar

type Json = dict[str, Any]  # a JSON Schema has no narrower type

_CAPITAL = re.compile(r"[A-Z]")


class Wrong(Exception):
    """A node that cannot be read, with every problem found in it."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__(problems)


class Tags:
    """The imported service tags. Clouds spell one tag in several cases, so case does not count."""

    __slots__ = ("_names", "_networks")

    def __init__(self, networks: Mapping[str, tuple[Network, ...]]) -> None:
        self._networks = networks
        self._names = {name.casefold(): name for name in networks}

    def find(self, name: str) -> tuple[Network, ...] | None:
        known = self._names.get(name.casefold())
        return None if known is None else self._networks[known]

    def names(self) -> Iterable[str]:
        return self._networks.keys()


@dataclass(frozen=True, slots=True)
class Scope:
    """What the reading of one file may ask. `label` names the workload or set that is being read."""

    file: str
    tags: Tags | None  # None: any tag will do, without prefixes
    is_public_suffix: Callable[[Hostname], bool]
    label: str = ""

    def place(self, node: Node) -> Place:
        return Place(self.file, node.line, node.column)

    def wrong(self, node: Node, message: str, hint: str | None = None) -> Wrong:
        return Wrong([Problem(self.place(node), message, hint)])


@dataclass(frozen=True, slots=True)
class Shape[T]:
    """How one kind of value is read, and how the schema describes it. `read` raises Wrong."""

    read: Callable[[Node, Scope], T]
    schema: Json

    def named(self, name: str) -> Shape[T]:
        """The same shape, described once under `$defs`."""
        return Shape(self.read, {"$ref": f"#/$defs/{name}"})

    def into[U](self, make: Callable[[T], U]) -> Shape[U]:
        """The same values, given to `make` once read."""
        return Shape(lambda node, scope: make(self.read(node, scope)), self.schema)


@dataclass(frozen=True, slots=True)
class Key:
    """One key: the shape of its value, what it means, and the name of its field (by default the key in snake case)."""

    shape: Shape[Any]  # a table holds keys of many types
    says: str
    field: str | None = None
    required: bool = False


class Table:
    """A closed set of keys. Whatever else is written is an error that names the nearest right key."""

    __slots__ = ("_elsewhere", "_fields", "_required", "keys", "what")

    def __init__(self, what: str, keys: Mapping[str, Key], elsewhere: Mapping[str, str] | None = None) -> None:
        """`elsewhere` tells of right keys in the wrong place where they belong."""
        self.what = what
        self.keys = keys
        self._elsewhere = elsewhere or {}
        self._fields = {name: (key.field or snake(name), key.shape.read) for name, key in keys.items()}
        self._required = [name for name, key in keys.items() if key.required]

    def read(self, node: Node, scope: Scope) -> dict[str, Any]:
        """The values by field, only those written. Raises Wrong with every problem of every key."""
        if type(node) is not MapNode:
            raise scope.wrong(node, f"{node.kind} where {self.what} must stand", "write key: value, or {} for none")
        values: dict[str, Any] = {}
        problems: list[Problem] = []
        for key, value in node.entries:
            known = self._fields.get(key.text)
            if known is None:
                problems.append(self.unknown(key, scope))
            else:
                try:
                    values[known[0]] = known[1](value, scope)
                except Wrong as e:
                    problems += e.problems
            if len(problems) >= MAX_PROBLEMS:
                break
        if self._required:
            written = {key.text for key, _ in node.entries}
            problems += [
                Problem(scope.place(node), f'{self.what} needs the key "{name}"', f"write {name}: {self._sample(name)}")
                for name in self._required
                if name not in written
            ]
        if problems:
            raise Wrong(problems)
        return values

    def unknown(self, key: Scalar, scope: Scope) -> Problem:
        repair = self._elsewhere.get(key.text) or did_you_mean(key.text, self.keys)
        return Problem(scope.place(key), f"{self.what} knows no key {quote(key.text)}", repair)

    def _sample(self, name: str) -> object:
        return self.keys[name].shape.schema.get("const", "…")

    @property
    def schema(self) -> Json:
        described: Json = {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"description": key.says, **key.shape.schema} for name, key in self.keys.items()},
        }
        return described | ({"required": self._required} if self._required else {})

    @property
    def shape(self) -> Shape[dict[str, Any]]:
        return Shape(self.read, self.schema)


def the_one(node: Node, scope: Scope, what: str, names: Collection[str]) -> str:
    """Which one of `names` the mapping has. Raises Wrong where it has none or several."""
    entries = node.entries if type(node) is MapNode else ()
    found = [key for key, _ in entries if key.text in names]
    if len(found) == 1:
        return found[0].text
    words = ", ".join(names)
    if found:
        both = " and ".join(f'"{key.text}"' for key in found)
        raise scope.wrong(found[1], f"{what} is one of {words}: {both} are two", "make two of it")
    for key, _ in entries:
        if guess := nearest(key.text, names):
            raise scope.wrong(key, f"{what} knows no key {quote(key.text)}", f'did you mean "{guess}"?')
    raise scope.wrong(node, f"{what} has none of {words}", "write one of them")


def one_of(names: Iterable[str]) -> Json:
    return {"oneOf": [{"required": [name]} for name in names]}


def snake(name: str) -> str:
    return _CAPITAL.sub(lambda capital: "_" + capital.group().lower(), name)


def read_text(node: Node, scope: Scope) -> str:
    if type(node) is not Scalar:
        raise scope.wrong(node, f"{node.kind} where text must stand")
    if node.plain and (kind := node.kind) != "text":
        repair = "write a value, or remove the key" if kind == "nothing" else f'write "{node.text}" in quotes'
        raise scope.wrong(node, f"{kind} where text must stand", repair)
    return node.text


def _read_flag(node: Node, scope: Scope) -> bool:
    flag = node.flag if type(node) is Scalar else None
    if flag is None:
        shown = quote(node.text) if type(node) is Scalar and node.text else node.kind
        raise scope.wrong(node, f"{shown} where true or false must stand", "write true or false, without quotes")
    return flag


FLAG = Shape(_read_flag, {"type": "boolean"})


def line(longest: int) -> Shape[str]:
    """One line of free text."""

    def read(node: Node, scope: Scope) -> str:
        text = read_text(node, scope)
        if not text or len(text) > longest or not text.isprintable():
            raise scope.wrong(node, f"{quote(text)} is not one line of 1 to {longest} printable characters")
        return text

    return Shape(read, {"type": "string", "minLength": 1, "maxLength": longest, "pattern": r"^[^\n\r\t]*$"})


def word(pattern: str, what: str, repair: str | None = None) -> Shape[str]:
    """Text of one form. `pattern` is a regular expression that Python and JSON Schema read alike, without anchors."""
    form = re.compile(pattern)

    def read(node: Node, scope: Scope) -> str:
        text = read_text(node, scope)
        if not form.fullmatch(text):
            raise scope.wrong(node, f"{quote(text)} is not {what}", repair)
        return text

    return Shape(read, {"type": "string", "pattern": f"^(?:{pattern})$"})


def choice[T](meanings: Mapping[str, T]) -> Shape[T]:
    """One of a few words, read as what it means."""

    def read(node: Node, scope: Scope) -> T:
        if type(node) is Scalar and node.text in meanings:
            return meanings[node.text]
        shown = quote(node.text) if type(node) is Scalar else node.kind
        guess = nearest(node.text, meanings) if type(node) is Scalar else None
        repair = f'did you mean "{guess}"?' if guess else None
        raise scope.wrong(node, f"{shown} where {' or '.join(meanings)} must stand", repair)

    return Shape(read, {"enum": list(meanings)})


def listing[T](item: Shape[T], *, least: int = 0, single: bool = False) -> Shape[tuple[T, ...]]:
    """A list of one shape; with `single` one value alone will do, with `least` 1 an empty list is an error."""

    def read(node: Node, scope: Scope) -> tuple[T, ...]:
        if type(node) is not ListNode:
            if single and type(node) is Scalar and node.kind != "nothing":
                return (item.read(node, scope),)
            raise scope.wrong(
                node, f"{node.kind} where a list must stand", "write [one, another], or one per line after -"
            )
        if len(node.items) < least:
            raise scope.wrong(node, "an empty list", "list something, or remove the key")
        return read_each(lambda _, inner: item.read(inner, scope), node.items)

    schema: Json = {"type": "array", "items": item.schema} | ({"minItems": least} if least else {})
    return Shape(read, {"anyOf": [item.schema, schema]} if single else schema)


def read_each[T](read: Callable[[int, Node], T], nodes: Iterable[Node]) -> tuple[T, ...]:
    """`read` of each index and node. Raises Wrong with the problems of all that cannot be read."""
    values: list[T] = []
    problems: list[Problem] = []
    for index, node in enumerate(nodes):
        try:
            values.append(read(index, node))
        except Wrong as e:
            problems += e.problems
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise Wrong(problems)
    return tuple(values)


def numbered[T](read: Callable[[Node, Scope, str], T], label: str, schema: Json) -> Shape[tuple[T, ...]]:
    """A list whose items carry a label: `label` with `{}` for what the scope calls the whole, and the index."""

    def read_all(node: Node, scope: Scope) -> tuple[T, ...]:
        if type(node) is not ListNode:
            raise scope.wrong(node, f"{node.kind} where a list must stand", "begin each item with -, or write []")
        prefix = label.format(scope.label)
        return read_each(lambda index, item: read(item, scope, f"{prefix}[{index}]"), node.items)

    return Shape(read_all, {"type": "array", "items": schema})


def by_name[T](name: Shape[str], value: Shape[T], what: str) -> Shape[dict[str, tuple[Scalar, T]]]:
    """A mapping whose keys are names of the user's choice: each name with its node and value."""

    def read(node: Node, scope: Scope) -> dict[str, tuple[Scalar, T]]:
        if type(node) is not MapNode:
            raise scope.wrong(node, f"{node.kind} where {what} must stand", "write NAME: … below it, or {} for none")
        found: dict[str, tuple[Scalar, T]] = {}
        problems: list[Problem] = []
        for key, inner in node.entries:
            try:
                label = name.read(key._replace(plain=False), scope)
                found[label] = (key, value.read(inner, replace(scope, label=label)))
            except Wrong as e:
                problems += e.problems
                if len(problems) >= MAX_PROBLEMS:
                    break
        if problems:
            raise Wrong(problems)
        return found

    return Shape(read, {"type": "object", "propertyNames": name.schema, "additionalProperties": value.schema})
