"""Files that change under a watch: as editors, ConfigMaps and careless scripts change them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.service import watch
from proxy.service.watch import Look, Watch, look

WAIT_S = 15.0


def write(directory: Path) -> None:
    (directory / "policy.yaml").write_text("longer than before")


def touch(directory: Path) -> None:
    os.utime(directory / "policy.yaml", ns=(1, 1))


def rename(directory: Path) -> None:
    """As vim and `sed -i` do: the name leads to another file, of the same content."""
    (directory / "new").write_text("policy")
    (directory / "new").replace(directory / "policy.yaml")


def remove(directory: Path) -> None:
    (directory / "policy.yaml").unlink()


def swap_directory(directory: Path) -> None:
    """As the kubelet does with a ConfigMap: policy.yaml -> ..data/policy.yaml, and ..data changes."""
    (directory / "..2").mkdir()
    (directory / "..2" / "map.yaml").write_text("policy")
    (directory / "..data_tmp").symlink_to("..2")
    (directory / "..data_tmp").replace(directory / "..data")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text("policy")
    (tmp_path / "..1").mkdir()
    (tmp_path / "..1" / "map.yaml").write_text("policy")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "map.yaml").symlink_to("..data/map.yaml")
    return tmp_path


@pytest.mark.parametrize("change", [write, touch, rename, remove, swap_directory], ids=lambda change: change.__name__)
def test_whatever_a_path_leads_to_is_seen(directory: Path, change: Callable[[Path], None]) -> None:
    paths = [str(directory / "policy.yaml"), str(directory / "map.yaml")]

    async def run() -> None:
        it = Watch(paths, look_s=0.01)
        change(directory)
        async with asyncio.timeout(WAIT_S):
            await it.changed()

    asyncio.run(run())


def test_a_look_at_the_same_files_is_the_same(directory: Path) -> None:
    paths = [str(directory / "policy.yaml"), str(directory / "map.yaml"), str(directory / "missing.yaml")]

    assert look(paths) == look(paths)
    assert look(paths)[2] is None


OLD, NEW, NEWER = (((name, 1, 1, 1, 1, 1),) for name in ("old", "new", "newer"))
MISSING: Look = (None,)

# What each look sees, the first one when the watch is made; how many it takes until a change is told.
LOOKS: dict[str, tuple[list[Look], int]] = {
    "a change that holds still": ([OLD, NEW, NEW], 2),
    "nothing at first": ([OLD, OLD, OLD, NEW, NEW], 4),
    "one that is still being written": ([OLD, NEW, NEWER, NEWER], 3),
    "missing between two files": ([OLD, MISSING, NEW, NEW], 3),
    "missing for a moment": ([OLD, MISSING, OLD, OLD, NEW, NEW], 5),
    "gone": ([OLD, MISSING, MISSING], 2),
    "there and back": ([OLD, NEW, OLD, OLD, NEWER, NEWER], 5),
}


@pytest.mark.parametrize("case", LOOKS)
def test_a_change_is_told_when_two_looks_agree(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    looks, expected = LOOKS[case]
    taken = 0

    def scripted() -> Iterator[Look]:
        yield from looks

    script = scripted()

    def next_look(_paths: object) -> Look:
        nonlocal taken
        taken += 1
        return next(script)

    monkeypatch.setattr(watch, "look", next_look)

    async def run() -> None:
        it = Watch(["policy.yaml"], look_s=0.0)
        async with asyncio.timeout(WAIT_S):
            await it.changed()

    asyncio.run(run())

    assert taken == 1 + expected


def test_a_change_between_two_waits_is_not_missed(directory: Path) -> None:
    async def run() -> None:
        it = Watch([str(directory / "policy.yaml")], look_s=0.01)
        async with asyncio.timeout(WAIT_S):
            write(directory)
            await it.changed()
            rename(directory)
            await it.changed()

    asyncio.run(run())
