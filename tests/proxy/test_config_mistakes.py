"""What cannot be meant by a configuration: each problem on a line, with who said it and the repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.key import ConfigKey
from proxy.config.keys import KEYS
from proxy.config.reading import read_config
from proxy.options import Misused

POLICY: Mapping[str, object] = {"policy": ("p.yaml",)}


def problems(file: str | None = None, variables: Mapping[str, str] | None = None, /, **flags: object) -> list[str]:
    with pytest.raises(Misused) as caught:
        read_config(file, variables or {}, flags)
    return str(caught.value).splitlines()


# One gate.yaml beside `policy: p.yaml` on its first line: where it is wrong, what is said and what is to be done.
IN_FILE: dict[str, tuple[str, str]] = {
    "an unknown key": ("polcy: x", '2:1: the gate\'s configuration knows no key "polcy"; did you mean "policy"?'),
    "by habit": ("proxy_listen: x", '2:1: the gate\'s configuration knows no key "proxy_listen"; did you mean "proxyL'),
    "a key of limits at the top": ("idleS: 5", '2:1: the gate\'s configuration knows no key "idleS"; idleS stands und'),
    "a key of the top in limits": ("limits: {workers: 2}", '2:10: limits knows no key "workers"; workers stands at th'),
    "a key of no table": ("limits: {idels: 2}", '2:10: limits knows no key "idels"; did you mean "idleS"?'),
    "a duplicate key": ("workers: 1\nworkers: 2", '3:1: duplicate key "workers"; line 2 has it already'),
    "not YAML": ("listen: [::]:15001", '2:10: not YAML: did not find expected node content; an address of IPv6 stands'),
    "IPv6 in quotes, and another mistake": ('listen: "[::]:1" ]', "2:18: not YAML: did not find expected key; while"),
    "an unfinished list": ("listen: [a", "3:1: not YAML: did not find expected ',' or ']'"),
    "an anchor": ("workload: &a x", "2:11: anchor &a"),
    "a list at the top of a part": ("limits: []", "2:9: a list where limits must stand"),
    "a mode that is none": ("mode: sidcar", '2:7: "sidcar" where gateway or sidecar or proxy must stand; did you mean'),
    "no workers": ("workers: 0", '2:10: "0" is not a whole number from 1 to 64'),
    "too many workers": ("workers: 65", '2:10: "65" is not a whole number from 1 to 64'),
    "half a worker": ("workers: 1.5", '2:10: "1.5" is not a whole number from 1 to 64'),
    "workers as text": ('workers: "2"', '2:10: "2" is not a whole number from 1 to 64'),
    "a list of workers": ("workers: [1]", "2:10: a list is not a whole number from 1 to 64"),
    "a negative time": ("graceS: -1", '2:9: "-1" is not a number of seconds from 0 to 3600'),
    "a time without end": ("graceS: .inf", '2:9: ".inf" is not a number of seconds from 0 to 3600'),
    "no time to say hello": ("limits: {helloS: 0}", '2:18: "0" is not a number of seconds from 0.1 to 600'),
    "a time with its unit": ("limits: {idleS: 5m}", '2:17: "5m" is not a number of seconds from 1 to 604800'),
    "a forward to a port of the guard's": (
        'udpForward: {"127.0.0.1:5353": "203.0.113.7:53"}',
        '2:32: "203.0.113.7:53": udp port 53 stays closed; that port is the DNS guard\'s',
    ),
    "an address without a port": ("listen: 10.0.0.1", '2:9: "10.0.0.1" is not an address with its port; write ADDR:PO'),
    "a name to listen on": ("listen: localhost:80", '2:9: "localhost:80" is not an address with its port; write '),
    "a port that is none": ("listen: 10.0.0.1:65536", '2:9: "10.0.0.1:65536" is not an address with its port'),
    "a port in other digits": ("listen: 10.0.0.1:٣", "is not an address with its port"),
    "IPv6 without brackets": ('listen: "::1:80"', '2:9: "::1:80" is not an address with its port'),
    "IPv4 in brackets": ('listen: "[10.0.0.1]:80"', '2:9: "[10.0.0.1]:80" is not an address with its port'),
    "IPv6 without quotes": ("listen: [[::1]:80]", "2:11: not YAML: did not find expected node content; an address of "),
    "a mapping to listen on": ("listen: [{a: b}]", "2:10: a mapping where an address with its port must stand; IPv6 s"),
    "nothing to listen on": ("listen: []", "2:9: an empty list; list something, or remove the key"),
    "nothing": ("pki:", "nothing where text must stand; write a value, or remove the key"),
    "no path": ('pki: ""', '2:6: "" is no path'),
    "a path with NUL": ('pki: "a\\0b"', '2:6: "a\\x00b" is no path'),
    "a name server by name": ("nameservers: dns.example", '2:14: "dns.example" is not the address of a name server; w'),
    "a name server on port 0": ("nameservers: 10.0.0.1:0", '2:14: "10.0.0.1:0" is not the address of a name server'),
    "a host by name": ("hosts: {a.example: b.example}", '2:9: host "a.example": "b.example" is not an address'),
    "a host that is a wildcard": ('hosts: {"*.a.example": 1.1.1.1}', '2:9: host "*.a.example": '),
    "a host without an address": ("hosts: {a.example: []}", "2:20: an empty list"),
    "two ports": ('hosts: {a.b: ["1.1.1.1:1", "1.1.1.2:2"]}', '2:9: host "a.b": a.b has another port already'),
    "one host twice": ("hosts: {a.example: 1.1.1.1, A.example: 1.1.1.2}", '2:29: "A.example" stands here twice; list'),
    "hosts as a list": ("hosts: [a.example=1.1.1.1]", "2:8: a list where hosts must stand; write NAME: ADDRESS"),
    "a proxy over TLS": ("upstreamProxy: {url: 'https://p.example:1'}", '"https://p.example:1" is not the url of a pr'),
    "a proxy without a port": ("upstreamProxy: {url: 'http://p.example'}", '"http://p.example" is not the url of a pr'),
    "a proxy with a path": ("upstreamProxy: {url: 'http://p.example:1/x'}", "is not the url of a proxy; write http://"),
    "a proxy on port 0": ("upstreamProxy: {url: 'http://p.example:0'}", "is not the url of a proxy"),
    "a proxy that is no name": ("upstreamProxy: {url: 'http://a_b..c:1'}", "is not the url of a proxy"),
    "a proxy at 127.1": ("upstreamProxy: {url: 'http://127.1:80'}", "is not the url of a proxy"),
    "direct to every name": ("upstreamProxy: {url: 'http://p:1', direct: '*'}", '2:44: "*" would be every name'),
    "direct with host bits": ("upstreamProxy: {url: 'http://p:1', direct: 10.1.0.0/8}", 'did you mean "10.0.0.0/8"?'),
    "an admin door without a port": ("admin: 127.0.0.1", '2:8: "127.0.0.1" is not an address with its port'),
    "no admin, said wrongly": ("admin: null", '2:8: "null" is not an address with its port'),
    "balancers everywhere": ("proxyProtocolFrom: 0.0.0.0/0", '2:20: "0.0.0.0/0" is everybody, who could all forge'),
    "a quarter of all": ("proxyProtocolFrom: [64.0.0.0/2]", '2:21: "64.0.0.0/2" is everybody'),
    "just too wide": ("proxyProtocolFrom: 10.0.0.0/7", '2:20: "10.0.0.0/7" is everybody'),
    "all of IPv6": ("proxyProtocolFrom: '::/0'", '2:20: "::/0" is everybody'),
    "global unicast": ("proxyProtocolFrom: '2000::/3'", '"2000::/3" is everybody'),
    "all of IPv4, mapped": ("proxyProtocolFrom: '::ffff:0.0.0.0/96'", "is everybody"),
    "half of IPv4, mapped": ("proxyProtocolFrom: '::ffff:0.0.0.0/97'", "is everybody"),
    "all of IPv4, hidden in a narrower prefix": ("proxyProtocolFrom: '::/64'", '"::/64" is everybody'),
    "a mode without its workload": (
        "mode: sidecar",
        "2:7: mode sidecar does not know whose rules hold for its pod; say --workload NAME, OUTGATE_WORKLOAD, or workl",
    ),
    "a proxy with redirected connections": (
        "mode: proxy\nlisten: 127.0.0.1:1",
        "3:9: mode proxy takes no redirected connections; say --proxy-listen, or mode gateway",
    ),
    "a proxy that is asked for names": (
        "mode: proxy\ndnsListen: 127.0.0.1:1",
        "3:12: clients of mode proxy send names and ask for none; say mode gateway",
    ),
    "a proxy that hears of lookups": (
        "mode: proxy\ndnstapListen: tap.sock",
        "3:15: clients of mode proxy look nothing up for themselves; say mode gateway",
    ),
    "openings in another mode": ("mode: proxy\nopenings: true", "3:11: in mode proxy the gate carries everything"),
    "openings without lookups": ("openings: true", "2:11: openings follow lookups, and the gate hears of none"),
    "search domains without questions": ("dnsSearch: a.example", "2:12: dnsSearch is about DNS questions, and none"),
    "a search domain that is none": ("dnsSearch: 10.0.0.1", "2:12: "),
    "a zone without a server": ("dnsForward: {a.example: []}", "2:"),
    "a zone that is no name": ("dnsForward: {10.0.0.1: 10.0.0.2}", "2:14: "),
    "a zone twice": (
        "dnsForward: {a.example: 10.0.0.1, A.example: 10.0.0.2}",
        '2:35: "A.example" stands here twice; list its servers in one place',
    ),
    "a server that is the gate itself": (
        "dnsListen: 127.0.0.1:5300\nnameservers: 127.0.0.1:5300",
        "3:14: 127.0.0.1:5300 is this gate's own dnsListen; name the site's server",
    ),
    "a zone's server that is the gate itself": (
        "dnsListen: 127.0.0.1:5300\ndnsForward: {a.example: 127.0.0.1:5300}",
        "127.0.0.1:5300 is this gate's own dnsListen",
    ),
    "a port for DNS and the proxy": (
        "dnsListen: 127.0.0.1:1\nproxyListen: 127.0.0.1:1",
        "127.0.0.1:1 is taken twice, by proxyListen and dnsListen",
    ),
    "credentials for nobody": (
        "credentials: users",
        "2:14: credentials is for clients of a proxy, and there is none; say --proxy-listen ADDR:PORT, OUTGATE_PROXY_L",
    ),
    "balancers before nothing": ("proxyProtocolFrom: 10.0.0.0/8", "2:20: proxyProtocolFrom is for clients of a proxy"),
    "direct past nothing": (
        "upstreamProxy: {direct: a.example}",
        "2:25: upstreamProxy.direct without the proxy it is about; say --upstream-proxy URL, OUTGATE_UPSTREAM_PROXY, o",
    ),
    "a password for nobody": ("upstreamProxy: {credentials: x}", "2:30: upstreamProxy.credentials without the proxy"),
    "an address twice": (
        "listen: [10.0.0.1:1, 10.0.0.1:1]",
        "2:9: 10.0.0.1:1 is taken twice, by listen and listen; say another port",
    ),
    "one address, two spellings": (
        'listen: ["[::1]:1"]\nproxyListen: "[0:0:0:0:0:0:0:1]:1"',
        "3:14: [::1]:1 is taken twice, by listen and proxyListen",
    ),
    "the admin port": ("listen: 127.0.0.1:9901", "2:9: 127.0.0.1:9901 is taken twice, by listen and admin"),
    "the default door": ('admin: "[::]:15001"', "2:8: [::]:15001 is taken twice, by listen and admin"),
    "one source with all inspected": ("limits: {maxPerSource: 4097}", "4097 for one source, where all together may"),
    "one source with more than all": (
        "limits: {maxConnections: 10, maxPerSource: 11}",
        "2:44: 11 for one source, where all together may have 10; say --max-connections N, OUTGATE_MAX_CONNECTIONS, or",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_FILE)
def test_a_file_that_cannot_be_meant_says_where_and_why(tmp_path: Path, case: str) -> None:
    text, said = IN_FILE[case]
    (tmp_path / "gate.yaml").write_text(f"policy: p.yaml\n{text}\n", encoding="utf-8")
    [problem] = problems(str(tmp_path / "gate.yaml"))

    assert problem.startswith(f"{tmp_path}/gate.yaml:")
    assert said in problem


AS_TEXT: dict[str, tuple[dict[str, str], dict[str, object], str]] = {
    "a flag": ({}, {"workers": "many"}, '--workers: "many" is not a whole number from 1 to 64'),
    "a variable": ({"OUTGATE_WORKERS": "0"}, {}, 'OUTGATE_WORKERS: "0" is not a whole number from 1 to 64'),
    "a variable that a flag overrules": (
        {"OUTGATE_WORKERS": "0"}, {"workers": "2"}, 'OUTGATE_WORKERS: "0" is not a whole number from 1 to 64',
    ),
    "one of several": ({}, {"listen": ("127.0.0.1:1", "::1")}, '--listen: "::1" is not an address with its port; writ'),
    "one in a variable": ({"OUTGATE_LISTEN": "127.0.0.1:1,x"}, {}, 'OUTGATE_LISTEN: "x" is not an address with its po'),
    "only commas": ({"OUTGATE_LISTEN": ","}, {}, "OUTGATE_LISTEN: an empty list"),
    "a host": ({}, {"hosts": ("api.example",)}, '--host: "api.example": write NAME=ADDRESS or NAME=ADDRESS:PORT'),
    "a port without end": ({}, {"admin": "1.1.1.1:" + "9" * 5000}, "is not an address with its port"),
    "a number without end": ({}, {"workers": "9" * 5000}, "is not a whole number from 1 to 64"),
    "lines in a value": ({}, {"workload": "a\noutgate: forged"}, '--workload: "a\\noutgate: forged" is not one line'),
    "a mode": ({"OUTGATE_MODE": "gate"}, {}, 'OUTGATE_MODE: "gate" where gateway or sidecar or proxy must stand'),
    "a sidecar without its workload": ({"OUTGATE_MODE": "sidecar"}, {}, "OUTGATE_MODE: mode sidecar does not know who"),
    "everybody": ({"OUTGATE_PROXY_PROTOCOL_FROM": "10.0.0.1 0.0.0.0/1"}, {}, '"0.0.0.0/1" is everybody'),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_TEXT)
def test_text_that_cannot_be_meant_says_who_and_why(case: str) -> None:
    variables, flags, said = AS_TEXT[case]
    [problem] = problems(None, variables, **POLICY, **flags)

    assert said in problem


def test_a_policy_is_required() -> None:
    assert problems() == ["no policy: say --policy FILE, OUTGATE_POLICY, or policy in gate.yaml"]


@pytest.mark.parametrize(
    "password",
    ["http://user:s3cr3t@proxy.example:3128", "http://s3cr3t@[::1]:1", "s3cr3t@proxy"],
    ids=["both", "user", "bare"],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(password: str) -> None:
    [problem] = problems(None, {}, **POLICY, upstream_proxy_url=password)

    assert "put NAME:PASSWORD into a file" in problem
    assert "s3cr3t" not in problem


def test_every_problem_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("workers: 0\nlimits:\n  idleS: x\n  wrong: 1\n")

    said = problems(str(tmp_path / "gate.yaml"), {"OUTGATE_GRACE_S": "x"}, admin="y", listen=("z", "a"))

    assert [line.removeprefix(str(tmp_path)).split(": ")[0] for line in said] == [
        "/gate.yaml:1:10", "/gate.yaml:3:10", "/gate.yaml:4:3", "OUTGATE_GRACE_S", "--listen", "--listen", "--admin",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"workers: \xff"), "gate.yaml:1:10: byte 0xff is not UTF-8"),
        (lambda path: path.write_text("a: b\n---\nc: d"), "second document in one file"),
        (lambda path: path.write_text("[" * 100), "nested deeper than 20 levels"),
        (lambda path: path.write_text("just text"), "text where the gate's configuration must stand"),
    ],
    ids=["missing", "a directory", "not UTF-8", "two documents", "deep", "no mapping"],
)
def test_a_file_that_cannot_be_read_is_misuse(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "gate.yaml"
    make(path)
    [problem] = problems(str(path), **POLICY)

    assert said in problem


@pytest.mark.parametrize(
    "prefix", ["10.0.0.0/8", "2001::/16", "::ffff:10.0.0.0/104", "::/96", "::1", "fd00::/16", "0.0.0.0/8"]
)
def test_balancers_may_be_as_wide_as_a_site(prefix: str) -> None:
    config = read_config(None, {"OUTGATE_PROXY_PROTOCOL_FROM": prefix}, {**POLICY, "proxy_listen": ("127.0.0.1:0",)})

    assert len(config.proxy_protocol_from) == 1


def test_port_0_is_another_port_each_time() -> None:
    flags = {
        **POLICY,
        "listen": ("127.0.0.1:0", "127.0.0.1:0"),
        "proxy_listen": ("127.0.0.1:0",),
        "admin": "127.0.0.1:0",
    }

    assert len(read_config(None, {}, flags).doors()) == 3


@given(key=st.sampled_from(KEYS), text=st.text(max_size=40))
def test_no_text_is_more_than_misuse(key: ConfigKey, text: str) -> None:
    """Whatever stands in a variable, the gate starts with it or says in lines of its own why not."""
    variables = {"OUTGATE_POLICY": "p.yaml", key.variable: text}
    said = ""
    try:
        read_config(None, variables, {})
    except Misused as error:
        said = str(error)
    assert all(line.isprintable() for line in said.split("\n"))
