"""`outgate serve` carries `udp:` rules behind real rules of the kernel: a gateway, a pod, and ports that forward.

What leaves is seen on a wire to the origin; real clients (dig, openssl) go through it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from proxy.verify.packets import quic_initial
from tests.end_to_end.firewalled import (
    NEAR4,
    ORIGIN4,
    ORIGIN6,
    PROHIBITED,
    WAIT_S,
    WORK4,
    Lab,
    a_gateway,
    a_pod,
    family_of,
)
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import eventually
from tests.end_to_end.udp_servers import udp_server
from tests.end_to_end.world import OUTGATE
from tests.proxy.nameserver import address as a_record
from tests.proxy.nameserver import reply as dns_reply
from tests.sandbox_user import as_user

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "dig", "openssl", "setpriv")
    ),
]

GATE_UID = 1337
RELAY_PORT, DNS_PORT = 15006, 15053
RULES = f"""
    rules:
      - name: by-name
        udp: {{host: echo.example, ports: 9000, budget: 10MiB/h}}
      - name: by-address
        udp: {{address: [{ORIGIN4}, "{ORIGIN6}"], ports: [9001, 5300, 4433]}}
      - name: little
        udp: {{address: [{ORIGIN4}, "{ORIGIN6}"], ports: 9002, budget: 1000B/h}}
"""
POLICY = f"""
version: 1
workloads:
  app:
    match: {{address: [10.77.1.0/24, "fd77:1::/64"]}}{RULES}"""
CAPABILITIES = "+net_raw,+net_bind_service"
RANDOM = bytes(range(64))
FAMILIES = pytest.mark.parametrize("address", [ORIGIN4, ORIGIN6], ids=["IPv4", "IPv6"])
HOSTS = ["--host", f"echo.example={ORIGIN4}", "--host", f"echo.example={ORIGIN6}"]


def echo(message: bytes) -> bytes:
    return b"echo of " + message


def with_capabilities(command: list[str], capabilities: str) -> list[str]:
    """Run it as the gate's uid, with nothing else."""
    drop = ["--reuid", str(GATE_UID), "--regid", str(GATE_UID), "--clear-groups"]
    caps = [f"--{kind}-caps=-all{',' if capabilities else ''}{capabilities}" for kind in ("inh", "ambient")]
    return as_user(["setpriv", *drop, *caps, *command], 0)


def serving(lab: Lab, directory: Path, machine: str, *options: str, capabilities: str = "") -> Placed:
    command = [str(OUTGATE), "serve", "-p", "policy.yaml", "--log", "decisions.jsonl", "--admin", "none", *options]
    return Placed(directory, lab.net.inside(machine, with_capabilities(command, capabilities)))


def directory_of(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory, policy: str) -> Path:
    import tempfile

    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-udp-")))
    directory.chmod(0o777)
    (directory / "policy.yaml").write_text(policy)
    return directory


# --- a gateway -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[Lab]:
    with a_gateway() as lab:
        lab.apply(
            "gateway", "--mode gateway --workload-device br0 --upstream-device out", f"--udp-port {RELAY_PORT}",
            f"--dns-port {DNS_PORT}",
        )  # fmt: skip
        closed_to_nft(lab)
        yield lab


def closed_to_nft(lab: Lab) -> None:
    """Bridges do not show their packets to nft: TPROXY needs it (docs/firewall.md)."""
    if Path("/proc/sys/net/bridge").exists():
        for tables in ("iptables", "ip6tables"):
            lab.net.run("gateway", ["sysctl", "-qw", f"net.bridge.bridge-nf-call-{tables}=0"])


@pytest.fixture(scope="module")
def served(gateway: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Placed]:
    """By a gate without any privilege but the two that the page names, with two workers."""
    with ExitStack() as stack:
        directory = directory_of(stack, tmp_path_factory, POLICY)
        doors = ["--udp-listen", f"[::]:{RELAY_PORT}", "--dns-listen", f"[::]:{DNS_PORT}", "--udp-idle-s", "1"]
        it = serving(gateway, directory, "gateway", "--workers", "2", *doors, *HOSTS, capabilities=CAPABILITIES)
        yield stack.enter_context(it)


def ask(lab: Lab, machine: str, address: str, port: int, message: bytes, *, uid: int | None = None) -> bytes:
    """What is answered; the socket is connected, so only the address that was asked is heard."""
    program = (
        "import socket,sys; s = socket.socket(int(sys.argv[1]), socket.SOCK_DGRAM); s.settimeout(20);"
        "s.connect((sys.argv[2], int(sys.argv[3]))); s.send(bytes.fromhex(sys.argv[4]));"
        "sys.stdout.buffer.write(s.recv(65536))"
    )
    line = [sys.executable, "-c", program, str(int(family_of(address))), address, str(port), message.hex()]
    line = line if uid is None else as_user(line, uid)
    done = subprocess.run(lab.net.inside(machine, line), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def look_up(lab: Lab, name: str) -> str:
    line = ["dig", "+short", "+tries=1", "+time=15", f"@{NEAR4}", name]
    return subprocess.run(lab.net.inside("work", line), capture_output=True, text=True, timeout=60).stdout


@FAMILIES
def test_a_rule_about_addresses_carries_to_the_address_that_was_asked(
    gateway: Lab, served: Placed, address: str
) -> None:
    gateway.origin.look()
    with udp_server(gateway.net, "origin", address, 9001, echo) as heard:
        assert ask(gateway, "work", address, 9001, b"question") == b"echo of question"
    assert heard.messages == [b"question"]
    [record] = eventually(
        lambda: served.records(**{"destination.port": 9001, "destination.address": address}), "a record"
    )
    assert (record["workload"], record["verdict"], record["stage"]) == ("app", "allow", "udp")
    assert (record["bytes.sent"], record["bytes.received"], record["udp.datagrams.sent"]) == (8, 16, 1)
    assert record["rule"].endswith("(by-address)")
    shown = f"[{address}]" if ":" in address else address
    assert gateway.origin.look().packets == [f"udp {shown}:9001"]


@FAMILIES
def test_a_rule_by_name_carries_what_was_looked_up_to_what_the_gate_resolves(
    gateway: Lab, served: Placed, address: str
) -> None:
    look_up(gateway, "echo.example")
    subprocess.run(gateway.net.inside("work", ["dig", "+tries=1", f"@{NEAR4}", "AAAA", "echo.example"]), check=True)
    with (
        udp_server(gateway.net, "origin", ORIGIN4, 9000, echo) as heard4,
        udp_server(gateway.net, "origin", ORIGIN6, 9000, echo) as heard6,
    ):
        assert ask(gateway, "work", address, 9000, b"name") == b"echo of name"
    assert heard4.messages + heard6.messages == [b"name"]
    [record] = eventually(
        lambda: served.records(**{"destination.port": 9000, "destination.address": address}), "a record"
    )
    assert (record["server.names"], record["verdict"]) == (["echo.example"], "allow")


@pytest.mark.parametrize("size", [0, 1400, 9000, 60_000])
def test_datagrams_of_every_size_arrive_whole(gateway: Lab, served: Placed, size: int) -> None:
    with udp_server(gateway.net, "origin", ORIGIN4, 9001, lambda message: message) as heard:
        assert ask(gateway, "work", ORIGIN4, 9001, bytes(size)) == bytes(size)
    assert heard.messages == [bytes(size)]


@FAMILIES
def test_what_is_denied_sends_nothing_and_looks_nothing_up(gateway: Lab, served: Placed, address: str) -> None:
    gateway.origin.look()
    with gateway.net.open_socket("work", family_of(address), socket.SOCK_DGRAM) as sock:
        for _ in range(50):
            sock.sendto(b"x", (address, 9999))
        [record] = eventually(
            lambda: served.records(**{"destination.port": 9999, "destination.address": address}), "a record"
        )
    assert (record["verdict"], record["reason"], record["source.address"].startswith(("10.77", "fd77"))) == (
        "deny", "port", True,
    )  # fmt: skip
    assert gateway.origin.look().packets == []


def test_quic_is_refused_by_the_kernel_at_once(gateway: Lab, served: Placed) -> None:
    assert gateway.refusal_of_udp("work", ORIGIN4, 443) in PROHIBITED


def test_a_datagram_sent_to_the_relay_itself_goes_nowhere(gateway: Lab, served: Placed) -> None:
    """From a machine whose packets no rule leads: it would be a relay for everybody."""
    gateway.origin.look()
    with gateway.net.open_socket("other", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("10.78.0.1", RELAY_PORT))
        [record] = eventually(lambda: served.records(**{"destination.port": RELAY_PORT}), "a record")
    assert (record["verdict"], record["reason"]) == ("deny", "never_reached")
    assert gateway.origin.look().packets == []


def test_a_third_partys_datagram_does_not_reach_the_workload(gateway: Lab, served: Placed) -> None:
    with (
        gateway.net.open_socket("origin", socket.AF_INET, socket.SOCK_DGRAM) as server,
        gateway.net.open_socket("origin", socket.AF_INET, socket.SOCK_DGRAM) as third,
        gateway.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((ORIGIN4, 9001))
        server.settimeout(WAIT_S)
        client.settimeout(WAIT_S)
        client.sendto(b"x", (ORIGIN4, 9001))
        _, upstream = server.recvfrom(100)
        third.sendto(b"forged", upstream)
        server.sendto(b"true", upstream)
        assert client.recvfrom(100) == (b"true", (ORIGIN4, 9001))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)


def test_the_headers_of_a_workloads_packets_stay_behind(gateway: Lab, served: Placed) -> None:
    """TTL and DSCP are the gate's own, whatever the workload writes there."""
    with (
        gateway.net.open_socket("origin", socket.AF_INET, socket.SOCK_DGRAM) as server,
        gateway.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((ORIGIN4, 9001))
        server.settimeout(WAIT_S)
        for option in (socket.IP_RECVTOS, 12):  # 12: IP_RECVTTL
            server.setsockopt(socket.IPPROTO_IP, option, 1)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 77)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
        client.sendto(b"x", (ORIGIN4, 9001))
        _, ancillary, _, _ = server.recvmsg(100, 100)
    seen = {kind: content[0] for _, kind, content in ancillary}
    assert (seen[socket.IP_TOS], seen[socket.IP_TTL]) == (0, 64)


def test_no_new_budget_comes_of_other_ports_or_a_reload(gateway: Lab, served: Placed) -> None:
    import signal

    with udp_server(gateway.net, "origin", ORIGIN4, 9002, lambda message: None) as heard:
        for round_ in range(4):
            with gateway.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(bytes(700), (ORIGIN4, 9002))
                eventually(lambda: len(heard.messages) + len(served.records(reason="budget")) >= 1, f"round {round_}")
            if round_ == 1:
                served.policy.write_text(POLICY + "      - dns: more.example\n")
                served.send(signal.SIGHUP)
        eventually(lambda: served.records(reason="budget"), "the budget is used up")
        assert len(heard.messages) == 1


def test_dig_asks_a_name_server_on_another_port(gateway: Lab, served: Placed) -> None:
    def answer(message: bytes) -> bytes:
        return dns_reply(message, [a_record("what.example", "198.51.100.9")])

    with udp_server(gateway.net, "origin", ORIGIN4, 5300, answer):
        line = ["dig", "+notcp", "+short", "+time=15", "+tries=1", "-p", "5300", f"@{ORIGIN4}", "what.example"]
        done = subprocess.run(gateway.net.inside("work", line), capture_output=True, text=True, timeout=60)
    assert done.stdout == "198.51.100.9\n", done.stderr


def test_openssl_speaks_dtls_through_it(gateway: Lab, served: Placed, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=dtls", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    serve = ["openssl", "s_server", "-dtls", "-accept", f"{ORIGIN4}:4433", "-key", str(key), "-cert", str(cert)]
    server = subprocess.Popen(
        gateway.net.inside("origin", serve), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert server.stdout
        assert server.stdin
        while b"ACCEPT" not in server.stdout.readline():
            pass
        line = ["openssl", "s_client", "-dtls", "-connect", f"{ORIGIN4}:4433", "-quiet"]
        client = subprocess.Popen(
            gateway.net.inside("work", line), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert client.stdin
        assert client.stdout
        client.stdin.write(b"from the workload\n")
        client.stdin.flush()
        while b"from the workload" not in server.stdout.readline():
            pass
        server.stdin.write(b"from the origin\n")
        server.stdin.flush()
        assert client.stdout.readline() == b"from the origin\n"
        client.kill()
        client.communicate()
    finally:
        server.kill()
        server.communicate()


def test_quic_goes_to_the_name_that_it_shows_and_nothing_of_another_leaves(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    policy = POLICY.partition("    rules:")[0] + "    rules: [{udp: {host: echo.example, ports: 443, quic: sni}}]\n"
    with ExitStack() as stack:
        lab = stack.enter_context(a_gateway())
        lab.apply(
            "gateway", f"--mode gateway --workload-device br0 --upstream-device out --udp-port {RELAY_PORT} --quic"
        )
        closed_to_nft(lab)
        directory = directory_of(stack, tmp_path_factory, policy)
        doors = ["--udp-listen", f"[::]:{RELAY_PORT}", "--udp-idle-s", "1"]
        it = stack.enter_context(serving(lab, directory, "gateway", *doors, *HOSTS[:2], capabilities=CAPABILITIES))
        lab.origin.look()
        with udp_server(lab.net, "origin", ORIGIN4, 443, echo) as heard:
            for asked in ("203.0.113.7", "2001:db8:77::7"):  # where the client believes the name to be
                assert ask(lab, "work", asked, 443, quic_initial("echo.example", RANDOM)).startswith(b"echo of ")
            with lab.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(quic_initial("other.example", RANDOM), (ORIGIN4, 443))
                [denied] = eventually(lambda: it.records(verdict="deny"), "the denial")
        assert (denied["reason"], denied["server.name"]) == ("no_rule", "other.example")
        assert [len(message) for message in heard.messages] == [1200, 1200]
        assert lab.origin.look().packets == [f"udp {ORIGIN4}:443"] * 2


# --- what it needs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", ["", "+net_raw", "+net_bind_service"])
def test_without_its_capabilities_it_does_not_start_and_says_so(
    gateway: Lab, tmp_path_factory: pytest.TempPathFactory, capabilities: str
) -> None:
    with ExitStack() as stack:
        directory = directory_of(stack, tmp_path_factory, POLICY)
        command = [str(OUTGATE), "serve", "-p", "policy.yaml", "--admin", "none", "--listen", "127.0.0.1:0"]
        command += ["--udp-listen", "[::]:15010"]
        line = gateway.net.inside("gateway", with_capabilities(command, capabilities))
        done = subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("outgate: --udp-listen [::]:15010: ")
    assert done.stderr.endswith(
        "; answers leave from the address that was asked: give the gate CAP_NET_RAW and CAP_NET_BIND_SERVICE\n"
    )
    assert done.stderr.count("\n") == 1


# --- a pod -----------------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_pods_datagrams_are_carried_by_the_gate_beside_it(
    address: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ExitStack() as stack:
        lab = stack.enter_context(a_pod())
        lab.apply("pod", f"--mode sidecar --upstream-device eth0 --udp-port {RELAY_PORT}")
        policy = "version: 1\nworkloads:\n  app:" + RULES
        directory = directory_of(stack, tmp_path_factory, policy)
        doors = ["--mode", "sidecar", "-w", "app", "--udp-listen", f"[::]:{RELAY_PORT}", "--udp-idle-s", "1"]
        it = stack.enter_context(serving(lab, directory, "pod", *doors, capabilities=CAPABILITIES))
        lab.origin.look()
        with udp_server(lab.net, "origin", address, 9001, echo) as heard:
            assert ask(lab, "pod", address, 9001, b"question", uid=4242) == b"echo of question"
        assert heard.messages == [b"question"]
        with lab.net.open_socket("pod", family_of(address), socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (address, 9999))
            eventually(lambda: it.records(reason="port"), "the denial")
        shown = f"[{address}]" if ":" in address else address
        assert lab.origin.look().packets == [f"udp {shown}:9001"]
        [record] = eventually(lambda: it.records(verdict="allow"), "the record")
        assert record["source.address"] in (WORK4, "fd77:1::2")


# --- ports that forward ----------------------------------------------------------------------------------------------


def test_a_port_that_forwards_needs_no_privilege(gateway: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    with ExitStack() as stack:
        directory = directory_of(stack, tmp_path_factory, POLICY)
        forwards = ["--udp-forward", f"0.0.0.0:7001={ORIGIN4}:9001", "--udp-forward", f"0.0.0.0:7002={ORIGIN4}:9999"]
        words = ["--mode", "proxy", "-w", "app", *forwards, "--proxy-listen", "127.0.0.1:0", "--udp-idle-s", "1"]
        it = stack.enter_context(serving(gateway, directory, "gateway", *words))
        gateway.origin.look()
        with udp_server(gateway.net, "origin", ORIGIN4, 9001, echo):
            assert ask(gateway, "other", "10.78.0.1", 7001, b"question") == b"echo of question"
        with gateway.net.open_socket("other", socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.78.0.1", 7002))
            [denied] = eventually(lambda: it.records(verdict="deny"), "the denial")
        assert (denied["reason"], denied["destination.address"], denied["destination.port"]) == ("port", ORIGIN4, 9999)
        assert gateway.origin.look().packets == [f"udp {ORIGIN4}:9001"]
