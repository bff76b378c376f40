"""`outgate firewall` by its command line, in a namespace of its own: what is printed, kept, refused and undone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import ClassVar

import pytest

from proxy import firewall
from proxy.elements import Element, open_text
from proxy.firewall import FirewallRefused
from proxy.layout import read_layout
from proxy.nft import Library, Nft, NftRefused, Shown, read_openings
from proxy.ruleset import render
from tests.proxy.commands_of import invoke
from tests.proxy.kernel_rules import NEEDS_ROOT, everything, in_namespace

FOREIGN = """
table inet theirs { chain x { type nat hook prerouting priority dstnat; iifname "br0" tcp dport 80 redirect; } }
table ip6 outgate { chain mine { type filter hook forward priority filter; } }
table inet filter { set s { type ipv4_addr; elements = { 192.0.2.7 } }
 chain input { type filter hook input priority filter; policy accept; ct mark 0x80 counter accept; } }
"""


@pytest.fixture
def namespace() -> Iterator[None]:
    with in_namespace("br0", "eth0"):
        yield


def load(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text.replace("} }", "}; }").replace("; }", ";\n}"), text=True, check=True)


def ruleset() -> str:
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout


# --- without a kernel -------------------------------------------------------------------------------------------------


def test_render_prints_rules_and_needs_nothing() -> None:
    done = invoke("firewall", "render", "--mode", "sidecar", "--upstream-device", "nowhere0", "--inbound")
    assert done.exit_code == 0
    assert done.stdout == render(read_layout("sidecar", {"upstream_devices": ["nowhere0"]}, {"inbound": True}))


@pytest.mark.parametrize("command", ["render", "apply"])
def test_a_flag_that_cannot_be_meant_is_a_usage_error(command: str) -> None:
    done = invoke("firewall", command, "--mode", "gateway", "--exclude", "10.0.0.0/8")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "outgate: --exclude: has no meaning with --mode gateway; leave it out\n"


def test_every_test_that_the_page_names_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "firewall.md").read_text()))
    tests = "\n".join(path.stem + "\n" + path.read_text() for path in (root / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert [name for name in named if not re.search(rf"^(    )?(def )?{name}\b", tests, re.MULTILINE)] == []


class Scripted:
    """An nft that refuses one transaction in the words of a kernel."""

    def __init__(self, says: str) -> None:
        self._says = says

    def run(self, text: str, *, shown: Shown = Shown.PLAIN, is_check: bool = False) -> str:
        if shown:
            return '{"nftables": []}'
        raise NftRefused(self._says)


class RefusesDormant:
    """An nft that takes everything but rules that bear on nothing."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft

    def run(self, text: str, *, shown: Shown = Shown.PLAIN, is_check: bool = False) -> str:
        if "flags dormant" in text:
            raise NftRefused("Error: No such device")
        return self._nft.run(text, shown=shown, is_check=is_check)


def test_a_kernel_without_the_egress_hook_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "/dev/stdin:68:11-16: Error: Could not process rule: Operation not supported\n    chain egress {\n"
    monkeypatch.setattr(firewall, "_require_devices", lambda _layout: None)
    with pytest.raises(FirewallRefused, match=r"^this kernel has no hook .* \(Linux 5\.16, CONFIG_NETFILTER_EGRESS\)"):
        firewall.apply(Scripted(says), read_layout("sidecar", {}, {}), since="")


EDITS = {
    "a rule more": ("add rule inet outgate past_the_gate accept", "has besides accept"),
    "a rule before": ('insert rule inet outgate forwarded iifname "br0" accept', 'besides iifname "br0" accept'),
    "no rules": ("flush chain inet outgate to_gate", "lacks meta l4proto tcp redirect to :15001"),
    "another policy": ("chain inet outgate forwarded { policy drop; }", "has besides type filter hook forward"),
    "a chain more": (
        "add chain inet outgate x { type filter hook forward priority -20; }", "has besides chain x {",
    ),
    "a set more": ("add set inet outgate x { type ipv4_addr; }", "has besides set x {"),
}  # fmt: skip


class TestKernel:
    pytestmark: ClassVar = [*NEEDS_ROOT, pytest.mark.usefixtures("namespace")]

    # --- in force, and gone ---

    @pytest.mark.parametrize(
        "flags",
        [
            ["--mode", "gateway"],
            ["--mode", "gateway", "--udp-port", "15006", "--ntp-port", "15123", "--dns-port", "15353"],
            ["--mode", "bridge", "--workload-device", "br0"],
            ["--mode", "sidecar", "--upstream-device", "eth0", "--upstream-device", "br0", "--udp-port", "15006"],
        ],
        ids=["gateway", "relays", "bridge", "sidecar"],
    )
    def test_remove_restores_what_was_there(self, flags: list[str]) -> None:
        load(FOREIGN)
        subprocess.run(["ip", "rule", "add", "fwmark", "0x80", "lookup", "77"], check=True)
        before = everything()
        for _ in range(2):
            assert invoke("firewall", "apply", *flags).exit_code == 0
        in_force = everything()
        assert ("fwmark 0x80/0x80 lookup 15001" in in_force) == ("--udp-port" in flags)
        assert in_force.count("fwmark 0x80/0x80 lookup 15001") in (0, 2)  # once for IPv4, once for IPv6
        assert invoke("firewall", "status").exit_code == 0
        done = invoke("firewall", "remove")
        assert (done.exit_code, done.stderr) == (0, "the rules are gone\n")
        assert everything() == before

    def test_another_mode_takes_the_place_of_the_former(self) -> None:
        invoke("firewall", "apply", "--mode", "sidecar", "--upstream-device", "eth0", "--upstream-device", "br0")
        assert "table netdev outgate" in ruleset()
        assert invoke("firewall", "apply", "--mode", "gateway", "--udp-port", "15006").exit_code == 0
        assert "table netdev outgate" not in ruleset()
        assert invoke("firewall", "apply", "--mode", "gateway").exit_code == 0
        assert "15001" not in everything().partition("}\n0:")[2]  # no route any more
        assert invoke("firewall", "status").exit_code == 0

    def test_removing_nothing_says_so(self) -> None:
        done = invoke("firewall", "remove", "--json")
        assert (done.exit_code, json.loads(done.stdout)) == (1, {"removed": False})

    def test_a_check_changes_nothing(self) -> None:
        before = everything()
        done = invoke("firewall", "apply", "--mode", "gateway", "--udp-port", "7", "--check")
        assert done.exit_code == 0
        assert everything() == before

    def test_only_sets_that_say_for_whom_can_be_opened(self) -> None:
        library = Library()
        with pytest.raises(firewall.FirewallRefused, match="none of our rules is in force: outgate firewall apply"):
            firewall.require_openings(library)
        firewall.apply(library, read_layout("gateway", {}, {}), since="")
        assert firewall.require_openings(library).mode == "gateway"
        rules = library.run("list table inet outgate").replace("ipv4_addr . ipv4_addr", "ipv4_addr")
        library.run("delete table inet outgate\n" + re.sub("ip saddr . ip daddr", "ip daddr", rules))
        with pytest.raises(firewall.FirewallRefused, match="made by another version of outgate"):
            firewall.require_openings(library)

    def test_what_was_open_stays_open(self) -> None:
        invoke("firewall", "apply", "--mode", "gateway")
        library = Library()
        four = Element(ip_address("10.1.0.7"), ip_address("203.0.113.7"), "tcp", 22)
        six = Element(ip_address("fd01::7"), ip_address("2001:db8::7"), "udp", 443)
        library.run(open_text({four: 600, six: 300}))
        done = invoke("firewall", "apply", "--mode", "gateway", "--inbound", "--json")
        assert json.loads(done.stdout) == {"mode": "gateway", "applied": True, "openingsKept": 2}
        assert [one.element for one in read_openings(library)] == [four, six]
        assert [one.left_s > 290 for one in read_openings(library)] == [True, True]
        library.close()

    # --- status ---

    def test_status_says_what_is_in_force(self) -> None:
        invoke("firewall", "apply", "--mode", "gateway", "--workload-subnet", "10.1.0.0/16")
        found = json.loads(invoke("firewall", "status", "--json").stdout)
        assert (found["inForce"], found["mode"], found["openings"], found["differences"]) == (True, "gateway", 0, [])
        assert found["since"].startswith("20")
        assert "--workload-subnet 10.1.0.0/16" in found["flags"]
        assert set(found["counters"]) == {"never_reached", "refused", "spoofed", "invalid"}
        assert "mode           gateway, since 20" in invoke("firewall", "status").stdout

    def test_status_without_rules_is_no(self) -> None:
        assert json.loads(invoke("firewall", "status", "--json").stdout) == {"inForce": False}
        done = invoke("firewall", "status")
        assert (done.exit_code, done.stdout[:13]) == (1, "not in force:")

    def test_rules_that_nft_loaded_are_ours_too(self, tmp_path: Path) -> None:
        (tmp_path / "gateway.nft").write_text(invoke("firewall", "render", "--mode", "gateway").stdout)
        subprocess.run(["nft", "-f", tmp_path / "gateway.nft"], check=True)
        done = invoke("firewall", "status")
        assert done.exit_code == 0
        assert "gateway, loaded by nft -f" in done.stdout
        assert invoke("firewall", "remove").exit_code == 0

    @pytest.mark.parametrize("edit", EDITS)
    def test_status_finds_what_somebody_changed(self, edit: str) -> None:
        command, said = EDITS[edit]
        invoke("firewall", "apply", "--mode", "gateway")
        load(command)
        before = ruleset()
        done = invoke("firewall", "status", "--json")
        assert done.exit_code == 1
        assert any(said in each for each in json.loads(done.stdout)["differences"])
        assert "changed: table inet outgate: " in invoke("firewall", "status").stdout
        assert ruleset() == before
        assert invoke("firewall", "apply", "--mode", "gateway").exit_code == 0
        assert invoke("firewall", "status").exit_code == 0

    def test_status_finds_a_table_a_route_or_a_device_that_is_gone(self) -> None:
        flags = ["--mode", "sidecar", "--upstream-device", "eth0", "--upstream-device", "br0", "--udp-port", "7"]
        invoke("firewall", "apply", *flags)
        subprocess.run(["ip", "-6", "rule", "del", "fwmark", "0x80/0x80", "lookup", "15001"], check=True)
        assert "changed: the route for --udp-port: not there\n" in invoke("firewall", "status").stdout
        load("delete table netdev outgate")
        assert "changed: table netdev outgate: not there\n" in invoke("firewall", "status").stdout

    def test_status_says_when_the_rules_could_not_be_loaded_any_more(self) -> None:
        """As where a device of theirs is gone, on kernels before 6.16."""
        invoke("firewall", "apply", "--mode", "gateway")
        library = Library()
        found = firewall.look(RefusesDormant(library))
        assert found
        assert found.differences == ("cannot be loaded any more: nft: Error: No such device",)
        library.close()

    def test_flags_of_another_version_are_told(self) -> None:
        load(render(read_layout("gateway", {}, {})).replace("--gate-port", "--door"))
        done = invoke("firewall", "status")
        assert done.exit_code == 1
        assert "changed: made by another version of outgate: --door 15001" in done.stdout

    # --- refusals, after which all is as before ---

    @pytest.mark.parametrize("command", ["apply --mode gateway", "remove", "status"])
    @pytest.mark.parametrize("family", ["inet", "netdev"])
    def test_a_table_of_somebody_else_is_left_alone(self, command: str, family: str) -> None:
        load(f"table {family} outgate {{\nchain theirs {{\n}}\n}}")
        before = everything()
        done = invoke("firewall", *command.split())
        assert (done.exit_code, done.stdout) == (3, "")
        assert done.stderr.startswith(f"outgate: table {family} outgate: another program's, or written by hand")
        assert done.stderr.count("\n") == 1
        assert everything() == before

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (
                ["--mode", "gateway", "--workload-device", "bro"],
                "--workload-device bro: no such device; there are br0, ",
            ),
            (["--mode", "sidecar", "--upstream-device", "net7"], "--upstream-device net7: no such device"),
            (["--mode", "sidecar"], "br0: up, and no packet socket would be stopped there; name every device: "),
        ],
    )
    def test_a_device_that_is_missing_or_left_out_is_refused(self, flags: list[str], said: str) -> None:
        before = everything()
        done = invoke("firewall", "apply", *flags)
        assert done.exit_code == 3
        assert done.stderr.startswith(f"outgate: {said}")
        assert everything() == before

    def test_a_refused_transaction_takes_its_route_back(self) -> None:
        library = Library()
        refuses = Scripted("Error: Could not process rule: No buffer space available")
        before = everything()
        with pytest.raises(NftRefused):
            firewall._put(refuses, read_layout("gateway", {"udp_port": ["7"]}, {}), "")
        with pytest.raises(FirewallRefused, match="nft: Error: Could not process rule: No buffer space available"):
            firewall.apply(refuses, read_layout("gateway", {"udp_port": ["7"]}, {}), since="")
        assert everything() == before
        library.close()

    @pytest.mark.parametrize("command", ["apply --mode gateway", "apply --mode gateway --check", "remove", "status"])
    def test_without_the_capability_it_says_which(self, command: str) -> None:
        words = [sys.executable, "-m", "proxy", "firewall", *command.split()]
        done = subprocess.run(
            ["setpriv", "--bounding-set", "-net_admin", *words], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("outgate: needs CAP_NET_ADMIN in this network namespace")
        assert done.stderr.count("\n") == 1

    def test_without_nft_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.nft._LIBRARY", "libnftables-of-nobody.so.1")
        monkeypatch.setenv("PATH", "/nowhere")
        done = invoke("firewall", "status")
        assert done.exit_code == 3
        assert done.stderr == (
            "outgate: neither libnftables.so.1 nor the program nft is here; install the package nftables\n"
        )

    def test_the_program_serves_as_well_as_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.nft._LIBRARY", "libnftables-of-nobody.so.1")
        before = everything()
        assert invoke("firewall", "apply", "--mode", "gateway", "--udp-port", "7").exit_code == 0
        assert invoke("firewall", "status").exit_code == 0
        assert invoke("firewall", "remove").exit_code == 0
        assert everything() == before
        assert os.environ["PATH"]
