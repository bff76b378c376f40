"""The rules as text: golden files that a person reads, and what holds for every layout.

After a change that is meant: `python -m tests.proxy.test_ruleset --update`, and read the diff.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from policies.addresses import Reach, classify
from proxy.layout import Layout, Mode, read_words
from proxy.nft import Library
from proxy.ruleset import SIGN, render
from tests.proxy.kernel_rules import NEEDS_ROOT, in_namespace
from tests.proxy.test_layout import TEXTS, layouts

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {
    "gateway": ["--mode gateway"],
    "gateway-with-relays": [
        "--mode gateway", "--dns-port 15353", "--ntp-port 15123", "--udp-port 15006", "--workload-subnet 10.1.0.0/16",
        "--inbound",
    ],
    "gateway-one-armed": [
        "--mode gateway", "--workload-device eth0", "--workload-subnet 10.1.0.0/16", "--workload-subnet fd01::/64",
        "--resolver 10.0.0.53",
    ],
    "bridge": ["--mode bridge", "--workload-device br-out", "--resolver 10.0.0.53"],
    "sidecar": ["--mode sidecar"],
    "sidecar-with-everything": [
        "--mode sidecar", "--upstream-device eth0", "--upstream-device net1", "--dns-port 15353", "--ntp-port 15123",
        "--udp-port 15006", "--gate-uid 2000", "--exclude 10.96.0.0/12", "--exclude fd00:96::/108",
        "--exclude-port 9000", "--ipv6 closed", "--inbound", "--quic",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_rules_are_as_they_were_read(name: str) -> None:
    assert render(read_words(LAYOUTS[name])) == (GOLDEN / f"{name}.nft").read_text()


# --- whatever the flags -----------------------------------------------------------------------------------------------


def chains(text: str) -> Iterator[tuple[str, list[str]]]:
    for name, body in re.findall(r"^    chain (\w+) \{\n(.*?)^    \}$", text, re.MULTILINE | re.DOTALL):
        yield name, [line.strip().partition("  #")[0] for line in body.splitlines()]


@given(layouts())
def test_only_tables_of_our_own_are_named(layout: Layout) -> None:
    text = render(layout)
    assert "flush" not in text
    assert set(re.findall(r"^[^#]*\btable \w+ (\w+)", text, re.MULTILINE)) == {"outgate"}


@given(layouts())
def test_every_way_out_ends_in_a_refusal(layout: Layout) -> None:
    by_name = dict(chains(render(layout)))
    last = {name: lines[-1] for name, lines in by_name.items()}
    assert last["refuse"] == "drop"
    if layout.mode is Mode.SIDECAR:
        assert last["leaving"] == "goto refuse"
        assert last["forwarded"].endswith("drop")
        assert last["egress"].endswith("drop")
        assert [name for name in ("leaving", "forwarded", "egress") if "policy drop" not in by_name[name][0]] == []
        return
    assert last["past_the_gate"] == last["to_this_machine"] == "goto refuse"
    for hook, ending in (("forwarded", "past_the_gate"), ("entering", "to_this_machine")):
        led = rf"iifname .* goto {ending}|oifname .* goto refuse"
        assert all(re.fullmatch(led, line) for line in by_name[hook][1:])
        assert len(by_name[hook]) > 1


@given(layouts())
def test_no_address_is_led_anywhere_before_it_was_asked_whether_it_is_reached_by_nobody(layout: Layout) -> None:
    by_name = dict(chains(render(layout)))
    first = by_name["attempted" if layout.mode is Mode.SIDECAR else "from_workload"]
    base = "attempted" if layout.mode is Mode.SIDECAR else "arriving"
    assert "priority raw" in by_name[base][0]
    refused = [line for line in first if "counter name never_reached goto refuse" in line]
    assert [line.split()[0] for line in refused] == ["ip", "ip6"]
    assert "redirect" not in " ".join(first)
    assert "tproxy" not in " ".join(first)


def test_the_addresses_are_those_that_no_policy_reaches() -> None:
    text = render(read_words(LAYOUTS["sidecar"]))
    listed = re.findall(r"^ +ip6? daddr \{ (.*) \} counter name never_reached", text, re.MULTILINE)
    networks = [ip_network(word) for line in listed for word in line.split(", ")]
    assert {classify(end) for one in networks for end in (one[0], one[-1])} == {Reach.NEVER}
    for known in ("169.254.169.254", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "127.0.0.1"):
        assert any(ip_network(known).subnet_of(one) for one in networks if one.version == ip_network(known).version)  # type: ignore[arg-type]  # of one version


@pytest.fixture(scope="module")
def kernel() -> Iterator[Library]:
    with in_namespace(*TEXTS["upstream_devices"]):
        library = Library()
        yield library
        library.close()


class TestKernel:
    pytestmark = NEEDS_ROOT

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(layout=layouts())
    def test_every_layout_is_taken(self, kernel: Library, layout: Layout) -> None:
        kernel.run(render(layout, since="2026-11-22T00:00:00Z"), is_check=True)

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_it_may_be_loaded_as_often_as_one_likes(self, kernel: Library, name: str) -> None:
        text = render(read_words([word.replace("net1", "eth1") for word in LAYOUTS[name]]))
        kernel.run(text)
        once = kernel.run("list ruleset")
        kernel.run(text)
        assert kernel.run("list ruleset") == once
        assert f"chain {SIGN}" in once
        kernel.run("delete table inet outgate" + ("\ndelete table netdev outgate" if "netdev" in text else ""))


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, words in LAYOUTS.items():
        (GOLDEN / f"{name}.nft").write_text(render(read_words(words)))


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    main()
