"""Programs that people use, through `outgate run`: each trusts the gate unasked, and is let through or told why not."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.end_to_end.clients import CURL, JAVA_SOURCE, NODE, REQUESTS, URLLIB
from tests.end_to_end.origin import BANNER, COMMIT, blob
from tests.end_to_end.world import OUTGATE, Command, Ended, Ran, World
from tests.sandbox_user import ORDINARY_UID, as_user

pytestmark = [pytest.mark.kernel, pytest.mark.client]

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: api.example
        name: api
        ports: [80, 443]
        tls: inspect
        allow: ["GET,HEAD /search/**", "GET /bytes/**", "POST /upload", "GET /repo.git/**"]
        deny: ["* /search/secret/**"]
      - {name: cdn, host: "*.cdn.example", ports: [80, 443]}
      - {name: ssh, tcp: "git.example:22"}
"""
API = "https://api.example"
PROBLEM_KEYS = {"type", "title", "status", "detail", "workload", "rule", "reason", "id"}
PROXIES = {"https_proxy": "http://proxy.example:3128", "HTTP_PROXY": "http://proxy.example:3128", "ALL_PROXY": "x"}
SPEAK_FIRST = """
import socket, sys
with socket.create_connection(("git.example", 22), 10) as sock:
    sys.stdout.buffer.write(sock.recv(100))
    sock.sendall(b"hello")
    sys.stdout.buffer.write(sock.recv(100))
"""
UPLOAD = blob(3_000_000)


def urls(client: str) -> list[str]:
    """Allowed, denied, passed undecrypted, unknown."""
    return [
        f"{API}/search/{client}?q=Oslo",
        f"{API}/search/secret/{client}",
        f"https://{client}.cdn.example/any",
        f"https://{client}.unknown.example/",
    ]


def s_client(name: str) -> Command:
    return Command(["openssl", "s_client", "-connect", f"{name}:443", "-servername", name, "-verify_return_error"])


def commands(world: World) -> dict[str, Command]:
    """What is tried, by name; the first word of each is what has to be installed."""
    java = world.file("Fetch.java", JAVA_SOURCE)
    allowed, denied, passed, _ = urls("curl")
    every = {
        "java": Command(["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", str(java), *urls("java")]),
        "urllib": Command([*URLLIB, *urls("urllib")]),
        "requests": Command([*REQUESTS, *urls("requests")]),
        "node": Command([*NODE, *urls("node")]),
        "leaf": Command([*CURL, "-v", allowed]),
        "origin's": Command([*CURL, "-v", passed]),
        "page": Command([*CURL, "-i", "-H", "Accept: text/html,application/xhtml+xml,*/*;q=0.8", f"{denied}/page"]),
        "git": Command(["git", "ls-remote", f"{API}/repo.git"]),
        "git denied": Command(["git", "ls-remote", f"{API}/other.git"], env={"GIT_TERMINAL_PROMPT": "0"}),
        "wget": Command(["wget", "-qO-", f"{API}/bytes/100000"]),
        "openssl inspected": s_client("api.example"),
        "openssl passed": s_client("s.cdn.example"),
        "upload": Command([*CURL, "--data-binary", "@-", f"{API}/upload"], stdin=UPLOAD),
        "plain": Command([
            *CURL, "-w", "\n%{http_code} %{num_connects}\n",
            *(f"http://api.example/search/{path}" for path in ("plain/1", "secret/plain", "plain/2")),
        ]),
        "forty": Command([*CURL, *(f"{API}/search/forty/{number}" for number in range(40))]),
        "speaks first": Command([sys.executable, "-c", SPEAK_FIRST]),
    }  # fmt: skip
    return {name: each for name, each in every.items() if shutil.which(each.argv[0])}


@dataclass(frozen=True, slots=True)
class Tried:
    ended: Mapping[str, Ended]
    ran: Ran

    def __getitem__(self, name: str) -> Ended:
        if name not in self.ended:
            pytest.skip(f"the program of {name} is not installed")
        return self.ended[name]

    def of(self, part: str) -> list[dict[str, Any]]:
        """The records of requests with this in their URL."""
        return [record for record in self.ran.records if part in record.get("url.full", "")]

    def arrived(self, part: str) -> list[dict[str, Any]]:
        return [request for request in self.ran.seen.requests if part in request["target"]]


@pytest.fixture(scope="module")
def tried(world: World) -> Tried:
    """All of them, as the only workload, unnamed, from a shell that has proxy variables of its own."""
    return Tried(*world.run_many(commands(world), policy=POLICY, workload=None, env=PROXIES, timeout_s=120))


@pytest.mark.parametrize("client", ["urllib", "requests", "node"])
def test_a_runtime_reaches_what_is_allowed_and_reads_why_it_was_denied(tried: Tried, client: str) -> None:
    answers: dict[str, Any] = {}
    for line in tried[client].stdout.splitlines():
        answers |= json.loads(line)
    allowed, denied, passed, unknown = (answers[url] for url in urls(client))

    assert (allowed[0], json.loads(allowed[2])["target"]) == (200, f"/search/{client}?q=Oslo")
    assert passed[0] == 200, passed
    assert isinstance(unknown, str)  # an exception: no such name
    assert [request["target"] for request in tried.arrived(client)] == [f"/search/{client}?q=Oslo"]

    status, headers, body = denied
    problem = json.loads(body)
    record = tried.ran.record(id=problem["id"])
    assert (status, headers["content-type"]) == (403, "application/problem+json")
    assert set(problem) == PROBLEM_KEYS
    assert (problem["status"], problem["reason"], problem["workload"]) == (403, "deny_rule", "app")
    assert (record["verdict"], record["reason"], record["rule"]) == ("deny", "deny_rule", problem["rule"])
    assert (record["url.full"], record["http.response.status_code"]) == (f"{API}/search/secret/{client}", 403)
    assert headers["outgate-decision"] == f"deny; reason=deny_rule; id={problem['id']}"


def test_java_reaches_what_is_allowed_and_reads_why_it_was_denied(tried: Tried) -> None:
    lines = [line.split("\t") for line in tried["java"].stdout.decode().splitlines()]

    assert [line[0] for line in lines] == urls("java"), tried["java"].stderr
    allowed, denied, passed, unknown = lines
    assert (allowed[1], passed[1]) == ("200", "200")
    problem = json.loads(base64.b64decode(denied[3]))
    assert (denied[1], set(problem), problem["reason"]) == ("403", PROBLEM_KEYS, "deny_rule")
    assert denied[2] == f"deny; reason=deny_rule; id={problem['id']}"
    assert len(unknown) == 2  # an exception


def test_the_certificate_is_ours_on_inspected_hosts_and_the_origins_on_passthrough(tried: Tried) -> None:
    assert "issuer: O=Outgate; CN=Outgate issuing CA" in tried["leaf"].stderr
    assert "issuer: O=The Origin's Own Authority" in tried["origin's"].stderr


def test_a_passthrough_connection_has_one_record_with_its_bytes(tried: Tried) -> None:
    tried["origin's"]
    record = tried.ran.record(server__name="curl.cdn.example", stage="tls")

    assert (record["verdict"], record["tls.mode"]) == ("allow", "passthrough")
    assert record["bytes.sent"] > 500
    assert record["bytes.received"] > 500
    assert "url.full" not in record


def test_a_browser_gets_a_page_to_read(tried: Tried) -> None:
    head, _, page = tried["page"].stdout.decode().partition("\r\n\r\n")

    assert "HTTP/1.1 403" in head
    assert "content-type: text/html" in head.lower()
    [record] = tried.of("/page")
    assert record["id"] in page
    assert "/search/secret/curl/page" in page


def test_the_name_that_was_judged_is_the_name_that_is_asked_upstream(tried: Tried) -> None:
    tried["leaf"]
    [request] = tried.arrived("/search/curl")

    assert (request["sni"], request["headers"]["Host"]) == ("api.example", "api.example")


def test_git_lists_a_repository_over_https(tried: Tried) -> None:
    assert tried["git"].stdout.decode().split("\n")[:2] == [f"{COMMIT}\tHEAD", f"{COMMIT}\trefs/heads/main"]
    assert {record["verdict"] for record in tried.of("/repo.git")} == {"allow"}


def test_git_is_told_that_a_repository_is_denied(tried: Tried) -> None:
    assert tried["git denied"].status == 128
    assert "403" in tried["git denied"].stderr
    assert tried.arrived("/other.git") == []


def test_wget_downloads_a_file_byte_for_byte(tried: Tried) -> None:
    assert tried["wget"].stdout == blob(100_000), tried["wget"].stderr


@pytest.mark.parametrize(("kind", "issuer"), [("inspected", "Outgate issuing CA"), ("passed", "The Origin's Own")])
def test_openssl_verifies_the_chain_without_being_told(tried: Tried, kind: str, issuer: str) -> None:
    shown = tried[f"openssl {kind}"].stdout.decode()

    assert "Verify return code: 0 (ok)" in shown
    assert re.search(f"issuer=.*{issuer}", shown)


def test_an_upload_arrives_whole(tried: Tried) -> None:
    assert json.loads(tried["upload"].stdout)["length"] == len(UPLOAD)
    [record] = tried.of("/upload")
    assert (record["bytes.sent"], record["http.request.method"]) == (len(UPLOAD), "POST")


def test_plain_http_is_judged_request_by_request_on_one_connection(tried: Tried) -> None:
    lines = tried["plain"].stdout.decode().splitlines()

    assert [line for line in lines if re.fullmatch(r"\d{3} \d", line)] == ["200 1", "403 0", "200 0"]
    assert [record["reason"] for record in tried.of("http://api.example/")] == ["rule", "deny_rule", "rule"]
    assert [request["target"] for request in tried.arrived("/plain")] == ["/search/plain/1", "/search/plain/2"]


def test_forty_requests_over_one_connection_have_forty_records(tried: Tried) -> None:
    tried["forty"]
    records = tried.of("/forty/")

    assert [record["url.full"] for record in records] == [f"{API}/search/forty/{number}" for number in range(40)]
    assert len({record["source.port"] for record in records}) == 1


def test_a_server_that_speaks_first_is_heard_through_a_tcp_rule(tried: Tried) -> None:
    assert tried["speaks first"].stdout == BANNER + b"hello"
    record = tried.ran.record(stage="tcp")
    assert (record["verdict"], record["server.names"]) == ("allow", ["git.example"])


def test_nothing_was_dialled_or_asked_that_the_policy_does_not_name(tried: Tried) -> None:
    """Over all clients together, the proxies of the user's shell included."""
    ports = {packet.rpartition(":")[2] for packet in tried.ran.seen.connections}
    asked = {name.split()[0] for name in tried.ran.seen.asked}

    assert ports <= {"443", "80", "22"}
    assert all(packet.startswith("tcp ") for packet in tried.ran.seen.connections)
    assert {name for name in asked if not name.endswith(".cdn.example")} == {"api.example", "git.example"}


def test_every_request_and_connection_is_counted_at_the_end(tried: Tried) -> None:
    beyond_lookups = [record for record in tried.ran.records if record["stage"] != "dns"]
    allowed = sum(record["verdict"] == "allow" for record in beyond_lookups)

    assert re.search(rf"^outgate: app: {allowed} allowed, \d+ denied$", tried.ran.stderr, re.MULTILINE)


@needs_curl
def test_the_records_of_a_command_that_ends_at_once_are_complete(world: World) -> None:
    """The last answers reach the command before their records reach the log, and the command ends with them."""
    addresses = [f"{API}/search/last/{number}" for number in range(100)]
    ran = world.run(["curl", "-s", "-Z", "--parallel-max", "10", *addresses], policy=POLICY)

    assert ran.status == 0, ran.stderr
    assert sorted(record["url.full"] for record in ran.records if record["stage"] == "http") == sorted(addresses)
    assert "outgate: app: 100 allowed, 0 denied\n" in ran.stderr


@needs_curl
def test_audit_lets_pass_and_says_what_enforcement_would_deny(world: World) -> None:
    script = f"curl -s -o /dev/null {API}/other && curl -s -o /dev/null https://unknown.example/"
    ran = world.run(["sh", "-c", script], policy=POLICY.replace("  app:\n", "  app:\n    mode: audit\n"))
    would_be = {(record["stage"], record["reason"]) for record in ran.records if record.get("would_be") == "deny"}

    assert ran.status == 0, ran.stderr
    assert would_be == {("http", "no_allow_entry"), ("dns", "no_rule"), ("tls", "no_rule")}
    assert "0 allowed, 0 denied, 3 that enforcement would deny" in ran.stderr
    assert ran.stderr.count("- host: unknown.example\n") == 1  # the lookup and the connection need the same line


@needs_curl
def test_a_given_authority_signs_and_its_keys_are_hidden_from_the_command(world: World) -> None:
    pki = world.directory / "pki"
    subprocess.run([str(OUTGATE), "pki", "init", "--pki", str(pki)], check=True, capture_output=True)
    [root] = (pki / "roots").glob("*/ca.crt")
    script = (
        f"curl -s -o /dev/null -w '%{{http_code}}' --cacert {world.file('root.crt', root.read_bytes())} {API}/search"
    )
    ran = world.run(["sh", "-c", f"{script}; find {pki} -type f"], policy=POLICY, options=["--pki", str(pki)])

    assert ran.stdout == b"200"


@needs_curl
def test_proxy_variables_lead_to_the_same_verdicts_without_a_sandbox(world: World) -> None:
    show = "curl -s -o /dev/null -w '%{http_code} ' "
    script = "; ".join(show + url for url in (*urls("advised"), "http://api.example/other")) + "; true"
    ran = world.run(["sh", "-c", script], policy=POLICY, options=["--proxy-env"])

    assert ran.stdout.split() == [b"200", b"403", b"200", b"000", b"403"]
    assert [record["reason"] for record in ran.records] == ["rule", "deny_rule", "rule", "no_rule", "no_allow_entry"]
    assert "advisory" in ran.stderr
    assert {name.split()[0] for name in ran.seen.asked} == {"api.example", "advised.cdn.example"}


@needs_curl
@pytest.mark.skipif("os.geteuid() != 0", reason="only root can become an ordinary user")
def test_an_ordinary_user_gets_the_same(world: World) -> None:
    show = "curl -s -w '%{http_code} ' -o /dev/null "
    script = "id -u; " + "; ".join(show + url for url in urls("user"))
    ran = world.run(["sh", "-c", script], policy=POLICY, before=as_user([]))

    assert ran.stdout.decode().split() == [str(ORDINARY_UID), "200", "403", "200", "000"], ran.stderr
    assert [request["target"] for request in ran.seen.requests] == ["/search/user?q=Oslo", "/any"]
