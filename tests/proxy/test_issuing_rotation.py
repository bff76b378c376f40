"""Another issuing CA signs from one moment on: what a gate, its inspector and whoever waits for a leaf make of that."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import signal
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from pki.authority import YEAR, Authority, AuthorityError, certificate_id, create_authority
from pki.issuers import issuers_text
from pki.signer import SignerError
from pki.store import load
from proxy.inspecting import HttpHost
from proxy.inspector import core as inspecting_core
from proxy.inspector.minting import Minting, NoLeaf
from proxy.issuing import Issuers, describe, reminder
from proxy.options import Unready, load_issuers
from proxy.run import Renewals
from proxy.service import watch
from proxy.service.watch import Watch
from tests.proxy.gates import eventually
from tests.proxy.inspecting import Rig
from tests.proxy.rotating import key_of, new_store, renew_issuing
from tests.proxy.swapping import INSPECTED, Serving, of_app, policy_of

NOW = datetime.now(UTC)
OPEN = of_app(f"{{host: {INSPECTED}, tls: inspect}}")
PATIENCE_S = 15.0


def other() -> Authority:
    return create_authority(datetime.now(UTC))


def issuer_of(sock: ssl.SSLSocket) -> str:
    der = sock.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).issuer.rfc4514_string()


def named(authority: Authority) -> str:
    return authority.issuer.certificate.subject.rfc4514_string()


@pytest.fixture(params=HttpHost)
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    with Serving(tmp_path, OPEN, http_host=request.param) as it:
        yield it


ONLY_MITMPROXY = pytest.mark.parametrize("serving", [HttpHost.MITMPROXY], indirect=True, ids=["mitmproxy"])


# --- a gate -----------------------------------------------------------------------------------------------------------


def test_what_is_open_goes_on_and_what_comes_is_shown_the_new_issuer(serving: Serving) -> None:
    later = other()
    with serving.connect(INSPECTED) as kept:
        assert issuer_of(kept) == named(serving.authority)
        serving.sign_by(later)
        with serving.connect(INSPECTED) as new:
            assert issuer_of(new) == named(later)
            assert (serving.ask(kept).status, serving.ask(new).status) == (200, 200)


def test_a_connection_in_its_handshake_during_the_change_is_served(serving: Serving) -> None:
    with serving.connect(INSPECTED), serving.dial() as early:
        serving.sign_by(other())
        with serving.shake_hands(early, INSPECTED) as sock:
            assert serving.ask(sock).status == 200


def test_an_inspector_that_starts_later_signs_by_the_newest(serving: Serving) -> None:
    later = other()
    serving.sign_by(other())
    serving.sign_by(later)
    with serving.connect(INSPECTED) as sock:
        assert issuer_of(sock) == named(later)


@ONLY_MITMPROXY
def test_an_inspector_that_was_lost_comes_back_with_the_newest(serving: Serving) -> None:
    later = other()
    with serving.connect(INSPECTED):
        pass
    lost = serving.inspector
    os.kill(lost, signal.SIGSTOP)
    serving.sign_by(later)  # it never reads this
    os.kill(lost, signal.SIGKILL)

    def connect() -> ssl.SSLSocket | None:
        try:
            return serving.connect(INSPECTED)
        except OSError:
            return None  # it is started again after a pause

    with eventually_given(connect) as sock:
        assert issuer_of(sock) == named(later)
    assert serving.inspector != lost


def eventually_given[T](look: Callable[[], T | None]) -> T:
    found: list[T] = []

    def look_once() -> bool:
        if (one := look()) is not None:
            found.append(one)
        return bool(found)

    eventually(look_once, "it serves")
    return found[0]


def test_a_text_that_cannot_be_read_ends_the_inspector_and_stands_in_no_word_of_it(tmp_path: Path) -> None:
    """It must not go on with an issuer that was replaced; and keys are in the text."""
    key = issuers_text(create_authority(NOW).issuers)
    with Rig(tmp_path, in_process=True) as rig:
        with rig.connect():
            pass
        first = rig.inspector.pid
        rig.loop.call_soon_threadsafe(rig.inspector.sign_by, key[:-20])
        rig.wait_for(lambda: rig.inspector.pid != first)
        rig.wait_for(lambda: len(rig.log) > 1)
    assert rig.log[0].startswith("the inspector cannot judge: its issuing CAs cannot be read: ")
    assert "PRIVATE" not in "".join(rig.log)


# --- an issuing CA at its end -----------------------------------------------------------------------------------------


def test_an_issuing_ca_that_expired_has_every_inspected_connection_refused_and_that_said_once(tmp_path: Path) -> None:
    with Rig(tmp_path, authority=create_authority(NOW - timedelta(days=900))) as rig:
        for _ in range(3):
            with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
                rig.connect()
        records = rig.wait_for_records(3)
    assert {(record["reason"], record["verdict"]) for record in records} == {("gate_failed", "deny")}
    assert "expired at" in str(records[0]["error.message"])
    assert [type(error).__name__ for error in rig.failures] == ["NoLeaf"]


def test_it_is_said_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspecting_core, "AGAIN_S", 0.0)
    with Rig(tmp_path, authority=create_authority(NOW - timedelta(days=900))) as rig:
        for _ in range(2):
            with pytest.raises(ssl.SSLError):
                rig.connect()
        rig.wait_for_records(2)
    assert len(rig.failures) == 2


def issuers(life: timedelta = YEAR) -> Issuers:
    return describe(create_authority(NOW, issuing_life=life).issuers)


# The life of an issuing CA, how much of it is over, and what is said.
REMINDERS: dict[str, tuple[timedelta, float, str]] = {
    "new": (YEAR, 0.0, r"^$"),
    "before two thirds": (YEAR, 0.66, r"^$"),
    "after two thirds": (YEAR, 0.67, r"^the issuing CA expires on 20\d\d-\d\d-\d\d, in 120 days; .*issuing --pki DIR$"),
    "the last day": (YEAR, 0.999, r", in 0 days; "),
    "at its end": (YEAR, 1.0, r"^the issuing CA expired on 20.*, and inspected connections are refused; "),
    "of a week, soon": (timedelta(days=7), 0.6, r"^$"),
    "of a week, late": (timedelta(days=7), 0.7, r", in 2 days; "),
}


@pytest.mark.parametrize("case", REMINDERS)
def test_who_runs_a_gate_is_reminded_of_its_issuing_ca_in_time(case: str) -> None:
    life, over, said = REMINDERS[case]
    found = issuers(life)
    begun = found.expires - life.total_seconds()
    assert re.search(said, reminder(found, begun + over * life.total_seconds() + 1))


def test_the_line_that_ends_first_counts() -> None:
    both = create_authority(NOW, with_rsa=True).issuers
    short = create_authority(NOW, issuing_life=timedelta(days=9)).issuers
    assert describe([both[0], short[0]]).expires == describe(short).expires < describe(both).expires


def test_equal_issuers_have_one_digest_and_others_another() -> None:
    authority = create_authority(NOW)
    assert describe(authority.issuers) == describe(authority.issuers)
    assert describe(authority.issuers).digest != describe(other().issuers).digest


# --- who waits for a leaf ---------------------------------------------------------------------------------------------


class Slow:
    """Leaves whose signer takes until it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_sign = threading.Event()
        self.fault: Exception | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def cached(self, host: str, alpn: tuple[str, ...]) -> ssl.SSLContext | None:
        return self._context if host == "cached.example" else None

    def context(self, host: str, alpn: tuple[str, ...]) -> ssl.SSLContext:
        self.asked.append(host)
        self.may_sign.wait(PATIENCE_S)
        if self.fault:
            raise self.fault
        return self._context

    def replace(self, issuers: object) -> None:
        pass

    def __len__(self) -> int:
        return 1


def run(test: Callable[[Slow], Awaitable[None]]) -> None:
    async def bounded() -> None:
        slow = Slow()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await test(slow)
        finally:
            slow.may_sign.set()

    asyncio.run(bounded())


def test_while_a_signer_takes_its_time_the_loop_goes_on_and_one_name_is_signed_for_once() -> None:
    async def test(slow: Slow) -> None:
        minting = Minting(slow, patience_s=PATIENCE_S)
        waiting = [asyncio.create_task(minting.context("new.example", b"http/1.1")) for _ in range(20)]
        await asyncio.sleep(0)
        assert await minting.context("cached.example", b"http/1.1")
        assert not any(task.done() for task in waiting)
        slow.may_sign.set()
        assert len(set(await asyncio.gather(*waiting))) == 1
        assert slow.asked == ["new.example"]

    run(test)


def test_names_beyond_the_bound_are_refused_at_once() -> None:
    async def test(slow: Slow) -> None:
        minting = Minting(slow, patience_s=PATIENCE_S, max_waiting=2)
        waiting = [asyncio.create_task(minting.context(f"{name}.example", b"h2")) for name in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(NoLeaf, match="2 names wait for their leaves already"):
            await minting.context("c.example", b"h2")
        slow.may_sign.set()
        await asyncio.gather(*waiting)
        assert await minting.context("c.example", b"h2")

    run(test)


def test_a_signer_that_hangs_is_waited_for_so_long() -> None:
    async def test(slow: Slow) -> None:
        minting = Minting(slow, patience_s=0.05)
        for _ in range(2):
            with pytest.raises(NoLeaf, match=r"no leaf was signed within 0\.05 s"):
                await minting.context("new.example", b"h2")
        assert slow.asked == ["new.example"]  # nobody queues up behind himself

    run(test)


NO_LEAF: dict[str, tuple[Exception, str]] = {
    "an issuing CA at its end": (AuthorityError("CA 12 expired"), "CA 12 expired"),
    "a token that is gone": (SignerError("pkcs11:token=a: gone"), "pkcs11:token=a: gone"),
    "no descriptor": (OSError(errno.EMFILE, "Too many open files"), "no leaf can be loaded: Too many open files"),
    "a leaf that OpenSSL refuses": (ssl.SSLError(1, "[SSL] too weak"), "no leaf can be loaded: [SSL] too weak"),
}


@pytest.mark.parametrize("case", NO_LEAF)
def test_why_there_is_no_leaf_is_told_to_everyone_who_waits_and_the_next_asks_anew(case: str) -> None:
    fault, said = NO_LEAF[case]

    async def test(slow: Slow) -> None:
        minting, slow.fault = Minting(slow, patience_s=PATIENCE_S), fault
        slow.may_sign.set()
        for told in await asyncio.gather(*(minting.context("a.example", b"h2") for _ in "ab"), return_exceptions=True):
            assert isinstance(told, NoLeaf)
            assert str(told) == said
        slow.fault = None
        assert await minting.context("a.example", b"h2")
        assert slow.asked == ["a.example"] * 2

    run(test)


# --- what a store's watch sees ----------------------------------------------------------------------------------------


def swap_link(store: Path) -> None:
    """As the kubelet shows a secret: `issuing` leads into a directory that is another from one moment on."""
    shutil.copytree(store / "issuing", store / "..2")
    shutil.rmtree(store / "issuing")
    (store / "issuing").symlink_to("..2")


SEEN: dict[str, Callable[[Path], object]] = {
    "a rotation": renew_issuing,
    "a key that comes later than the rest": lambda store: shutil.copy(key_of(store), key_of(store).with_name("new")),
    "a key that others may not read any more": lambda store: key_of(store).chmod(0o400),
    "a link that leads elsewhere": swap_link,
}


@pytest.mark.parametrize("case", SEEN)
def test_what_becomes_of_a_store_is_seen(tmp_path: Path, case: str) -> None:
    watched = Watch((), new_store(tmp_path), 0.02)
    SEEN[case](tmp_path / "pki")

    async def test() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await watched.changed()

    asyncio.run(test())


def test_a_store_at_rest_is_no_news(tmp_path: Path) -> None:
    watched = Watch((), new_store(tmp_path), 0.01)
    load(tmp_path / "pki")

    async def test() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await watched.changed()

    asyncio.run(test())


# --- a gate without a supervisor (`outgate run`) ----------------------------------------------------------------------


class Told:
    """In place of a gate: what it is told to sign by."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def sign_by(self, issuing: str) -> None:
        self.texts.append(issuing)


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Told]]:
    """A store that a running gate follows."""
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    directory = new_store(tmp_path)
    renewals = Renewals(policy_of(OPEN), "app", load_issuers(directory), Watch((), directory, 0.02), directory)
    gate = Told()
    over = threading.Event()

    async def follow() -> None:
        task = asyncio.create_task(renewals.carry_out(gate))  # type: ignore[arg-type]  # all that it asks of a gate
        await asyncio.to_thread(over.wait)
        task.cancel()

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(asyncio.run, follow())
        yield tmp_path / "pki", gate
        over.set()
        running.result(PATIENCE_S)


def test_a_command_that_runs_long_is_shown_leaves_of_the_newest_issuer(followed: tuple[Path, Told]) -> None:
    store, gate = followed
    for count in (1, 2):
        newest = renew_issuing(store)
        eventually(lambda: len(gate.texts) == count, "it is told")  # noqa: B023 - done before the next round
        assert certificate_id(load(store).issuer.certificate) == newest
        assert gate.texts[-1] == issuers_text(load(store).issuers)


def test_what_a_command_cannot_use_is_said_and_the_former_stays(
    followed: tuple[Path, Told], capfd: pytest.CaptureFixture[str]
) -> None:
    store, gate = followed
    said = ""

    def hears(what: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return what in said

    renew_issuing(store, permitted=["elsewhere.test"])
    eventually(lambda: hears("the issuing CA is not replaced, the former stays in force"), "the constraints are seen")
    assert f'"{INSPECTED}" is inspected, and the constraints of the issuing CA leave it out' in said
    key = key_of(store)
    key.chmod(0o644)
    eventually(lambda: hears("chmod 600"), "the loose key is seen")
    assert gate.texts == []
    key.chmod(0o600)
    renew_issuing(store, permitted=[])
    eventually(lambda: gate.texts, "it is told")


def test_no_command_runs_under_leaves_that_it_would_not_accept(tmp_path: Path) -> None:
    directory = new_store(tmp_path, "elsewhere.test")
    with pytest.raises(Unready, match=r"rotate issuing .*--constrain-to"):
        Renewals(policy_of(OPEN), "app", load_issuers(directory), Watch((), directory), directory)


def test_a_command_is_told_at_its_start_that_the_issuing_ca_comes_to_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = new_store(tmp_path, now=NOW - 0.9 * YEAR)
    Renewals(policy_of(OPEN), "app", load_issuers(directory), Watch((), directory), directory)
    assert "the issuing CA expires on" in capfd.readouterr().err
