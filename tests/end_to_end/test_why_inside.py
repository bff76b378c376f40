"""`outgate why` inside the sandbox knows policy and workload, and never disagrees with what the gate does."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.end_to_end.clients import CURL
from tests.end_to_end.world import OUTGATE, Ran, World

pytestmark = [pytest.mark.kernel, pytest.mark.client]

POLICY = """\
version: 1
guard:
  - {host: "*.paste.example", deny: all}
workloads:
  app:
    rules:
      - host: api.example
        ports: [80, 443, 8443]
        tls: inspect
        allow:
          - "GET,HEAD /search/**"
          - "POST /upload"
        deny:
          - "* /search/secret/**"
      - host: "*.cdn.example"
        ports: [443, 8443]
      - host: closed.cdn.example
        deny: all
      - host: web.example
        ports: 8080
        plain: [8080]
      - {host: slash.example, tls: inspect, encodedSlash: literal, allow: ["GET /*/c"]}
      - {host: old.example, until: 2026-01-31}
      - tcp: git.example:22
      - tcp: 93.184.216.0/24:5432
      - dns: "*.lookup.example"
  other:
    rules:
      - host: unknown.example
"""

ATTEMPTS = [
    "GET https://api.example/search",
    "GET https://api.example/search/",
    "GET https://api.example/search/a%20b?q=1",
    "HEAD https://api.example/search/x",
    "POST https://api.example/search/x",
    "POST https://api.example/upload",
    "GET https://api.example/search/secret",
    "GET https://api.example/search/SeCret/x",
    "GET https://api.example/search/secrets",
    "GET https://api.example/search/..%2fsecret",
    "GET https://api.example/search/%2e%2e/x",
    "GET https://api.example/search//x",
    "GET https://api.example/",
    "GET https://api.example:8443/search/port",
    "GET http://api.example/search/plain",
    "GET http://api.example/other",
    "GET https://one.cdn.example/whatever",
    "GET https://one.cdn.example:8443/whatever",
    "GET https://cdn.example/",
    "GET https://closed.cdn.example/",
    "GET http://one.cdn.example/",
    "GET http://web.example:8080/x",
    "GET https://web.example/",
    "GET https://slash.example/a%2Fb/c",
    "GET https://slash.example/a/b/c",
    "GET https://old.example/",
    "GET https://unknown.example/",
    "GET https://x.paste.example/",
    "GET https://93.184.216.34/",
    "GET https://x.lookup.example/",
    "tcp://git.example:22",
    "tcp://93.184.216.34:5432",
    "tcp://unknown.example:22",
    "tcp://93.184.217.1:5432",
    "tcp://169.254.169.254:5432",
    "dns://x.lookup.example",
    "dns://lookup.example",
    "dns://unknown.example",
    "dns://api.example",
]

# Tries each attempt for real, then asks `outgate why` about it, bare. JSON: words to [went through, why's answer].
DRIVER = """
import json, os, socket, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from click.testing import CliRunner
from proxy.cli import outgate
curl = json.loads(sys.argv[1])

def went_through(words):
    method, _, url = words.rpartition(" ")
    if method:
        verb = ["--head"] if method == "HEAD" else ["-X", method]
        command = [*curl, "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", *verb, url]
        done = subprocess.run(command, capture_output=True)
        return done.stdout == b"200"
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    try:
        if scheme == "dns":
            return bool(socket.getaddrinfo(rest, 443))
        with socket.create_connection((host, int(port)), 10) as sock:
            return sock.recv(100).startswith(b"SSH")
    except OSError:
        return False

def ask(words):
    done = CliRunner().invoke(outgate, ["why", "--json", words])
    return [done.exit_code, done.stdout]

os.chdir("/")
words = json.load(sys.stdin)
with ThreadPoolExecutor(4) as pool:
    went = list(pool.map(went_through, words))
asked = list(map(ask, words))
print(json.dumps({one: [a, *b] for one, a, b in zip(words, went, asked)}))
"""


@dataclass(frozen=True, slots=True)
class Compared:
    """What happened to each attempt: whether it went through, and the exit code and JSON of `why`."""

    went: dict[str, bool]
    codes: dict[str, int]
    why: dict[str, dict[str, Any]]
    ran: Ran


@pytest.fixture(scope="module")
def compared(world: World) -> Compared:
    ran = world.run(
        [sys.executable, "-c", DRIVER, json.dumps(CURL)],
        policy=POLICY,
        stdin=json.dumps(ATTEMPTS).encode(),
    )
    assert ran.status == 0, ran.stderr
    said = json.loads(ran.stdout)
    return Compared(
        {words: one[0] for words, one in said.items()},
        {words: one[1] for words, one in said.items()},
        {words: json.loads(one[2]) for words, one in said.items()},
        ran,
    )


@pytest.mark.parametrize("words", ATTEMPTS)
def test_why_gives_the_verdict_that_the_gate_gave(compared: Compared, words: str) -> None:
    why = compared.why[words]

    assert (why["verdict"] == "allow") is compared.went[words]
    assert compared.codes[words] == (0 if compared.went[words] else 1)
    assert why["workload"] == "app"


def test_the_command_itself_says_it_to_a_person(world: World) -> None:
    ran = world.run([str(OUTGATE), "why", "GET", "https://api.example/search/secret"], policy=POLICY)

    assert ran.status == 1
    assert ran.stdout.decode().startswith("DENY  GET https://api.example/search/secret\n")
    assert ran.stderr == ""


def test_why_inside_reads_the_same_service_tags(world: World) -> None:
    tag = {"name": "Storage", "id": "Storage", "properties": {"addressPrefixes": ["20.60.0.0/16"]}}
    tags = world.file("tags.json", json.dumps({"changeNumber": 1, "cloud": "Public", "values": [tag]}))
    policy = "version: 1\nworkloads: {app: {rules: [{tcp: {tag: Storage, ports: 5432}}]}}\n"
    command = ["sh", "-c", f"cd /; {OUTGATE} why tcp://20.60.1.1:5432 | head -1"]
    ran = world.run(command, policy=policy, options=["--tags", str(tags)])

    assert ran.stdout == b"ALLOW  tcp://20.60.1.1:5432\n", ran.stderr


def test_the_table_has_both_answers(compared: Compared) -> None:
    """Else a gate that lets nothing through would agree with a `why` that denies everything."""
    assert 12 <= sum(compared.went.values()) <= len(ATTEMPTS) - 12


@pytest.mark.parametrize("words", [words for words in ATTEMPTS if " https://api.example/" in words])
def test_the_reason_of_a_request_is_the_same_in_the_log(compared: Compared, words: str) -> None:
    method, _, url = words.partition(" ")
    path = url.partition("?")[0]
    records = [
        record
        for record in compared.ran.records
        if record.get("http.request.method") == method and record.get("url.full", "").partition("?")[0] == path
    ]

    assert [record["reason"] for record in records] == [compared.why[words]["reason"]]
    rule = compared.why[words]["rule"]
    assert rule is None or records[0]["rule"].startswith(f"{rule['file']}:{rule['line']} ")


# --- what the closing summary says to paste


def paste(policy: str, stderr: str) -> str:
    """`policy` with every addition made that the summary proposes, as a person would make it."""
    lines = policy.splitlines()
    proposed = re.findall(
        r"^      to allow it, add to (\S+)[^\n]*?:(\d+)\b[^\n]*\n((?:          [^\n]*\n)+)", stderr, re.MULTILINE
    )
    for key, line, text in sorted(proposed, key=lambda each: -int(each[1])):
        at = int(line) - 1
        indent = 6
        if key == "allow:":
            at = next(i for i in range(at, len(lines)) if lines[i].strip() == "allow:") + 1
            indent = 10
        new = [" " * indent + each[10:] for each in text.splitlines()]
        if lines[at : at + len(new)] != new:
            lines[at:at] = new
    return "\n".join(lines) + "\n"


SMALL = """\
version: 1
workloads:
  app:
    rules:
      - host: api.example
        tls: inspect
        allow:
          - "GET /search/**"
"""


def test_pasting_what_the_summary_says_makes_the_same_command_succeed(world: World) -> None:
    command = [
        "sh", "-c",
        "for url in https://api.example/other https://new.example/page http://plain.example/; do"
        " curl -sf -o /dev/null $url || bad=1; done; exit ${bad:-0}",
    ]  # fmt: skip
    policy, runs = SMALL, []
    for _ in range(4):  # a refused lookup hides what would be refused after it
        runs.append(world.run(command, policy=policy))
        if runs[-1].status == 0:
            break
        policy = paste(policy, runs[-1].stderr)

    assert runs[0].status == 1
    assert "outgate: app: 0 allowed, 3 denied" in runs[0].stderr
    assert runs[-1].status == 0, f"{policy}\n{runs[-1].stderr}"
    assert re.search(r"^outgate: app: 3 allowed, 0 denied$", runs[-1].stderr, re.MULTILINE)
