"""Several workers write one log: each line is whole and there once, whoever is slow, killed, or finds the disk full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fcntl import F_GETPIPE_SZ, fcntl, ioctl
from pathlib import Path
from termios import FIONREAD

import pytest

from proxy.log.target import Turns, share_turns
from tests.disks import small_disk_at
from tests.proxy.gates import PATIENCE_S, eventually
from tests.proxy.log_writer import AHEAD

NAMES = "abcd"
SIZE = 8192  # of a line: more than a pipe takes at once (PIPE_BUF)


@pytest.fixture
def turns() -> Iterator[int]:
    fd = share_turns()
    yield fd
    os.close(fd)


class Writer:
    """`log_writer` in a process of its own."""

    def __init__(self, name: str, count: int, turns: int, *, stdout: int | None = None, target: str = "stdout") -> None:
        command = [sys.executable, "-m", "tests.proxy.log_writer", name, str(count), str(SIZE), target, str(turns)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=stdout, stderr=pipe, text=True, bufsize=1, pass_fds=[turns]
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def finish(self) -> list[int]:
        """Written, lost, failures."""
        self.go()
        said = [int(word) for word in self.hear().split()]
        assert self.process.wait(PATIENCE_S) == 0
        self._close()
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stderr):
            assert stream is not None
            stream.close()


def finish(writers: Sequence[Writer]) -> list[list[int]]:
    for writer in writers:
        assert writer.hear() == "queued"
    return [writer.finish() for writer in writers]


def numbers(lines: Iterable[bytes]) -> dict[str, list[int]]:
    """The numbers of each writer's records as they come. Each is as it was written, or this raises."""
    found: dict[str, list[int]] = {}
    for line in lines:
        record = json.loads(line)
        assert record["text"] == record["writer"] * SIZE
        found.setdefault(record["writer"], []).append(record["number"])
    return found


def read_slowly(pipe: int) -> bytes:
    chunks = []
    with open(pipe, "rb", buffering=0) as reader:
        while chunk := reader.read(1000):
            chunks.append(chunk)
    return b"".join(chunks)


def test_lines_longer_than_pipe_buf_are_whole_in_one_pipe_with_a_slow_reader(turns: int) -> None:
    count = 100
    ours, theirs = os.pipe()
    writers = [Writer(name, count, turns, stdout=theirs) for name in NAMES]
    os.close(theirs)
    for writer in writers:
        writer.go()
    with ThreadPoolExecutor() as beside:
        finished = beside.submit(finish, writers)
        lines = read_slowly(ours).splitlines()
    assert finished.result() == [[count, 0, 0]] * len(NAMES)
    assert numbers(lines) == {name: list(range(count)) for name in NAMES}


def test_writer_that_is_killed_in_the_middle_of_a_line_spoils_no_other(turns: int) -> None:
    count = 50
    ours, theirs = os.pipe()
    killed, other = Writer("a", count, turns, stdout=theirs), Writer("b", count, turns, stdout=theirs)
    os.close(theirs)
    seen = Turns(os.dup(turns))
    killed.go()
    eventually(lambda: seen.torn_by == killed.process.pid, "it writes into a pipe that nobody reads")
    other.go()
    eventually(lambda: is_full(ours), "the pipe is full")
    killed.kill()
    with ThreadPoolExecutor() as beside:
        finished = beside.submit(finish, [other])
        lines = read_slowly(ours).split(b"\n")
    seen.close()
    assert finished.result() == [[count, 0, 0]]
    torn = next(index for index, line in enumerate(lines) if not line.endswith(b"}"))
    assert 0 < len(lines[torn]) < SIZE
    assert numbers(lines[:torn]) == {"a": list(range(torn))}
    assert numbers(filter(None, lines[torn + 1 :])) == {"b": list(range(count))}


def is_full(pipe: int) -> bool:
    waiting = array("i", [0])
    ioctl(pipe, FIONREAD, waiting)
    return waiting[0] == fcntl(pipe, F_GETPIPE_SZ)


def test_file_that_is_rotated_under_load_loses_and_doubles_nothing(turns: int, tmp_path: Path) -> None:
    count, rotations = 400, 4
    path = tmp_path / "log"
    writers = [Writer(name, count, turns, target=str(path)) for name in NAMES]
    for writer in writers:
        writer.go()
    for rotation in range(rotations):
        eventually(lambda: path.exists() and path.stat().st_size > 20 * SIZE, "records are written")
        path.rename(tmp_path / f"log.{rotation}")
        for writer in writers:
            writer.process.send_signal(signal.SIGHUP)
        eventually(path.exists, "a writer has followed")
    assert finish(writers) == [[count, 0, 0]] * len(NAMES)
    files = [tmp_path / f"log.{rotation}" for rotation in range(rotations)] + [path]
    found = numbers([line for file in files for line in file.read_bytes().splitlines()])
    assert {name: sorted(written) for name, written in found.items()} == {name: list(range(count)) for name in NAMES}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from small_disk_at(tmp_path, "2m")


@pytest.mark.kernel
def test_disk_that_fills_up_and_is_freed_keeps_every_record(turns: int, small_disk: Path) -> None:
    """A worker that was cut off finds that another wrote next: its record follows whole, on a line of its own."""
    count, names = AHEAD + 36, "ab"  # two times 36 lines are more than there is room for: one at least must wait
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_600_000))
    writers = [Writer(name, count, turns, target=str(small_disk / "log")) for name in names]
    for writer in writers:
        writer.go()
    for writer in writers:
        assert writer.hear() == "queued"
    ballast.unlink()
    said = [writer.finish() for writer in writers]
    assert [(written, lost) for written, lost, _ in said] == [(count, 0)] * len(names)
    assert sum(failures for _, _, failures in said) > 0
    lines = (small_disk / "log").read_bytes().split(b"\n")
    found = numbers(line for line in lines if line.endswith(b"}"))
    assert found == {name: list(range(count)) for name in names}
