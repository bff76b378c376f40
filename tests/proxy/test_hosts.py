"""What `--host`, a hosts file and resolv.conf say, and what they cannot mean."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.hosts import (
    HostsEntry,
    MalformedHostOption,
    parse_host_option,
    parse_host_options,
    read_hosts_file,
    system_nameservers,
    system_search,
)

NAME = Hostname("api.example")


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


@pytest.mark.parametrize(
    ("text", "name", "entry"),
    [
        ("api.example=127.0.0.1", NAME, HostsEntry(addresses("127.0.0.1"))),
        ("API.Example.=127.0.0.1:8443", NAME, HostsEntry(addresses("127.0.0.1"), 8443)),
        ("api.example=::1", NAME, HostsEntry(addresses("::1"))),
        ("api.example=[::1]", NAME, HostsEntry(addresses("::1"))),
        ("api.example=[::1]:8443", NAME, HostsEntry(addresses("::1"), 8443)),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_a_host_option_is_read(text: str, name: Hostname, entry: HostsEntry) -> None:
    assert parse_host_option(text) == (name, entry)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("api.example", "write NAME=ADDRESS or NAME=ADDRESS:PORT"),
        ("=127.0.0.1", "the name is empty"),
        ("*.example=127.0.0.1", '"*.example"'),
        ("127.0.0.1=127.0.0.1", "is an address, not a name"),
        ("api.example=", '"" is not an address; NAME=ADDRESS takes an IPv4 or IPv6 address'),
        ("api.example=other.example", '"other.example" is not an address'),
        ("api.example=other.example:80", '"other.example" is not an address'),
        ("api.example=127.1", '"127.1" is not an address'),
        ("api.example=::1:x", "write [ADDRESS]:PORT for IPv6"),
        ("api.example=[::1]844", '"[::1]844" is not an address'),
        ("api.example=[::1", "is not an address"),
        ("api.example=fe80::1%eth0", '"fe80::1%eth0" is not an address'),
        ("api.example=127.0.0.1:", '"" is not a port from 1 to 65535'),
        ("api.example=127.0.0.1:0", '"0" is not a port'),
        ("api.example=127.0.0.1:65536", '"65536" is not a port'),
        ("api.example=127.0.0.1:٣", '"٣" is not a port'),
        ("api.example=[::1]:" + "9" * 5000, "is not a port"),
    ],
    ids=lambda text: text[:40],
)
def test_a_host_option_that_cannot_be_meant_says_why(text: str, why: str) -> None:
    with pytest.raises(MalformedHostOption) as caught:
        parse_host_option(text)
    assert str(caught.value).startswith(f'--host "{text}": ')
    assert why in str(caught.value)


def test_host_options_of_one_name_add_up() -> None:
    options = [
        "api.example=127.0.0.1:8443",
        "api.example=[::1]:8443",
        "b.example=127.0.0.2",
        "api.example=127.0.0.1:8443",
    ]
    assert parse_host_options(options) == {
        NAME: HostsEntry(addresses("127.0.0.1", "::1"), 8443),
        Hostname("b.example"): HostsEntry(addresses("127.0.0.2")),
    }


def test_host_options_of_one_name_have_one_port() -> None:
    with pytest.raises(MalformedHostOption, match="another port already"):
        parse_host_options(["api.example=127.0.0.1:8443", "api.example=::1"])


def test_a_hosts_file_is_read_with_all_its_oddities(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(
        b"127.0.0.1\tlocalhost   Api.Example # comment\n# 10.0.0.1 no.example\n::1 localhost\n10.0.0.300 bad.example\n"
        b"fe80::1%lo0 scoped.example\n10.0.0.5\n10.0.0.6 \xff.example -bad- good.example\n127.0.0.1 localhost\n\n"
    )
    assert read_hosts_file(str(path)) == {
        "localhost": addresses("127.0.0.1", "::1"),
        "api.example": addresses("127.0.0.1"),
        "good.example": addresses("10.0.0.6"),
    }


RESOLV_CONF = """\
# nameserver 10.0.0.1
; nameserver 10.0.0.2
domain old.example
nameserver 10.0.0.3  # the first
nameserver fe80::1%eth0
nameserver
nameserver not-an-address
search Corp.Example svc.cluster.local -bad-
nameserver 2001:db8::53
nameserver 10.0.0.4
options ndots:5
"""


def test_resolv_conf_names_at_most_three_servers(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(RESOLV_CONF)
    assert system_nameservers(str(path)) == [("10.0.0.3", 53), ("fe80::1%eth0", 53), ("2001:db8::53", 53)]
    assert system_search(str(path)) == ("corp.example", "svc.cluster.local")


@pytest.mark.parametrize("text", [None, "", "search example\n", "nameserver nonsense\n"], ids=str)
def test_without_a_nameserver_the_machine_itself_is_asked(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    assert system_nameservers(str(path)) == [("127.0.0.1", 53), ("::1", 53)]


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert read_hosts_file(str(tmp_path / "hosts")) == {}
    assert system_search(str(tmp_path / "resolv.conf")) == ()
