"""What arrives is whole lines: after a disk that filled up, a writer that was killed, a file that was moved away."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.log.target import Target, Turns, share_turns

ANOTHER = 1  # a process id that is not ours


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full at this size: what is written across it is taken in part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def append(target: Target, lines: bytes) -> bytes:
    """What was not taken."""
    left = bytearray(lines)
    target.append(left)
    return bytes(left)


def append_in_vain(target: Target, lines: bytes) -> bytes:
    left = bytearray(lines)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        target.append(left)
    return bytes(left)


@pytest.mark.parametrize("size", range(13))
def test_lines_are_whole_wherever_the_disk_filled_up(path: Path, size: int) -> None:
    target = Target(str(path), Turns())
    with file_size_limit(size):
        left = append_in_vain(target, b"first\nsecond\n")
    append(target, left + b"third\n")
    assert path.read_bytes() == b"first\nsecond\nthird\n"
    assert not target.is_torn
    target.close()


@pytest.mark.parametrize("size", range(13))
def test_disk_that_fills_up_again_and_again_takes_each_line_once(path: Path, size: int) -> None:
    target, left = Target(str(path), Turns()), b"first\nsecond\n"
    for limit in range(size, 13):
        with file_size_limit(limit):
            left = append_in_vain(target, left)
    append(target, left)
    assert path.read_bytes() == b"first\nsecond\n"
    target.close()


def test_line_that_was_cut_comes_before_what_is_said_next(path: Path) -> None:
    target = Target(str(path), Turns())
    with file_size_limit(8):
        left = append_in_vain(target, b"first\nsecond\nthird\n")
    assert left == b"third\n"
    assert target.is_torn
    append(target, b"between\n" + left)
    assert path.read_bytes() == b"first\nsecond\nbetween\nthird\n"
    target.close()


def test_another_writer_begins_on_a_line_of_its_own_and_ours_is_written_anew(path: Path) -> None:
    turns = Turns()
    target, other = Target(str(path), turns), os.open(path, os.O_WRONLY | os.O_APPEND)
    with file_size_limit(8):
        left = append_in_vain(target, b"first\nsecond\n")
    os.write(other, b"\nother\n")
    turns.torn_by = 0
    append(target, left)
    assert path.read_bytes() == b"first\nse\nother\nsecond\n"
    os.close(other)
    target.close()


def test_line_of_a_writer_that_was_killed_is_not_continued(path: Path) -> None:
    turns = Turns()
    target = Target(str(path), turns)
    append(target, b"first\n")
    path.write_bytes(b"first\nsec")
    turns.torn_by = ANOTHER
    append(target, b"third\n")
    append(target, b"fourth\n")
    assert path.read_bytes() == b"first\nsec\nthird\nfourth\n"
    target.close()


def test_torn_line_stays_marked_while_nothing_can_be_written(path: Path) -> None:
    turns = Turns()
    path.write_bytes(b"fir")
    target = Target(str(path), turns)
    for _ in range(2):
        with file_size_limit(3):
            assert append_in_vain(target, b"second\n") == b"second\n"
    append(target, b"second\n")
    assert path.read_bytes() == b"fir\nsecond\n"
    target.close()


@pytest.mark.parametrize(("found", "then"), [(b"", b""), (b"one\n", b"one\n"), (b"one\ntw", b"one\ntw\n")])
def test_record_after_a_crash_of_the_machine_begins_on_a_line_of_its_own(path: Path, found: bytes, then: bytes) -> None:
    path.write_bytes(found)
    target = Target(str(path), Turns())
    append(target, b"next\n")
    assert path.read_bytes() == then + b"next\n"
    target.close()


class TestReopen:
    def test_follows_a_path_that_was_moved_away(self, path: Path) -> None:
        target = Target(str(path), Turns())
        append(target, b"first\n")
        path.rename(path.with_suffix(".1"))
        append(target, b"second\n")
        target.reopen()
        append(target, b"third\n")
        assert path.with_suffix(".1").read_bytes() == b"first\nsecond\n"
        assert path.read_bytes() == b"third\n"
        target.close()

    def test_follows_a_path_to_the_file_that_stands_there(self, path: Path) -> None:
        target = Target(str(path), Turns())
        path.rename(path.with_suffix(".1"))
        path.write_bytes(b"created by logrotate\n")
        target.reopen()
        append(target, b"next\n")
        assert path.read_bytes() == b"created by logrotate\nnext\n"
        target.close()

    def test_keeps_the_file_that_is_still_there(self, path: Path) -> None:
        target = Target(str(path), Turns())
        append(target, b"first\n")
        descriptors = os.listdir("/proc/self/fd")
        target.reopen()
        assert os.listdir("/proc/self/fd") == descriptors
        append(target, b"second\n")
        assert path.read_bytes() == b"first\nsecond\n"
        target.close()

    def test_keeps_the_old_file_where_there_can_be_no_new_one(self, tmp_path: Path) -> None:
        (tmp_path / "logs").mkdir()
        target = Target(str(tmp_path / "logs" / "log"), Turns())
        (tmp_path / "logs").rename(tmp_path / "old")
        with pytest.raises(FileNotFoundError):
            target.reopen()
        append(target, b"still here\n")
        assert (tmp_path / "old" / "log").read_bytes() == b"still here\n"
        target.close()

    def test_line_that_was_cut_in_the_old_file_is_whole_in_the_new_one(self, path: Path) -> None:
        target = Target(str(path), Turns())
        with file_size_limit(3):
            left = append_in_vain(target, b"first\n")
        path.rename(path.with_suffix(".1"))
        target.reopen()
        append(target, left + b"second\n")
        assert path.read_bytes().split() == [b"first", b"second"]
        target.close()


class TestPipe:
    def test_without_a_reader_it_is_an_error_and_no_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="No such device or address"):
            Target(str(tmp_path / "pipe"), Turns())

    def test_made_non_blocking_by_whoever_shares_it_takes_everything(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        target = Target(str(tmp_path / "pipe"), Turns())
        os.set_blocking(reader, True)
        line = b"x" * 1_000_000 + b"\n"  # a pipe holds 64 KiB
        thread = threading.Thread(target=append, args=(target, line))
        thread.start()
        with open(reader, "rb") as file:
            assert file.readline() == line
        thread.join()
        target.close()


def test_turn_that_a_killed_process_held_is_free() -> None:
    shared = share_turns()
    script = (
        "import sys, time\nfrom proxy.log.target import Turns\nturns = Turns(int(sys.argv[1]))\n"
        "with turns.take():\n    turns.torn_by = 7\n    print('mine', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(shared)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[shared]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        turns, took = Turns(shared), threading.Event()

        def take() -> None:
            with turns.take():
                took.set()

        waiting = threading.Thread(target=take)
        waiting.start()
        assert not took.wait(0.05)
        holder.kill()
        waiting.join(20)
        assert took.is_set()
        assert turns.torn_by == 7
        turns.close()


CLOSED = """
from proxy.log.target import Target, Turns
try:
    Target(%r, Turns())
except OSError as error:
    print(error.strerror, file=sys.stderr or sys.stdout)
"""


@pytest.mark.parametrize(("name", "closing", "called"), [(None, "1>&-", "output"), ("-", "2>&-", "error")])
def test_closed_standard_stream_is_refused(name: str | None, closing: str, called: str) -> None:
    """Another file has its number by now, and would get the records."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, f"import sys{CLOSED % name}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ran.stdout + ran.stderr).strip() == f"standard {called} is closed"
