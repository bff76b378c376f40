"""`outgate serve` before a real unbound, asked by a real dig: what a site sees that leads port 53 to the gate."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.placed import Placed
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.world import OUTGATE

SBIN = os.environ.get("PATH", "") + ":/usr/sbin"
UNBOUND = shutil.which("unbound", path=SBIN)
pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(UNBOUND is None, reason="unbound is not installed"),
    pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed"),
]

POLICY = """
version: 1
workloads:
  app:
    rules:
      - host: www.site.example
      - host: many.site.example
      - host: inner.site.example
      - host: short.site.example
      - host: "*.wild.site.example"
"""
ECH_KEYS = "AEX+DQBBpQ=="  # any bytes are keys to who does not use them
ZONE = f"""\
$ORIGIN site.example.
@ 300 IN SOA ns admin 1 3600 600 86400 30
@ 300 IN NS ns
ns 300 IN A 127.0.0.1
www 300 IN CNAME edge
edge 300 IN A 93.184.216.34
edge 300 IN AAAA 2606:2800:220:1::1
edge 300 IN HTTPS 1 . alpn="h3,h2" port="8443" ipv4hint="10.0.0.1" ech="{ECH_KEYS}" ipv6hint="fd00::1"
www 300 IN TXT "out of band"
inner 300 IN A 10.0.0.1
short 5 IN A 93.184.216.35
*.wild 300 IN A 93.184.216.36
""" + "".join(f"many 300 IN A 93.184.{number}.1\n" for number in range(200))


@contextmanager
def unbound(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A name server for site.example, and its port. It logs every question to unbound.log."""
    port = free_port()
    (directory / "site.zone").write_text(ZONE)
    (directory / "unbound.conf").write_text(
        f"""
server:
    interface: 127.0.0.1
    port: {port}
    directory: "{directory}"
    chroot: ""
    username: ""
    pidfile: ""
    use-syslog: no
    logfile: "{directory}/unbound.log"
    log-queries: yes
    do-daemonize: no
    module-config: "iterator"
remote-control:
    control-enable: no
auth-zone:
    name: site.example
    zonefile: "{directory}/site.zone"
    for-downstream: yes
    for-upstream: no
"""
    )
    assert UNBOUND
    process = subprocess.Popen([UNBOUND, "-d", "-c", str(directory / "unbound.conf")], text=True)
    try:
        eventually(lambda: answers(port), "unbound answers")
        yield process, port
    finally:
        process.kill()
        process.wait(WAIT_S)


def free_port() -> int:
    """A port that is free for UDP and TCP, below those that the kernel gives to whoever asks for any."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        ):
            try:
                stream.bind(("127.0.0.1", port))
                datagram.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def gate(directory: Path, upstream: int) -> Iterator[Placed]:
    (directory / "policy.yaml").write_text(POLICY)
    command = [
        str(OUTGATE), "serve", "--listen", "127.0.0.1:0", "--dns-listen", "127.0.0.1:0", "--admin", "none", "-w", "app",
        "-p", "policy.yaml", "--log", "decisions.jsonl", "--nameserver", f"127.0.0.1:{upstream}",
        "--dns-new-names-burst", "4", "--dns-new-names", "0",
    ]  # fmt: skip
    with Placed(directory, command) as placed:
        placed.address = ("127.0.0.1", int(placed.hears(r"serving DNS on .*:(\d+)")[1]))
        yield placed


def dig(gate: Placed, *words: str) -> str:
    line = ["dig", "@127.0.0.1", "-p", str(gate.address[1]), "+tries=1", "+timeout=15", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout


def test_real_answers_are_told_anew(tmp_path: Path) -> None:
    with unbound(tmp_path) as (_, port), gate(tmp_path, port) as placed:
        assert dig(placed, "+short", "wWw.SiTe.example").split() == ["93.184.216.34"]  # its alias is no news
        assert dig(placed, "+short", "www.site.example", "AAAA").split() == ["2606:2800:220:1::1"]
        https = dig(placed, "+short", "www.site.example", "HTTPS")
        assert https.split() == ["1", ".", 'alpn="h2"', "port=8443"]
        assert not any(word in https for word in ("ech", "hint", "h3"))
        many = dig(placed, "+short", "many.site.example").split()  # too many for a datagram: dig comes back over TCP
        assert len(many) == 200
        assert dig(placed, "+short", "inner.site.example") == ""
        assert "status: NOERROR" in dig(placed, "www.site.example", "TXT")
        assert "status: NXDOMAIN" in dig(placed, "ns.site.example")
        log = (tmp_path / "unbound.log").read_text()
        asked = {line.split()[-3] for line in log.splitlines() if line.endswith(" IN")}
        assert asked == {f"{name}.site.example." for name in ("www", "many", "inner")}
        assert "TXT" not in log
        reasons = {"rule", "private_address", "query_type", "no_rule"}
        eventually(lambda: reasons == {record["reason"] for record in placed.records()}, "a record of each")


def test_a_tunnel_below_a_wildcard_ends_with_its_budget(tmp_path: Path) -> None:
    """What iodine sends: data in labels, as much as fits, and types that carry data back."""
    with unbound(tmp_path) as (_, port), gate(tmp_path, port) as placed:
        for number in range(12):
            data = bytes((number,)) * 28
            dig(placed, "+short", f"{data.hex()}.wild.site.example")
            dig(placed, "+short", f"{data.hex()}.{number}.and.so.more.wild.site.example")
            for qtype in ("NULL", "TXT", "SRV", "MX", "CNAME"):
                dig(placed, "+short", f"t{number}.wild.site.example", qtype)
        log = (tmp_path / "unbound.log").read_text()
        out = {line.split()[-3] for line in log.splitlines() if "wild.site.example" in line}
        assert len(out) == 4
        assert not any(".more." in name or name.startswith("t") for name in out)
        refused = eventually(
            lambda: found if len(found := placed.records(reason="lookup_budget")) == 20 else None, "their records"
        )
        assert {record["stage"] for record in refused} == {"dns"}


def test_a_server_that_dies_leaves_what_is_known_and_opens_nothing(tmp_path: Path) -> None:
    with unbound(tmp_path) as (process, port), gate(tmp_path, port) as placed:
        assert dig(placed, "+short", "short.site.example").split() == ["93.184.216.35"]
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
        assert "status: SERVFAIL" in dig(placed, "www.site.example")
        assert "(No Reachable Authority): (resolver_failed, decision " in dig(placed, "www.site.example")
        assert "status: NXDOMAIN" in dig(placed, "evil.example")

        def stale() -> bool:
            """Its five seconds are over when an answer counts for thirty."""
            line = dig(placed, "+noall", "+answer", "short.site.example").split()
            return line[-1] == "93.184.216.35" and int(line[1]) > 5

        assert eventually(stale, "a stale answer")
