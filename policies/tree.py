"""The text of a policy file as a tree of nodes with places. It knows YAML; it knows no key of a policy.

PyYAML's C event stream is read directly, with scalar rules of our own (YAML 1.2 core: `no`, `10:22`, `0o17` and `1_000`
are text). Whatever could make two readers see two policies in one file is a problem here: a duplicate key, an anchor, an
alias, a tag, a merge key, a second document.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import yaml
from yaml.cyaml import CParser

from policies.errors import MAX_PROBLEMS, PolicyError, Problem, quote
from policies.model import Place

MAX_BYTES = 32 * 1024 * 1024  # a policy is typed or generated; beyond this it is an attack on our memory
MAX_DEPTH = 20  # the deepest key of the language is at 6

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_FLAGS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")  # longer digits are nobody's port; int() of a million of them is an attack
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


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
        if self.text in _NULL:
            return "nothing"
        if self.text in _FLAGS:
            return "true or false"
        return "a number" if _FLOAT.fullmatch(self.text) else "text"

    @property
    def flag(self) -> bool | None:
        return _FLAGS.get(self.text) if self.plain else None

    @property
    def whole(self) -> int | None:
        return int(self.text) if self.plain and _WHOLE.fullmatch(self.text) else None


class Sequence(NamedTuple):
    items: tuple[Node, ...]
    line: int
    column: int

    @property
    def kind(self) -> str:
        return "a list"


class Mapping(NamedTuple):
    entries: tuple[tuple[Scalar, Node], ...]
    line: int
    column: int

    @property
    def kind(self) -> str:
        return "a mapping"


type Node = Scalar | Sequence | Mapping


def decode(file: str, content: bytes) -> Source:
    """The text of a file's bytes: UTF-8, a byte order mark accepted. Raises PolicyError with the place of the first bad byte."""
    if len(content) > MAX_BYTES:
        raise PolicyError([Problem(Place(file, 1), f"larger than {MAX_BYTES >> 20} MiB", "split it into several files")])
    try:
        return Source(file, content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        before = content[: e.start].decode("utf-8-sig", "replace")
        raise PolicyError([Problem(_place_after(file, before), "not UTF-8", "save the file as UTF-8")]) from e


def parse(source: Source) -> Node:
    """The tree of one file. Raises PolicyError with every problem that YAML itself shows; a syntax error ends the reading."""
    text = source.text.removeprefix("\ufeff")
    if len(text) > MAX_BYTES or len(text) * 4 > MAX_BYTES < len(text.encode("utf-8", "replace")):
        raise PolicyError([Problem(Place(source.file, 1), f"larger than {MAX_BYTES >> 20} MiB", "split it")])
    return _Composer(source.file).compose(text)


class _Composer:
    """Nodes from events, with a stack of its own: depth costs an error, never a recursion."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def compose(self, text: str) -> Node:
        root: Node | None = None
        try:
            root = self._compose(CParser(text))
        except yaml.reader.ReaderError as e:
            before = text.encode("utf-8", "replace")[: e.position].decode("utf-8", "replace")
            self.problems.append(
                Problem(_place_after(self.file, before), f"character U+{ord(e.character):04X} cannot stand in a policy")
                if isinstance(e.character, str)
                else Problem(_place_after(self.file, before), f"character U+{e.character:04X} cannot stand in a policy")
            )
        except UnicodeEncodeError as e:
            self.problems.append(Problem(_place_after(self.file, text[: e.start]), "half a surrogate pair", "save the file as UTF-8"))
        except yaml.MarkedYAMLError as e:
            self.problems.append(_syntax_problem(self.file, e))
        except _TooDeep as e:
            self._report(e.line, e.column, f"nested deeper than {MAX_DEPTH} levels")
        if self.problems:
            raise PolicyError(self.problems)
        return root if root is not None else Mapping((), 1, 1)

    def _compose(self, parser: CParser) -> Node | None:
        ...


