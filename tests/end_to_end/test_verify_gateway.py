"""`outgate verify` before an internet that answers everything: with no gate, behind one, and behind one that leaks.

With no gate every row is a leak: that the probes can fail is what makes the rest worth anything.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.documented import GATEWAY, SERVICE, SIDECAR, command
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import Placed, make_authority
from tests.end_to_end.service import WAIT_S
from tests.end_to_end.verifying import SOCKETS, Internet, documented, internet, settle, verified, verify
from tests.end_to_end.world import OUTGATE
from tests.sandbox_user import ORDINARY_UID, as_user

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "unshare")
    ),
]

INSIDE4, INSIDE6, ROUTER4, ROUTER6 = "10.77.1.2", "fd77:1::2", "10.77.1.1", "fd77:1::1"
OUTSIDE4, OUTSIDE6, BEYOND4, BEYOND6 = "10.77.2.1", "fd77:2::1", "10.77.2.2", "fd77:2::2"
RULES = """
    rules:
      - {host: api.example, ports: [80, 443], tls: inspect, allow: ["GET /search/**"]}
      - host: "*.cdn.example"
      - tcp: 203.0.113.10:25
"""
POLICY = f'version: 1\nworkloads:\n  app:\n    match: {{address: [{INSIDE4}/32, "{INSIDE6}/128"]}}{RULES}'
PROXY = {"https_proxy": f"http://{ROUTER4}:3128"}
AS_APP = ("-p", "policy.yaml", "-w", "app")


@contextmanager
def a_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="outgate-verify-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "policy.yaml").write_text(POLICY)
        yield directory


@contextmanager
def attached(manner: str) -> Iterator[tuple[Namespaces, Internet, Path]]:
    """A workload whose first router is the internet itself."""
    with ExitStack() as stack:
        net = stack.enter_context(machines("inside", "internet"))
        net.link("internet", "wire", "inside", "eth0")
        net.address("internet", "wire", f"{ROUTER4}/24", f"{ROUTER6}/64")
        net.address("inside", "eth0", f"{INSIDE4}/24", f"{INSIDE6}/64")
        net.default("inside", ROUTER4, ROUTER6)
        net.run("inside", ["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])
        outside = stack.enter_context(internet(net, marker_from="inside", manner=manner))
        settle(net, "inside")
        yield net, outside, stack.enter_context(a_directory())


@contextmanager
def routed(manner: str) -> Iterator[tuple[Namespaces, Internet, Path]]:
    """A workload, a machine that routes for it, and the internet behind that."""
    with ExitStack() as stack:
        net = stack.enter_context(machines("inside", "router", "internet"))
        net.link("router", "br0", "inside", "eth0")
        net.link("router", "out", "internet", "wire")
        net.address("inside", "eth0", f"{INSIDE4}/24", f"{INSIDE6}/64")
        net.address("router", "br0", f"{ROUTER4}/24", f"{ROUTER6}/64")
        net.address("router", "out", f"{OUTSIDE4}/24", f"{OUTSIDE6}/64")
        net.address("internet", "wire", f"{BEYOND4}/24", f"{BEYOND6}/64")
        net.default("inside", ROUTER4, ROUTER6)
        net.default("router", BEYOND4, BEYOND6)
        net.default("internet", OUTSIDE4, OUTSIDE6)
        net.forward("router")
        net.run("inside", ["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])
        outside = stack.enter_context(internet(net, marker_from="router", manner=manner))
        settle(net, "inside")
        yield net, outside, stack.enter_context(a_directory())


# --- no gate: the oracle ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Iterator[tuple[Namespaces, Internet, Path]]:
    with attached("honest") as made:
        yield made


def test_with_no_gate_every_row_is_a_leak(oracle: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = oracle
    found = verified(net, "inside", directory, *AS_APP, sockets=SOCKETS, env=PROXY)

    assert found.status == 1
    assert found.leaks == found.rows.keys() - {"tcp-25"}  # which the policy allows
    assert found.rows["tcp-25"]["outcome"] == "reached"
    assert found.rows["tcp-25"]["allowed"] is True
    capable = {id for id, outcome in found.outcomes.items() if outcome == "capability"}
    assert capable == {"raw-sctp", "raw-gre", "raw-packet", "net-admin", "uid-gate"}
    assert found.page["gate"] == "unseen"
    assert found.page["seconds"] < 20


def test_a_run_sends_exactly_what_its_list_says(oracle: tuple[Namespaces, Internet, Path]) -> None:
    net, outside, directory = oracle
    outside.look()
    listed = json.loads(verify(net, "inside", directory, ["--dry-run", "--json", *AS_APP], env=PROXY).stdout)
    assert outside.look() == []  # a dry run sends nothing

    verified(net, "inside", directory, *AS_APP, env=PROXY)
    wanted = Counter[str]()
    for row in listed:
        protocol = row["to"].split(" ")[0]
        if protocol in ("udp", "tcp", "icmp", "protocol"):
            wanted[row["to"]] += len(row["bytes"]) if protocol == "udp" else 1
    assert Counter(outside.look()) == wanted


def test_rows_may_be_chosen(oracle: tuple[Namespaces, Internet, Path]) -> None:
    net, outside, directory = oracle
    outside.look()
    found = verified(net, "inside", directory, "--only", "icmp", "--only", "tcp-80")

    assert found.leaks == found.rows.keys() == {"icmp-echo", "icmp6-echo", "tcp-80"}
    assert set(outside.look()) == {"icmp 1.1.1.1", "icmp [2606:4700:4700::1111]", "tcp 1.1.1.1:80"}


def test_a_machine_without_ipv6_has_no_rows_of_it(oracle: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = oracle
    net.run("inside", ["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
    try:
        found = verified(net, "inside", directory)
    finally:
        net.run("inside", ["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0"])
        net.address("inside", "eth0", f"{INSIDE6}/64")
        net.default("inside", ROUTER6)
        settle(net, "inside")
    six = {id for id in found.rows if "6" in id.split("-")[0] or id.endswith("6")} - {"ntp-mode6"}

    assert len(six) > 10
    assert {found.rows[id]["outcome"] for id in six} == {"absent"}
    assert not six & found.leaks


# --- somebody who speaks as a gate ------------------------------------------------------------------------------------


FORGED = ("metadata-ipv4", "metadata-tls", "tcp-80", "tcp-443", "tcp-22", "dns-foreign", "dns-foreign-tcp", "doh-name")


def test_an_internet_that_answers_as_a_gate_would_is_a_leak_all_the_same() -> None:
    """Its 403 carries a decision, its alert is access_denied, its DNS says why: anybody can write that."""
    with routed("hostile") as (net, _, directory):
        found = verified(net, "inside", directory, *AS_APP)

    assert found.leaks >= {*FORGED, *(id for id, row in found.rows.items() if row["group"] == "metadata")}
    assert "proxied" not in found.outcomes.values()
    assert found.rows["metadata-ipv4"]["decision"] == "0123456789abcdef"
    assert "nothing shows" in found.rows["metadata-ipv4"]["detail"]


def test_a_first_router_is_believed_unless_it_has_to_show_a_certificate() -> None:
    """The limit that the page states: who owns the first router owns what a gate there would."""
    with attached("hostile") as (net, _, directory):
        make_authority_of(directory)
        believed = verified(net, "inside", directory, *AS_APP, "--only", "metadata")
        asked = verified(net, "inside", directory, *AS_APP, "--only", "metadata", "--only", "gate-certificate",
                         "--root", "root.pem")  # fmt: skip

    assert set(believed.outcomes.values()) == {"proxied"}
    assert believed.page["gate"] == "hops"
    assert set(asked.outcomes.values()) == {"reached"}
    assert asked.leaks == asked.rows.keys()


def make_authority_of(directory: Path) -> None:
    """`pki`, and its root as root.pem."""
    (directory / "origin.pem").write_text("")
    make_authority(directory)
    [root] = (directory / "pki" / "roots").glob("*/ca.crt")
    (directory / "root.pem").write_bytes(root.read_bytes())


# --- a gateway --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Iterator[tuple[Namespaces, Internet, Path]]:
    """The gate of the page behind the rules of the page, and an internet that answers as a gate would."""
    with routed("hostile") as (net, outside, directory):
        make_authority_of(directory)
        net.rules("router", gateway_rules())
        serve = [str(OUTGATE), *command(SERVICE, GATEWAY, "outgate serve").split()[1:], "--log", "decisions.jsonl"]
        with Placed(directory, net.inside("router", serve)):
            yield net, outside, directory


def rendered(line: str) -> str:
    """What a line of the page that applies rules would load."""
    words = line.replace("outgate firewall apply", "firewall render").split()
    return subprocess.run([str(OUTGATE), *words], capture_output=True, text=True, check=True).stdout


def gateway_rules() -> str:
    return rendered(command(SERVICE, GATEWAY, "outgate firewall", "eth0").replace("eth0", "out"))


@contextmanager
def broken(net: Namespaces, changes: Mapping[str, str]) -> Iterator[None]:
    """The rules with a mistake in them: each of these lines of theirs has another in its place."""
    rules = gateway_rules()
    for old, new in changes.items():
        assert rules.count(old) == 1, rules
        rules = rules.replace(old, new)
    net.rules("router", rules)
    try:
        yield
    finally:
        net.rules("router", gateway_rules())


LAST = '"out" } ct mark & 0x80 == 0x80 accept\n        goto refuse'  # of what is forwarded
ERRORS = "meta l4proto { icmp, ipv6-icmp } goto refuse"
FIRST = {  # of the chains that a packet of the workload goes through
    chain: f"chain {chain} {{\n" for chain in ("from_workload", "to_gate", "past_the_gate")
}


def let_pass(what: str) -> dict[str, str]:
    return {start: f"{start}{what} accept\n" for start in FIRST.values()}


def test_behind_a_gateway_with_the_rules_of_the_page_nothing_leaks(
    gateway: tuple[Namespaces, Internet, Path],
) -> None:
    """Also for root with every capability: it may send what it likes, on a machine that is not the gate's."""
    net, outside, directory = gateway
    outside.look()
    found = verified(net, "inside", directory, *AS_APP, "--root", "root.pem")

    assert found.leaks == set(), found.page
    assert found.status == 0
    assert found.page["gate"] == "hops"
    assert outside.look() == ["tcp 203.0.113.10:25"]  # which the policy allows
    assert found.outcomes["tcp-25"] == "reached"
    assert found.on_the_page | {"tcp-25": "proxied"} == {id: row.behind_gateway for id, row in documented().items()}


def test_each_decision_that_it_tells_is_in_the_gates_log(gateway: tuple[Namespaces, Internet, Path]) -> None:
    """Which is the proof that nobody inside can have."""
    net, _, directory = gateway
    found = verified(net, "inside", directory, *AS_APP, "--only", "raw-ip", "--only", "tls")
    told = {row["decision"] for row in found.rows.values() if row["decision"]}
    logged = {json.loads(one)["id"] for one in (directory / "decisions.jsonl").read_text().splitlines()}

    assert len(told) >= 4
    assert told <= logged


def test_a_gateway_that_refuses_nothing_leaks_all_but_tcp(gateway: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = gateway
    with broken(net, {line: line.replace("goto refuse", "accept") for line in (LAST, ERRORS)}):
        found = verified(net, "inside", directory, *AS_APP, "--root", "root.pem")

    unjudged = {id for id, row in found.rows.items() if row["to"].startswith(("udp", "icmp"))}
    on_the_link = {"mdns", "mdns6", "llmnr"}
    assert found.leaks == unjudged - on_the_link
    assert {found.rows[id]["outcome"] for id in found.leaks} == {"reached"}


def test_a_hole_for_metadata_leaks_metadata_alone(gateway: tuple[Namespaces, Internet, Path]) -> None:
    """Although who answers there says that he is the gate, and the gate answers everywhere else."""
    net, _, directory = gateway
    with broken(net, let_pass("ip daddr 169.254.0.0/16")):
        found = verified(net, "inside", directory, *AS_APP, "--root", "root.pem")

    assert found.leaks == {id for id, row in found.rows.items() if row["to"].startswith("tcp 169.254.")}
    assert len(found.leaks) == 6
    assert "nothing shows" in found.rows["metadata-ipv4"]["detail"]


def test_a_port_that_is_forwarded_leaks_alone(gateway: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = gateway
    with broken(net, let_pass("tcp dport 22")):
        found = verified(net, "inside", directory, *AS_APP)

    assert found.leaks == {"tcp-22", "tcp6-22"}
    assert found.status == 1


def test_a_redirect_of_two_ports_alone_closes_the_rest(gateway: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = gateway
    with broken(net, {"meta l4proto tcp redirect": "tcp dport { 80, 443 } redirect"}):
        found = verified(net, "inside", directory, *AS_APP)

    assert found.leaks == set()
    assert {found.outcomes[id] for id in ("tcp-22", "tcp-8080", "dns-dot")} == {"blocked fast"}
    assert found.rows["tcp-25"]["status"] == "odd"  # the policy allows it, and the rules do not


LOOKUPS = {"dns-denied", "dns-txt", "dns-null", "dns-any", "dns-tunnel"}  # asked of the machine's own resolver


@pytest.mark.parametrize("resolver", [ROUTER4, ROUTER6])
def test_a_gate_that_is_the_resolver_is_believed_since_it_answers_for_addresses_that_nobody_has(resolver: str) -> None:
    with routed("hostile") as (net, outside, directory):
        make_authority_of(directory)
        apply = command(SERVICE, GATEWAY, "outgate firewall", "eth0").replace("eth0", "out")
        net.rules("router", rendered(f"{apply} --dns-port 15053"))
        serve = [str(OUTGATE), *command(SERVICE, GATEWAY, "outgate serve").split()[1:], "--log", "decisions.jsonl"]
        with Placed(directory, net.inside("router", [*serve, "--dns-listen", "[::]:15053"])):
            outside.look()
            found = verified(net, "inside", directory, *AS_APP, "--only", "dns", resolver=resolver)
            seen = outside.look()

    assert {found.outcomes[id] for id in LOOKUPS} == {"proxied"}, found.page
    assert found.leaks == set()
    assert seen == []


def test_a_resolver_on_the_first_router_that_asks_others_is_a_leak_although_their_answer_reads_like_a_gates() -> None:
    with routed("hostile") as (net, _, directory), forwarding(net):
        found = verified(net, "inside", directory, *AS_APP, "--only", "dns", resolver=ROUTER4)

    assert found.leaks >= LOOKUPS
    assert "nothing shows" in found.rows["dns-denied"]["detail"]


@contextmanager
def forwarding(net: Namespaces) -> Iterator[None]:
    """A resolver on the router, as a home router has one: it passes questions and answers on as they are."""
    inside, outward = (net.open_socket("router", socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    inside.bind((ROUTER4, 53))
    outward.connect(("8.8.8.8", 53))

    def carry() -> None:
        while True:
            query, client = inside.recvfrom(4096)
            if not query:
                return
            outward.send(query)
            inside.sendto(outward.recv(4096), client)

    with inside, outward, ThreadPoolExecutor(1) as pool:
        carried = pool.submit(carry)
        try:
            yield
        finally:
            with net.open_socket("router", socket.AF_INET, socket.SOCK_DGRAM) as end:
                end.sendto(b"", (ROUTER4, 53))
            carried.result(WAIT_S)


# --- beside one program -----------------------------------------------------------------------------------------------


GATE_UID = 1337


@pytest.fixture(scope="module")
def pod() -> Iterator[tuple[Namespaces, Internet, Path]]:
    with routed("hostile") as (net, outside, directory):
        make_authority_of(directory)
        (directory / "policy.yaml").write_text(f"version: 1\nworkloads:\n  weather:{RULES}")
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, GATE_UID, GATE_UID)
        net.rules("inside", rendered(command(SERVICE, SIDECAR, "outgate firewall", "eth0")))
        serve = [str(OUTGATE), *command(SERVICE, SIDECAR, "runuser").partition("outgate serve")[2].split()]
        serve = [serve[0], "serve", *serve[1:], "--log", "decisions.jsonl"]
        with Placed(directory, net.inside("inside", as_user(serve, GATE_UID))):
            yield net, outside, directory


def test_beside_a_program_nothing_leaks_for_an_ordinary_user(pod: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = pod
    found = verified(net, "inside", directory, "-p", "policy.yaml", become=as_user([], ORDINARY_UID))

    assert found.leaks == set(), found.page
    assert found.page["gate"] == "machine"
    assert (found.rows["tcp-80"]["proof"], found.rows["tcp-80"]["outcome"]) == ("machine", "proxied")
    assert found.rows["uid-gate"]["detail"] == f"cannot become uid {GATE_UID}"


def test_beside_a_program_root_has_ways_round_the_gate(pod: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = pod
    found = verified(net, "inside", directory, "-p", "policy.yaml")

    assert found.leaks == {"raw-sctp", "raw-gre", "raw-packet", "net-admin", "uid-gate"}
    assert found.rows["uid-gate"]["detail"] == f"can become uid {GATE_UID}"


def test_the_gates_own_user_gets_out(pod: tuple[Namespaces, Internet, Path]) -> None:
    net, _, directory = pod
    found = verified(net, "inside", directory, "-p", "policy.yaml", become=as_user([], GATE_UID))

    assert {"uid-gate", "metadata-ipv4", "tcp-80", "dns-foreign", "quic-v1", "icmp-echo"} <= found.leaks
