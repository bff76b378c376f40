"""The text of a policy file as a tree of nodes with places. It knows YAML; it knows no key of a policy.

PyYAML's C event stream is read directly, with scalar rules of our own (YAML 1.2 core: `no`, `10:22`, `0o17` and `1_000`
are text). Whatever could make two readers see two policies in one file is a problem here: a duplicate key, an anchor,
an alias, a tag, a merge key, a second document.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from yaml.cyaml import CParser  # type: ignore[attr-defined]  # the stubs hide it, libyaml has it
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from policies.errors import PolicyError, Problem
from policies.model import Place
from policies.spelling import MAX_PROBLEMS, quote

MAX_BYTES = 32 * 1024 * 1024  # a policy is typed or generated; beyond this it is an attack on our memory
MAX_DEPTH = 20  # the deepest value of the language is at 6

_NOTHING = frozenset({"", "~", "null", "Null", "NULL"})
_FLAGS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")  # no port has more digits; int() of a million of them is an attack
_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One policy file: the name it is cited by, and its text."""

    file: str
    text: str


class Scalar(NamedTuple):
    """One value as written. `plain` is without quotes: only then may it be a number, a flag or nothing."""

    text: str
    plain: bool
    line: int
    column: int

    @property
    def kind(self) -> str:
        if not self.plain:
            return "text"
        if self.text in _NOTHING:
            return "nothing"
        if self.text in _FLAGS:
            return self.text
        return "a number" if _NUMBER.fullmatch(self.text) else "text"

    @property
    def flag(self) -> bool | None:
        return _FLAGS.get(self.text) if self.plain else None

    @property
    def whole(self) -> int | None:
        return int(self.text) if self.plain and _WHOLE.fullmatch(self.text) else None


class ListNode(NamedTuple):
    items: tuple[Node, ...]
    line: int
    column: int

    @property
    def kind(self) -> str:
        return "a list"


class MapNode(NamedTuple):
    entries: tuple[tuple[Scalar, Node], ...]
    line: int
    column: int

    @property
    def kind(self) -> str:
        return "a mapping"


type Node = Scalar | ListNode | MapNode

_NO_KEY = Scalar("", True, 1, 1)


def decode(file: str, content: bytes) -> Source:
    """The text in a file's bytes: UTF-8, a byte order mark is dropped. Raises PolicyError at the first bad byte."""
    if len(content) > MAX_BYTES:
        raise _too_large(file)
    try:
        return Source(file, content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        at = _place_after(file, content[: e.start].decode("utf-8", "replace").removeprefix("\ufeff"))
        raise PolicyError([Problem(at, f"byte 0x{content[e.start]:02x} is not UTF-8", "save the file as UTF-8")]) from e


def parse(source: Source) -> Node:
    """The tree of one file. Raises PolicyError with all that is wrong with it as YAML; bad syntax ends the reading."""
    text = source.text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES or (len(text) * 4 > MAX_BYTES and len(text.encode("utf-8", "replace")) > MAX_BYTES):
        raise _too_large(source.file)
    composer = _Composer(source.file)
    try:
        return composer.compose(CParser(text))
    except UnicodeEncodeError as e:
        wrong = Problem(_place_after(source.file, text[: e.start]), "half a surrogate pair", "save the file as UTF-8")
    except yaml.reader.ReaderError as e:  # its position counts the bytes of UTF-8
        at = _place_after(source.file, text.encode()[: e.position].decode("utf-8", "replace"))
        wrong = Problem(at, f"character U+{e.character:04X} cannot stand in a policy file", "remove it")
    except yaml.MarkedYAMLError as e:
        wrong = _syntax_problem(source.file, e)
    except _Stop as e:
        wrong = e.problem
    raise PolicyError([*composer.problems, wrong])


class _Stop(Exception):
    """A problem after which the rest of the file means nothing."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Open:
    """A list or mapping whose end has not been read. `keys` is None for a list; `key` waits for its value."""

    __slots__ = ("awaits_key", "column", "items", "key", "keys", "line")

    def __init__(self, mark: yaml.Mark, keys: dict[str, Scalar] | None) -> None:
        self.line = mark.line + 1
        self.column = mark.column + 1
        self.items: list[Node | tuple[Scalar, Node]] = []
        self.keys = keys
        self.key = _NO_KEY
        self.awaits_key = keys is not None

    def close(self) -> Node:
        kind = ListNode if self.keys is None else MapNode
        # mypy: the two kinds of items cannot mix, `keys` tells which they are
        return kind(tuple(self.items), self.line, self.column)  # type: ignore[arg-type]


class _Composer:
    """Nodes from events, on a stack of its own: depth costs an error, never a recursion."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def compose(self, parser: CParser) -> Node:
        """The root node; an empty mapping for a file without one."""
        root: Node = MapNode((), 1, 1)
        documents = 0
        stack: list[_Open] = []
        next_event = parser.get_event
        while True:
            event: Any = next_event()  # `kind` tells which attributes it has; mypy cannot follow
            kind = type(event)
            if kind is ScalarEvent:
                mark = event.start_mark
                text = event.value
                if stack and stack[-1].awaits_key:
                    text = sys.intern(text)  # a hundred thousand rules share a few keys
                node: Node = Scalar(text, event.implicit[0], mark.line + 1, mark.column + 1)
                if event.anchor is not None or event.tag is not None:
                    self._refuse(event)
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                stack.append(_Open(event.start_mark, {} if kind is MappingStartEvent else None))
                if event.anchor is not None or event.tag is not None:
                    self._refuse(event)
                if len(stack) > MAX_DEPTH:
                    raise _Stop(Problem(_place(self.file, event.start_mark), f"nested deeper than {MAX_DEPTH} levels"))
                continue
            elif kind is MappingEndEvent or kind is SequenceEndEvent:
                node = stack.pop().close()
            elif kind is AliasEvent:
                self._refuse(event)
                node = Scalar("", True, event.start_mark.line + 1, event.start_mark.column + 1)
            elif kind is StreamEndEvent:
                if self.problems:
                    raise PolicyError(self.problems)
                return root
            else:
                if kind is DocumentStartEvent:
                    documents += 1
                    self._check_document(event, documents)
                continue
            if not stack:
                root = node
                continue
            parent = stack[-1]
            if parent.keys is None:
                parent.items.append(node)
            elif parent.awaits_key:
                parent.key = self._key(parent.keys, node)
                parent.awaits_key = False
            else:
                parent.items.append((parent.key, node))
                parent.awaits_key = True

    def _key(self, keys: dict[str, Scalar], node: Node) -> Scalar:
        if not isinstance(node, Scalar):
            self._add(self._problem_at(node, f"{node.kind} cannot be a key", "write text before the colon"))
            return Scalar("", True, node.line, node.column)
        if node.plain and node.text == "<<":
            self._add(self._problem_at(node, "merge key <<", "write the keys out, or make a set and use it"))
        elif first := keys.get(node.text):
            self._add(self._problem_at(node, f"duplicate key {quote(node.text)}", f"line {first.line} has it already"))
        keys[node.text] = node
        return node

    def _check_document(self, event: Any, documents: int) -> None:
        place = _place(self.file, event.start_mark)
        if documents > 1:
            raise _Stop(Problem(place, "second document in one file", "put it into a file of its own"))
        if event.version not in (None, (1, 2)):
            self._add(Problem(place, "a policy is YAML 1.2", "remove the %YAML line"))

    def _refuse(self, event: Any) -> None:
        place = _place(self.file, event.start_mark)
        if isinstance(event, AliasEvent):
            self._add(Problem(place, f"alias *{event.anchor}", "write the value out, or make a set and use it"))
        elif event.anchor is not None:
            self._add(Problem(place, f"anchor &{event.anchor}", "remove it; what repeats belongs in a set"))
        else:
            self._add(Problem(place, f"tag {quote(event.tag)}", "remove it; quote the value if it is to be text"))

    def _add(self, problem: Problem) -> None:
        self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise PolicyError(self.problems)

    def _problem_at(self, node: Node, message: str, hint: str) -> Problem:
        return Problem(Place(self.file, node.line, node.column), message, hint)


def _place(file: str, mark: yaml.Mark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


def _place_after(file: str, before: str) -> Place:
    """The place of the character that follows `before`, the beginning of the file."""
    return Place(file, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def _too_large(file: str) -> PolicyError:
    return PolicyError([Problem(Place(file, 1), f"larger than {MAX_BYTES >> 20} MiB", "split it into several files")])


def _syntax_problem(file: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = _place(file, mark) if mark else Place(file, 1)
    began = f"{error.context} that begins at line {error.context_mark.line + 1}" if error.context_mark else None
    return Problem(place, f"not YAML: {error.problem}", began)
