"""`outgate status`: what a health check is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.proxy.commands_of import invoke


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def page(*because: str, notes: tuple[str, ...] = ()) -> bytes:
    return json.dumps({"ready": not because, "because": because, "notes": notes}).encode()


def test_a_ready_gate_is_ready_and_its_notes_are_shown() -> None:
    with answering(200, page(notes=("team-b.yaml was refused",))) as admin:
        found = invoke("status", "--admin", admin)
    assert found.exit_code == 0
    assert [line.strip() for line in found.output.splitlines()] == ["ready", "team-b.yaml was refused"]


def test_a_gate_that_is_not_ready_says_why() -> None:
    with answering(503, page("no policy", "1 of 2 workers")) as admin:
        found = invoke("status", "--admin", admin)
        as_json = invoke("status", "--admin", admin, "--json")
    assert (found.exit_code, found.output) == (1, "not ready: no policy; 1 of 2 workers\n")
    assert json.loads(as_json.output) == {"ready": False, "because": ["no policy", "1 of 2 workers"], "notes": []}


def test_the_variable_of_the_gate_names_its_admin_port_and_every_address_is_the_loopback_one() -> None:
    with answering(200, page()) as admin:
        port = admin.rpartition(":")[2]
        assert invoke("status", env={"OUTGATE_ADMIN": f"0.0.0.0:{port}"}).exit_code == 0


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"ready": true}', b"null"], ids=str)
def test_what_is_no_gate_is_never_taken_for_one_that_is_ready(body: bytes) -> None:
    with answering(200, body) as admin:
        found = invoke("status", "--admin", admin)
    assert found.exit_code == 3
    assert "what answers there is no gate" in found.output


def test_where_nobody_listens_it_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = invoke("status", "--admin", f"127.0.0.1:{taken.getsockname()[1]}")
    assert found.exit_code == 3
    assert "connection refused; name the gate's --admin" in found.output


def test_an_address_that_is_none_is_misuse() -> None:
    assert invoke("status", "--admin", "somewhere").exit_code == 2
