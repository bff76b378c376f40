"""The front door: what is peeked, who is asked, what the client is told, and what never reaches an upstream."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest
import trustme

from policies.model import Attempt, Reason
from proxy.limits import Limits
from proxy.original_dst import redirected_dst
from proxy.wire.client_hello import Alert, render_alert
from tests.builders import policy, rules
from tests.proxy.gates import DESTINATION, assert_refused, at, eventually, gate, origin, read_all, read_exactly
from tests.proxy.hellos import browser_hello, ech, hello, message, records, server_name

A = rules("- host: a.example")
NAME = "a.example"


def alert(reason: Alert) -> bytes:
    return render_alert(reason)


def send_in(sock: socket.socket, data: bytes, size: int, pause_s: float = 0.001) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at_ in range(0, len(data), size):
        sock.sendall(data[at_ : at_ + size])
        time.sleep(pause_s)


# --- passed through ---


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (hello(), 1 << 16),
        (hello(), 1),
        (hello() + b"early data", 7),
        (browser_hello(), 500),
        (records(message([server_name(b"a.example")]), *[20] * 10), 1 << 16),
        (records(message([server_name(b"a.example")]), 1, 2, 3), 2),
        (records(message([server_name(b"a.example"), (21, bytes(8000))]), 3000), 1200),
    ],
    ids=["whole", "byte by byte", "with early data", "post-quantum", "in records", "records and bytes", "8 KB"],
)
def test_hello_reaches_the_upstream_unchanged_however_it_comes(data: bytes, size: int) -> None:
    pol = rules("- host: a.example\n  ech: allow")
    with origin() as upstream, gate(pol, {NAME: at(upstream.address)}) as it, it.connect() as client:
        send_in(client, data, size)
        assert read_exactly(client, len(data)) == data  # the origin echoes
        client.close()
        record = it.record()
        assert bytes(upstream.heard[0]) == data
        assert (record["verdict"], record["reason"], record["stage"]) == ("allow", "rule", "tls")
        assert (record["server.name"], record["tls.mode"]) == (NAME, "passthrough")
        assert (record["bytes.sent"], record["bytes.received"]) == (len(data), len(data))
        assert (record["upstream.address"], record["upstream.port"]) == upstream.address
        assert (record["destination.address"], record["destination.port"]) == (str(DESTINATION), 443)
        assert "duration_ms" in record
        eventually(lambda: it.listener.open_connections == 0)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class TlsClient:
    """A TLS client on a plain socket, so that its bytes can be cut as one likes."""

    def __init__(self, sock: socket.socket, authority: trustme.CA, name: str) -> None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)

    def handshake(self, size: int) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                send_in(self.sock, self.outgoing.read(), size)
                data = self.sock.recv(65536)
                assert data
                self.incoming.write(data)
            else:
                send_in(self.sock, self.outgoing.read(), size)
                return


@pytest.fixture
def tls_origin(authority: trustme.CA) -> Iterator[tuple[str, int]]:
    """Ends TLS as a.example."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(NAME).configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    try:
                        with context.wrap_socket(sock, server_side=True) as tls:
                            tls.sendall(b"the origin itself")
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize("size", [1 << 16, 50])
def test_real_tls_passes_undecrypted(authority: trustme.CA, tls_origin: tuple[str, int], size: int) -> None:
    with gate(A, {NAME: at(tls_origin)}) as it, it.connect() as sock:
        client = TlsClient(sock, authority, NAME)
        client.handshake(size)
        certificate = client.tls.getpeercert()
        assert certificate is not None
        assert ("DNS", NAME) in certificate["subjectAltName"]  # the origin's own
        while True:
            try:
                assert client.tls.read(100) == b"the origin itself"
                break
            except ssl.SSLWantReadError:
                client.incoming.write(sock.recv(65536))


def test_name_that_must_be_looked_up_first_is_carried_too() -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it, it.connect() as client:
        it.names.is_cached = False
        client.sendall(hello())
        assert read_exactly(client, len(hello())) == hello()
        assert it.names.asked == [NAME, NAME]


def test_opaque_bytes_go_to_the_name_whose_lookup_gave_the_address() -> None:
    pol = rules("- tcp: db.example:5432")
    with (
        origin(greeting=b"server speaks first") as upstream,
        gate(pol, {"db.example": at(upstream.address)}, port=5432, told=["db.example"]) as it,
    ):
        with it.connect() as client:
            assert read_exactly(client, 19) == b"server speaks first"  # nothing was waited for
            client.sendall(b"select 1")
            assert read_exactly(client, 8) == b"select 1"
        record = it.record()
        assert (record["stage"], record["server.names"]) == ("tcp", ["db.example"])


def test_silent_client_on_a_port_of_either_kind_is_opaque_after_a_while() -> None:
    pol = rules("- host: a.example\n- tcp: db.example:443")
    limits = Limits(silence_s=0.2)
    with origin(greeting=b"220 hi") as upstream:
        names = {"db.example": at(upstream.address), NAME: at(upstream.address)}
        with gate(pol, names, told=["db.example"], limits=limits) as it:
            with it.connect() as client:
                assert read_exactly(client, 6) == b"220 hi"
            assert it.record()["stage"] == "tcp"
            it.records.clear()
            with it.connect() as client:  # and one that speaks is judged by what it says
                client.sendall(hello())
                read_exactly(client, 6)
            assert it.record()["stage"] == "tls"


@pytest.mark.parametrize(
    ("says", "stage", "reason"),
    [(hello("b.example"), "tls", "deny_rule"), (hello(NAME), "tls", "rule"), (b"select 1", "tcp", "rule")],
    ids=["denied hello", "allowed hello", "opaque bytes"],
)
def test_a_late_speaker_is_judged_by_what_it_says(says: bytes, stage: str, reason: str) -> None:
    """A client that waits out the silence and then shows a name must not get past the rules about that name."""
    pol = rules("- host: a.example\n- {host: b.example, deny: all}\n- tcp: db.example:443")
    with origin() as upstream:
        names = {"db.example": at(upstream.address), NAME: at(upstream.address)}
        with gate(pol, names, told=["db.example"], limits=Limits(silence_s=0.1)) as it, it.connect() as client:
            eventually(lambda: upstream.heard, "the upstream to be dialled")
            client.sendall(says)
            if reason == "rule":
                assert read_exactly(client, len(says)) == says
            else:
                assert read_all(client) == render_alert(Alert.ACCESS_DENIED)
            client.close()
            record = it.record()
            assert (record["stage"], record["reason"]) == (stage, reason)
            assert bytes(upstream.heard[0]) == b""


def test_silence_on_both_sides_ends_at_the_idle_deadline() -> None:
    pol = rules("- host: a.example\n- tcp: db.example:443")
    limits = Limits(silence_s=0.1, idle_s=0.3)
    with (
        origin() as upstream,
        gate(pol, {"db.example": at(upstream.address)}, told=["db.example"], limits=limits) as it,
    ):
        with it.connect() as client, pytest.raises(ConnectionResetError):
            read_all(client)
        assert it.record()["reason"] == "hello_timeout"


# --- denied ---

TLS_DENIALS = {
    "name without rule": (hello("b.example"), Reason.NO_RULE, Alert.ACCESS_DENIED),
    "name above": (hello("example"), Reason.NO_RULE, Alert.ACCESS_DENIED),
    "name below": (hello("x.a.example"), Reason.NO_RULE, Alert.ACCESS_DENIED),
    "no sni": (hello(None), Reason.NO_SNI, Alert.ACCESS_DENIED),
    "ech": (hello(NAME, ech()), Reason.ECH, Alert.ACCESS_DENIED),
    "a browser's ech": (browser_hello(), Reason.ECH, Alert.ACCESS_DENIED),
    "address literal": (hello("192.0.2.1"), Reason.MALFORMED_NAME, Alert.ACCESS_DENIED),
    "short address literal": (hello("127.1"), Reason.MALFORMED_NAME, Alert.ACCESS_DENIED),
    "not a hostname": (hello("a.example\x00.b.example"), Reason.MALFORMED_NAME, Alert.ACCESS_DENIED),
    "two names": (
        records(message([server_name(b"a.example", b"b.example")])),
        Reason.MALFORMED_HELLO,
        Alert.DECODE_ERROR,
    ),
    "two name extensions": (
        hello(NAME, server_name(b"b.example")),
        Reason.MALFORMED_HELLO,
        Alert.DECODE_ERROR,
    ),
    "garbage after the type byte": (b"\x16" + b"\xff" * 40, Reason.MALFORMED_HELLO, Alert.DECODE_ERROR),
    "server hello": (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Reason.MALFORMED_HELLO, Alert.DECODE_ERROR),
    "zero-length record": (b"\x16\x03\x01\x00\x00", Reason.MALFORMED_HELLO, Alert.DECODE_ERROR),
    "16 MB announced": (
        b"\x16\x03\x01\x20\x00\x01\xff\xff\xff",
        Reason.HELLO_TOO_LARGE,
        Alert.DECODE_ERROR,
    ),
}


@pytest.mark.parametrize(("data", "reason", "said"), TLS_DENIALS.values(), ids=TLS_DENIALS.keys())
def test_denied_hello_gets_an_alert_and_touches_nothing(data: bytes, reason: Reason, said: Alert) -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}) as it, it.connect() as client:
        client.sendall(data)
        assert read_all(client) == alert(said)  # then a clean end, no reset
        assert it.record()["reason"] == reason
        assert it.record()["tls.ech" if reason is Reason.ECH else "verdict"] in (True, "deny")
        assert (it.names.asked, upstream.heard, it.handed) == ([], [], [])
        client.close()
        eventually(lambda: it.listener.open_connections == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n",
        b"\x00" * 50,
        b"\x80\x2e\x01\x03\x01\x00\x15",
        b"get / HTTP/1.1\r\n\r\n",
        b"\x17\x03\x03\x00\x01x",
    ],
    ids=["ssh", "zeroes", "ssl 2 hello", "lower-case method", "application data"],
)
def test_bytes_that_are_no_hello_are_reset(data: bytes) -> None:
    with origin() as upstream, gate(A, {NAME: at(upstream.address)}, told=[NAME]) as it, it.connect() as client:
        client.sendall(data)
        with pytest.raises(ConnectionResetError):
            read_all(client)
        assert (it.record()["stage"], it.record()["reason"]) == ("tcp", "wrong_protocol")
        assert (it.names.asked, upstream.heard) == ([], [])


def test_plain_http_on_a_tls_port_is_told_why_in_http() -> None:
    with gate(A) as it, it.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        problem = json.loads(body)
        assert (problem["reason"], problem["workload"]) == ("wrong_protocol", "app")
        assert problem["id"] == it.record()["id"]
        assert b"Connection: close" in head
        assert it.handed == []


def test_tls_on_a_plain_port_is_denied() -> None:
    with gate(rules("- host: a.example\n  ports: [80]"), port=80) as it, it.connect() as client:
        client.sendall(hello())
        assert read_all(client) == alert(Alert.ACCESS_DENIED)
        assert it.record()["reason"] == "wrong_protocol"


def test_denied_client_that_goes_on_sending_still_reads_its_alert() -> None:
    """Unread bytes would make the close a reset, and a reset may overtake the alert."""
    with gate(A) as it, it.connect() as client:
        client.sendall(hello("b.example") + bytes(30_000))
        time.sleep(0.1)
        client.sendall(bytes(100_000))
        time.sleep(0.1)
        assert read_all(client) == alert(Alert.ACCESS_DENIED)
        client.close()
        eventually(lambda: it.listener.open_connections == 0)


def test_denied_client_that_never_stops_is_cut() -> None:
    with gate(A, limits=Limits(max_linger=200_000)) as it, it.connect() as client:
        client.sendall(hello("b.example"))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(bytes(50_000_000))
        eventually(lambda: it.listener.open_connections == 0)


def test_denied_client_that_never_closes_is_cut() -> None:
    with gate(A, limits=Limits(linger_s=1.0)) as it, it.connect() as client:
        client.sendall(hello("b.example"))
        assert read_all(client) == alert(Alert.ACCESS_DENIED)
        assert it.listener.open_connections == 1
        eventually(lambda: it.listener.open_connections == 0)


def test_opaque_denial_is_a_reset() -> None:
    with gate(rules("- tcp: db.example:5432"), port=5432) as it:
        assert_refused(it)
        assert (it.record()["stage"], it.record()["reason"]) == ("tcp", "no_rule")


def test_connection_made_straight_to_the_gate_is_refused() -> None:
    """Else whoever reaches the port has an open proxy, and the gate could be led to dial itself for ever."""
    with gate(A, original_dst=redirected_dst) as it:
        assert_refused(it)
        record = it.record()
        assert record["reason"] == "never_reached"
        assert (record["destination.address"], record["destination.port"]) == it.address


def test_unknown_workload_is_denied() -> None:
    with gate(A, workload="stranger") as it, it.connect() as client:
        client.sendall(hello())
        assert read_all(client) == alert(Alert.ACCESS_DENIED)
        assert (it.record()["reason"], it.record()["workload"]) == ("unknown_workload", "stranger")


def test_audit_mode_lets_pass_and_says_what_it_would_have_done() -> None:
    pol = policy("""
        version: 1
        mode: audit
        workloads: {app: {rules: [{host: a.example}]}}
    """)
    with origin() as upstream, gate(pol, {"b.example": at(upstream.address)}) as it:
        with it.connect() as client:
            client.sendall(hello("b.example"))
            read_exactly(client, 10)
        assert (it.record()["verdict"], it.record()["would_be"]) == ("allow", "deny")


# --- handed over ---


def test_inspected_connection_is_given_away_with_nothing_read() -> None:
    with gate(rules("- host: a.example\n  tls: inspect")) as it, it.connect() as client:
        client.sendall(hello())
        eventually(lambda: it.handed)
        sock, handover = it.handed[0]
        assert sock.recv(65536) == hello()
        assert (handover.workload, handover.host, handover.port, handover.plain) == ("app", NAME, 443, False)
        assert handover.source == client.getsockname()
        assert handover.destination == (str(DESTINATION), 443)
        assert (it.records, it.names.asked) == ([], [])  # the inspector records, and looks up
        sock.sendall(b"from the inspector")
        assert read_exactly(client, 18) == b"from the inspector"
        eventually(lambda: it.listener.open_connections == 0)


def test_plain_request_on_a_plain_port_is_given_away_undecided() -> None:
    with gate(rules("- host: a.example\n  ports: [80]"), port=80) as it, it.connect() as client:
        send_in(client, b"GET /x HTTP/1.1\r\n", 1)
        eventually(lambda: it.handed)
        _, handover = it.handed[0]
        assert (handover.host, handover.port, handover.plain) == (None, 80, True)
        assert it.judged == []


@pytest.mark.parametrize("is_plain", [False, True], ids=["tls", "plain"])
def test_without_an_inspector_nothing_is_let_through(is_plain: bool) -> None:
    pol = rules("- host: a.example\n  ports: [80, 443]\n  tls: inspect")
    with gate(pol, port=80 if is_plain else 443, has_inspector=False) as it, it.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n" if is_plain else hello())
        said = read_all(client)
        assert said.startswith(b"HTTP/1.1 502 ") if is_plain else said == alert(Alert.INTERNAL_ERROR)
        assert it.record()["reason"] == "gate_failed"


# --- a part of the gate fails ---


def test_judge_that_crashes_costs_that_connection_alone() -> None:
    def judge(attempt: Attempt) -> object:
        raise ZeroDivisionError("asked for")

    with origin() as upstream, gate(A, {NAME: at(upstream.address)}, judge=judge) as it:  # type: ignore[arg-type]  # broken
        for _ in range(2):
            with it.connect() as client:
                client.sendall(hello())
                with pytest.raises(ConnectionResetError):
                    read_all(client)
        eventually(lambda: it.reasons() == ["gate_failed"] * 2 and len(it.loop.crashes) == 2)
        assert [type(error) for error in it.loop.crashes] == [ZeroDivisionError] * 2
        assert upstream.heard == []
        eventually(lambda: it.listener.open_connections == 0)


def test_lookup_that_crashes_costs_that_connection_alone() -> None:
    with gate(A) as it:
        it.names.is_cached = False
        it.names.entries = None  # type: ignore[assignment]  # broken
        with it.connect() as client:
            client.sendall(hello())
            with pytest.raises(ConnectionResetError):
                read_all(client)
        eventually(lambda: it.reasons() == ["gate_failed"] and it.loop.crashes)
        assert [type(error) for error in it.loop.crashes] == [TypeError]
