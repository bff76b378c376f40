"""What is wrong is said in one clear line with the documented status; nothing passes, hangs or shows a traceback."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from policies.hostnames import Hostname
from proxy.wire.dns import encode_name
from tests.end_to_end.clients import CURL
from tests.end_to_end.origin import blob
from tests.end_to_end.world import OUTGATE, Command, Ended, Ran, World
from tests.proxy.hellos import hello
from tests.sandbox_user import UNTIL_SIGNALLED, why_no_sandbox

POLICY = """\
version: 1
workloads:
  app:
    rules:
      - host: api.example
        tls: inspect
        allow:
          - "GET /search/**"
"""
GOOD = {"policy.yaml": POLICY}


def outgate(
    *arguments: str, cwd: Path, stdin: bytes = b"", timeout_s: float = 60
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(OUTGATE), *arguments], cwd=cwd, input=stdin, capture_output=True, timeout=timeout_s)


# --- the command line and the files that it names

TWO = POLICY + "  other: {}\n"
TYPO = POLICY.replace("allow:", "alow:")

REFUSED: dict[str, tuple[Mapping[str, str | bytes], list[str], str]] = {
    "no such policy": ({}, ["-p", "policy.yaml"], r"policy\.yaml.*[Nn]o such file"),
    "a directory as policy": ({}, ["-p", "."], r"\..*[Ii]s a directory"),
    "not UTF-8": ({"policy.yaml": b"\xff\xfe\x00"}, ["-p", "policy.yaml"], r"policy\.yaml:1.*UTF-8"),
    "a key that does not exist": ({"policy.yaml": TYPO}, ["-p", "policy.yaml"], r'policy\.yaml:7:9: .*"alow".*"allow"'),
    "not YAML": ({"policy.yaml": "version: [1"}, ["-p", "policy.yaml"], r"policy\.yaml:2:1: not YAML: "),
    "an unknown workload": (GOOD, ["-p", "policy.yaml", "-w", "ap"], r'unknown workload "ap"; did you mean "app"\?'),
    "a workload to choose": ({"policy.yaml": TWO}, ["-p", "policy.yaml"], r"which workload\? .*app, other"),
    "a log that cannot be written": (GOOD, ["-p", "policy.yaml", "--log", "no/where"], r"--log no/where: No such file"),
    "no roots": (GOOD, ["-p", "policy.yaml", "--upstream-ca", "ca.pem"], r"--upstream-ca ca\.pem: No such file"),
    "bad roots": (GOOD, ["-p", "policy.yaml", "--upstream-ca", "policy.yaml"], r"--upstream-ca policy\.yaml.*PEM"),
    "a host without an address": (GOOD, ["-p", "policy.yaml", "--host", "api.example"], r"write NAME=ADDR"),
    "a host with a name as address": (GOOD, ["-p", "policy.yaml", "--host", "a.example=b"], r'"b" is not an address'),
    "a port too large": (GOOD, ["-p", "policy.yaml", "--host", "a=1.2.3.4:70000"], r'"70000" is not a port'),
    "no authority": (GOOD, ["-p", "policy.yaml", "--pki", "pki"], r"pki.*outgate pki init"),
    "service tags that are none": (GOOD, ["-p", "policy.yaml", "--tags", "policy.yaml"], r"policy\.yaml:.*JSON"),
    "no policy": (GOOD, [], r"Missing option '-p'"),
    "an unknown option": (GOOD, ["-p", "policy.yaml", "--hots", "x"], r"No such option.*--hots"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_the_gate_says_in_a_line_why_it_does_not_start(tmp_path: Path, case: str) -> None:
    files, arguments, said = REFUSED[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    done = outgate("run", *arguments, "--", "touch", str(tmp_path / "ran"), cwd=tmp_path)
    stderr = done.stderr.decode()

    assert (done.returncode, done.stdout) == (125, b""), stderr
    assert re.search(said, stderr), stderr
    assert "Traceback" not in stderr
    if "Usage:" not in stderr:
        assert re.fullmatch(r"outgate: [^\n]+\n", stderr), stderr
    assert not (tmp_path / "ran").exists()


def test_the_only_workload_of_a_policy_is_meant_whoever_it_matches(tmp_path: Path) -> None:
    pods = POLICY.replace("    rules:", "    match: {kubernetes: {namespace: app}}\n    rules:")
    (tmp_path / "policy.yaml").write_text(pods)
    done = outgate("run", "-p", "policy.yaml", "--proxy-env", "--", "true", cwd=tmp_path)

    assert done.returncode == 0, done.stderr


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    assert outgate("pki", "init", "--pki", "pki", cwd=tmp_path).returncode == 0
    for key in (tmp_path / "pki").rglob("*.key"):
        key.chmod(0o644)
    done = outgate("run", "-p", "policy.yaml", "--pki", "pki", "--", "true", cwd=tmp_path)

    assert done.returncode == 125
    assert re.fullmatch(rb"outgate: [^\n]*\.key[^\n]*chmod[^\n]*\n", done.stderr), done.stderr


# --- the exit status and the output of the command


@pytest.fixture(scope="module")
def sandbox() -> None:
    if reason := why_no_sandbox():
        pytest.skip(reason)


STATUSES = {
    "success": (["true"], 0, ""),
    "its own": (["sh", "-c", "exit 3"], 3, ""),
    "not found": (["no-such-program"], 127, "outgate: no-such-program: command not found\n"),
    "not executable": (["/etc/passwd"], 126, "outgate: /etc/passwd: Permission denied\n"),
    "terminated": (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, ""),
    "killed": (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL, ""),
}


@pytest.mark.kernel
@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("case", list(STATUSES))
def test_the_exit_status_is_the_commands(tmp_path: Path, case: str) -> None:
    command, status, said = STATUSES[case]
    (tmp_path / "policy.yaml").write_text(POLICY)
    done = outgate("run", "-p", "policy.yaml", "--", *command, cwd=tmp_path)

    assert (done.returncode, done.stdout, done.stderr.decode()) == (status, b"", said)


@pytest.mark.kernel
@pytest.mark.usefixtures("sandbox")
def test_standard_streams_are_the_commands_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    bytes_ = blob(1_000_000)
    done = outgate(
        "run", "-p", "policy.yaml", "--", "sh", "-c", "cat; printf 'a\\377b' >&2", cwd=tmp_path, stdin=bytes_
    )

    assert done.stdout == bytes_
    assert done.stderr == b"a\xffb"


@pytest.mark.kernel
@pytest.mark.usefixtures("sandbox")
def test_a_signal_to_outgate_reaches_the_command(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    script = f"trap 'echo caught; exit 7' TERM; echo ready; {UNTIL_SIGNALLED}"
    with subprocess.Popen(
        [str(OUTGATE), "run", "-p", "policy.yaml", "--", "sh", "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as started:
        assert started.stdout
        assert started.stdout.readline() == b"ready\n"
        started.terminate()
        out, _ = started.communicate(timeout=30)

    assert (started.returncode, out) == (7, b"caught\n")


@pytest.mark.kernel
@pytest.mark.usefixtures("sandbox")
def test_a_closed_reader_ends_the_command_and_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    shell = f"{OUTGATE} run -p policy.yaml -- sh -c 'yes' | head -1"
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, timeout=60)

    assert done.stdout == b"y\n"
    assert b"Traceback" not in done.stderr


# --- the far end and the near end

FAILING = """\
version: 1
workloads:
  app:
    rules:
      - {host: "*.example", ports: [80, 443, 9443], tls: inspect}
      - {host: "*.test", ports: [443, 9443]}
"""
BAD = {
    "expired": ("https://expired.example/", "upstream_certificate", "certificate has expired"),
    "of another name": ("https://wrong.example/", "upstream_certificate", "hostname mismatch"),
    "of a stranger": ("https://stranger.example/", "upstream_certificate", "unable to get"),
    "refusing": ("https://api.example:9443/", "upstream_refused", "refused"),
    "slow": ("https://silent.example/", "upstream_timeout", "10 s"),
    "cut": ("https://api.example/garbage", "upstream_failed", "cannot be passed on"),
    "no such name": ("https://absent.example/", "name_not_found", "does not exist"),
    "a nameserver that fails": ("https://servfail.example/", "resolver_failed", "SERVFAIL"),
    "a silent nameserver": ("https://mute.example/", "resolver_failed", "did not answer"),
}  # fmt: skip
HALF_HELLO = (
    "import socket; s = socket.create_connection(('1.2.3.4', 443)); s.send(bytes.fromhex('1603010200010001fc0303'))"
)
HALF_BODY = """
import socket, ssl
sock = socket.create_connection(("api.example", 443))
tls = ssl.create_default_context().wrap_socket(sock, server_hostname="api.example")
tls.sendall(b"POST /half HTTP/1.1\\r\\nHost: api.example\\r\\nContent-Length: 1000\\r\\n\\r\\nhalf")
"""
# Everything at once, and gone before anybody answers.
LAST_WORDS = """
import os, socket, sys
hello, query = map(bytes.fromhex, sys.argv[1:])
socks = [socket.create_connection((host, port)) for host, port in (("1.2.3.4", 80), ("1.2.3.5", 443), ("1.2.3.6", 443))]
socks[0].send(b"GET /last HTTP/1.1\\r\\nHost: last.unknown\\r\\n\\r\\n")
socks[1].send(hello)
socks[2].send(b"garbage")
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.sendto(b"x", ("1.2.3.7", 9999))
udp.sendto(query, ("1.2.3.8", 53))
os._exit(5)
"""


@pytest.fixture(scope="module")
def failing(world: World) -> tuple[Mapping[str, Ended], Ran]:
    commands = {
        name: Command([*CURL, "-w", "\n%{http_code} %{time_total}", "--connect-to", "::1.2.3.4:", url])
        for name, (url, _, _) in BAD.items()
    }
    commands["passed refusing"] = Command([*CURL, "--connect-to", "::1.2.3.4:", "https://refusing.test:9443/"])
    commands["passed absent"] = Command([*CURL, "--connect-to", "::1.2.3.4:", "https://absent.test/"])
    commands["half hello"] = Command([sys.executable, "-c", HALF_HELLO])
    commands["half body"] = Command([sys.executable, "-c", HALF_BODY])
    return world.run_many(commands, policy=FAILING)


@pytest.mark.kernel
@pytest.mark.client
@pytest.mark.parametrize("case", list(BAD))
def test_an_upstream_that_cannot_be_had_is_a_502_with_the_reason(
    failing: tuple[Mapping[str, Ended], Ran], case: str
) -> None:
    ended, ran = failing
    _, reason, said = BAD[case]
    body, _, last = ended[case].stdout.decode().rpartition("\n")
    status, took_s = last.split()
    problem = json.loads(body)

    assert (status, problem["status"], problem["reason"]) == ("502", 502, reason)
    assert said.lower() in problem["detail"].lower()
    assert ran.record(id=problem["id"])["reason"] == reason
    assert float(took_s) < 18  # its own deadline is 10 s; the machine may be busy


@pytest.mark.kernel
@pytest.mark.client
def test_a_client_that_stops_in_the_middle_is_recorded_and_holds_nobody_up(
    failing: tuple[Mapping[str, Ended], Ran],
) -> None:
    _, ran = failing

    hello = ran.record(reason="client_gone", stage="tls", destination__address="1.2.3.4")
    assert hello["verdict"] == "deny"
    half = [record for record in ran.records if record.get("url.full", "").endswith("/half")]
    assert [record["reason"] for record in half] == ["client_gone"]


@pytest.mark.kernel
@pytest.mark.client
@pytest.mark.parametrize(("host", "reason"), [("refusing.test", "upstream_refused"), ("absent.test", "name_not_found")])
def test_a_passthrough_that_cannot_be_carried_is_an_alert_and_a_record(
    failing: tuple[Mapping[str, Ended], Ran], host: str, reason: str
) -> None:
    ended, ran = failing

    alert = ended[f"passed {host.partition('.')[0]}"].stderr
    assert re.search("unrecognized name|internal error", alert)
    assert ran.record(stage="tls", server__name=host)["reason"] == reason


@pytest.mark.kernel
def test_the_last_words_of_a_command_are_judged_and_recorded(world: World) -> None:
    question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + encode_name(Hostname("last.unknown")) + b"\0\1\0\1"
    ran = world.run([sys.executable, "-c", LAST_WORDS, hello("last.unknown").hex(), question.hex()], policy=FAILING)
    told = {(record["stage"], record.get("destination.address")): record["reason"] for record in ran.records}

    assert ran.status == 5
    # the inspector starts for this one, and the gate waits a second for it
    assert told.pop(("http", "1.2.3.4")) in ("no_rule", "client_gone")
    assert told == {
        ("tls", "1.2.3.5"): "no_rule",
        ("tcp", "1.2.3.6"): "no_rule",
        ("udp", "1.2.3.7"): "no_rule",
        ("dns", "1.2.3.8"): "no_rule",
    }
    assert ran.seen.packets == []


@pytest.mark.kernel
@pytest.mark.client
def test_a_request_that_the_end_of_the_command_cuts_has_its_record(world: World) -> None:
    """The inspector is still dialling; and a lookup is still waiting for its answer."""
    script = "curl -s --http1.1 -m 2 https://silent.example/cut & curl -s https://mute.test/ & sleep 2.5; exit 4"
    began = time.monotonic()
    ran = world.run(["sh", "-c", script], policy=FAILING)

    assert ran.status == 4
    assert time.monotonic() - began < 20
    assert ran.record(url__full="https://silent.example/cut")["reason"] == "client_gone"
    assert {record["server.name"] for record in ran.records if record["stage"] == "dns"} >= {"mute.test"}
