"""Plain requests to an explicit proxy on one connection: each for its own host and port, all by one sender."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest

from addons.credential import seal
from tests.proxy.inspecting import HOST, POLICY, Reply, Rig, get, read_reply

PORTS = POLICY.replace("ports: [80, 443]", "ports: [80, 443]\n        plain: [8080]")


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def proxied(directory: Path, *, credential: str | None = None) -> Rig:
    sealed = seal(credential.encode()) if credential else None
    return Rig(directory, plain=True, proxied=True, policy=PORTS, credential=sealed)


def ask(sock: socket.socket, url: str, *, host: str | None = None, fields: str = "", method: str = "GET") -> Reply:
    named = host if host is not None else url.partition("://")[2].partition("/")[0]
    sock.sendall(f"{method} {url} HTTP/1.1\r\nHost: {named}\r\n{fields}\r\n".encode())
    return read_reply(sock)[0]


def test_each_request_is_for_the_host_and_port_it_names(tmp_path: Path) -> None:
    with proxied(tmp_path) as gate, gate.connect() as sock:
        for url in (
            f"http://{HOST}/search?q=1",
            f"http://{HOST}/search",
            "http://other.test/",
            f"http://{HOST}:8080/search",
        ):
            assert ask(sock, url).body == b"sunny"
        assert gate.origin.requests == [
            get("/search?q=1"),
            get("/search"),
            get("/", host="other.test"),
            get("/search", host=f"{HOST}:8080"),
        ]
        assert gate.origin.connections == 3
        gate.wait_for(lambda: len(gate.origin._open) == 1)  # the one that is kept for the next request
        assert len(gate.origin._open) == 1
        records = gate.wait_for_records(4)
    assert [(record["server.name"], record["destination.port"]) for record in records] == [
        (HOST, 80),
        (HOST, 80),
        ("other.test", 80),
        (HOST, 8080),
    ]


def test_a_denied_request_leaves_the_connection_to_the_next(tmp_path: Path) -> None:
    with proxied(tmp_path) as gate, gate.connect() as sock:
        assert ask(sock, "http://nowhere.test/").reason == "no_rule"
        assert ask(sock, f"http://{HOST}/forecasts").reason == "no_allow_entry"
        assert ask(sock, f"http://{HOST}:8081/search").reason == "port"
        assert gate.origin.connections == 0
        assert ask(sock, f"http://{HOST}/search").status == 200
        assert ask(sock, "http://nowhere.test/").reason == "no_rule"
        assert ask(sock, f"http://{HOST}/search").status == 200
        assert gate.origin.connections == 1


MALFORMED = [
    ("host-of-another", f"http://{HOST}/search", "other.test"),
    ("port-of-another", f"http://{HOST}/search", f"{HOST}:8080"),
    ("no-port-in-host", f"http://{HOST}:8080/search", HOST),
    ("origin-form", "/search", HOST),
    ("https", f"https://{HOST}/search", HOST),
    ("user", f"http://x@{HOST}/search", HOST),
    ("address", "http://127.0.0.1/search", "127.0.0.1"),
]


@pytest.mark.parametrize(("url", "host"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_a_request_that_two_proxies_may_send_elsewhere_is_refused(tmp_path: Path, url: str, host: str) -> None:
    with proxied(tmp_path) as gate, gate.connect() as sock:
        assert ask(sock, url, host=host).status == 400
        assert gate.origin.connections == 0


def test_every_request_shows_the_credential_that_was_verified(tmp_path: Path) -> None:
    mine = basic("app:secret")
    with proxied(tmp_path, credential=mine) as gate, gate.connect() as sock:
        fields = f"Proxy-Authorization: {mine}\r\nProxy-Connection: keep-alive\r\n"
        for _ in range(2):
            assert ask(sock, f"http://{HOST}/search", fields=fields).status == 200
        assert gate.origin.requests == [get(), get()]


@pytest.mark.parametrize(
    "fields",
    ["", f"Proxy-Authorization: {basic('app:other')}\r\n", f"Proxy-Authorization: {basic('app:secret')}\r\n" * 2],
    ids=["none", "another", "twice"],
)
def test_a_request_of_another_sender_on_the_same_connection_is_refused(tmp_path: Path, fields: str) -> None:
    """A balancer may send requests of several clients over one connection."""
    mine = basic("app:secret")
    with proxied(tmp_path, credential=mine) as gate, gate.connect() as sock:
        first = ask(sock, f"http://{HOST}/search", fields=f"Proxy-Authorization: {mine}\r\n")
        reply = ask(sock, f"http://{HOST}/search", fields=fields)
        assert (first.status, reply.status, reply.reason) == (200, 407, "credentials")
        assert reply.fields["proxy-authenticate"].startswith("Basic realm=")
        assert len(gate.origin.requests) == 1
        assert [record["reason"] for record in gate.wait_for_records(2)] == ["rule", "credentials"]


def test_what_is_for_proxies_is_not_forwarded_on_direct_connections_either(tmp_path: Path) -> None:
    with Rig(tmp_path) as gate:
        fields = "Proxy-Authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\n"
        assert gate.send(get(fields=fields)).status == 200
        assert gate.origin.requests == [get()]
