"""What a person reads on stdout and stderr: lines, aligned rows, code to paste. It decides no wording of a verdict.

Plain text into a pipe or a file; on a terminal rich adds colour (unless NO_COLOR is set) and breaks lines at its width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn, TextIO

import click

if TYPE_CHECKING:  # its import costs 50 ms, so only a terminal pays for it
    import rich.console
    import rich.text

    from policies.errors import Problem


class Style(StrEnum):
    GOOD = "bold green"
    BAD = "bold red"
    WARN = "yellow"
    STRONG = "bold"
    DIM = "dim"
    CODE = "cyan"


type Span = str | tuple[str, Style]
type Cell = Span | list[Span]

GAP = 2  # columns between cells


class Console:
    """One stream. Every method prints whole lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._rich = _terminal(self._stream)

    def line(self, *spans: Span, indent: int = 0) -> None:
        """One line, or on a narrow terminal one paragraph that hangs from `indent`."""
        if self._rich is None:
            self._print(" " * indent + "".join(map(_plain, spans)))
            return
        from rich.padding import Padding

        self._rich.print(Padding(_text(spans), (0, 0, 0, indent), expand=False))

    def blank(self) -> None:
        self._print("")

    def rows(self, rows: Iterable[Sequence[Cell]], *, indent: int = 0) -> None:
        """Rows with aligned columns. On a terminal the last column is the one that wraps; where it is all dim, an
        aside, it is cut instead."""
        cells = [[_spans(cell) for cell in row] for row in rows]
        if not cells:
            return
        columns = max(map(len, cells))
        if self._rich is None:
            self._print_columns(cells, indent)
            return
        from rich.padding import Padding
        from rich.table import Table

        table = Table.grid(padding=(0, GAP, 0, 0))
        for column in range(columns):
            table.add_column(no_wrap=column < columns - 1, overflow="fold")
        for row in cells:
            texts = [_text(spans) for spans in row]
            if all(not isinstance(span, str) and span[1] is Style.DIM for span in row[-1]):
                texts[-1].no_wrap, texts[-1].overflow = True, "ellipsis"
            table.add_row(*texts)
        self._rich.print(Padding(table, (0, 0, 0, indent), expand=False))

    def code(self, lines: Iterable[str], *, indent: int = 0) -> None:
        """Text to paste: never wrapped, whatever the width, so that what is copied is what was meant."""
        for line in lines:
            if self._rich is None:
                self._print(" " * indent + line)
            else:
                self._rich.print(_text([(" " * indent + line, Style.CODE)]), soft_wrap=True)

    def problem(self, problem: Problem, level: str, style: Style) -> None:
        """`file:line:column: level: message; repair`, one line into a pipe; on a terminal the repair has its own."""
        place = problem.place
        where = (f"{place.file}:{place.line}:{place.column}: ", Style.STRONG)
        if self._rich is None:
            repair = f"; {problem.hint}" if problem.hint else ""
            self.line(where, level, f": {problem.message}{repair}")
            return
        self.line(where, (level, style), f": {problem.message}")
        if problem.hint:
            self.line((problem.hint, Style.DIM), indent=4)

    def json(self, value: object) -> None:
        """One JSON document, for machines; the same on a terminal."""
        click.echo(json.dumps(value, indent=2), file=self._stream)

    def _print_columns(self, cells: list[list[list[Span]]], indent: int) -> None:
        texts = [["".join(map(_plain, spans)) for spans in row] for row in cells]
        widths = [max(len(row[i]) for row in texts if i < len(row)) for i in range(max(map(len, texts)))]
        for row in texts:
            padded = (" " * GAP).join(text.ljust(width) for text, width in zip(row, widths, strict=False))
            self._print((" " * indent + padded).rstrip())

    def _print(self, text: str) -> None:
        click.echo(printable(text), file=self._stream)


def stop(message: str, exit_code: int) -> NoReturn:
    """The end of a command: one line on stderr that says what is wrong and the repair."""
    Console(sys.stderr).line(("outgate: ", Style.BAD), message)
    raise SystemExit(exit_code)


def _terminal(stream: TextIO) -> rich.console.Console | None:
    if not stream.isatty():
        return None
    from rich.console import Console as RichConsole

    return RichConsole(file=stream, highlight=False, markup=False, emoji=False)


def _spans(cell: Cell) -> list[Span]:
    return cell if isinstance(cell, list) else [cell]


def _plain(span: Span) -> str:
    return span if isinstance(span, str) else span[0]


def _text(spans: Iterable[Span]) -> rich.text.Text:
    from rich.text import Text

    text = Text()
    for span in spans:
        text.append(printable(_plain(span)), style="" if isinstance(span, str) else span[1].value)
    return text


def printable(text: str) -> str:
    """A name or path from outside must not move the cursor, recolour the screen or forge a line of the report."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
