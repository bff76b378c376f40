"""CAs are replaced under a service that carries traffic: nobody is cut, everybody finds a path, no key is seen."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pki.authority import (
    YEAR,
    Authority,
    CaKey,
    KeyKind,
    certificates_pem,
    create_issuing,
    create_key,
    create_root,
)
from pki.rotation import activate_issuing, activate_root, retire_issuing, stage_issuing, stage_root
from pki.signer import open_key
from pki.store import changing, load, save
from tests.end_to_end.inspected_origin import options_of_a_service
from tests.end_to_end.service import WAIT_S, Service, children, eventually, signal_to
from tests.end_to_end.world import a_world
from tests.pki.softhsm import PIN, make_softhsm
from tests.proxy.rotating import key_of, new_store, renew_issuing

HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
INSPECTED = "      - {host: api.test, tls: inspect}\n"
OTHER = '      - tcp: "other.test:7"\n'
TOKEN = "a-token-of-some-length"
LOADED = 'outgate_reloads_total{result="loaded"}'


@pytest.fixture
def options(tmp_path: Path) -> Iterator[list[str]]:
    yield from options_of_a_service(tmp_path, TOKEN)


class Client:
    """One keep-alive connection to https://api.test, of somebody who trusts these roots."""

    def __init__(self, service: Service, roots: list[x509.Certificate]) -> None:
        context = ssl.create_default_context(cadata=certificates_pem(*roots).decode())
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        self._http = HTTPConnection("api.test")
        self._http.sock = sock = context.wrap_socket(service.tunnel("api.test:443"), server_hostname="api.test")
        der = sock.getpeercert(binary_form=True)
        assert der is not None
        self.leaf = x509.load_der_x509_certificate(der)

    def get(self) -> int:
        self._http.request("GET", "/search")
        with self._http.getresponse() as reply:
            reply.read()
            return reply.status

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Load:
    """Requests on a connection that stays and on ones that are new each time, until the context closes.

    roots   whom they trust; asked for each new connection
    faults  what went wrong
    counts  of requests that were answered: on what stays, and on what was new
    """

    def __init__(self, service: Service, roots: Callable[[], list[x509.Certificate]]) -> None:
        self._service = service
        self._roots = roots
        self.faults: list[str] = []
        self.counts = [0, 0]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._stay), threading.Thread(target=self._come_anew)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _stay(self) -> None:
        with Client(self._service, self._roots()) as client:
            while not self._over.wait(0.02):
                self._ask(client, 0)

    def _come_anew(self) -> None:
        while not self._over.wait(0.05):
            try:
                with Client(self._service, self._roots()) as client:
                    self._ask(client, 1)
            except (OSError, AssertionError) as error:
                self.faults.append(repr(error))

    def _ask(self, client: Client, kind: int) -> None:
        try:
            assert client.get() == 200
            self.counts[kind] += 1
        except Exception as error:
            self.faults.append(repr(error))


def shown_by(service: Service, roots: list[x509.Certificate]) -> str:
    """Whose leaf a new connection is shown."""
    with Client(service, roots) as client:
        return client.leaf.issuer.rfc4514_string()


def newest(store: Path) -> str:
    return load(store).issuer.certificate.subject.rfc4514_string()


def shows_the_newest(service: Service, store: Path, roots: list[x509.Certificate]) -> None:
    eventually(lambda: shown_by(service, roots) == newest(store), "a leaf of the newest issuing CA")


# --- a rotation -------------------------------------------------------------------------------------------------------


def test_issuing_cas_and_a_root_are_replaced_under_load_and_no_request_fails(
    tmp_path: Path, options: list[str]
) -> None:
    store = Path(new_store(tmp_path))
    old = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, "--workers", "2", *options) as it, Load(it, lambda: old) as load_of_old:
        for number in range(10):
            renew_issuing(store)
            if number in (0, 5):  # the others come faster than anybody looks
                shows_the_newest(it, store, old)
        shows_the_newest(it, store, old)

        with changing(store) as change:
            change.authority = stage_root(change.authority, datetime.now(UTC))
        new = [load(store).roots[-1].certificate]
        eventually(lambda: is_accepted(it, new), "the chain leads to the new root too")
        with Load(it, lambda: new) as load_of_new:
            with changing(store) as change:
                change.authority = activate_root(retire_issuing(change.authority), datetime.now(UTC))
            for roots in (old, new, old + new):
                shows_the_newest(it, store, roots)
        assert (load_of_old.faults, load_of_new.faults) == ([], [])
        assert min(*load_of_old.counts, *load_of_new.counts) > 5
        assert it.ready() == (200, [], [])
        denied = it.records(verdict="deny")
        assert [record["reason"] for record in denied if record["reason"] != "client_certificate_refused"] == []


def is_accepted(service: Service, roots: list[x509.Certificate]) -> bool:
    try:
        Client(service, roots).close()
    except ssl.SSLCertVerificationError:
        return False
    return True


def test_policy_and_issuing_ca_may_change_at_once(tmp_path: Path, options: list[str]) -> None:
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + OTHER, *options) as it:
        renew_issuing(store)
        it.policy.write_text(HEAD + INSPECTED)  # the first that inspects
        it.hears(r"issuing CA [0-9a-f]{16} is in force: new connections")
        shows_the_newest(it, store, roots)
        assert it.metric(LOADED) >= 1


@pytest.mark.parametrize("part", ["inspector", "worker"])
def test_a_process_that_is_killed_during_a_rotation_comes_back_with_the_newest_issuer(
    tmp_path: Path, options: list[str], part: str
) -> None:
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options, "--http-host", "mitmproxy") as it:
        assert shown_by(it, roots) == newest(store)
        [worker] = it.workers()
        [inspector] = children(worker, "proxy.inspector.main")
        lost = inspector if part == "inspector" else worker
        os.kill(lost, signal.SIGSTOP)  # it hears of nothing any more
        renew_issuing(store)
        it.send(signal.SIGHUP)
        time.sleep(0.5)  # whether the news is on its way to it by now or not: it must come back with them
        os.kill(lost, signal.SIGKILL)

        def shows_newest() -> bool:
            try:
                return shown_by(it, roots) == newest(store)
            except (OSError, AssertionError):
                return False  # nobody serves for a moment

        eventually(shows_newest, "the newest issuer")
        assert lost not in it.processes()


# --- a store that cannot be used --------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_read_leaves_the_former_issuer_and_is_told_of_once(
    tmp_path: Path, options: list[str]
) -> None:
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options) as it:
        former = newest(store)
        renew_issuing(store)
        expected = newest(store)
        key = key_of(store)
        key.chmod(0o644)
        it.hears("the issuing CAs are not replaced, issuing CA [0-9a-f]{16} stays in force:")
        it.hears(r"ca\.key: mode 0644 .*chmod 600")
        for _ in range(2):
            status, page = it.reload(TOKEN)
            assert (status, page["result"]) == (422, "refused")
            assert "chmod 600" in page["problems"][0]
        assert sum("chmod 600" in line for line in it.said) == 1
        assert it.ready() == (
            200, [], ["the issuing CAs cannot be replaced by those of the store; the former stay in force"]
        )  # fmt: skip
        assert shown_by(it, roots) == former != expected

        it.policy.write_text(HEAD + INSPECTED + OTHER)  # and holds no policy up
        it.hears(r"policy [0-9a-f]{12} is in force")
        key.chmod(0o600)  # nothing else is touched
        shows_the_newest(it, store, roots)
        assert it.ready() == (200, [], [])


def test_an_issuing_ca_whose_constraints_leave_an_inspected_name_out_is_not_taken(
    tmp_path: Path, options: list[str]
) -> None:
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options) as it:
        former = newest(store)
        renew_issuing(store, permitted=["elsewhere.test"])
        it.send(signal.SIGHUP)
        it.hears(
            'policy.yaml:5.*"api.test" is inspected, and the constraints .* rotate issuing .*--constrain-to POLICY'
        )
        assert shown_by(it, roots) == former
        renew_issuing(store, permitted=["api.test"])
        it.send(signal.SIGHUP)
        shows_the_newest(it, store, roots)


def test_an_issuing_ca_that_expired_is_told_of_and_nothing_is_inspected_until_there_is_another(
    tmp_path: Path, options: list[str]
) -> None:
    store = Path(new_store(tmp_path, now=datetime.now(UTC) - 1.1 * YEAR))
    end = load(store).issuer.certificate.not_valid_after_utc
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options) as it:
        it.hears(rf"the issuing CA expired on {end.date()}, and inspected connections are refused; replace it: outgate")
        assert it.metric("outgate_issuing_expiry_timestamp_seconds") == end.timestamp()
        with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
            Client(it, roots)
        [record] = eventually(lambda: it.records(reason="gate_failed"), "a record")
        assert record["error.message"].startswith("CA ")
        assert (it.ready()[0], "expired" in it.ready()[2][0]) == (200, True)
        renew_issuing(store)
        it.send(signal.SIGHUP)
        eventually(lambda: not it.ready()[2], "another is in force")
        assert shown_by(it, roots) == newest(store)
        assert it.metric("outgate_issuing_expiry_timestamp_seconds") > end.timestamp()


# --- without a service ------------------------------------------------------------------------------------------------

ASK_TWICE = """
import socket, ssl, time

def issuer():
    with socket.create_connection(("api.example", 443)) as sock:
        with ssl.create_default_context().wrap_socket(sock, server_hostname="api.example") as stream:
            return stream.getpeercert()["issuer"]

first = issuer()
print("asked", flush=True)
open({ready!r}, "w").close()
end = time.monotonic() + {wait_s}
while issuer() == first and time.monotonic() < end:
    time.sleep(0.1)
print("another" if issuer() != first else "the same")
"""


@pytest.mark.kernel
def test_a_command_that_runs_long_sees_the_new_issuer(tmp_path: Path) -> None:
    with a_world() as world:
        store = Path(new_store(world.directory))
        ready = world.file("ready", "")
        ready.unlink()

        def renew() -> None:
            eventually(ready.exists, "the command has asked")
            renew_issuing(store)

        renewing = threading.Thread(target=renew)
        renewing.start()
        (world.directory / "ask.py").write_text(ASK_TWICE.format(ready=str(ready), wait_s=WAIT_S))
        ran = world.run(
            [sys.executable, str(world.directory / "ask.py")],
            policy=HEAD + "      - {host: api.example, tls: inspect}\n",
            options=["--pki", str(store)],
        )
        renewing.join()
    assert ran.stdout == b"asked\nanother\n", ran.stderr


# --- keys -------------------------------------------------------------------------------------------------------------


def secrets_of(store: Path) -> set[bytes]:
    """Each private key there in every dress that it might slip out in."""
    found: set[bytes] = set()
    for path in store.rglob("ca.key"):
        pem = path.read_bytes()
        lines = [line for line in pem.splitlines() if not line.startswith(b"-----")]
        found.update(line for line in lines if len(line) > 40)
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        number = key.private_numbers().private_value.to_bytes(32)
        encoded = base64.b64encode(number)[:-4]
        found |= {number, number[::-1], number.hex().encode(), number.hex().upper().encode(), encoded}
    return found


def limits_of(pid: int) -> str:
    """Empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/limits").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def everything_of(service: Service, directory: Path) -> Iterator[tuple[str, bytes]]:
    """What can be read of a service from outside: words, pages, files, and what the kernel shows of its processes."""
    yield "standard error", "\n".join(service.said).encode()
    for page in ("/", "/metrics", "/readyz"):
        yield page, service.ask(page)[1].encode()
    yield "/reload", json.dumps(service.reload(TOKEN)).encode()
    for path in directory.rglob("*"):
        if path.is_file() and directory / "pki" not in path.parents:
            yield str(path), path.read_bytes()
    for pid in (service.process.pid, *service.processes()):
        yield from shown_of(pid)


def shown_of(pid: int) -> Iterator[tuple[str, bytes]]:
    process = Path("/proc", str(pid))
    try:
        paths = [process / "cmdline", process / "environ", *(process / "fd").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for path in paths:
        try:
            # An open file, also one of memory, as whoever could open it would find it; a pipe or a socket is none.
            if path.parent.name != "fd" or path.stat().st_mode & 0o170000 == 0o100000:
                yield f"{path} -> {os.readlink(path) if path.is_symlink() else ''}", path.read_bytes()
        except OSError:
            continue  # gone meanwhile


@contextmanager
def dumping_cores() -> Iterator[None]:
    """As where an operator allows them."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.mark.parametrize("host", ["auto", "mitmproxy"])
def test_no_key_is_seen_anywhere_whatever_fails(
    tmp_path: Path, options: list[str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tests.end_to_end.service._CLEAN", {**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    options += ["--workers", "2", "--http-host", host]
    with dumping_cores(), Service(tmp_path, HEAD + INSPECTED, *options) as it:
        keys = secrets_of(store)
        watched: dict[int, list[tuple[str, bytes]]] = {}
        over = threading.Event()

        def watch() -> None:
            """Processes that live for a moment: compilers."""
            while not over.wait(0.02):
                for pid in children(it.process.pid, "proxy.service.compiler"):
                    watched.setdefault(pid, list(shown_of(pid)))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            shown_by(it, roots)
            for harm in (cut_the_key, swap_the_lines, open_to_all):
                renew_issuing(store)
                keys |= secrets_of(store)
                path = key_of(store)
                text = path.read_bytes()
                harm(path)
                assert it.reload(TOKEN)[0] == 422
                path.write_bytes(text)
                path.chmod(0o600)
            for worker in it.workers():
                for pid in (*children(worker, "proxy.inspector.main"), worker):
                    signal_to(pid, signal.SIGABRT)  # as a crash in C would
            eventually(lambda: it.ready()[0] == 200 and len(it.workers()) == 2, "others serve")
            eventually(lambda: is_served(it, store, roots), "they inspect")
        finally:
            over.set()
            watching.join()

        assert watched
        seen = [*(one for found in watched.values() for one in found), *everything_of(it, tmp_path)]
        assert any(place.startswith("/proc/") and "->" in place for place, _ in seen)
        assert {place for place, text in seen if any(key in text for key in keys)} == set()
        limited = [limits for pid in (it.process.pid, *it.processes()) if (limits := limits_of(pid))]
        # a supervisor, two workers, two inspectors where there are any; a compiler may be about to end
        assert len(limited) >= (3 if host == "auto" else 5)
        assert [limits for limits in limited if not re.search(r"Max core file size +[01] +[01] ", limits)] == []
        assert list(tmp_path.glob("core*")) == []
        assert any(
            "PRIVATE KEY" in path.read_text() for path in store.rglob("ca.key")
        )  # the search finds what there is


def test_a_key_in_a_token_signs_and_the_next_one_in_its_place_and_the_pin_is_seen_nowhere(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token's module is loaded by the compiler and by the inspector, and never here."""
    (tmp_path / "hsm").mkdir()
    hsm = make_softhsm(tmp_path / "hsm")
    monkeypatch.setattr("tests.end_to_end.service._CLEAN", {**os.environ, "SOFTHSM2_CONF": str(hsm.configuration)})
    hsm.make_token("gate")
    root = create_root(datetime.now(UTC), name="Outgate")

    def in_token(label: str) -> CaKey:
        key = create_key(KeyKind.EC_P256)
        hsm.put(key, "gate", label, label.encode().hex())
        return open_key(hsm.uri("gate", label), key.public_key())

    store, roots = tmp_path / "pki", [root.certificate]
    issuing = create_issuing(root, datetime.now(UTC), name="Outgate", key=in_token("first"))
    save(Authority((root,), (issuing,)), store)
    with Service(tmp_path, HEAD + INSPECTED, *options) as it:
        assert shown_by(it, roots) == newest(store)
        with changing(store) as change:
            now = datetime.now(UTC)
            staged = stage_issuing(change.authority, now, key=in_token("second"))
            change.authority = activate_issuing(staged, now)
        it.send(signal.SIGHUP)
        shows_the_newest(it, store, roots)
        key_of(store).write_text(hsm.uri("gate", "lost") + "\n")
        assert it.reload(TOKEN)[0] == 422
        assert shown_by(it, roots) == newest(store)
        seen = [(place, text) for place, text in everything_of(it, tmp_path) if str(tmp_path / "hsm") not in place]
        assert {place for place, text in seen if PIN.encode() in text} == set()


def is_served(service: Service, store: Path, roots: list[x509.Certificate]) -> bool:
    try:
        return shown_by(service, roots) == newest(store)
    except (OSError, AssertionError):
        return False


def cut_the_key(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def swap_the_lines(path: Path) -> None:
    """No PEM any more, and all of the key still."""
    path.write_bytes(b"\n".join(reversed(path.read_bytes().splitlines())))


def open_to_all(path: Path) -> None:
    path.chmod(0o644)
