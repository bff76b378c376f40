"""`outgate relay` as its operator meets it: start, readiness, status, metrics, reload, and every way to be wrong."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from proxy.record import show_peer
from proxy.relays.ntp.server import Drop
from proxy.relays.ntp.source import Failure, SourceState
from tests.end_to_end.service import WAIT_S, eventually
from tests.proxy.commands_of import invoke, start, write
from tests.proxy.nameserver import unused_port
from tests.proxy.relaying import POLICY, RelayProcess, time_server_thread

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """One that is synchronised with a scripted server, under a service manager."""
    directory = tmp_path_factory.mktemp("relay")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, time_server_thread() as server:
        manager.bind(str(directory / "notify"))
        manager.settimeout(WAIT_S)
        environment = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "60000000"}
        with RelayProcess(directory, "--host", f"time.example={show_peer(server)}", env=environment) as it:
            it.hears("outgate: synchronised, policy")
            it.manager = manager
            yield it


def fetch(relay: RelayProcess, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{relay.admin}{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=WAIT_S) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


# --- a relay that works


def test_a_client_is_given_the_time_and_the_answer_is_recorded(relay: RelayProcess) -> None:
    got = eventually(relay.ask, "an answer")
    assert (got.leap, got.stratum) == (0, 3)
    record = eventually(lambda: relay.records(stage="ntp", verdict="allow"), "a record")[0]
    assert (record["workload"], record["reason"]) == ("app", "rule")
    assert record["rule"].endswith("policy.yaml:6 (clock)")
    assert record["policy.generation"] in relay.hears("synchronised, policy (.*)")[1]


def test_a_source_that_is_no_workload_gets_no_answer(relay: RelayProcess) -> None:
    assert relay.ask(source="127.0.0.8") is None
    denied = eventually(lambda: relay.records(verdict="deny"), "a record")[0]
    assert (denied["workload"], denied["reason"]) == ("unknown", "unknown_workload")


def test_it_is_ready_when_it_is_synchronised(relay: RelayProcess) -> None:
    status, text = fetch(relay, "/readyz")
    assert (status, json.loads(text)["ready"]) == (200, True)


def test_status_shows_the_estimate_and_each_server(relay: RelayProcess) -> None:
    shown = invoke("relay", "status", "--admin", relay.admin)
    assert shown.exit_code == 0
    assert shown.stdout.startswith("synchronised\n")
    assert re.search(r"time\.example +127\.0\.0\.1:\d+ +selected +2 ", shown.stdout)
    assert "spare" not in shown.stdout


def test_status_as_json_has_the_keys_that_its_help_names(relay: RelayProcess) -> None:
    shown = invoke("relay", "status", "--admin", relay.admin, "--json")
    page = json.loads(shown.stdout)
    assert (shown.exit_code, page["ready"], page["estimate"]["stratum"]) == (0, True, 3)
    assert abs(page["estimate"]["offset_s"]) < 0.1
    help_text = " ".join(invoke("relay", "status", "--help").stdout.split())
    named = re.search(r"JSON keys: (.*) Example:", help_text)
    assert named
    keys = {*page, *page["estimate"], *page["sources"][0]}
    assert keys == set(re.findall(r"[a-z_]+", named[1]))
    [selected] = [source for source in page["sources"] if source["state"] == "selected"]
    assert selected["polls"] >= 3


def test_every_metric_is_explained_in_the_manual_and_no_other(relay: RelayProcess) -> None:
    text = fetch(relay, "/metrics", Accept="application/openmetrics-text")[1]
    shown = {sample.name for family in parse_openmetrics(text) for sample in family.samples}  # type: ignore[no-untyped-call]  # the library has no types there
    table = (ROOT / "docs" / "ntp.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    assert shown == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    for label in (*SourceState, *Failure, *Drop):
        assert f"`{label}`" in table


def test_metrics_name_no_client_and_no_workload(relay: RelayProcess) -> None:
    relay.ask(source="127.0.0.8")
    text = fetch(relay, "/metrics")[1]
    assert "127.0.0.8" not in text
    assert "app" not in re.findall(r'"([^"]*)"', text)


def test_the_port_cannot_be_taken_twice(relay: RelayProcess) -> None:
    ended = start("relay", "-p", str(relay.policy), "--listen", f"127.0.0.1:{relay.port}")
    assert ended.returncode == 3
    assert ended.stderr == f"outgate: --listen 127.0.0.1:{relay.port}: address already in use\n"


def test_the_service_manager_is_told_that_it_lives_and_when_it_is_ready(relay: RelayProcess) -> None:
    assert relay.manager
    said = [relay.manager.recv(4096).decode() for _ in range(3)]
    assert said[-1].startswith("READY=1\nSTATUS=synchronised, policy ")
    assert "WATCHDOG=1" in said
    assert "STATUS=not synchronised: no server gives the time yet" in said


# --- its life


def test_not_ready_without_a_server_and_says_why(tmp_path: Path) -> None:
    host = f"time.example=127.0.0.1:{unused_port()}"
    with RelayProcess(tmp_path, "--host", host) as relay:
        relay.hears("not synchronised: no server gives the time yet")
        eventually(lambda: "connection refused" in fetch(relay, "/readyz")[1], "the server's fault in /readyz")
        assert fetch(relay, "/readyz")[0] == 503
        got = relay.ask()
        assert got is not None
        assert (got.leap, got.stratum) == (3, 16)
        assert fetch(relay, "/metrics")[0] == 200
        shown = invoke("relay", "status", "--admin", relay.admin)
        assert shown.exit_code == 1
        assert shown.stdout.startswith("not synchronised: no server gives the time yet\n")
        relay.send(signal.SIGTERM)
        assert relay.ends() == 0
        assert relay.records(verdict="allow")  # what was put together is written at the end


@pytest.mark.parametrize("by_signal", [True, False], ids=["SIGHUP", "a changed file"])
def test_a_changed_policy_is_in_force_at_once(tmp_path: Path, by_signal: bool) -> None:
    with time_server_thread() as server, RelayProcess(tmp_path, "--host", f"time.example={show_peer(server)}") as relay:
        assert eventually(relay.ask, "an answer")
        relay.policy.write_text(POLICY.replace("127.0.0.1/32", "127.0.0.5/32"))
        if by_signal:
            relay.send(signal.SIGHUP)
        relay.hears("policy .* is in force")
        assert relay.ask() is None
        assert eventually(lambda: relay.ask(source="127.0.0.5"), "an answer")


def test_a_server_with_nts_that_loses_its_rule_is_told_and_not_asked(tmp_path: Path) -> None:
    with RelayProcess(tmp_path, "--nts", "time.example", "--host", f"time.example=127.0.0.1:{unused_port()}") as relay:
        relay.policy.write_text(POLICY.replace("time.example", "other.example"))
        relay.send(signal.SIGHUP)
        relay.hears("--nts time.example: no ntp rule names it any more")
        assert "time.example" not in fetch(relay, "/metrics")[1]


def test_variables_name_servers_with_nts(tmp_path: Path) -> None:
    variables = {"OUTGATE_NTS": f"time.example:{unused_port()}"}
    with RelayProcess(tmp_path, "--host", "time.example=127.0.0.1", env=variables) as relay:
        eventually(lambda: "no key exchange: connection refused" in fetch(relay, "/readyz")[1], "the server's fault")


def test_a_policy_that_does_not_load_changes_nothing(tmp_path: Path) -> None:
    with time_server_thread() as server, RelayProcess(tmp_path, "--host", f"time.example={show_peer(server)}") as relay:
        relay.policy.write_text("version: 1\nworkload: {}\n")
        relay.send(signal.SIGHUP)
        relay.hears("the policy is not reloaded, .* stays in force")
        assert eventually(relay.ask, "an answer")
        assert "policy.yaml cannot be loaded" in fetch(relay, "/readyz")[1]
        relay.policy.write_text("version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\n")
        relay.send(signal.SIGHUP)
        relay.hears("names no time server")
        assert eventually(relay.ask, "an answer")


def test_rules_that_only_a_gate_serves_are_none_of_its_business(tmp_path: Path) -> None:
    policy = (
        POLICY
        + """\
      - {host: a.example, tls: inspect, allow: ["GET /**"]}
      - udp: {host: media.example, ports: [443], budget: 1MiB/h}
"""
    )
    with RelayProcess(tmp_path, policy=policy) as relay:
        assert eventually(relay.ask, "an answer")


def test_a_reload_of_many_rules_is_read_beside_the_answers(tmp_path: Path) -> None:
    """In a process of its own: whoever reads 100,000 rules answers nobody for seconds."""
    rules = "".join(f"      - host: h{number}.example\n" for number in range(3000))
    with RelayProcess(tmp_path) as relay:
        assert eventually(relay.ask, "an answer")
        relay.policy.write_text(POLICY + rules)
        relay.send(signal.SIGHUP)
        children = Path(f"/proc/{relay.process.pid}/task/{relay.process.pid}/children")
        eventually(lambda: children.read_text().split(), "a process that reads it")
        relay.hears("policy .* is in force")


def test_relay_mode_answers_by_what_was_asked_because_of_the_client(tmp_path: Path) -> None:
    with time_server_thread() as server:
        options = ("--mode", "relay", "-w", "app", "--host", f"time.example={show_peer(server)}")
        with RelayProcess(tmp_path, *options) as relay:
            got = eventually(relay.ask, "an answer")
            assert (got.leap, got.stratum) == (0, 3)


# --- mistakes

WRONG = {
    "no policy": ((), 2, "Missing option '-p'"),
    "no such file": (("-p", "missing.yaml"), 3, "missing.yaml:1:1: cannot be read: No such file or directory"),
    "a listener without a port": (
        ("-p", "p.yaml", "--listen", "127.0.0.1"),
        2,
        '--listen: "127.0.0.1" is not an address with its port; write ADDR:PORT',
    ),
    "a name for a listener": (("-p", "p.yaml", "--listen", "localhost:123"), 2, "is not an address with its port"),
    "a time that is none": (("-p", "p.yaml", "--drain-s", "nan"), 2, '--drain-s: "nan" is not a number of seconds'),
    "an admin that is no address": (("-p", "p.yaml", "--admin", "nowhere"), 2, '--admin: "nowhere" is not'),
    "unknown workload": (("-p", "p.yaml", "-w", "ap"), 2, 'unknown workload "ap"; did you mean "app"?'),
    "a host without address": (("-p", "p.yaml", "--host", "time.example"), 2, "write NAME=ADDRESS"),
    "proof of a server that no rule names": (
        ("-p", "p.yaml", "--nts", "tim.example"),
        2,
        '--nts tim.example: no ntp rule names it; did you mean "time.example"?',
    ),
    "proof of no server": (("-p", "p.yaml", "--nts", "192.0.2.1"), 2, '--nts "192.0.2.1": '),
    "proof at no port": (("-p", "p.yaml", "--nts", "time.example:x"), 2, '"x" is not a port from 1 to 65535'),
    "roots that are not there": (("-p", "p.yaml", "--upstream-ca", "no.pem"), 3, "--upstream-ca no.pem: No such file"),
    "unknown mode": (("-p", "p.yaml", "--mode", "both"), 2, "'both' is not one of 'serve', 'relay'"),
    "an address of another machine": (
        ("-p", "p.yaml", "--listen", "192.0.2.1:10123"),
        3,
        "--listen 192.0.2.1:10123: cannot assign requested address",
    ),
    "a log in no directory": (
        ("-p", "p.yaml", "--listen", "127.0.0.1:0", "--log", "missing/log"),
        3,
        "--log missing/log: No such file or directory",
    ),
    "no time server": (("-p", "none.yaml"), 3, "the policy names no time server; add a rule such as `- ntp: time"),
    "no time server of the workload": (
        ("-p", "p.yaml", "-w", "web"),
        3,
        'workload "web" names no time server; add a rule',
    ),
    "matched by kubernetes": (("-p", "pods.yaml"), 3, "a relay knows sources by their address alone; use match"),
}
FILES = {
    "p.yaml": "version: 1\nworkloads: {app: {rules: [{ntp: time.example}]}, web: {rules: []}}\n",
    "none.yaml": "version: 1\nworkloads: {app: {rules: [{host: a.example}]}}\n",
    "pods.yaml": "version: 1\nworkloads: {app: {match: {kubernetes: {namespace: a}}, rules: [{ntp: time.example}]}}\n",
}


@pytest.mark.parametrize(("arguments", "status", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        write(tmp_path, text, name)
    ended = invoke("relay", *arguments)
    assert ended.exit_code == status
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_status_where_nobody_listens() -> None:
    ended = invoke("relay", "status", "--admin", f"127.0.0.1:{unused_port()}")
    assert ended.exit_code == 3
    assert "connection refused; name the relay's --admin" in ended.stderr


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.0 200 OK\r\n\r\nhello", b'HTTP/1.0 200 OK\r\n\r\n{"ready": true}', b"SSH-2.0-OpenSSH_9.2\r\n", b""],
    ids=["text", "other json", "another protocol", "nothing"],
)
def test_status_where_something_else_listens(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:  # it is closed: the test is over
                    return
                with sock:
                    sock.recv(4096)
                    sock.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        ended = invoke("relay", "status", "--admin", show_peer(listener.getsockname()[:2]))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
    assert ended.exit_code == 3
    assert "name the relay's --admin" in ended.stderr
