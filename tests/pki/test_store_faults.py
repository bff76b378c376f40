"""Stores whose writer is stopped, whose disk is full, that others write, read or own at the same time."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pki.authority import Authority, certificate_id, create_authority, issue_leaf
from pki.chains import is_signed_by
from pki.files import write_file
from pki.rotation import activate_issuing, activate_root, retire_issuing, retire_root, stage_issuing, stage_root
from pki.store import StoreError, changing, load, load_issuers, load_trusted, save, survey
from tests.disks import small_disk_at
from tests.pki.test_store import AUTHORITY, ISSUING, ISSUING_ID, LATER, NOW, OTHER, change, contents, keys, same

CHECKOUT = Path(__file__).parents[2]
NOBODY = 65534
DEADLINE_S = 60.0

type Step = Callable[[Authority], Authority]

STEPS: dict[str, Step] = {
    "stage issuing": lambda authority: stage_issuing(authority, LATER),
    "activate issuing": lambda authority: activate_issuing(authority, LATER),
    "retire issuing": retire_issuing,
    "stage root": lambda authority: stage_root(authority, LATER),
    "activate root": lambda authority: activate_root(authority, LATER),
    "retire root": lambda authority: retire_root(authority, LATER, soak=timedelta(0)),
}


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: these tests write much, and what a disk keeps is not their matter."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def walk() -> list[Authority]:
    """The authority before the first step, and after each."""
    authorities = [AUTHORITY]
    for step in STEPS.values():
        authorities.append(step(authorities[-1]))
    return authorities


def known_keys(authority: Authority) -> set[str]:
    return {
        *(f"roots/{certificate_id(root.certificate)}/ca.key" for root in authority.roots if root.key),
        *(f"issuing/{certificate_id(one.certificate)}/ca.key" for one in authority.issuing),
    }


# The machine stops


class PowerCut(BaseException):
    pass


CALLS = ("open", "mkdir", "replace", "unlink", "rmdir", "fsync", "fchmod")


@contextmanager
def power_for(calls: int) -> Iterator[list[int]]:
    """After so many calls that write, nothing is written any more, not even by who tidies up. Counts the calls."""
    made = [0]
    with pytest.MonkeyPatch.context() as patch:

        def counted(name: str) -> Callable[..., Any]:  # Any: whatever `os` has
            real = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                writes = name != "open" or arguments[1] & os.O_CREAT
                if writes and made[0] == calls:
                    raise PowerCut
                made[0] += bool(writes)
                return real(*arguments, **named)

            return call

        for name in CALLS:
            patch.setattr(os, name, counted(name))
        yield made


def cut_everywhere(before: Authority | None, write: Callable[[Path], None], after: Authority, quick: Path) -> int:
    """Stops `write` after each of its calls, and looks at what is left. Returns how many there were."""
    pristine = quick / "pristine"
    if before is not None:
        save(before, pristine)
    else:
        pristine.mkdir()
    seen_old = seen_new = False
    for calls in range(10_000):
        store = quick / str(calls)
        shutil.copytree(pristine, store)
        finished = False
        try:
            with power_for(calls):
                write(store)
                finished = True
        except PowerCut:
            pass
        if before is None and not (store / "state.json").exists():
            save(OTHER, store)
            assert keys(store) == known_keys(OTHER), calls
            seen_old = True
        else:
            is_new = same(load(store), after)
            assert is_new or (before is not None and same(load(store), before)), calls
            assert seen_new <= is_new, "the old one came back"
            seen_old, seen_new = seen_old or not is_new, seen_new or is_new
            with changing(store):
                pass  # whoever comes next to write tidies up, also if there is nothing to write
            assert keys(store) == known_keys(load(store)), calls
            assert not [name for name in contents(store) if "/." in name or name == ".unfinished"], calls
        shutil.rmtree(store)
        if finished:
            assert (seen_old, seen_new) == (True, True)
            return calls
    raise AssertionError("it never came to an end")


def test_a_first_save_may_stop_anywhere(quick: Path) -> None:
    assert cut_everywhere(None, lambda store: save(AUTHORITY, store), AUTHORITY, quick) > 30


def test_overwriting_may_stop_anywhere(quick: Path) -> None:
    """The former authority's keys stay; they were in use. Those of the one that was not written go."""
    save(AUTHORITY, quick / "pristine")
    for calls in range(10_000):
        store = quick / str(calls)
        shutil.copytree(quick / "pristine", store)
        finished = False
        try:
            with power_for(calls):
                save(OTHER, store, overwrite=True)
                finished = True
        except PowerCut:
            pass
        assert same(load(store), AUTHORITY) or same(load(store), OTHER)
        is_new = same(load(store), OTHER)
        with changing(store):
            pass
        assert keys(store) == known_keys(AUTHORITY) | (known_keys(OTHER) if is_new else set())
        shutil.rmtree(store)
        if finished:
            return
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("number", range(len(STEPS)), ids=list(STEPS))
def test_a_step_of_a_rotation_may_stop_anywhere(number: int, walk: Sequence[Authority], quick: Path) -> None:
    before, after = walk[number], walk[number + 1]
    cut_everywhere(before, lambda store: void(change(store, lambda _: after)), after, quick)


def void(_: object) -> None:
    pass


def test_files_are_on_the_disk_before_the_state_names_them(walk: Sequence[Authority], tmp_path: Path) -> None:
    """A rename may reach the disk before what it names: each file is synced first, and each directory after."""
    save(walk[0], tmp_path)
    events: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        sync, rename, delete, make = os.fsync, os.replace, os.unlink, os.mkdir

        def fsync(descriptor: int) -> None:
            events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
            sync(descriptor)

        def replace(source: Path, target: Path) -> None:
            events.extend([("from", str(source)), ("to", str(target))])
            rename(source, target)

        def unlink(path: Path, **named: Any) -> None:
            events.append(("delete", str(path)))
            delete(path, **named)

        def mkdir(path: Path, mode: int = 0o777) -> None:
            events.append(("to", str(path)))
            make(path, mode)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "unlink", unlink)
        patch.setattr(os, "mkdir", mkdir)
        for number, step in enumerate(STEPS):
            events.clear()
            with changing(tmp_path) as store:
                store.authority = walk[number + 1]
            assert_ordered(events, tmp_path, step)


def assert_ordered(events: Sequence[tuple[str, str]], store: Path, step: str) -> None:
    state = events.index(("to", str(store / "state.json")))
    in_force = state + 1 + events[state + 1 :].index(("sync", str(store)))
    assert ("to", str(store / ".unfinished")) in events[:state]
    for at, (what, path) in enumerate(events):
        if what == "from":
            assert ("sync", path) in events[:at], f"{step}: {path} was renamed before it was on the disk"
        if what == "to":
            until = state if at < state else len(events)
            assert ("sync", str(Path(path).parent)) in events[at:until] or at == state, (
                f"{step}: {path} may be forgotten"
            )
        if what == "delete" and path.endswith("ca.key"):
            assert at > in_force, f"{step}: {path} was deleted while the state named it"


# The disk is full


@contextmanager
def room_for(calls: int) -> Iterator[None]:
    """After so many calls that need room, there is none; what needs none goes on."""
    made = 0
    with pytest.MonkeyPatch.context() as patch:

        def bounded(name: str) -> Callable[..., Any]:  # Any: whatever `os` has
            real = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal made
                if name != "open" or arguments[1] & os.O_CREAT:
                    made += 1
                    if made > calls:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **named)

            return call

        for name in ("open", "mkdir", "fsync"):
            patch.setattr(os, name, bounded(name))
        yield


def told(write: Callable[[], object]) -> str:
    """What `write` says when it fails, or nothing."""
    try:
        write()
    except StoreError as error:
        return str(error)
    return ""


def test_a_full_disk_leaves_no_half_store(quick: Path) -> None:
    for calls in range(10_000):
        store = quick / str(calls)
        with room_for(calls):
            message = told(lambda store=store: save(AUTHORITY, store))  # type: ignore[misc]  # a bound name
        if not message:
            assert calls > 30
            return
        assert "No space left on device; " in message
        assert "\n" not in message
        if "the change is made" not in message:
            assert "make room there" in message
            assert keys(store) == set(), calls
            save(AUTHORITY, store)
        assert same(load(store), AUTHORITY)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=list(STEPS))
def test_a_full_disk_leaves_the_old_state_or_says_that_it_is_the_new_one(
    number: int, walk: Sequence[Authority], quick: Path
) -> None:
    before, after = walk[number], walk[number + 1]
    save(before, quick / "pristine")
    for calls in range(10_000):
        store = quick / str(calls)
        shutil.copytree(quick / "pristine", store)
        with room_for(calls):
            message = told(lambda store=store: change(store, lambda _: after))  # type: ignore[misc]  # a bound name
        if not message:
            return
        assert message.startswith(str(store))
        is_made = "the change is made" in message
        assert same(load(store), after if is_made else before), calls
        assert is_made or keys(store) == known_keys(before), calls
        with changing(store):
            pass
        assert keys(store) == known_keys(load(store))
        shutil.rmtree(store)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from small_disk_at(tmp_path, "256k")


@pytest.mark.kernel
def test_a_disk_that_is_really_full_is_told_in_one_line(small_disk: Path) -> None:
    store = small_disk / "pki"
    save(AUTHORITY, store)
    before = contents(store)
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "ballast")
    with pytest.raises(StoreError, match="No space left on device; make room there"):
        change(store, lambda authority: stage_root(authority, LATER))
    assert contents(store) == before
    (small_disk / "ballast").unlink()
    changed = change(store, lambda authority: stage_root(authority, LATER))
    assert same(load(store), changed)


# Others


def start(directory: Path, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pki.store_writer", str(directory), str(turns)]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_do_not_write_at_once(quick: Path) -> None:
    save(AUTHORITY, quick / "pki")
    with changing(quick / "pki") as store:
        with start(quick / "pki", 1) as other:
            _, said = other.communicate(timeout=DEADLINE_S)
        assert other.returncode == 1
        assert f"{quick / 'pki'}: another outgate is writing there; try again when it is done" in said
        store.authority = changed = stage_root(store.authority, LATER)
    assert same(load(quick / "pki"), changed)
    with start(quick / "pki", 0) as other:
        assert other.wait(DEADLINE_S) == 0


def test_a_reader_never_sees_a_change_in_the_middle(quick: Path) -> None:
    """200 rotations, each of which deletes the key that was in use; every tenth exchanges root and chain too."""
    store, turns = quick / "pki", 200
    save(create_authority(NOW), store)
    seen = set()
    with start(store, turns) as writer:
        while writer.poll() is None:
            (issuer,) = load_issuers(store)
            leaf = issue_leaf(issuer, "example.com", LATER)
            leaf.certificate.verify_directly_issued_by(issuer.certificate)
            assert issuer.chain[0] == issuer.certificate
            whole = load(store)
            assert {root.key is not None for root in whole.roots} == {True}
            assert is_signed_by(whole.issuer.certificate, whole.roots[0].certificate)
            assert len(survey(store).issuing) == len(load_trusted(store)) == 1
            seen.add(issuer.certificate)
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert (writer.stdout.read().split()[-1], writer.stderr.read()) == (str(turns), "")
    assert len(seen) > 5
    assert keys(store) == known_keys(load(store))


def test_a_store_that_changes_all_the_time_is_told_in_one_line(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(AUTHORITY, quick)
    turns = iter(range(100))
    monkeypatch.setattr(
        "pki.store.read_state", lambda _: b'{"version": 1, "issuing": "%016d", "roots": []}' % next(turns)
    )
    with pytest.raises(StoreError, match="changed 20 times while it was read; try again"):
        load_issuers(quick)


def test_a_writer_that_is_killed_leaves_a_store(quick: Path) -> None:
    store = quick / "pki"
    save(create_authority(NOW), store)
    for turn in (1, 4, 12):
        with start(store, 10_000) as writer:
            assert writer.stdout is not None
            while writer.stdout.readline() != f"{turn}\n":
                assert writer.poll() is None
            writer.kill()
        assert len(load_issuers(store)) == 1
        with changing(store):
            pass
        assert keys(store) == known_keys(load(store))


@contextmanager
def ordinary_user() -> Iterator[None]:
    """As nobody, if we are root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


needs_root = pytest.mark.skipif("os.geteuid() != 0", reason="only root can become an ordinary user")


@pytest.mark.kernel
@needs_root
def test_who_may_not_read_keys_gets_the_roots(open_place: Path) -> None:
    save(AUTHORITY, open_place / "pki")
    for folder in [open_place / "pki", *(open_place / "pki").glob("**/")]:
        folder.chmod(0o755)
    with ordinary_user():
        assert load_trusted(open_place / "pki") == AUTHORITY.trusted
        assert survey(open_place / "pki").issuing[0].certificate == ISSUING.certificate
        with pytest.raises(StoreError, match=r"ca\.key: Permission denied; restore it, or run as its owner"):
            load_issuers(open_place / "pki")
        with pytest.raises(StoreError, match=f"belongs to uid 0, and we are uid {NOBODY}; run as its owner"):
            save(OTHER, open_place / "pki", overwrite=True)


@pytest.mark.kernel
@needs_root
def test_root_takes_no_key_that_another_user_owns(open_place: Path) -> None:
    open_place.chmod(0o777)
    with ordinary_user():
        save(AUTHORITY, open_place / "pki")
    before = contents(open_place)
    for read in (load, load_issuers):
        with pytest.raises(StoreError, match=rf"ca\.key: belongs to uid {NOBODY}, not to us; run as that user"):
            read(open_place / "pki")
    with pytest.raises(StoreError, match=f"belongs to uid {NOBODY}, and we are uid 0; run as its owner"):
        change(open_place / "pki", lambda authority: stage_root(authority, LATER))
    assert contents(open_place) == before


@pytest.mark.kernel
@needs_root
def test_a_directory_that_may_not_be_written_is_told_in_one_line(open_place: Path) -> None:
    open_place.chmod(0o777)
    with ordinary_user():
        save(AUTHORITY, open_place / "pki")
        (open_place / "pki" / "issuing").chmod(0o500)
        before = contents(open_place)
        with pytest.raises(StoreError, match="Permission denied; choose a directory you may write"):
            change(open_place / "pki", lambda authority: stage_issuing(authority, LATER))
        assert contents(open_place) == before
        (open_place / "pki").chmod(0o500)
        with pytest.raises(StoreError, match="Permission denied; choose a directory you may write"):
            save(OTHER, open_place / "pki", overwrite=True)
        with pytest.raises(StoreError, match="Permission denied; choose a directory you may write"):
            save(OTHER, open_place / "pki" / "below")
        assert contents(open_place) == before


# What somebody put there


def test_the_list_of_unfinished_files_reaches_nothing_outside(quick: Path) -> None:
    """It is read by who deletes: it may name folders of CAs, and their keys, and nothing else."""
    save(AUTHORITY, quick / "pki")
    (quick / "precious").mkdir()
    for path in ("../precious", "issuing/../../precious", "/", f"issuing/{ISSUING_ID}/../..", "state.json", 7):
        (quick / "pki" / ".unfinished").write_text(f'["{path}"]')
        with pytest.raises(StoreError, match="not the list that an interrupted writer leaves"), changing(quick / "pki"):
            pass
        assert (quick / "precious").is_dir()
        assert same(load(quick / "pki"), AUTHORITY)


def test_a_link_in_the_place_of_the_lock_is_not_followed(quick: Path) -> None:
    save(AUTHORITY, quick / "pki")
    (quick / "pki" / ".lock").unlink()
    (quick / "pki" / ".lock").symlink_to(quick / "victim")
    with pytest.raises(StoreError, match="symbolic link"), changing(quick / "pki"):
        pass
    assert not (quick / "victim").exists()


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"old")
    with open(tmp_path / "state.json", "rb") as reader:
        write_file(tmp_path / "state.json", b"new", 0o600)
        assert reader.read() == b"old"
    assert contents(tmp_path) == {"state.json": b"new"}


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "ca.key").symlink_to(tmp_path / "victim")
    write_file(tmp_path / "ca.key", b"key", 0o600)
    assert contents(tmp_path) == {"victim": b"precious", "ca.key": b"key"}
    assert not (tmp_path / "ca.key").is_symlink()
