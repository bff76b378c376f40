from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pytest_benchmark.fixture import BenchmarkFixture

from policies.addresses import (
    Address,
    Network,
    PrefixMap,
    Reach,
    classify,
    inside_one_private_block,
)

METADATA = {
    "aws-azure-google": "169.254.169.254",
    "aws-time": "169.254.169.123",
    "aws-ecs": "169.254.170.2",
    "aws-eks": "169.254.170.23",
    "tencent": "169.254.0.23",
    "scaleway": "169.254.42.42",
    "azure-wireserver": "168.63.129.16",
    "alibaba": "100.100.100.200",
    "oracle-classic": "192.0.0.192",
    "aws-v6": "fd00:ec2::254",
    "aws-eks-v6": "fd00:ec2::23",
    "aws-resolver-v6": "fd00:ec2::253",
    "google-v6": "fd20:ce::254",
    "oracle-v6": "fd00:c1::a9fe:a9fe",
    "scaleway-v6": "fd00:42::42",
    "akamai-v6": "fd00:a9fe:a9fe::1",
    "alibaba-v6": "fd00:100::100:200",
    "openstack-v6": "fe80::a9fe:a9fe",
}

NEVER = {
    "loopback": "127.0.0.1",
    "loopback-end": "127.255.255.255",
    "link-local": "169.254.0.1",
    "unspecified": "0.0.0.0",
    "this-network": "0.1.2.3",
    "multicast": "224.0.0.1",
    "multicast-end": "239.255.255.255",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "v6-loopback": "::1",
    "v6-unspecified": "::",
    "v6-link-local": "fe80::1",
    "v6-link-local-scoped": "fe80::1%eth0",
    "v6-link-local-end": "febf::1",
    "v6-multicast": "ff02::1",
    "v6-multicast-global": "ff0e::1",
}

PRIVATE = {
    "ten": "10.0.0.1",
    "shared": "100.64.0.1",
    "shared-end": "100.127.255.255",
    "172": "172.16.0.1",
    "172-end": "172.31.255.255",
    "protocol-assignments": "192.0.0.1",
    "dummy": "192.0.0.8",
    "nat64-discovery": "192.0.0.170",
    "test-net-1": "192.0.2.1",
    "6to4-relay": "192.88.99.1",
    "192": "192.168.0.1",
    "benchmarking": "198.18.0.1",
    "benchmarking-end": "198.19.255.255",
    "test-net-2": "198.51.100.1",
    "test-net-3": "203.0.113.1",
    "v6-local": "fd12:3456::1",
    "v6-local-fc": "fc00::1",
    "v6-site-local": "fec0::1",
    "v6-documentation": "2001:db8::1",
    "v6-documentation-2": "3fff::1",
    "v6-benchmarking": "2001:2::1",
    "v6-orchid": "2001:10::1",
    "v6-protocol-assignments": "2001:1::4",
    "v6-discard": "100::1",
    "v6-dummy": "100:0:0:1::1",
    "v6-segment-routing": "5f00::1",
    "v6-local-nat64": "64:ff9b:1::808:808",
    "v6-6to4": "2002:808:808::1",
    "v6-teredo": "2001:0:808:808::f7f7:f7f7",
    "v6-compatible": "::8.8.8.8",
    "v6-translated": "::ffff:0:8.8.8.8",
    "v6-unassigned": "4000::1",
    "v6-below-global-unicast": "1fff:ffff::1",
}

PUBLIC = {
    "ordinary": "8.8.8.8",
    "before-ten": "9.255.255.255",
    "after-ten": "11.0.0.0",
    "before-shared": "100.63.255.255",
    "after-shared": "100.128.0.0",
    "after-loopback": "128.0.0.0",
    "beside-wireserver": "168.63.129.17",
    "before-link-local": "169.253.255.255",
    "after-link-local": "169.255.0.0",
    "before-172": "172.15.255.255",
    "after-172": "172.32.0.0",
    "pcp-anycast": "192.0.0.9",
    "turn-anycast": "192.0.0.10",
    "as112": "192.31.196.1",
    "amt": "192.52.193.1",
    "as112-direct": "192.175.48.1",
    "before-multicast": "223.255.255.255",
    "v6": "2606:4700:4700::1111",
    "v6-first": "2000::1",
    "v6-last": "3ffe::1",
    "v6-pcp-anycast": "2001:1::1",
    "v6-turn-anycast": "2001:1::2",
    "v6-srp-anycast": "2001:1::3",
    "v6-amt": "2001:3::1",
    "v6-as112": "2001:4:112::1",
    "v6-orchid-2": "2001:20::1",
    "v6-drone": "2001:30::1",
    "v6-after-protocol-assignments": "2001:200::1",
    "v6-as112-direct": "2620:4f:8000::1",
    "mapped": "::ffff:8.8.8.8",
    "nat64": "64:ff9b::8.8.8.8",
}


def disguises(inner: IPv4Address) -> dict[str, str]:
    """Every IPv6 form that carries `inner`."""
    a, b, c, d = inner.packed
    high, low = f"{a:02x}{b:02x}", f"{c:02x}{d:02x}"
    flipped = IPv4Address(int(inner) ^ 0xFFFFFFFF)
    return {
        "mapped": f"::ffff:{inner}",
        "mapped-scoped": f"::ffff:{inner}%eth0",
        "compatible": f"::{inner}",
        "translated": f"::ffff:0:{inner}",
        "nat64": f"64:ff9b::{inner}",
        "local-nat64-96": f"64:ff9b:1::{inner}",
        "local-nat64-96-subnet": f"64:ff9b:1:7::{inner}",
        "local-nat64-64": f"64:ff9b:1:7:{a:02x}:{b:02x}{c:02x}:{d:02x}00:0",
        "local-nat64-56": f"64:ff9b:1:7{a:02x}:{b:02x}:{low}:0:0",
        "local-nat64-48": f"64:ff9b:1:{high}:{c:02x}:{d:02x}00:0:0",
        "6to4": f"2002:{high}:{low}::1",
        "teredo-server": f"2001:0:{high}:{low}:0:0:f7f7:f7f7",
        "teredo-client": f"2001:0:808:808:0:0:{flipped}",
        "isatap": f"2607:f8b0::5efe:{inner}",
        "isatap-universal": f"2607:f8b0::200:5efe:{inner}",
        "isatap-local": f"fd12::5efe:{inner}",
    }


@pytest.mark.parametrize("text", METADATA.values(), ids=METADATA)
def test_metadata_is_never_reached(text: str) -> None:
    assert classify(ip_address(text)) is Reach.NEVER


@pytest.mark.parametrize("text", NEVER.values(), ids=NEVER)
def test_what_no_rule_reaches(text: str) -> None:
    assert classify(ip_address(text)) is Reach.NEVER


@pytest.mark.parametrize("text", PRIVATE.values(), ids=PRIVATE)
def test_what_is_not_globally_reachable_is_private(text: str) -> None:
    assert classify(ip_address(text)) is Reach.PRIVATE


@pytest.mark.parametrize("text", PUBLIC.values(), ids=PUBLIC)
def test_what_is_public(text: str) -> None:
    assert classify(ip_address(text)) is Reach.PUBLIC


@pytest.mark.parametrize("form", disguises(IPv4Address(0)))
@pytest.mark.parametrize("text", ["169.254.169.254", "168.63.129.16", "100.100.100.200", "127.0.0.1", "224.0.0.251"])
def test_never_stays_never_in_disguise(text: str, form: str) -> None:
    assert classify(ip_address(disguises(IPv4Address(text))[form])) is Reach.NEVER


@pytest.mark.parametrize("form", disguises(IPv4Address(0)))
@pytest.mark.parametrize("text", ["10.1.2.3", "192.168.7.9", "100.64.3.4"])
def test_private_stays_private_in_disguise(text: str, form: str) -> None:
    assert classify(ip_address(disguises(IPv4Address(text))[form])) is Reach.PRIVATE


@given(st.ip_addresses(v=4).filter(int))  # of 0.0.0.0 a local NAT64 address shows no trace
@example(IPv4Address("0.0.0.1"))
@example(IPv4Address("255.255.255.255"))
def test_no_disguise_makes_an_address_better(inner: IPv4Address) -> None:
    order = [Reach.PUBLIC, Reach.PRIVATE, Reach.NEVER]
    for text in disguises(inner).values():
        assert order.index(classify(ip_address(text))) >= order.index(classify(inner))


# Where `ipaddress` and we differ on purpose, or where its own patch releases differ (CPython gh-113171 and later).
DIFFERENCES = [
    ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's own; public by the registry
        "192.88.99.0/24",  # deprecated, "N/A" in the registry
        "192.0.0.0/24",  # exceptions arrived with 3.12.4 and 3.13
        "100.64.0.0/10",  # neither private nor global to ipaddress
        "224.0.0.0/4",  # global to ipaddress where the registry says so
        "ff00::/8",
        "2001::/23",  # exceptions arrived with 3.12.4 and 3.13
        "2002::/16",  # "N/A" in the registry
        "3fff::/20",  # arrived later
        "5f00::/16",  # not there yet
        "100:0:0:1::/64",  # not there yet
        "64:ff9b::/96",  # judged by the address inside
        "64:ff9b:1::/48",  # arrived with 3.12.4 and 3.13
    )
]
NOTABLE = [int(ip_address(text)) for table in (METADATA, NEVER, PRIVATE, PUBLIC) for text in table.values()]


@given(st.ip_addresses() | st.sampled_from(NOTABLE).map(lambda n: ip_address(n)))
def test_the_standard_library_agrees_but_for_known_differences(address: Address) -> None:
    if any(address in network for network in DIFFERENCES):
        return
    if address.version == 6 and (address not in ip_network("2000::/3") or int(address) >> 32 & 0xFDFFFFFF == 0x5EFE):
        assert classify(address) is not Reach.PUBLIC or address.ipv4_mapped
        return
    assert (classify(address) is Reach.PUBLIC) is address.is_global


@given(st.ip_addresses())
def test_every_address_has_a_class(address: Address) -> None:
    assert classify(address) in Reach


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("10.20.0.0/16", True),
        ("10.0.0.0/8", True),
        ("10.1.2.3/32", True),
        ("100.64.0.0/10", True),
        ("192.168.0.0/16", True),
        ("fd12:3456::/32", True),
        ("fc00::/7", True),
        ("fec0::/10", True),
        ("::ffff:10.0.0.0/104", True),
        ("0.0.0.0/0", False),
        ("::/0", False),
        ("10.0.0.0/7", False),
        ("192.168.0.0/15", False),
        ("172.0.0.0/11", False),
        ("100.0.0.0/9", False),
        ("::ffff:0.0.0.0/96", False),
        ("fc00::/6", False),
        ("8.8.8.0/24", False),
        ("2606:4700::/32", False),
        ("4000::/16", False),
        ("127.0.0.0/8", False),
        ("169.254.0.0/16", False),
        ("169.254.169.254/32", False),
        ("100.100.100.200/32", False),
        ("::ffff:100.100.100.200/128", False),
        ("fd00:ec2::/32", False),
        ("fd00:ec2::254/128", False),
        ("fe80::/64", False),
    ],
)
def test_rule_is_about_private_addresses_only_inside_one_private_block(text: str, inside: bool) -> None:
    assert inside_one_private_block(ip_network(text)) is inside


def prefixes() -> st.SearchStrategy[Network]:
    """Few bits set, so that prefixes nest and meet."""
    v4 = st.builds(
        lambda bits, length: IPv4Network((bits << 28, length), strict=False), st.integers(0, 15), st.integers(0, 32)
    )
    v6 = st.builds(
        lambda bits, length: IPv6Network((bits << 124, length), strict=False), st.integers(0, 15), st.integers(0, 128)
    )
    return v4 | v6


def looked_up() -> st.SearchStrategy[Address]:
    v4 = st.builds(lambda bits, rest: IPv4Address(bits << 28 | rest), st.integers(0, 15), st.integers(0, 2))
    v6 = st.builds(lambda bits, rest: IPv6Address(bits << 124 | rest), st.integers(0, 15), st.integers(0, 2))
    return v4 | v6 | v4.map(lambda address: IPv6Address(f"::ffff:{address}"))


@given(st.lists(prefixes(), max_size=30), looked_up())
def test_prefix_map_agrees_with_looking_at_every_prefix(networks: list[Network], address: Address) -> None:
    inner = address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
    holding = [(network, i) for i, network in enumerate(networks) if inner in network]
    holding.sort(key=lambda pair: -pair[0].prefixlen)
    found = PrefixMap((network, i) for i, network in enumerate(networks)).covering(address)
    assert found == [i for _, i in holding]


def test_longest_prefix_comes_first() -> None:
    tree = PrefixMap([(ip_network("10.0.0.0/8"), "wide"), (ip_network("10.1.0.0/16"), "narrow")])
    assert tree.covering(IPv4Address("10.1.2.3")) == ["narrow", "wide"]
    assert tree.covering(IPv4Address("10.2.2.3")) == ["wide"]
    assert tree.covering(IPv4Address("11.0.0.1")) == []
    assert tree.covering(IPv6Address("::ffff:10.2.2.3")) == ["wide"]


def test_mapped_prefix_is_its_v4_prefix() -> None:
    assert PrefixMap([(ip_network("::ffff:10.0.0.0/104"), 1)]).covering(IPv4Address("10.9.9.9")) == [1]


def test_empty_prefix_map_finds_nothing() -> None:
    assert PrefixMap[int]().covering(IPv4Address("10.0.0.1")) == []


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "10.0.0.1"])
def test_class_of_a_common_address_costs_under_two_microseconds(benchmark: BenchmarkFixture, text: str) -> None:
    assert benchmark(classify, ip_address(text)) is not Reach.NEVER
