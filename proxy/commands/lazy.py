"""Groups of commands of which only the one that is called is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click


def lazy_group(commands: Mapping[str, tuple[str, str]]) -> type[click.Group]:
    """A group of `commands`: by name where each lives (`module:name`), and its line in --help."""

    class LazyGroup(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(commands)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in commands:
                return None
            module, _, name = commands[cmd_name][0].partition(":")
            command = getattr(import_module(module), name)
            assert isinstance(command, click.Command)
            return command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, line) for name, (_, line) in commands.items()])

    return LazyGroup
