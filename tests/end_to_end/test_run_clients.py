"""Programs that people use, through `outgate run`: each trusts the gate unasked, is let through, and is told why not."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tests.end_to_end.clients import CURL, JAVA_SOURCE, NODE, REQUESTS, URLLIB
from tests.end_to_end.origin import BANNER, COMMIT, blob
from tests.end_to_end.world import Ran, World
from tests.sandbox_user import ORDINARY_UID, as_user

pytestmark = [pytest.mark.kernel, pytest.mark.client]

POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: api.example
        name: api
        ports: [80, 443]
        tls: inspect
        allow: ["GET,HEAD /search/**", "GET /bytes/**", "POST /upload", "GET /repo.git/**", "GET /cut", "GET /garbage"]
        deny: ["* /search/secret/**"]
      - {name: cdn, host: "*.cdn.example", ports: [80, 443]}
      - {name: ssh, tcp: "git.example:22"}
"""
ALLOWED = "https://api.example/search?q=Oslo"
DENIED = "https://api.example/search/secret"
PASSED = "https://one.cdn.example/anything"
UNKNOWN = "https://unknown.example/"
PROBLEM_KEYS = {"type", "title", "status", "detail", "workload", "rule", "reason", "id"}


def installed(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def expect_denial(answer: tuple[int, Mapping[str, str], str], ran: Ran, *, reason: str, status: int = 403) -> None:
    """problem+json with every key, and the id that the log has."""
    got, headers, body = answer
    problem = json.loads(body)
    assert (got, headers["content-type"]) == (status, "application/problem+json")
    assert set(problem) == PROBLEM_KEYS
    record = ran.record(id=problem["id"])
    assert (problem["status"], problem["reason"], problem["workload"]) == (status, reason, "app")
    assert (record["verdict"], record["reason"], record["rule"]) == ("deny", reason, problem["rule"])
    assert record["http.response.status_code"] == status
    assert headers["outgate-decision"] == f"deny; reason={reason}; id={problem['id']}"


def expect_only(ran: Ran, *destinations: str) -> None:
    """These addresses and ports were dialled, and nothing else."""
    assert set(ran.seen.connections) == set(destinations)


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(URLLIB, id="urllib"),
        pytest.param(REQUESTS, id="requests"),
        pytest.param(NODE, id="node-fetch", marks=installed("node")),
    ],
)
def test_a_runtime_reaches_what_is_allowed_and_reads_why_it_was_denied(world: World, client: list[str]) -> None:
    ran = world.run([*client, ALLOWED, DENIED, PASSED, UNKNOWN], policy=POLICY)
    answers: dict[str, Any] = {}
    for line in ran.stdout.splitlines():
        answers |= json.loads(line)

    assert ran.status == 0, ran.stderr
    status, _, body = answers[ALLOWED]
    assert (status, json.loads(body)["target"]) == (200, "/search?q=Oslo")
    expect_denial(answers[DENIED], ran, reason="deny_rule")
    assert answers[PASSED][0] == 200
    assert isinstance(answers[UNKNOWN], str)  # no such name
    assert [request["target"] for request in ran.seen.requests] == ["/search?q=Oslo", "/anything"]
    assert {name.split()[0] for name in ran.seen.asked} == {"api.example", "one.cdn.example"}


@installed("java")
def test_java_reaches_what_is_allowed_and_reads_why_it_was_denied(world: World) -> None:
    source = world.file("Fetch.java", JAVA_SOURCE)
    ran = world.run(["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", str(source), ALLOWED, DENIED, PASSED, UNKNOWN], policy=POLICY)
    lines = [line.split("\t") for line in ran.stdout.decode().splitlines()]

    assert [line[0] for line in lines] == [ALLOWED, DENIED, PASSED, UNKNOWN], ran.stderr
    allowed, denied, passed, unknown = lines
    assert (allowed[1], passed[1]) == ("200", "200")
    problem = json.loads(base64.b64decode(denied[3]))
    assert (denied[1], set(problem), problem["reason"]) == ("403", PROBLEM_KEYS, "deny_rule")
    assert denied[2].endswith(f"id={problem['id']}")
    assert len(unknown) == 2  # an exception


@installed("curl")
def test_curl_sees_our_leaf_on_inspected_hosts_and_the_origins_on_passthrough(world: World) -> None:
    ran = world.run(["sh", "-c", f"curl -sv -o /dev/null {ALLOWED}; curl -sv -o /dev/null {PASSED}"], policy=POLICY)

    issuers = re.findall(r"issuer: (.*)", ran.stderr)
    assert len(issuers) == 2
    assert "Outgate issuing CA" in issuers[0]
    assert "The Origin's Own Authority" in issuers[1]
    assert ran.record(stage="http")["url.full"].startswith("https://api.example/search?q=~")
    passed = ran.record(stage="tls", verdict="allow")
    assert (passed["tls.mode"], passed["server.name"]) == ("passthrough", "one.cdn.example")
    assert passed["bytes.sent"] > 500
    assert passed["bytes.received"] > 500


@installed("curl")
def test_a_browser_gets_a_page_to_read(world: World) -> None:
    accept = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"
    ran = world.run([*CURL, "-i", "-H", accept, DENIED], policy=POLICY)
    head, _, page = ran.stdout.decode().partition("\r\n\r\n")

    assert "HTTP/1.1 403" in head
    assert "content-type: text/html" in head.lower()
    assert ran.record(stage="http")["id"] in page
    assert "/search/secret" in page


@installed("curl")
def test_a_name_that_was_judged_is_the_name_that_is_asked_upstream(world: World) -> None:
    ran = world.run([*CURL, ALLOWED], policy=POLICY)

    [request] = ran.seen.requests
    assert (request["sni"], request["headers"]["Host"]) == ("api.example", "api.example")
    assert ran.seen.connections == ["tcp 93.184.216.34:443"] or len(ran.seen.connections) <= 2  # happy eyeballs


@installed("git")
def test_git_lists_a_repository_over_https(world: World) -> None:
    ran = world.run(["git", "ls-remote", "https://api.example/repo.git"], policy=POLICY, env={"GIT_TERMINAL_PROMPT": "0"})

    assert ran.stdout.decode().split() == [COMMIT, "refs/heads/main"], ran.stderr
    assert all(record["verdict"] == "allow" for record in ran.records)


@installed("git")
def test_git_is_told_that_a_repository_is_denied(world: World) -> None:
    ran = world.run(["git", "ls-remote", "https://api.example/other.git"], policy=POLICY)

    assert ran.status == 128
    assert "403" in ran.stderr
    assert ran.seen.connections == []


@installed("wget")
def test_wget_downloads_a_file_byte_for_byte(world: World) -> None:
    ran = world.run(["wget", "-qO-", "https://api.example/bytes/100000"], policy=POLICY)

    assert ran.stdout == blob(100_000), ran.stderr


@installed("openssl")
@pytest.mark.parametrize(("name", "issuer"), [("api.example", "Outgate issuing CA"), ("one.cdn.example", "The Origin")])
def test_openssl_verifies_the_chain_without_being_told(world: World, name: str, issuer: str) -> None:
    command = ["openssl", "s_client", "-connect", f"{name}:443", "-servername", name, "-verify_return_error"]
    ran = world.run(command, policy=POLICY)

    assert b"Verify return code: 0 (ok)" in ran.stdout, ran.stderr
    assert re.search(rb"issuer=.*" + issuer.encode(), ran.stdout)


@installed("curl")
def test_an_upload_arrives_whole(world: World) -> None:
    body = blob(3_000_000)
    ran = world.run([*CURL, "--data-binary", "@-", "https://api.example/upload"], policy=POLICY, stdin=body)

    assert json.loads(ran.stdout)["length"] == len(body)
    record = ran.record(stage="http")
    assert (record["bytes.sent"], record["http.request.method"]) == (len(body), "POST")


@installed("curl")
def test_plain_http_is_judged_by_path_and_told_why(world: World) -> None:
    """The same rule on port 80; one connection, three requests."""
    url = "http://api.example"
    show = ["-w", "\n%{http_code} %{num_connects}\n"]
    ran = world.run([*CURL, *show, f"{url}/search", f"{url}/search/secret", f"{url}/search/x"], policy=POLICY)
    lines = ran.stdout.decode().splitlines()

    assert [line for line in lines if re.fullmatch(r"\d{3} \d", line)] == ["200 1", "403 0", "200 0"]
    assert [record["reason"] for record in ran.records if record["stage"] == "http"] == ["rule", "deny_rule", "rule"]
    assert [request["sni"] for request in ran.seen.requests] == [None, None]


@installed("curl")
def test_forty_requests_over_one_connection_have_forty_records(world: World) -> None:
    urls = [f"https://api.example/search/{number}" for number in range(40)]
    ran = world.run([*CURL, "-o", "/dev/null", *urls], policy=POLICY)

    https = [record["url.full"] for record in ran.records if record["stage"] == "http"]
    assert https == urls
    assert len({record["source.port"] for record in ran.records if record["stage"] == "http"}) == 1


def test_a_server_that_speaks_first_is_heard_through_a_tcp_rule(world: World) -> None:
    program = """
import socket, sys
with socket.create_connection(("git.example", 22), 10) as sock:
    sys.stdout.buffer.write(sock.recv(100)); sock.sendall(b"hello"); sys.stdout.buffer.write(sock.recv(100))
"""
    ran = world.run([sys.executable, "-c", program], policy=POLICY)

    assert ran.stdout == BANNER + b"hello", ran.stderr
    record = ran.record(stage="tcp")
    assert (record["verdict"], record["server.names"]) == ("allow", ["git.example"])


@pytest.mark.skipif("os.geteuid() != 0", reason="only root can become an ordinary user")
@installed("curl")
def test_an_ordinary_user_gets_the_same(world: World) -> None:
    show = "curl -s -w '%{http_code} ' -o /dev/null"
    script = f"id -u; {show} {ALLOWED}; {show} {DENIED}; {show} {PASSED}; {show} {UNKNOWN} || true"
    ran = world.run(["sh", "-c", script], policy=POLICY, before=as_user([]))

    assert ran.stdout.decode().split() == [str(ORDINARY_UID), "200", "403", "200", "000"], ran.stderr
    assert [request["target"] for request in ran.seen.requests] == ["/search?q=Oslo", "/anything"]


@installed("curl")
def test_the_only_workload_of_a_policy_need_not_be_named(world: World) -> None:
    ran = world.run([*CURL, "-o", "/dev/null", "-w", "%{http_code}", ALLOWED], policy=POLICY, workload=None)

    assert ran.stdout == b"200"


@installed("curl")
def test_a_proxy_of_the_users_shell_is_not_asked(world: World) -> None:
    proxies = {"https_proxy": "http://proxy.example:3128", "HTTP_PROXY": "http://proxy.example:3128", "ALL_PROXY": "x"}
    ran = world.run([*CURL, "-o", "/dev/null", "-w", "%{http_code}", ALLOWED], policy=POLICY, env=proxies)

    assert ran.stdout == b"200"
