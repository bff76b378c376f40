"""The rules of `outgate firewall` in real network namespaces: what workloads try, how it is refused, and what leaves.

The origin's wire shows every packet. `test_serve_modes` has the same rules with a real gate behind them.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from proxy.original_dst import redirected_dst
from tests.end_to_end.firewalled import (
    GATE_PORT,
    GATE_UID,
    IP_RECVORIGDSTADDR,
    IP_TRANSPARENT,
    IPV6_RECVORIGDSTADDR,
    IPV6_TRANSPARENT,
    NEAR4,
    NEAR6,
    ORIGIN4,
    ORIGIN6,
    OTHER4,
    OUT4,
    OUT6,
    PACKET_QDISC_BYPASS,
    PROHIBITED,
    REFUSED,
    SO_MARK,
    SOL_PACKET,
    WAIT_S,
    WORK4,
    WORK6,
    Lab,
    a_gateway,
    a_pod,
    close_for_work,
    family_of,
    ipv4,
    mac_of,
    open_for_work,
    udp,
)  # fmt: skip
from tests.end_to_end.origin import BANNER
from tests.end_to_end.service import eventually
from tests.end_to_end.world import CHECKOUT, OUTGATE
from tests.proxy.kernel_rules import NEEDS_ROOT
from tests.sandbox_user import ORDINARY_UID, as_user

pytestmark = NEEDS_ROOT
FAMILIES = pytest.mark.parametrize("address", [ORIGIN4, ORIGIN6], ids=["IPv4", "IPv6"])
METADATA = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254"]
GATEWAY = ["--mode", "gateway", "--workload-device", "br0", "--upstream-device", "out"]


# --- a gateway --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[Lab]:
    with a_gateway() as lab:
        yield lab


@pytest.fixture
def ruled(gateway: Lab) -> Lab:
    """With the rules of a gateway, and nothing seen yet."""
    gateway.apply("gateway", *GATEWAY)
    gateway.origin.look()
    return gateway


@FAMILIES
def test_every_connection_is_led_to_the_gate_with_its_destination(ruled: Lab, address: str) -> None:
    with ruled.listener("gateway", "::", GATE_PORT) as door:
        for port in (443, 22, 7777):
            with ruled.connect("work", address, port), door.accept()[0] as met:
                assert redirected_dst(met) == (ip_address(address), port)
    assert ruled.origin.look().packets == []


@FAMILIES
def test_without_a_gate_a_connection_is_refused_at_once(ruled: Lab, address: str) -> None:
    assert ruled.refusal_of_tcp("work", address, 443) in REFUSED
    assert ruled.origin.look().packets == []


@FAMILIES
def test_udp_is_refused_at_once(ruled: Lab, address: str) -> None:
    assert [ruled.refusal_of_udp("work", address, port) in PROHIBITED for port in (53, 123, 443, 9999)] == [True] * 4
    assert ruled.origin.look().packets == []
    assert ruled.counted("gateway", "refused") >= 4


@FAMILIES
def test_echo_requests_are_refused(ruled: Lab, address: str) -> None:
    version = 6 if ":" in address else 4
    request, protocol = (b"\x80\0\0\0\0\0\0\0", 58) if version == 6 else (b"\x08\0\xf7\xff\0\0\0\0", 1)
    with ruled.net.open_socket("work", family_of(address), socket.SOCK_RAW, protocol) as sock:
        sock.sendto(request, (address, 0))
    assert ruled.origin.look().packets == []


def anothers(kind: str, rule: str) -> str:
    """A table of another program."""
    return f"table inet agent {{\n chain x {{\n {kind}; policy accept;\n {rule}\n }}\n}}"


@pytest.mark.parametrize("address", METADATA)
def test_metadata_is_refused_before_anything_can_lead_it_elsewhere(ruled: Lab, address: str) -> None:
    """Another program's redirection comes at the usual priority, and an opening of ours is no way there either."""
    family = "ip6" if ":" in address else "ip"
    stolen = f"{family} daddr {address} meta l4proto tcp redirect to :8181"
    ruled.net.rules("gateway", anothers("type nat hook prerouting priority dstnat - 50", stolen))
    nft = ruled.nft("gateway")
    open_for_work(nft, address, "tcp", 80, 60)
    before = ruled.counted("gateway", "never_reached")
    try:
        with ruled.listener("gateway", "::", GATE_PORT) as door, ruled.listener("gateway", "::", 8181) as agent:
            assert ruled.refusal_of_tcp("work", address, 80) in REFUSED
            assert ruled.refusal_of_udp("work", address, 80) in PROHIBITED
            assert select.select([door, agent], [], [], 0)[0] == []
    finally:
        ruled.net.rules("gateway", "delete table inet agent")
        nft.close()
    assert ruled.counted("gateway", "never_reached") >= before + 2
    assert ruled.origin.look().packets == []


def test_only_what_is_redirected_reaches_this_machine(ruled: Lab) -> None:
    """Not the gate's own port, and no other service: those are connections like all others."""
    with ruled.listener("gateway", "::", GATE_PORT) as door, ruled.listener("gateway", "::", 8080) as service:
        for address in (NEAR4, NEAR6):
            assert ruled.refusal_of_tcp("work", address, GATE_PORT) in REFUSED
            with ruled.connect("work", address, 8080), door.accept()[0] as met:
                assert redirected_dst(met) == (ip_address(address), 8080)
        with ruled.datagrams("gateway", "::", 5300) as other:
            assert ruled.refusal_of_udp("work", NEAR4, 5300) in PROHIBITED
            assert select.select([door, service, other], [], [], 0)[0] == []


def test_programs_of_this_machine_reach_the_workload(ruled: Lab) -> None:
    for address in (WORK4, WORK6):
        with ruled.listener("work", "::", 8080) as door, ruled.connect("gateway", address, 8080) as sock:
            with door.accept()[0] as met:
                met.sendall(b"answer")
            assert sock.recv(6) == b"answer"


def test_what_else_this_machine_routes_is_not_touched(ruled: Lab) -> None:
    with ruled.connect("other", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
    with ruled.datagrams("origin", ORIGIN4, 9000) as far, ruled.datagrams("other", OTHER4, 0) as near:
        near.sendto(b"question", (ORIGIN4, 9000))
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert (near.recv(100), peer[0]) == (b"answer", OTHER4)
    assert ruled.counted("gateway", "refused") == 0


# --- what a DNS guard opens ---


@FAMILIES
def test_what_is_opened_is_reached_past_the_gate_and_nothing_beside_it(ruled: Lab, address: str) -> None:
    nft = ruled.nft("gateway")
    open_for_work(nft, address, "tcp", 22, 60)
    with ruled.connect("work", address, 22) as sock:
        assert sock.recv(100) == BANNER
        close_for_work(nft, address, "tcp", 22)
        assert ruled.refusal_of_tcp("work", address, 22) in REFUSED
        sock.sendall(b"still")  # what is established goes on
        assert sock.recv(100)
    assert ruled.refusal_of_tcp("work", address, 5432) in REFUSED
    assert ruled.refusal_of_udp("work", address, 22) in PROHIBITED
    assert ruled.origin.look().packets == [f"tcp {bracketed(address)}:22"]
    nft.close()


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@FAMILIES
def test_what_is_opened_closes_with_its_time(ruled: Lab, address: str) -> None:
    nft = ruled.nft("gateway")
    open_for_work(nft, address, "tcp", 22, 1)
    ruled.connect("work", address, 22).close()
    eventually(lambda: ruled.refusal_of_tcp("work", address, 22) in REFUSED, "it closes")
    nft.close()


@pytest.mark.parametrize("masquerade", [True, False])
@FAMILIES
def test_datagrams_that_are_opened_leave_with_the_source_that_the_flag_says(
    ruled: Lab, address: str, masquerade: bool
) -> None:
    ruled.apply("gateway", *GATEWAY, *([] if masquerade else ["--no-masquerade"]))
    nft = ruled.nft("gateway")
    open_for_work(nft, address, "udp", 9000, 60)
    with ruled.datagrams("origin", address, 9000) as far, ruled.datagrams("work", "::", 0) as near:
        near.sendto(b"question", (mapped(address), 9000))
        message, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert (message, near.recv(100)) == (b"question", b"answer")
    assert (
        peer[0]
        == {(True, False): OUT4, (True, True): OUT6, (False, False): WORK4, (False, True): WORK6}[
            masquerade, ":" in address
        ]
    )
    nft.close()


def mapped(address: str) -> str:
    return address if ":" in address else f"::ffff:{address}"


# --- rules that change, come and go ---


def test_another_application_loses_nothing_and_opens_nothing(ruled: Lab) -> None:
    """A carried flow and one to the gate go on, while forbidden datagrams are tried all the time."""
    nft = ruled.nft("gateway")
    open_for_work(nft, ORIGIN4, "tcp", 22, 600)
    over = threading.Event()

    def try_to_get_out() -> None:
        with ruled.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not over.wait(0.001):
                with contextlib.suppress(OSError):
                    sock.sendto(b"x", (ORIGIN4, 53))

    with (
        ruled.listener("gateway", "::", GATE_PORT) as door,
        ruled.connect("work", ORIGIN4, 22) as carried,
        ruled.connect("work", ORIGIN6, 443) as led,
        door.accept()[0] as met,
    ):
        assert carried.recv(100) == BANNER
        trying = threading.Thread(target=try_to_get_out)
        trying.start()
        try:
            for turn in range(50):
                ruled.apply("gateway", *GATEWAY)
                carried.sendall(b"%d\n" % turn)
                led.sendall(b"%d\n" % turn)
                assert met.recv(100) == b"%d\n" % turn
                assert carried.recv(100)
        finally:
            over.set()
            trying.join(WAIT_S)
    assert set(ruled.origin.look().packets) <= {f"tcp {ORIGIN4}:22"}
    nft.close()


def test_a_connection_from_before_the_rules_ends(ruled: Lab) -> None:
    ruled.firewall("gateway", "remove")
    with ruled.connect("work", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
        ruled.apply("gateway", *GATEWAY)
        sock.sendall(b"more")
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


def test_after_remove_all_is_as_it_was(gateway: Lab) -> None:
    gateway.firewall("gateway", "remove")
    gateway.net.rules("gateway", "table ip theirs {\n chain x {\n type nat hook postrouting priority srcnat;\n }\n}")
    before = gateway.listed("gateway")
    gateway.apply("gateway", *GATEWAY, "--udp-port", "15006")
    assert gateway.refusal_of_tcp("work", ORIGIN4, 22) in REFUSED
    gateway.firewall("gateway", "remove")
    assert gateway.listed("gateway") == before
    with gateway.connect("work", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER


# --- flags ---


def test_ipv6_closed_is_refused_and_ipv4_goes_on(ruled: Lab) -> None:
    ruled.apply("gateway", *GATEWAY, "--ipv6", "closed")
    with ruled.listener("gateway", "::", GATE_PORT) as door:
        assert ruled.refusal_of_tcp("work", ORIGIN6, 443) in REFUSED
        assert ruled.refusal_of_udp("work", ORIGIN6, 443) in PROHIBITED
        with ruled.connect("work", ORIGIN4, 443), door.accept()[0]:
            pass


def test_a_source_outside_the_subnets_is_dropped(ruled: Lab) -> None:
    ruled.apply("gateway", *GATEWAY, "--workload-subnet", f"{WORK4}/32", "--resolver", ORIGIN4)
    with ruled.net.open_socket("work", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for source in ("198.51.100.9", "10.77.1.77"):
            sock.sendto(ipv4(source, ORIGIN4, 17, udp(53)), (ORIGIN4, 0))
        assert ruled.origin.look().packets == []
        assert ruled.counted("gateway", "spoofed") == 2
        sock.sendto(ipv4(WORK4, ORIGIN4, 17, udp(53)), (ORIGIN4, 0))
    assert ruled.origin.look().packets == [f"udp {ORIGIN4}:53"]


@pytest.mark.parametrize("inbound", [False, True])
def test_a_workload_answers_the_outside_where_the_flag_says_so(ruled: Lab, inbound: bool) -> None:
    ruled.apply("gateway", *GATEWAY, *(["--inbound"] if inbound else []))
    outside = ruled.net.open_socket("origin", socket.AF_INET, socket.SOCK_STREAM)
    with ruled.listener("work", "0.0.0.0", 8080) as door, outside as sock:
        sock.settimeout(WAIT_S if inbound else 0.5)
        with contextlib.nullcontext() if inbound else pytest.raises(TimeoutError):
            sock.connect((WORK4, 8080))
            with door.accept()[0] as met:
                met.sendall(b"answer")
            assert sock.recv(6) == b"answer"
    assert ruled.refusal_of_udp("work", ORIGIN4, 9000) in PROHIBITED


@FAMILIES
def test_questions_go_to_the_dns_guard_whomever_they_are_for(ruled: Lab, address: str) -> None:
    ruled.apply("gateway", *GATEWAY, "--dns-port", "15353")
    near_side = NEAR6 if ":" in address else NEAR4
    with ruled.datagrams("gateway", near_side, 15353) as guard, ruled.listener("gateway", "::", 15353) as door:
        for asked in (address, near_side):
            with ruled.datagrams("work", "::", 0) as sock:
                sock.sendto(b"question", (mapped(asked), 53))
                _, peer = guard.recvfrom(100)
                guard.sendto(b"answer", peer)
                assert sock.recvfrom(100)[:2] == (b"answer", (mapped(asked), 53, 0, 0))
            with ruled.connect("work", asked, 53), door.accept()[0]:
                pass
    assert ruled.origin.look().packets == []
    assert ruled.refusal_of_udp("work", near_side, 15353) in PROHIBITED


@FAMILIES
def test_time_is_asked_of_the_relay_whomever_it_is_for(ruled: Lab, address: str) -> None:
    ruled.apply("gateway", *GATEWAY, "--ntp-port", "15123")
    near_side = NEAR6 if ":" in address else NEAR4
    with ruled.datagrams("gateway", near_side, 15123) as relay, ruled.datagrams("work", "::", 123) as sock:
        sock.sendto(b"question", (mapped(address), 123))
        _, peer = relay.recvfrom(100)
        relay.sendto(b"answer", peer)
        assert sock.recvfrom(100)[:2] == (b"answer", (mapped(address), 123, 0, 0))
    assert ruled.origin.look().packets == []


def transparent(lab: Lab, machine: str, address: str, port: int) -> socket.socket:
    """A socket that TPROXY gives datagrams for others, with their destination."""
    sock = lab.net.open_socket(machine, family_of(address), socket.SOCK_DGRAM)
    sock.settimeout(WAIT_S)
    if ":" in address:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVORIGDSTADDR, 1)
    sock.bind((address, port))
    return sock


def received(relay: socket.socket) -> tuple[bytes, tuple[str, int], tuple[str, int]]:
    """A datagram, whom it was for, and whence it came."""
    message, [(_, _, wanted)], _, peer = relay.recvmsg(100, 100)
    (port,) = struct.unpack_from("!H", wanted, 2)
    packed = wanted[8:24] if relay.family == socket.AF_INET6 else wanted[4:8]
    return message, (socket.inet_ntop(relay.family, packed), port), peer[:2]


@FAMILIES
def test_datagrams_are_given_to_the_udp_relay_with_their_destination(ruled: Lab, address: str) -> None:
    ruled.apply("gateway", *GATEWAY, "--udp-port", "15006")
    with bridged_packets_seen(ruled, "0"):
        assert_relayed(ruled, "gateway", "work", address, None)
        with transparent(ruled, "gateway", "::" if ":" in address else "0.0.0.0", 15006):
            assert ruled.refusal_of_udp("work", address, 443) in PROHIBITED
        assert ruled.refusal_of_udp("work", address, 9000) in PROHIBITED  # the relay is gone
    assert ruled.origin.look().packets == []


def test_where_bridges_show_their_packets_to_nft_the_udp_relay_gets_nothing_and_nothing_leaves(ruled: Lab) -> None:
    """The bridge forgets the socket that TPROXY has found."""
    ruled.apply("gateway", *GATEWAY, "--udp-port", "15006")
    with bridged_packets_seen(ruled, "1"), transparent(ruled, "gateway", "0.0.0.0", 15006) as relay:
        with ruled.net.open_socket("work", socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (ORIGIN4, 9000))
        assert ruled.origin.look().packets == []
        assert select.select([relay], [], [], 0)[0] == []


@pytest.mark.parametrize(("value", "is_said"), [("1", True), ("0", False)])
def test_apply_says_where_a_bridge_keeps_datagrams_from_the_relay(ruled: Lab, value: str, is_said: bool) -> None:
    command = [str(OUTGATE), "firewall", "apply", *GATEWAY, "--udp-port", "15006"]
    with bridged_packets_seen(ruled, value):
        done = subprocess.run(ruled.net.inside("gateway", command), capture_output=True, text=True, check=True)

    assert "are in force" in done.stderr
    assert ("net.bridge.bridge-nf-call-iptables=0" in done.stderr) is is_said


@contextlib.contextmanager
def bridged_packets_seen(lab: Lab, value: str) -> Iterator[None]:
    switches = [f"net.bridge.bridge-nf-call-{tables}" for tables in ("iptables", "ip6tables")]
    if not os.path.exists("/proc/sys/net/bridge"):
        if value == "1":
            pytest.skip("this kernel has no br_netfilter")
        switches = []
    try:
        for switch in switches:
            lab.net.run("gateway", ["sysctl", "-qw", f"{switch}={value}"])
        yield
    finally:
        for switch in switches:
            lab.net.run("gateway", ["sysctl", "-qw", f"{switch}=1"])


def assert_relayed(lab: Lab, relay_on: str, workload: str, address: str, uid: int | None) -> None:
    """A datagram comes to the relay, and its answer back as from whom it was for."""
    anywhere = "::" if ":" in address else "0.0.0.0"
    program = (
        "import socket,sys; s = socket.socket(int(sys.argv[1]), socket.SOCK_DGRAM); s.settimeout(20);"
        "s.connect((sys.argv[2], 9000)); s.send(b'question'); print(s.recv(100).decode())"
    )
    line = [sys.executable, "-c", program, str(int(family_of(address))), address]
    with transparent(lab, relay_on, anywhere, 15006) as relay:
        asking = subprocess.Popen(
            lab.net.inside(workload, line if uid is None else as_user(line, uid)), stdout=subprocess.PIPE, text=True
        )
        message, wanted, peer = received(relay)
        assert (message, wanted) == (b"question", (address, 9000))
        with transparent(lab, relay_on, address, 9000) as answering:
            answering.sendto(b"answer", peer)
        assert asking.communicate(timeout=WAIT_S)[0] == "answer\n"


def test_a_gateway_with_one_device_knows_workloads_by_their_source() -> None:
    with a_gateway(one_armed=True) as lab:
        flags = ["--mode", "gateway", "--workload-device", "br0", "--upstream-device", "br0"]
        lab.firewall(
            "gateway", "apply", *flags, "--workload-subnet", "10.77.1.0/24", "--workload-subnet", "fd77:1::/64"
        )
        nft = lab.nft("gateway")
        open_for_work(nft, ORIGIN4, "tcp", 22, 60)
        lab.origin.look()
        with lab.listener("gateway", "::", GATE_PORT) as door:
            for address in (ORIGIN4, ORIGIN6):
                with lab.connect("work", address, 443), door.accept()[0] as met:
                    assert redirected_dst(met) == (ip_address(address), 443)
        assert lab.refusal_of_udp("work", ORIGIN4, 53) in PROHIBITED
        with lab.connect("gateway", ORIGIN4, 22) as own, lab.connect("work", ORIGIN4, 22) as carried:
            assert own.recv(100) == carried.recv(100) == BANNER
        assert set(lab.origin.look().packets) == {f"tcp {ORIGIN4}:22"}
        nft.close()


# --- a docker network ---

DOCKER = """
table ip nat {
    chain PREROUTING {
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local tcp dport 8080 dnat to 10.77.1.2:80
    }
    chain POSTROUTING {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.77.1.0/24 oifname != "br0" masquerade
    }
}
table ip filter {
    chain DOCKER-USER {
        counter return
    }
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        counter jump DOCKER-USER
        oifname "br0" ct state related,established accept
        iifname "br0" oifname != "br0" accept
    }
}
"""


def test_a_docker_networks_own_rules_stay_and_ours_come_first(gateway: Lab) -> None:
    gateway.firewall("gateway", "remove")
    gateway.net.rules("gateway", DOCKER)
    before = uncounted(gateway.listed("gateway"))
    try:
        with gateway.connect("work", ORIGIN4, 22) as sock:
            assert sock.recv(100) == BANNER
        gateway.apply("gateway", "--mode", "bridge", "--workload-device", "br0")
        gateway.origin.look()
        assert gateway.refusal_of_tcp("work", ORIGIN4, 22) in REFUSED
        assert gateway.refusal_of_udp("work", ORIGIN4, 53) in PROHIBITED
        assert gateway.origin.look().packets == []
        door = gateway.listener("gateway", "::", GATE_PORT)
        with door, gateway.connect("work", OUT4, 8080), door.accept()[0] as met:
            assert redirected_dst(met) == (ip_address(OUT4), 8080)
        nft = gateway.nft("gateway")
        open_for_work(nft, ORIGIN4, "tcp", 22, 60)
        with gateway.connect("work", ORIGIN4, 22) as sock:
            assert sock.recv(100) == BANNER
        nft.close()
        gateway.firewall("gateway", "remove")
        assert uncounted(gateway.listed("gateway")) == before
    finally:
        gateway.net.rules("gateway", "delete table ip nat\ndelete table ip filter")


def uncounted(listed: str) -> str:
    return re.sub(r"packets \d+ bytes \d+", "", listed)


# --- a pod ------------------------------------------------------------------------------------------------------------

SIDECAR = ["--mode", "sidecar", "--upstream-device", "eth0"]


@pytest.fixture(scope="module")
def pod() -> Iterator[Lab]:
    with a_pod() as lab:
        yield lab


@pytest.fixture
def beside(pod: Lab) -> Lab:
    """With the rules of a sidecar, and nothing seen yet."""
    pod.apply("pod", *SIDECAR)
    pod.origin.look()
    return pod


def tried(lab: Lab, program: str, uid: int | None = ORDINARY_UID) -> str:
    """What a program prints that runs in the pod as that user; as root with every capability for None."""
    line = [sys.executable, "-c", "import socket, contextlib\n" + program]
    line = line if uid is None else as_user(line, uid)
    done = subprocess.run(lab.net.inside("pod", line), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REACH = """
def reach(address, port, kind):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as sock:
        sock.settimeout({wait} if kind == socket.SOCK_STREAM else 0.2)
        try:
            sock.connect((address, port))
        except OSError as error:
            return error.errno or 0
        for _ in range(100 if kind == socket.SOCK_DGRAM else 0):  # the kernel sends no more than one error a second
            try:
                sock.send(b"x")
                sock.recv(1)
            except TimeoutError:
                continue
            except OSError as error:
                return error.errno or 0
        return 0
print(*(reach(address, {port}, kind) for address in {addresses} for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)))
"""


def refusals(lab: Lab, port: int, *addresses: str, uid: int | None = ORDINARY_UID) -> list[int]:
    """For each address the error of TCP, then that of UDP."""
    program = REACH.format(wait=WAIT_S, port=port, addresses=addresses)
    return list(map(int, tried(lab, program, uid).split()))


def assert_refused(errors: list[int]) -> None:
    assert [error in REFUSED for error in errors[::2]] == [True] * (len(errors) // 2), errors
    assert [error in PROHIBITED for error in errors[1::2]] == [True] * (len(errors) // 2), errors


def test_a_pod_gets_nothing_out_and_is_told_at_once(beside: Lab) -> None:
    """Root too, as which many a container runs."""
    for uid in (ORDINARY_UID, None):
        for port in (443, 53):
            assert_refused(refusals(beside, port, ORIGIN4, ORIGIN6, uid=uid))
    assert beside.origin.look().packets == []


def test_metadata_is_refused_to_a_pod_before_anything_can_lead_it_elsewhere(beside: Lab) -> None:
    stolen = "meta l4proto { tcp, udp } redirect to :8181"
    beside.net.rules("pod", anothers("type nat hook output priority -150", stolen))
    try:
        with beside.listener("pod", "::", 8181) as agent, beside.listener("pod", "::", GATE_PORT) as door:
            assert_refused(refusals(beside, 80, *METADATA))
            assert select.select([agent, door], [], [], 0)[0] == []
    finally:
        beside.net.rules("pod", "delete table inet agent")
    assert beside.counted("pod", "never_reached") >= 2 * len(METADATA)


@FAMILIES
def test_a_pods_connections_are_led_to_the_gate_with_their_destination(beside: Lab, address: str) -> None:
    door = beside.listener("pod", "::1" if ":" in address else "127.0.0.1", GATE_PORT)
    with door, beside.connect("pod", address, 443), door.accept()[0] as met:
        assert redirected_dst(met) == (ip_address(address), 443)


def test_a_neighbour_does_not_reach_the_gates_ports(beside: Lab) -> None:
    beside.apply("pod", *SIDECAR, "--udp-port", "15006", "--ntp-port", "15123", "--dns-port", "15353")
    with beside.listener("pod", "::", GATE_PORT) as door, beside.datagrams("pod", "::", 15006) as relay:
        for address in (WORK4, WORK6):
            with beside.net.open_socket("router", family_of(address), socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (address, 15006))
            with beside.net.open_socket("router", family_of(address), socket.SOCK_STREAM) as sock:
                sock.settimeout(0.3)
                with pytest.raises(OSError):  # noqa: PT011 - refused or unanswered
                    sock.connect((address, GATE_PORT))
        assert select.select([door, relay], [], [], 0)[0] == []


def frame_for_the_origin(lab: Lab, device: str, source: str) -> bytes:
    there = mac_of(lab, "router", "in") if device == "eth0" else bytes(6)
    return there + mac_of(lab, "pod", device) + b"\x08\x00" + ipv4(source, ORIGIN4, 17, udp(9000))


def frames(lab: Lab, *, device: str = "eth0", bypass: bool = False, mark: int = 0, source: str = WORK4) -> None:
    """Root of the pod puts a datagram for the origin onto a device by a packet socket."""
    frame = frame_for_the_origin(lab, device, source)
    tried(
        lab,
        f"""
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock, contextlib.suppress(OSError):
    sock.setsockopt({SOL_PACKET}, {PACKET_QDISC_BYPASS}, {int(bypass)})
    sock.setsockopt(socket.SOL_SOCKET, {SO_MARK}, {mark})
    sock.bind(("{device}", 0))
    sock.send(bytes.fromhex("{frame.hex()}"))
""",
        uid=None,
    )


@pytest.mark.parametrize("bypass", [False, True], ids=["queued", "past the queue"])
@pytest.mark.parametrize("mark", [0, 0x80])
def test_frames_of_packet_sockets_do_not_leave_a_pod(beside: Lab, bypass: bool, mark: int) -> None:
    frames(beside, bypass=bypass, mark=mark)
    assert beside.origin.look().packets == []
    beside.firewall("pod", "remove")
    frames(beside, bypass=bypass, mark=mark)
    assert beside.origin.look().packets == [f"udp {ORIGIN4}:9000"]  # so the rules it was


@pytest.mark.parametrize("capabilities", ["-all,+net_raw", "-all"])
def test_an_xdp_socket_passes_every_rule_so_that_net_raw_must_be_dropped(beside: Lab, capabilities: str) -> None:
    """The kernel shows its frames to no hook. What the page says of the limits of a sidecar is about this."""
    frame = frame_for_the_origin(beside, "eth0", WORK4).hex()
    line = [sys.executable, str(CHECKOUT / "tests" / "end_to_end" / "inside_xdp.py"), "eth0", frame]
    line = ["setpriv", "--bounding-set", capabilities, *line]
    done = subprocess.run(beside.net.inside("pod", line), capture_output=True, text=True, timeout=60)
    if "not supported" in done.stderr:
        pytest.skip("this kernel has no AF_XDP")
    if capabilities == "-all":
        assert done.stderr == "socket: Operation not permitted\n"
        assert beside.origin.look().packets == []
    else:
        assert done.stdout == "sent\n", done.stderr
        assert beside.origin.look().packets == [f"udp {ORIGIN4}:9000"]


def test_a_frame_on_lo_is_not_routed_out_of_a_pod(beside: Lab) -> None:
    for key in ("all.rp_filter=0", "lo.rp_filter=0", "lo.route_localnet=1", "all.accept_local=1", "lo.forwarding=1"):
        beside.net.run("pod", ["sysctl", "-qw", f"net.ipv4.conf.{key}"])
    frames(beside, device="lo", source="10.9.9.9")
    assert beside.origin.look().packets == []
    beside.firewall("pod", "remove")
    frames(beside, device="lo", source="10.9.9.9")
    assert beside.origin.look().packets == [f"udp {ORIGIN4}:9000"]


def test_raw_packets_and_marks_are_no_way_out_of_a_pod(beside: Lab) -> None:
    """Root with every capability: a whole packet of its own, and the mark of the UDP relay on a datagram."""
    beside.apply("pod", *SIDECAR, "--udp-port", "15006")
    packet = ipv4(WORK4, ORIGIN4, 17, udp(9000)).hex()
    program = f"""
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock, contextlib.suppress(OSError):
    sock.setsockopt(socket.SOL_SOCKET, {SO_MARK}, 0x80)
    sock.sendto(bytes.fromhex("{packet}"), ("{ORIGIN4}", 0))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
    sock.setsockopt(socket.SOL_SOCKET, {SO_MARK}, 0x80)
    sock.sendto(b"x", ("{ORIGIN4}", 9000))
"""
    tried(beside, program, uid=None)
    beside.net.run("pod", ["ip", "rule", "del", "fwmark", "0x80/0x80"])
    tried(beside, program, uid=None)
    assert beside.origin.look().packets == []


def test_a_segment_forged_into_the_gates_connection_stays(beside: Lab) -> None:
    """Its connection has the mark of the gate's; its socket is not the gate's."""
    tried(
        beside,
        f"""
import os, struct
gate = socket.socket()
os.setresuid(-1, {GATE_UID}, -1)
gate = socket.socket()
gate.connect(("{ORIGIN4}", 22))
os.setresuid(-1, 0, -1)
body = struct.pack("!HHIIBBHHH", gate.getsockname()[1], 22, 1, 1, 5 << 4, 0x10, 1024, 0, 0)
with socket.socket(socket.AF_INET, socket.SOCK_RAW, 6) as raw, contextlib.suppress(OSError):
    raw.sendto(body + b"secret", ("{ORIGIN4}", 22))
""",
        uid=None,
    )
    assert beside.counted("pod", "refused") >= 1


@FAMILIES
def test_a_pods_datagrams_are_given_to_the_udp_relay_with_their_destination(beside: Lab, address: str) -> None:
    beside.apply("pod", *SIDECAR, "--udp-port", "15006")
    assert_relayed(beside, "pod", "pod", address, ORDINARY_UID)
    with transparent(beside, "pod", "::" if ":" in address else "0.0.0.0", 15006):
        assert refusals(beside, 443, address)[1] in PROHIBITED
    family = ["-6"] if ":" in address else []
    beside.net.run("pod", ["ip", *family, "rule", "del", "fwmark", "0x80/0x80"])
    with beside.net.open_socket("pod", family_of(address), socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(b"x", (address, 9000))
    assert beside.origin.look().packets == []


@FAMILIES
def test_a_pods_questions_and_its_time_are_the_relays(beside: Lab, address: str) -> None:
    beside.apply("pod", *SIDECAR, "--dns-port", "15353", "--ntp-port", "15123")
    own = "::1" if ":" in address else "127.0.0.1"
    for asked, door in ((53, 15353), (123, 15123)):
        with (
            beside.datagrams("pod", own, door) as relay,
            beside.net.open_socket("pod", family_of(address), socket.SOCK_DGRAM) as sock,
        ):
            sock.settimeout(WAIT_S)
            sock.sendto(b"question", (address, asked))
            _, peer = relay.recvfrom(100)
            relay.sendto(b"answer", peer)
            assert sock.recvfrom(100)[1][:2] == (address, asked)
    assert beside.origin.look().packets == []


def test_what_is_excluded_is_reached_past_the_gate_and_still_not_by_frames(beside: Lab) -> None:
    beside.apply("pod", *SIDECAR, "--exclude", f"{ORIGIN4}/32", "--exclude-port", "5432")
    with beside.connect("pod", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
    beside.connect("pod", ORIGIN6, 5432).close()
    frames(beside)
    assert set(beside.origin.look().packets) == {f"tcp {ORIGIN4}:22", f"tcp [{ORIGIN6}]:5432"}
    assert_refused(refusals(beside, 443, ORIGIN6))


def test_ipv6_closed_is_refused_to_a_pod(beside: Lab) -> None:
    beside.apply("pod", *SIDECAR, "--ipv6", "closed")
    with beside.listener("pod", "::", GATE_PORT) as door:
        assert_refused(refusals(beside, 443, ORIGIN6))
        with beside.connect("pod", ORIGIN4, 443), door.accept()[0]:
            pass


def test_after_remove_a_pod_is_as_it_was(pod: Lab) -> None:
    pod.firewall("pod", "remove")
    before = pod.listed("pod")
    pod.apply("pod", *SIDECAR, "--udp-port", "15006")
    pod.firewall("pod", "remove")
    assert pod.listed("pod") == before
    with pod.connect("pod", ORIGIN4, 22) as sock:
        assert sock.recv(100) == BANNER
