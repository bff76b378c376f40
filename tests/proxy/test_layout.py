"""The flags of `outgate firewall`: what each may say, and that what was said is read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import config
from proxy import layout as layout_module
from proxy.layout import FLAGS, SWITCHES, Layout, MalformedLayout, Mode, read_layout, read_words, words_of

TEXTS: dict[str, list[str]] = {
    "workload_devices": ["br0", "br-out", "veth1@x"],
    "upstream_devices": ["eth0", "eth1"],
    "subnets": ["10.0.0.0/8", "10.1.0.0/16", "10.0.0.7", "fd00::/8", "2001:db8::1"],
    "resolvers": ["10.0.0.53", "169.254.20.10", "fd00::53"],
    "excluded": ["10.96.0.0/12", "10.100.0.0/16", "fd00:10::/64", "192.0.2.1"],
    "excluded_ports": ["9000", "443"],
    "gate_uid": ["1337", "7"],
    "gate_port": ["15001", "1"],
    "dns_port": ["15353"],
    "ntp_port": ["15123"],
    "udp_port": ["15006"],
    "ipv6": ["on", "closed"],
}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Of every mode, whatever may be said together."""
    mode = draw(st.sampled_from(Mode))
    texts = {
        flag.field: draw(st.lists(st.sampled_from(TEXTS[flag.field]), max_size=3 if flag.many else 1))
        for flag in FLAGS
        if mode in flag.modes
    }
    if texts.get("dns_port"):
        texts["resolvers"] = []
    switches = {field: draw(st.booleans()) for field, (_, modes) in SWITCHES.items() if mode in modes}
    switches["quic"] &= bool(texts["udp_port"])
    return read_layout(mode, texts, switches)


@given(layouts())
def test_a_layout_is_read_back_from_its_words(layout: Layout) -> None:
    words = list(words_of(layout))
    assert read_words(words) == layout
    assert all(len(word) <= 128 for word in words)  # a comment of nft may be no longer


def test_the_gates_port_is_the_gates_own_default() -> None:
    assert layout_module.GATE_PORT == config.GATE_PORT


MISTAKES = {
    "a device with a quote": ("gateway", {"workload_devices": ['br0" accept']}, "no name of a device"),
    "a device with nft's wildcard": ("gateway", {"workload_devices": ["br*"]}, "no name of a device"),
    "a device with a newline": ("gateway", {"workload_devices": ["br0\n"]}, "no name of a device"),
    "a device that is too long": ("gateway", {"workload_devices": ["a234567890123456"]}, "no name of a device"),
    "port 0": ("gateway", {"gate_port": ["0"]}, "not a port from 1 to 65535"),
    "a port that is none": ("gateway", {"gate_port": ["65536"]}, "not a port"),
    "a port in other digits": ("gateway", {"gate_port": ["\u0661"]}, "not a port"),
    "root as the gate": ("sidecar", {"gate_uid": ["0"]}, "as root many a workload runs too"),
    "nobody's uid": ("sidecar", {"gate_uid": ["4294967295"]}, "not a uid"),
    "host bits": ("sidecar", {"excluded": ["10.0.0.1/8"]}, "did you mean 10.0.0.0/8"),
    "everything": ("sidecar", {"excluded": ["::/0"]}, "that is every address"),
    "a name": ("sidecar", {"excluded": ["db.example"]}, "not a prefix"),
    "a resolver with a zone": ("sidecar", {"resolvers": ["fe80::1%eth0"]}, "with a zone"),
    "a resolver by name": ("sidecar", {"resolvers": ["dns.example"]}, "not an address"),
    "another word for IPv6": ("sidecar", {"ipv6": ["off"]}, "not on or closed"),
    "a sidecar's flag for a gateway": ("gateway", {"excluded": ["10.0.0.0/8"]}, "no meaning with --mode gateway"),
    "a gateway's flag for a sidecar": ("sidecar", {"workload_devices": ["br0"]}, "no meaning with --mode sidecar"),
    "one port for two relays": ("gateway", {"dns_port": ["7"], "ntp_port": ["7"]}, "two are equal"),
    "the gate's port for the DNS guard": ("gateway", {"dns_port": ["15001"]}, "two are equal"),
    "a resolver beside the DNS guard": ("gateway", {"dns_port": ["7"], "resolvers": ["10.0.0.53"]}, "leave one"),
    "one device for both sides": ("gateway", {"upstream_devices": ["br0"]}, "--workload-subnet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_flag_that_cannot_be_meant_is_refused_with_its_repair(name: str) -> None:
    mode, texts, said = MISTAKES[name]
    with pytest.raises(MalformedLayout, match=said):
        read_layout(mode, texts, {})


def test_a_switch_of_another_mode_is_refused() -> None:
    with pytest.raises(MalformedLayout, match="--masquerade: has no meaning with --mode sidecar"):
        read_layout("sidecar", {}, {"masquerade": True})


def test_quic_is_led_nowhere_without_a_relay() -> None:
    with pytest.raises(MalformedLayout, match="--quic: there is no relay to lead it to"):
        read_layout("gateway", {}, {"quic": True})


@pytest.mark.parametrize("words", [[], ["--mode router"], ["--mode gateway", "--speed 7"], ["--mode gateway", "x"]])
def test_words_of_another_version_are_refused(words: list[str]) -> None:
    with pytest.raises(MalformedLayout):
        read_words(words)
