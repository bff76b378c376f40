"""Attackers on the authority, its store, its trust files, the doctor's server and the distribution job."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.server
import json
import os
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pki.authority import (
    AuthorityError,
    Issuing,
    create_authority,
    issue_leaf,
    key_pem,
)
from pki.doctor import answering, run
from pki.kubernetes.api import ApiFault, connect
from pki.leaves import server_context
from pki.lint import Profile, faults
from pki.pkcs12 import Contents, Form, assemble
from pki.rotation import activate_issuing, stage_issuing
from pki.store import StoreError, changing, load_issuers, load_trusted, save, survey
from pki.trust import TrustError, write_trust
from tests.pki.api_server import ApiServer, api_server
from tests.pki.kubernetes_jobs import keeping, once
from tests.pki.making_cas import Made, make, resigned, usage

NOW = datetime.now(UTC)
MALLORY = 65534


# --- stores and certificates that somebody has written ---------------------------------------------------------------


def pem(der: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def forge(directory: Path, der: bytes, key: bytes, **fields: object) -> Path:
    """A store whose root and issuing CA are this certificate, under its true id."""
    name = hashlib.sha256(der).hexdigest()[:16]
    record = {"id": name, "state": "active", "line": "main", "since": None, **fields}
    for kind in ("roots", "issuing"):
        folder = directory / kind / name
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(pem(der))
    (folder / "chain.pem").write_bytes(pem(der))
    (folder / "ca.key").write_bytes(key)
    (folder / "ca.key").chmod(0o600)
    state = {"version": 2, "roots": [record | {"crosses": []}], "issuing": [record | {"chain": [name]}], "given": []}
    (directory / "state.json").write_text(json.dumps(state))
    return directory


@cache
def rich() -> Made:
    """A CA with every extension that something of ours looks at."""
    return make(
        now=NOW,
        put=(
            (x509.NameConstraints([x509.DNSName("example.com")], [x509.DNSName("bad.example.com")]), True),
            (x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.2.3"), ["text"])]), False),
            (x509.PolicyConstraints(1, 1), False),
            (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName([x509.DNSName("a.b"), x509.RFC822Name("a@b")]), False),
            (usage("key_cert_sign", "crl_sign"), True),
        ),
    )


DER = rich().certificate.public_bytes(Encoding.DER)
KEY = key_pem(rich().key)  # type: ignore[arg-type]  # of `make`, elliptic


def read_all(store: Path) -> None:
    """Everything that reads a store says what is wrong in its own words, or finds nothing wrong."""
    for read in (load_trusted, load_issuers, survey):
        with suppress(StoreError):
            read(store)
    try:
        with changing(store) as change:
            change.authority = activate_issuing(stage_issuing(change.authority, NOW), NOW)
    except (StoreError, AuthorityError):
        pass


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(4, len(DER) - 1), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_whatever_is_in_a_certificate_of_a_store_is_told_in_our_own_words(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    der = bytearray(DER)
    for at, value in changes:
        der[at] = value
    read_all(forge(tmp_path_factory.mktemp("forged"), bytes(der), KEY))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x04"),  # X.509 version 5
        (bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d0209")),  # a kind of key that nobody knows
        (bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f")),  # a curve that nobody knows
        (bytes.fromhex("0603551d0e"), bytes.fromhex("0603551d0f")),  # an extension twice
        (b"\x0c\x04a CA", b"\x0c\x04a \xffA"),  # a subject that is no UTF-8
    ],
    ids=["version", "kind of key", "curve", "extension twice", "subject"],
)
def test_a_certificate_that_is_parsed_late_is_refused_when_it_is_read(tmp_path: Path, old: bytes, new: bytes) -> None:
    assert old in DER
    store = forge(tmp_path, DER.replace(old, new), KEY)
    for read in (load_trusted, load_issuers, survey):
        with pytest.raises(StoreError, match=r"ca\.crt: (no PEM certificate|not a CA certificate); "):
            read(store)


@pytest.mark.parametrize(
    "since", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59+00:00"]
)
def test_a_time_that_nobody_can_count_with_is_no_state(tmp_path: Path, since: str) -> None:
    store = forge(tmp_path, DER, KEY, since=since)
    with pytest.raises(StoreError, match="is no time with its zone; restore it from a copy"):
        survey(store)


@pytest.mark.parametrize("end", [b"00000101000000Z", b"00010101000000Z"], ids=["year 0", "year 1"])
def test_a_ca_that_ended_before_all_time_is_a_fault_and_no_traceback(tmp_path: Path, end: bytes) -> None:
    made = make(now=NOW, days=(-1, 365 * 40))
    former = made.certificate.not_valid_after_utc.strftime("%Y%m%d%H%M%SZ").encode()
    certificate = resigned(made.certificate, made.key, former, end)
    loaded = assemble(Contents(Form.PEM, (certificate,), (made.key,)))  # type: ignore[arg-type]
    assert [fault for fault in faults(loaded, Profile.STRICT, NOW) if fault.breaks]
    store = forge(tmp_path, certificate.public_bytes(Encoding.DER), key_pem(made.key))  # type: ignore[arg-type]
    read_all(store)


def test_nothing_is_changed_where_others_may_put_their_roots(tmp_path: Path) -> None:
    store = tmp_path / "it's $(mine)"
    save(create_authority(NOW), store)
    for mode in (0o777, 0o1777, 0o770):
        store.chmod(mode)
        expected = f"mode {mode:04o} lets others put CAs there; .*chmod go-w '"
        with pytest.raises(StoreError, match=expected), changing(store):
            pass
        with pytest.raises(StoreError, match="lets others"):
            save(create_authority(NOW), store, overwrite=True)
    store.chmod(0o755)
    with changing(store):
        pass


# --- names -----------------------------------------------------------------------------------------------------------

STRANGE = [
    "EXAMPLE.com", "example.com.", "*.example.com", "*", "", ".", ".example.com", "a..example.com", "exämple.com",
    "example.com\0.evil.org", "evil.org\nexample.com", "evil.org/example.com", "example.com:443", "a b.example.com",
    "-", f"{'a' * 64}.example.com", f"{'a.' * 130}example.com", "xn--", "0x7f.1", "127.1", "2130706433", "1.2.3.4",
    "::1", "::ffff:1.2.3.4", "fe80::1%lo", "[::1]", "com", "example", "notexample.com", "example.com.evil.org",
    "example\u3002com", "ｅxample.com", "ex\u00adample.com", "_a.example.com", "a_b.example.com", "example.co",
    "user@example.com", "%65xample.com", "example.com#", "example.com?", "bad.example.com", "a.bad.example.com",
]  # fmt: skip


@cache
def constrained() -> tuple[Issuing, Store]:
    authority = create_authority(NOW, permitted=["example.com"])
    return authority.issuer, Store([authority.roots[0].certificate])


def mints_only_what_is_inside(host: str) -> None:
    issuer, roots = constrained()
    try:
        leaf = issue_leaf(issuer, host, NOW)
    except AuthorityError:
        return
    names = leaf.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host]
    assert host == "example.com" or host.endswith(".example.com")
    assert set(host) <= set(string.ascii_lowercase + string.digits + "-_.")
    common = [str(one.value) for one in leaf.certificate.subject]
    assert common in ([], [host])
    if "_" not in host and not any(label.startswith("-") or label.endswith("-") for label in host.split(".")):
        verifier = (
            PolicyBuilder().store(roots).time(NOW + timedelta(seconds=1)).build_server_verifier(x509.DNSName(host))
        )
        verifier.verify(leaf.certificate, list(leaf.chain))


@pytest.mark.parametrize("host", STRANGE)
def test_a_constrained_ca_mints_nothing_outside_however_it_is_spelled(host: str) -> None:
    mints_only_what_is_inside(host)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=300), st.text("aeE*.-_x\0 \u3002０", max_size=40).map(lambda text: f"{text}.example.com")
    )
)
def test_a_constrained_ca_mints_nothing_outside(host: str) -> None:
    mints_only_what_is_inside(host)


# --- trust directories of others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775], ids=oct)
def test_no_trust_directory_is_made_where_others_may_write(tmp_path: Path, mode: int) -> None:
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(mode)
    with pytest.raises(TrustError, match=f"mode {mode:04o} lets others write there: .* name a new directory"):
        write_trust(place, {"env.sh": b"export A=1\n"})
    assert not list(place.iterdir())
    assert write_trust(place / "new", {"env.sh": b"export A=1\n"}) == ("env.sh",)


needs_root = pytest.mark.skipif("os.geteuid() != 0", reason="only root can give files away")


@pytest.mark.kernel
@needs_root
def test_no_trust_directory_is_made_in_one_of_another_user(tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    place.mkdir()
    os.chown(place, MALLORY, MALLORY)
    with pytest.raises(TrustError, match="belongs to uid 65534, not to us"):
        write_trust(place, {"env.sh": b"export A=1\n"})


@pytest.mark.kernel
@needs_root
def test_a_file_of_another_user_is_replaced_although_it_says_the_same(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "env.sh"
    path.write_bytes(b"export A=1\n")
    path.chmod(0o644)
    os.chown(path, MALLORY, MALLORY)
    assert write_trust(tmp_path, {"env.sh": b"export A=1\n"}) == ("env.sh",)
    assert path.stat().st_uid == 0


# --- the doctor -------------------------------------------------------------------------------------------------------


def test_who_connects_and_stays_does_not_keep_the_doctor() -> None:
    context = server_context(issue_leaf(create_authority(NOW).issuer, "localhost", NOW))
    before = {thread.ident for thread in threading.enumerate()}
    squatters = []
    with answering(context) as port:
        for number in range(60):
            squatter = socket.create_connection(("127.0.0.1", port), 10)
            squatter.sendall([b"", b"C", b"\x16\x03\x01"][number % 3])  # silent; a proxy's head and a hello without end
            squatters.append(squatter)
        began = time.monotonic()
    assert time.monotonic() - began < 15  # a squatter's twenty seconds, and again for each sixteen, before
    for squatter in squatters:
        squatter.close()
    assert {thread.ident for thread in threading.enumerate()} <= before


def test_a_head_without_end_is_no_proxys_client() -> None:
    context = server_context(issue_leaf(create_authority(NOW).issuer, "localhost", NOW))
    with answering(context) as port, socket.create_connection(("127.0.0.1", port), 10) as squatter:
        with suppress(ConnectionError):
            for _ in range(64):
                squatter.sendall(b"C" * 4096)
        with suppress(ConnectionError):
            assert squatter.recv(1) == b""


def test_what_a_program_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    left = tmp_path / "left"
    script = f"exec 3>&1 >/dev/null 2>&1; (exec 3>&-; sleep 300 & echo $! > {left}.new; mv {left}.new {left}; wait) & "
    script += f"while ! [ -e {left} ]; do sleep 0.01; done; echo said >&3"
    done = run(["sh", "-c", script], dict(os.environ), 20)
    assert (done.said, done.code) == ("said\n", 0)
    end = time.monotonic() + 15
    while is_running(int(left.read_text())):
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody has looked yet


# --- the cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as made:
        yield made


def look(kubeconfig: str) -> None:
    async def ask() -> None:
        async with connect(kubeconfig, None, connections=2) as api:
            await api.look("/api/v1/namespaces/a/configmaps/outgate-trust")

    asyncio.run(ask())


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[str]] = []
    to: ClassVar[str] = ""

    def do_GET(self) -> None:
        self.seen.append(f"{self.server.server_port} {self.headers.get('Authorization')}")  # type: ignore[attr-defined]
        self.send_response(307)
        self.send_header("Location", self.to + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def redirecting() -> Iterator[tuple[str, int]]:
    """The URL of a server that sends everybody to another, and the other one's port."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) for _ in range(2)]
    threads = [threading.Thread(target=one.serve_forever) for one in servers]
    for thread in threads:
        thread.start()
    first, second = (one.server_port for one in servers)
    _Elsewhere.seen, _Elsewhere.to = [], f"http://localhost:{second}"
    try:
        yield f"http://127.0.0.1:{first}", second
    finally:
        for one in servers:
            one.shutdown()
            one.server_close()
        for thread in threads:
            thread.join()


def test_a_redirect_takes_the_token_nowhere(tmp_path: Path) -> None:
    with redirecting() as (url, elsewhere):
        config = tmp_path / "config"
        user = {"name": "u", "user": {"token": "a-secret-token"}}
        cluster = {"name": "c", "cluster": {"server": url}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config.write_text(
            json.dumps({"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "x"})
        )

        with pytest.raises(ApiFault, match="307") as caught:
            look(str(config))
        assert "a-secret-token" not in str(caught.value)
        assert not [one for one in _Elsewhere.seen if one.startswith(str(elsewhere))]
        assert len(_Elsewhere.seen) == 1


def test_an_event_that_is_nested_without_end_breaks_the_watch_and_not_the_job(
    server: ApiServer, tmp_path: Path
) -> None:
    server.add_namespace("a")
    with keeping(server, tmp_path) as kept:
        kept.wait_until_ready()
        server.wait_for_watches("namespaces", "configmaps")
        server.send("configmaps", b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n")
        server.wait_for(lambda: any("malformed event" in line for line in kept.said), "it is said")
        server.add_namespace("b")
        server.wait_for(lambda: "b" in server.served(), "and it goes on")


@pytest.mark.parametrize("answer", ["null", "[]", '{"status": null}', '{"status": {}}', "1" * 5000, "[" * 100_000])
def test_a_plugin_that_answers_nonsense_is_one_clear_fault(server: ApiServer, tmp_path: Path, answer: str) -> None:
    (tmp_path / "token").write_text(answer)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "cat", "args": [str(tmp_path / "token")]}
    with pytest.raises(ApiFault, match="an answer that cannot be read"):
        look(server.kubeconfig(tmp_path, exec=plugin))


@pytest.mark.parametrize(
    "labels", [{}, {"app.kubernetes.io/managed-by": "Outgate"}, {"managed-by": "outgate"}], ids=repr
)
def test_what_a_tenant_put_there_first_is_never_overwritten(
    server: ApiServer, tmp_path: Path, labels: dict[str, str]
) -> None:
    server.add_namespace("a", "b")
    theirs = {
        "metadata": {"labels": labels, "annotations": {"outgate/trust-sha256": "0" * 64}},
        "data": {"ca.crt": "x"},
    }
    server.write("configmaps", "a", "outgate-trust", theirs)
    ran = once(server, tmp_path)
    assert ran.outcomes() == {"a": "refused", "b": "written"}
    assert server.config_map("a")["data"] == {"ca.crt": "x"}


def test_a_tenant_who_takes_the_label_loses_their_own_object_alone(server: ApiServer, tmp_path: Path) -> None:
    server.add_namespace("a", "b")
    labels = {"app.kubernetes.io/managed-by": "outgate"}
    for name in ("outgate-trust", "other"):
        server.write("configmaps", "a", name, {"metadata": {"labels": labels}, "data": {"x": "y" * 900_000}})
    ran = once(server, tmp_path, prune=True)
    assert ran.outcomes() == {"a": "written", "b": "written"}
    assert server.config_map("a", "other")["data"] == {"x": "y" * 900_000}


# --- what a process shows --------------------------------------------------------------------------------------------

SPY = r"""
import os, sys, threading
import pki.files
places = sys.argv[1:]
seen = set()
def watch():
    while True:
        for place in places:
            for path, _, names in os.walk(place):
                for name in names:
                    try:
                        mode = os.lstat(os.path.join(path, name)).st_mode & 0o777
                        if mode & 0o077 and b"PRIVATE KEY" in open(os.path.join(path, name), "rb").read():
                            seen.add(f"{name} {mode:o}")
                    except OSError:
                        continue
threading.Thread(target=watch, daemon=True).start()
from datetime import UTC, datetime
from pathlib import Path
from pki.authority import create_authority
from pki.store import save
for number in range(40):
    os.umask([0, 0o077, 0o002][number % 3])
    save(create_authority(datetime.now(UTC)), Path(places[0]) / str(number))
print(sorted(seen))
"""


def test_no_key_is_shown_to_others_for_a_moment_whatever_the_umask(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
