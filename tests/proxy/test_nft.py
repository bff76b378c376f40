"""nft's text handed to the kernel, by the library and by the program; what a DNS guard opens and closes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from policies.addresses import Address
from proxy import nft as module
from proxy.elements import Element, Opening, Transport, close_text, empty_text, open_text, restore_text
from proxy.layout import read_layout
from proxy.nft import Library, Nft, NftMissing, NftRefused, Program, open_nft, read_openings
from proxy.ruleset import render
from tests.proxy.kernel_rules import NEEDS_ROOT, in_namespace

pytestmark = NEEDS_ROOT
FOUR, SIX = ip_address("203.0.113.7"), ip_address("2001:db8::7")
SOURCES = {4: ip_address("10.1.0.7"), 6: ip_address("fd01::7")}


@pytest.fixture(params=[Library, Program])
def nft(request: pytest.FixtureRequest) -> Iterator[Nft]:
    """With the rules of a gateway in force."""
    with in_namespace("br0"):
        made: Nft = request.param()
        made.run(render(read_layout("gateway", {}, {})))
        yield made


def element(address: Address, protocol: Transport, port: int) -> Element:
    return Element(SOURCES[address.version], address, protocol, port)


def open_element(nft: Nft, address: Address, protocol: Transport, port: int, time_s: float) -> None:
    nft.run(open_text({element(address, protocol, port): time_s}))


def test_an_element_opens_and_closes(nft: Nft) -> None:
    open_element(nft, FOUR, "tcp", 22, 60)
    open_element(nft, SIX, "udp", 443, 0.2)
    assert read_openings(nft)[0].left_s in (59, 60)
    assert [(one.element, one.timeout_s) for one in read_openings(nft)] == [
        (element(FOUR, "tcp", 22), 60), (element(SIX, "udp", 443), 1),
    ]  # fmt: skip
    nft.run(close_text([element(FOUR, "tcp", 22)]))
    assert element(FOUR, "tcp", 22) not in {one.element for one in read_openings(nft)}


def test_elements_of_both_families_open_and_close_in_one_transaction(nft: Nft) -> None:
    both = {element(FOUR, "tcp", 22): 60.0, element(SIX, "tcp", 22): 90.0, element(FOUR, "udp", 22): 30.5}
    nft.run(open_text(both))
    assert {one.element: one.timeout_s for one in read_openings(nft)} == {
        element(FOUR, "tcp", 22): 60, element(SIX, "tcp", 22): 90, element(FOUR, "udp", 22): 31,
    }  # fmt: skip
    nft.run(close_text([element(FOUR, "tcp", 22), element(SIX, "tcp", 22)]))
    assert [one.element for one in read_openings(nft)] == [element(FOUR, "udp", 22)]
    nft.run(empty_text())
    assert read_openings(nft) == []


def test_elements_of_an_older_version_are_passed_over(nft: Nft) -> None:
    """They do not say who may."""
    nft.run(
        "delete table inet outgate\ntable inet outgate {\nset allowed4 {\n"
        "type ipv4_addr . inet_proto . inet_service; flags timeout\n}\nset allowed6 {\n"
        "type ipv6_addr . inet_proto . inet_service; flags timeout\n}\n}\n"
        f"add element inet outgate allowed4 {{ {FOUR} . tcp . 22 timeout 60s }}"
    )
    assert read_openings(nft) == []


def test_opening_again_begins_the_time_anew(nft: Nft) -> None:
    open_element(nft, FOUR, "tcp", 22, 5)
    open_element(nft, FOUR, "tcp", 22, 300)
    [one] = read_openings(nft)
    assert (one.timeout_s, one.left_s > 290) == (300, True)


def test_an_element_ends_with_its_time(nft: Nft) -> None:
    open_element(nft, FOUR, "tcp", 22, 1)
    assert read_openings(nft)
    end = time.monotonic() + 20
    while read_openings(nft):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_closing_what_is_not_open_is_no_error(nft: Nft) -> None:
    nft.run(close_text([element(SIX, "tcp", 22)]))
    assert read_openings(nft) == []


def test_what_is_open_can_be_written_down_and_opened_again(nft: Nft) -> None:
    open_element(nft, FOUR, "tcp", 22, 600)
    open_element(nft, SIX, "udp", 443, 600)
    before = read_openings(nft)
    nft.run("flush set inet outgate allowed4\nflush set inet outgate allowed6")
    nft.run(restore_text(before))
    assert [one.element for one in read_openings(nft)] == [one.element for one in before]
    assert all(590 < one.left_s <= 600 for one in read_openings(nft))


def test_the_last_moment_of_an_opening_is_not_restored() -> None:
    """`expires 0s` would have it stay for good."""
    assert restore_text([Opening(element(FOUR, "tcp", 22), 60, 0)]) == ""


def test_a_refusal_has_nfts_own_text_and_changes_nothing(nft: Nft) -> None:
    with pytest.raises(NftRefused, match="No such file or directory"):
        nft.run(
            f"add element inet outgate allowed4 {{ {element(FOUR, 'tcp', 22)} timeout 60s }}\n"
            "add element inet outgate elsewhere { 1 }"
        )
    assert read_openings(nft) == []
    with pytest.raises(NftRefused, match="syntax error"):
        nft.run("add elephant")


def test_a_full_set_is_a_refusal(nft: Nft) -> None:
    nft.run("add set inet outgate allowed8 { type ipv4_addr; flags timeout; size 1; }")
    nft.run("add element inet outgate allowed8 { 192.0.2.1 timeout 60s }")
    with pytest.raises(NftRefused, match=r"Too many open files in system|No space left"):
        nft.run("add element inet outgate allowed8 { 192.0.2.2 timeout 60s }")


def test_a_check_changes_nothing(nft: Nft) -> None:
    nft.run("delete table inet outgate", is_check=True)
    assert "chain past_the_gate" in nft.run("list table inet outgate")


def test_the_library_is_asked_first_and_the_program_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_nft(), Library)
    monkeypatch.setattr(module, "_LIBRARY", "libnftables-of-nobody.so.1")
    assert isinstance(open_nft(), Program)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NftMissing):
        open_nft()
