"""The admin port tells everybody the little it shows, obeys the token alone, and nobody holds it against others."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxy.service import admin as admin_module
from proxy.service.admin import (
    LIFETIME_S,
    MAX_BODY,
    MAX_CONNECTIONS,
    MAX_LINE,
    OPENMETRICS,
    PROMETHEUS,
    Admin,
    AdminFailed,
    open_admin,
    read_token,
)
from proxy.service.status import ReloadOutcome, ReloadResult
from tests.proxy.gates import PATIENCE_S, eventually

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN = "0123456789abcdef"
LOADED = ReloadResult(ReloadOutcome.LOADED, "0123456789ab")


@dataclass
class Supervisor:
    """A status that says what the test says. `gate` holds back metrics and reloads until it is set."""

    because: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    result: ReloadResult = LOADED
    fault: Exception | None = None
    reloads: int = 0
    pages: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def ready(self) -> list[str]:
        if self.fault:
            raise self.fault
        return self.because

    def notes(self) -> list[str]:
        return self.said

    async def metrics(self, openmetrics: bool) -> bytes:
        self.pages += 1
        await self.gate.wait()
        return b"openmetrics" if openmetrics else b"plain"

    async def reload(self) -> ReloadResult:
        self.reloads += 1
        await self.gate.wait()
        if self.fault:
            raise self.fault
        return self.result


@dataclass
class Port:
    """A running admin port, on a loop and a thread of its own."""

    loop: asyncio.AbstractEventLoop
    admin: Admin
    status: Supervisor
    said: list[str]

    @property
    def address(self) -> tuple[str, int]:
        return self.admin.address

    def ask(self, method: str, path: str, body: bytes = b"", /, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers=headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def reload(self, token: str = TOKEN, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask("POST", "/reload", Authorization=f"Bearer {token}", **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def say(self, data: bytes) -> bytes:
        """Everything that is answered to `data`; empty where the connection is cut."""
        with self.connect() as sock:
            sock.sendall(data)
            return everything(sock)

    def hold(self) -> None:
        self.loop.call_soon_threadsafe(self.status.gate.clear)
        eventually(lambda: not self.status.gate.is_set(), "held")

    def let_go(self) -> None:
        self.loop.call_soon_threadsafe(self.status.gate.set)

    def run[T](self, what: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(PATIENCE_S)


@contextmanager
def port(token_file: Path | None = None, host: str = "127.0.0.1") -> Iterator[Port]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Port:
        status = Supervisor()
        status.gate.set()
        said: list[str] = []
        file = None if token_file is None else str(token_file)
        return Port(loop, await open_admin((host, 0), status, token_file=file, log=said.append), status, said)

    it = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE_S)
    try:
        yield it
        it.run(it.admin.close())
        it.run(nothing_is_left())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()


async def nothing_is_left() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, others


def everything(sock: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionError):
        while data := sock.recv(65536):
            parts.append(data)
    return b"".join(parts)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def it(token_file: Path) -> Iterator[Port]:
    with port(token_file) as running:
        yield running


# --- what everybody may read ---


def test_health_is_told_while_the_loop_turns(it: Port) -> None:
    assert it.ask("GET", "/healthz")[::2] == (200, b"alive\n")


def test_readiness_is_200_or_says_what_is_missing(it: Port) -> None:
    status, headers, page = it.ask("GET", "/readyz")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(page) == {"ready": True, "because": [], "notes": []}

    it.status.because = ["worker 2 is starting"]
    it.status.said = ["the policy files were refused; the former policy is in force"]
    status, _, page = it.ask("GET", "/readyz")
    assert status == 503
    assert json.loads(page) == {"ready": False, "because": it.status.because, "notes": it.status.said}


@pytest.mark.parametrize(
    ("accept", "kind", "page"),
    [
        ("*/*", PROMETHEUS, b"plain"),
        ("text/plain;version=0.0.4", PROMETHEUS, b"plain"),
        ("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.3,*/*;q=0.2", OPENMETRICS, b"openmetrics"),
        ("text/plain; x=application/openmetrics-text", PROMETHEUS, b"plain"),
    ],
    ids=["any", "plain", "as Prometheus asks", "parameter"],
)
def test_metrics_come_in_the_format_that_is_asked_for(it: Port, accept: str, kind: str, page: bytes) -> None:
    status, headers, body = it.ask("GET", "/metrics", Accept=accept)
    assert (status, headers["content-type"], body) == (200, kind, page)


def test_listing_names_every_page(it: Port) -> None:
    status, _, page = it.ask("GET", "/")
    assert status == 200
    for path in ("/healthz", "/readyz", "/metrics", "/reload"):
        assert path.encode() in page


def test_head_is_answered_without_a_body(it: Port) -> None:
    assert it.ask("HEAD", "/healthz")[::2] == (200, b"")


def test_many_who_ask_for_metrics_cost_what_one_does(it: Port) -> None:
    it.hold()
    threads = [threading.Thread(target=it.ask, args=("GET", "/metrics")) for _ in range(20)]
    for thread in threads:
        thread.start()
    eventually(lambda: it.run(connections(it)) == 20, "twenty who wait")
    it.let_go()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert it.status.pages == 1


async def connections(it: Port) -> int:
    return len(it.admin._open)


def test_metrics_that_do_not_come_are_503_and_hold_up_nobody(it: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "METRICS_S", 0.05)
    it.hold()
    status, _, page = it.ask("GET", "/metrics")
    assert (status, page) == (503, b"no metrics within 0.05 s\n")
    assert it.ask("GET", "/healthz")[0] == 200


# --- reload ---


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (LOADED, 200),
        (ReloadResult(ReloadOutcome.UNCHANGED, "0123456789ab"), 200),
        (ReloadResult(ReloadOutcome.REFUSED, "0123456789ab", ("a.yaml:3: unknown key", "b.yaml:1: bad")), 422),
        (ReloadResult(ReloadOutcome.FAILED, "0123456789ab", ("worker 1 did not take it",)), 500),
    ],
    ids=lambda value: value.outcome.value if isinstance(value, ReloadResult) else "",
)
def test_reload_says_what_came_of_it(it: Port, result: ReloadResult, status: int) -> None:
    it.status.result = result
    answered, _, page = it.reload()
    assert answered == status
    assert json.loads(page) == {
        "result": result.outcome.value,
        "generation": "0123456789ab",
        "problems": list(result.problems),
    }
    assert it.status.reloads == 1


def test_reload_that_takes_long_is_202_and_goes_on(it: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "REPLY_S", 0.05)
    it.hold()
    assert it.reload()[0] == 202
    assert it.reload()[::2] == (409, b"another reload is under way\n")
    assert it.status.reloads == 1
    it.let_go()
    eventually(lambda: it.reload()[0] == 200, "a reload after that")


def test_reload_that_fails_is_500_and_one_line_of_log_without_its_text(it: Port) -> None:
    it.status.fault = RuntimeError("a secret")
    status, _, page = it.reload()
    assert status == 500
    assert json.loads(page)["problems"] == ["a part of the gate failed; its log says which"]
    (line,) = it.said
    assert line.startswith("admin: the reload failed: RuntimeError at test_admin.py:")


def test_fault_in_a_page_is_500_and_one_line_of_log_without_its_text(
    it: Port, capfd: pytest.CaptureFixture[str]
) -> None:
    it.status.fault = RuntimeError("a secret")
    status, _, page = it.ask("GET", "/readyz")
    assert (status, page) == (500, b"a part of the gate failed; its log says which\n")
    (line,) = it.said
    assert line.startswith("admin: a request failed: RuntimeError at test_admin.py:")
    assert capfd.readouterr() == ("", "")


# --- who may change ---


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN.upper()}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-Token": TOKEN},
    ],
    ids=["none", "empty", "longer", "shorter", "case", "scheme", "bare", "bytes", "header"],
)
def test_nothing_changes_without_the_token(it: Port, headers: dict[str, str]) -> None:
    status, answered, _ = it.ask("POST", "/reload", **headers)
    assert (status, answered["www-authenticate"]) == (401, "Bearer")
    assert it.status.reloads == 0


def test_token_in_the_address_is_no_token(it: Port) -> None:
    assert it.ask("POST", f"/reload?token={TOKEN}&access_token={TOKEN}")[0] == 401
    assert it.status.reloads == 0


def test_without_a_configured_token_nothing_changes_and_the_answer_says_how_to_configure_one() -> None:
    with port() as it:
        status, _, page = it.reload()
        assert status == 403
        assert b"--admin-token FILE" in page
        assert it.status.reloads == 0
        assert it.ask("GET", "/readyz")[0] == 200


def test_new_token_counts_at_once(it: Port, token_file: Path) -> None:
    token_file.write_text("another-token-0123")
    assert it.reload()[0] == 401
    assert it.reload("another-token-0123")[0] == 200


@pytest.mark.parametrize("harm", [lambda p: p.chmod(0o644), lambda p: p.unlink(), lambda p: p.write_text("short")])
def test_token_file_that_went_bad_closes_the_port_for_changes(it: Port, token_file: Path, harm: object) -> None:
    assert callable(harm)
    harm(token_file)
    for _ in range(3):
        assert it.reload()[::2] == (403, b"the token file cannot be used; the gate's log says why\n")
    assert it.status.reloads == 0
    assert len(it.said) == 1
    assert str(token_file) in it.said[0]


@pytest.mark.parametrize(
    "name",
    [
        "attacker.example",
        "attacker.example:9901",
        "localhost.attacker.example",
        "1.2.3.4.nip.example",
        "",
        "[::1",
        "127.0.0.1@x",
        "a b",
    ],
)
def test_page_in_a_browser_cannot_change_under_a_name_of_its_own(it: Port, name: str) -> None:
    """DNS rebinding: the attacker's name leads to 127.0.0.1, and stands in Host."""
    answer = it.say(
        f"POST /reload HTTP/1.1\r\nHost: {name}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert answer.split()[1] in (b"400", b"403")
    assert it.status.reloads == 0


@pytest.mark.parametrize("name", ["127.0.0.1:9901", "localhost", "LOCALHOST:1", "[::1]:9901", "192.0.2.7"])
def test_address_or_localhost_may_be_asked(it: Port, name: str) -> None:
    assert it.reload(Host=name)[0] == 200


def test_page_in_a_browser_cannot_read_from_loopback_either(it: Port) -> None:
    for path in ("/", "/healthz", "/readyz", "/metrics"):
        assert it.ask("GET", path, Host="attacker.example")[0] == 403


def test_scraper_may_use_a_name_where_the_port_is_not_on_loopback() -> None:
    with port(host="0.0.0.0") as it:
        assert it.ask("GET", "/metrics", Host="outgate.monitoring.example:9901")[0] == 200
        assert it.reload(Host="outgate.monitoring.example:9901")[0] == 403


@pytest.mark.parametrize("origin", ["https://attacker.example", "null", "http://127.0.0.1:9901"])
def test_browser_cannot_change_even_with_the_token(it: Port, origin: str) -> None:
    assert it.reload(Origin=origin)[::2] == (403, b"not from a browser\n")
    assert it.status.reloads == 0


def test_page_gives_no_other_origin_leave_to_read(it: Port) -> None:
    _, headers, _ = it.ask("GET", "/metrics", Origin="https://attacker.example")
    assert not any(name.startswith("access-control") for name in headers)
    assert it.ask("OPTIONS", "/reload", Origin="https://attacker.example")[0] == 405


def test_port_on_every_address_takes_both_families() -> None:
    with port(host="::") as it:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, it.address[1]), timeout=PATIENCE_S) as sock:
                sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert everything(sock).startswith(b"HTTP/1.0 200 ")


# --- the token file ---


def token_of(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "it's a token"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_token_is_one_line(tmp_path: Path) -> None:
    assert read_token(str(token_of(tmp_path, TOKEN + "\r\n"))) == TOKEN


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (TOKEN, 0o640, "mode 0640 shows the token to others; run: chmod 600 "),
        (TOKEN, 0o604, "mode 0604 shows the token to others"),
        (TOKEN[:-1], 0o600, "not one line of 16 to 1024 visible ASCII characters"),
        ("", 0o600, "not one line of 16 to 1024"),
        (TOKEN + "\n" + TOKEN, 0o600, "not one line of 16 to 1024"),
        ("0123456789 abcdef", 0o600, "not one line of 16 to 1024"),
        ("ä" * 20, 0o600, "not one line of 16 to 1024"),
        ("x" * 1025, 0o600, "not one line of 16 to 1024"),
    ],
    ids=["group", "others", "short", "empty", "two lines", "space", "letters", "long"],
)
def test_token_file_that_cannot_be_used_is_named_with_the_repair(
    tmp_path: Path, text: str, mode: int, says: str
) -> None:
    path = token_of(tmp_path, text, mode)
    with pytest.raises(AdminFailed) as refused:
        read_token(str(path))
    assert str(refused.value).startswith(f"{path}: {says}")


@pytest.mark.parametrize("kind", ["absent", "directory", "pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir(mode=0o700)
    if kind == "pipe":
        os.mkfifo(path, 0o600)  # that nobody writes to
    with pytest.raises(AdminFailed, match=f"{kind}: (not a file|No such file|Is a directory)"):
        read_token(str(path))


def test_port_does_not_open_with_a_token_file_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(AdminFailed, match="shows the token to others"), port(token_of(tmp_path, TOKEN, 0o644)):
        pass


def test_address_that_is_taken_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()

        async def open_there() -> None:
            await open_admin(address, Supervisor(), log=print)

        with pytest.raises(AdminFailed) as refused:
            asyncio.run(open_there())
    assert str(refused.value) == (
        f"--admin 127.0.0.1:{address[1]}: address already in use; name another address, or none"
    )


# --- bad requests ---


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/metrics", "GET, HEAD"),
        ("PUT", "/readyz", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("GET", "/reload", "POST"),
        ("HEAD", "/reload", "POST"),
        ("TRACE", "/reload", "POST"),
        ("PATCH", "/reload", "POST"),
    ],
)
def test_other_method_is_405_and_says_which_are_taken(it: Port, method: str, path: str, allow: str) -> None:
    status, headers, _ = it.ask(method, path, Authorization=f"Bearer {TOKEN}")
    assert (status, headers["allow"]) == (405, allow)
    assert it.status.reloads == 0


@pytest.mark.parametrize(
    "path", ["/x", "/metrics/", "//metrics", "/%6detrics%2f", "/reload/../healthz", "/..%2freload"]
)
def test_other_page_is_404(it: Port, path: str) -> None:
    assert it.ask("GET", path)[0] == 404


def test_long_body_is_413(it: Port) -> None:
    assert it.ask("POST", "/reload", b"x" * (MAX_BODY + 1), Authorization=f"Bearer {TOKEN}")[0] == 413
    assert it.ask("POST", "/reload", b"x" * MAX_BODY, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert it.status.reloads == 1


def test_endless_body_is_413_before_it_ends(it: Port) -> None:
    with it.connect() as sock:
        sock.sendall(
            b"POST /reload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + TOKEN.encode()
            + b"\r\nTransfer-Encoding: chunked\r\n\r\n401\r\n" + b"x" * 0x401 + b"\r\n"
        )  # fmt: skip
        assert everything(sock).startswith(b"HTTP/1.1 413 ")
    assert it.status.reloads == 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"x" * MAX_LINE * 2 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 65536 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 100_000,
    ],
    ids=["tls", "smuggling", "two hosts", "nul", "version", "long line", "65,536-byte header", "many headers"],
)
def test_what_is_no_request_is_refused_and_says_nothing_about_us(
    it: Port, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with it.connect() as sock:
        with suppress(ConnectionError):  # refused before it was sent
            sock.sendall(request_bytes)
        answer = everything(sock)
    assert answer == b"" or answer.split()[1] in (b"400", b"403")
    assert b"aiohttp" not in answer
    assert b"Python" not in answer
    assert it.ask("GET", "/healthz")[0] == 200
    assert (it.said, capfd.readouterr()) == ([], ("", ""))


def test_no_answer_names_versions_or_may_be_kept(it: Port) -> None:
    for method, path in (("GET", "/"), ("GET", "/x"), ("PUT", "/"), ("POST", "/reload"), ("GET", "/metrics")):
        _, headers, _ = it.ask(method, path)
        assert (headers["server"], headers["cache-control"]) == ("outgate", "no-store")
        assert headers["connection"] == "close"


def test_nothing_is_logged_about_what_is_served(it: Port, capfd: pytest.CaptureFixture[str]) -> None:
    it.ask("GET", "/healthz")
    it.ask("POST", "/reload")
    assert (it.said, capfd.readouterr()) == ([], ("", ""))


# --- bounds ---


def test_connection_is_over_soon_whatever_it_does(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "LIFETIME_S", 0.2)
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    body = b"POST /reload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 9\r\n\r\n"
    with port(token_file) as it:
        for begun in (b"", b"G", head, body % TOKEN.encode()):
            with it.connect() as sock:
                sock.sendall(begun)
                assert everything(sock) == b""
        assert it.ask("GET", "/healthz")[0] == 200
        assert it.status.reloads == 0
        eventually(lambda: it.run(connections(it)) == 0, "all are over")


def test_slow_heads_on_every_connection_hold_up_no_probe(it: Port) -> None:
    slow = []
    for _ in range(MAX_CONNECTIONS + 20):
        sock = it.connect()
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ")
        slow.append(sock)
    began = time.monotonic()
    assert it.ask("GET", "/healthz")[0] == 200
    assert it.ask("GET", "/metrics")[0] == 200
    assert time.monotonic() - began < LIFETIME_S
    assert it.run(connections(it)) <= MAX_CONNECTIONS
    assert everything(slow[0]) == b""  # the oldest went
    for sock in slow:
        sock.close()


def test_one_connection_carries_one_request(it: Port) -> None:
    once = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert it.say(once * 50).count(b"HTTP/1.1 200 ") == 1


def test_upgrade_is_not_followed(it: Port) -> None:
    answer = it.say(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nxxxx")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_close_ends_those_who_wait(token_file: Path) -> None:
    with port(token_file) as it:
        it.hold()
        idle, asking = it.connect(), it.connect()
        asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: it.status.pages == 1, "metrics are asked for")
        it.run(it.admin.close())
        assert everything(idle) == everything(asking) == b""
        with pytest.raises(ConnectionRefusedError):
            it.connect()
        idle.close()
        asking.close()


def test_status_is_known_without_a_web_server() -> None:
    code = "import sys, proxy.service.status; print('aiohttp' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
