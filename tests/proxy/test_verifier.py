"""The verifier: right from wrong, nothing to learn from its time, and a file that changes under it."""

from __future__ import annotations

import asyncio
import os
import time
from base64 import b64encode
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

from proxy.explicit import verifier as module
from proxy.explicit.credentials import (
    NOBODY,
    CredentialsError,
    PasswordHash,
    hash_password,
    remove_credential,
    store_credential,
)
from proxy.explicit.verifier import AT_ONCE, MAX_GUESSES, TooManyGuesses, Verifier

SOURCE = ip_address("192.0.2.1")
ANN = ("ann", "secret")


def value(name: str, password: str) -> bytes:
    return b"Basic " + b64encode(f"{name}:{password}".encode())


@pytest.fixture
def users(tmp_path: Path) -> Path:
    store_credential(tmp_path / "users", "ann", hash_password("secret"))
    return tmp_path / "users"


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def quiet(_line: str) -> None:
    raise AssertionError("there is nothing to say")


def test_what_was_verified_is_remembered_in_every_spelling(users: Path) -> None:
    async def verify() -> None:
        verifier = Verifier(users, quiet)
        assert verifier.recall(value(*ANN)) is None
        assert await verifier.verify(value(*ANN), SOURCE) == "ann"
        assert verifier.recall(value(*ANN)) == "ann"
        assert verifier.recall(value(*ANN).replace(b"Basic ", b"BASIC   ")) == "ann"
        assert verifier.recall(value("ann", "secret2")) is None
        assert verifier.recall(b"Basic !") is None

    asyncio.run(verify())


def test_wrong_name_and_wrong_password_take_as_long(users: Path) -> None:
    async def measure(verifier: Verifier, given: bytes) -> float:
        started = time.monotonic()
        assert await verifier.verify(given, SOURCE) is None
        return time.monotonic() - started

    async def compare() -> None:
        verifier = Verifier(users, quiet, failure_s=0.4)
        for given in (value("ann", "wrong"), value("nobody", "secret")):
            assert 0.4 <= await measure(verifier, given) < 10

    asyncio.run(compare())


def test_unknown_name_is_hashed_all_the_same(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no failure is cheaper than another, for us or on the clock."""
    hashed: list[str] = []
    is_of = PasswordHash.is_of

    def count(hash: object, password: str) -> bool:
        hashed.append(password)
        return is_of(NOBODY, password)

    monkeypatch.setattr(PasswordHash, "is_of", count)

    async def verify() -> None:
        verifier = Verifier(users, quiet, failure_s=0)
        assert await verifier.verify(value("ann", "wrong"), SOURCE) is None
        assert await verifier.verify(value("nobody", "guess"), SOURCE) is None
        assert await verifier.verify(b"Basic !", SOURCE) is None

    asyncio.run(verify())
    assert hashed == ["wrong", "guess"]


def test_only_so_many_are_hashed_at_once(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = 0, 0

    def hash(_hash: object, _password: str) -> bool:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1
        return False

    monkeypatch.setattr(PasswordHash, "is_of", hash)

    async def verify() -> None:
        verifier = Verifier(users, quiet, failure_s=0)
        sources = [ip_address(f"192.0.2.{number}") for number in range(12)]
        found = await asyncio.gather(*(verifier.verify(value("ann", str(source)), source) for source in sources))
        assert found == [None] * 12

    asyncio.run(verify())
    assert most == AT_ONCE


@pytest.mark.parametrize("other", ["2001:db8::2", "2001:db8::ffff:1"], ids=["next", "far"])
def test_hosts_of_one_ipv6_network_share_their_guesses(other: str, users: Path) -> None:
    async def guess() -> None:
        verifier = Verifier(users, quiet, failure_s=60)
        tasks = [
            asyncio.create_task(verifier.verify(value("ann", str(number)), IPv6Address("2001:db8::1")))
            for number in range(MAX_GUESSES)
        ]
        await asyncio.sleep(0)
        with pytest.raises(TooManyGuesses):
            await verifier.verify(value("ann", "one more"), IPv6Address(other))
        assert await verifier.verify(value(*ANN), IPv6Address("2001:db8:0:1::1")) == "ann"
        for task in tasks:
            task.cancel()

    asyncio.run(guess())


def test_waiter_that_goes_away_leaves_the_others_their_answer(users: Path) -> None:
    async def leave() -> None:
        verifier = Verifier(users, quiet)
        first, second = (asyncio.create_task(verifier.verify(value(*ANN), SOURCE)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "ann"

    asyncio.run(leave())


def test_memory_of_verified_credentials_is_bounded(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN", 2)
    for name in ("bob", "eve"):
        store_credential(users, name, hash_password("secret"))

    async def verify() -> None:
        verifier = Verifier(users, quiet)
        for name in ("ann", "bob"):
            await verifier.verify(value(name, "secret"), SOURCE)
        verifier.recall(value("ann", "secret"))  # used again: bob's is the older one now
        await verifier.verify(value("eve", "secret"), SOURCE)
        assert [verifier.recall(value(name, "secret")) for name in ("ann", "bob", "eve")] == ["ann", None, "eve"]

    asyncio.run(verify())


# --- the file changes ---


def test_changed_file_is_read_and_what_was_remembered_is_forgotten(users: Path) -> None:
    async def change() -> None:
        verifier = Verifier(users, quiet, failure_s=0)
        assert await verifier.verify(value(*ANN), SOURCE) == "ann"
        store_credential(users, "ann", hash_password("changed"))
        assert verifier.recall(value(*ANN)) is None
        assert await verifier.verify(value(*ANN), SOURCE) is None
        assert await verifier.verify(value("ann", "changed"), SOURCE) == "ann"

    asyncio.run(change())


def test_user_removed_while_verified_is_not_remembered(users: Path) -> None:
    async def remove() -> None:
        verifier = Verifier(users, quiet, failure_s=0)
        verifying = asyncio.create_task(verifier.verify(value(*ANN), SOURCE))
        await asyncio.sleep(0.001)
        remove_credential(users, "ann")
        assert verifier.recall(value(*ANN)) is None  # looks, and reads it
        await verifying
        assert verifier.recall(value(*ANN)) is None

    asyncio.run(remove())


def _open_to_others(path: Path) -> None:
    path.chmod(0o644)


def _malformed(path: Path) -> None:
    path.write_text("ann:secret\n")


def _gone(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("breaks", [_open_to_others, _malformed, _gone], ids=lambda breaks: breaks.__name__)
def test_broken_file_is_said_once_and_the_last_good_one_stays(breaks: Callable[[Path], None], users: Path) -> None:
    async def change() -> None:
        said: list[str] = []
        verifier = Verifier(users, said.append, failure_s=0)
        breaks(users)
        for _ in range(3):
            assert await verifier.verify(value(*ANN), SOURCE) == "ann"
            assert verifier.recall(value(*ANN)) == "ann"
        (line,) = said
        assert line.startswith(f"{users}")
        assert line.endswith("; the credentials read before stay in force")
        assert "secret" not in line
        _gone(users)
        store_credential(users, "bob", hash_password("secret"))
        assert verifier.recall(value(*ANN)) is None
        assert await verifier.verify(value("bob", "secret"), SOURCE) == "bob"
        assert len(said) == 1

    asyncio.run(change())


def test_file_is_looked_at_only_so_often(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 3600.0)

    async def change() -> None:
        verifier = Verifier(users, quiet)
        await verifier.verify(value(*ANN), SOURCE)
        remove_credential(users, "ann")
        assert verifier.recall(value(*ANN)) == "ann"

    asyncio.run(change())


def test_gate_does_not_start_with_a_file_it_cannot_read(users: Path) -> None:
    users.chmod(0o640)
    with pytest.raises(CredentialsError, match="chmod 600"):
        Verifier(users, quiet)


def test_verifying_gives_way_to_carrying(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def note(_hash: object, _password: str) -> bool:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        return True

    monkeypatch.setattr(PasswordHash, "is_of", note)

    async def verify() -> None:
        await Verifier(users, quiet).verify(value(*ANN), SOURCE)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    asyncio.run(verify())
    assert found == [min(before + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
