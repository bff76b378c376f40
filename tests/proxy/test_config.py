"""The configuration of a gate: said by flag, variable or file, and which of them wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from ipaddress import ip_address, ip_network
from operator import attrgetter
from pathlib import Path

import pytest

from policies.hostnames import Hostname, Pattern
from proxy.config import IN_CLUSTER, Config, Door, DoorKind, GateMode, Kubernetes, OnLogFailure, UpstreamProxy
from proxy.config.key import ConfigKey
from proxy.config.keys import KEYS
from proxy.config.reading import near_misses, read_config
from proxy.hosts import HostsEntry
from proxy.inspector.handover import Bounds
from proxy.limits import Limits
from tests.proxy.config_spellings import ids, in_file, in_flag, in_variable, needed

POLICY: Mapping[str, object] = {"policy": ("policy.yaml",)}
EVERYTHING = """
mode: gateway
policy: [policy.yaml, /etc/outgate/team.yaml]
tags: tags.json
workload: weather
listen: ["[::]:15001", 10.0.0.1:0]
proxyListen: 127.0.0.1:3128
credentials: users
proxyProtocolFrom: [10.0.5.0/28, "2001:db8::7"]
workers: 4
nameservers: [10.0.0.53, "[fd00::53]:5353", "fe80::1%eth0"]
hosts:
  API.example: 10.0.0.7
  db.example: ["10.0.0.8:5433", "[::1]:5433"]
upstreamProxy:
  url: http://Proxy.corp.example:3128
  credentials: ../secret
  direct: ["*.corp.example", intra.example, 10.0.0.0/8, "2001:db8::/32"]
upstreamCa: roots.pem
pki: pki
log: log.jsonl
onLogFailure: deny
admin: none
adminToken: token
drainS: 2.5
graceS: 0.5
limits: {maxConnections: 1000, idleS: 60, headS: 3}
"""


def read(directory: Path, text: str, **flags: object) -> Config:
    path = directory / "gate.yaml"
    path.write_text(text)
    return read_config(str(path), {}, flags)


def test_a_file_says_every_key(tmp_path: Path) -> None:
    def inside(name: str) -> str:
        return str(tmp_path / name)

    assert read(tmp_path, EVERYTHING) == Config(
        mode=GateMode.GATEWAY,
        policy=(inside("policy.yaml"), "/etc/outgate/team.yaml"),
        tags=(inside("tags.json"),),
        workload="weather",
        listen=(("::", 15001), ("10.0.0.1", 0)),
        proxy_listen=(("127.0.0.1", 3128),),
        credentials=inside("users"),
        proxy_protocol_from=(ip_network("10.0.5.0/28"), ip_network("2001:db8::7")),
        workers=4,
        nameservers=(("10.0.0.53", 53), ("fd00::53", 5353), ("fe80::1%eth0", 53)),
        hosts={
            Hostname("api.example"): HostsEntry((ip_address("10.0.0.7"),)),
            Hostname("db.example"): HostsEntry((ip_address("10.0.0.8"), ip_address("::1")), 5433),
        },
        upstream_proxy=UpstreamProxy(
            "proxy.corp.example",
            3128,
            inside("../secret"),
            (
                Pattern(Hostname("corp.example"), wildcard=True),
                Pattern(Hostname("intra.example"), wildcard=False),
                ip_network("10.0.0.0/8"),
                ip_network("2001:db8::/32"),
            ),
        ),
        upstream_ca=inside("roots.pem"),
        pki=inside("pki"),
        log=inside("log.jsonl"),
        on_log_failure=OnLogFailure.DENY,
        admin=None,
        admin_token=inside("token"),
        drain_s=2.5,
        grace_s=0.5,
        limits=Limits(max_connections=1000, max_per_source=500, idle_s=60),
        bounds=Bounds(connections=1000, per_source=500, idle_s=60, head_s=3),
    )


def test_what_is_not_said_is_as_the_model_has_it() -> None:
    assert read_config(None, {}, {"policy": ("/p.yaml",)}) == Config(policy=("/p.yaml",))


@pytest.mark.parametrize("key", KEYS, ids=ids())
def test_a_key_means_the_same_in_all_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: ConfigKey
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.yaml").write_text(in_file(key))
    rest = needed(key)
    unsaid = Config(policy=())

    by_file = read_config("gate.yaml", {}, rest)
    by_variable = read_config(None, in_variable(key), rest)
    by_flag = read_config(None, {}, {**rest, **in_flag(key)})

    assert by_file == by_variable == by_flag
    for name in key.fields:
        if not name.startswith(("upstream_proxy.", "kubernetes.")):
            assert attrgetter(name)(by_file) != attrgetter(name)(unsaid)
    if key.path.startswith("upstreamProxy."):
        assert by_file.upstream_proxy is not None
    if key.path.startswith("kubernetes."):
        assert by_file.kubernetes not in (None, Kubernetes()) or key.example == IN_CLUSTER


@pytest.mark.parametrize("key", KEYS, ids=ids())
def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: ConfigKey
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.yaml").write_text(in_file(key))
    other = OTHER[key.path]
    rest = needed(key)
    by_file = read_config("gate.yaml", {}, rest)
    wanted = read_config(None, {key.variable: other}, rest)

    assert wanted != by_file
    assert read_config("gate.yaml", {key.variable: other}, rest) == wanted
    assert read_config("gate.yaml", in_variable(key), {**rest, key.argument: (other,) if key.many else other}) == wanted
    assert read_config("gate.yaml", {key.variable: other}, {**rest, **in_flag(key)}) == by_file


OTHER = {
    "kubernetes.api": "other",
    "kubernetes.onStale": "deny",
    "kubernetes.staleS": "99",
    "kubernetes.tokenAudience": "other",
    "mode": "gateway",
    "policy": "other.yaml",
    "tags": "other.json",
    "workload": "other",
    "listen": "127.0.0.1:1",
    "proxyListen": "127.0.0.1:1",
    "dnsListen": "127.0.0.1:1",
    "dnstapListen": "other.sock",
    "dnsSearch": "other.example",
    "openings": "false",
    "dnsForward": "other.example=192.0.2.53",
    "credentials": "other",
    "proxyProtocolFrom": "192.0.2.0/24",
    "workers": "3",
    "nameservers": "192.0.2.53",
    "hosts": "other.example=192.0.2.1",
    "upstreamProxy.url": "http://other.example:1",
    "upstreamProxy.credentials": "other",
    "upstreamProxy.direct": "other.example",
    "upstreamCa": "other.pem",
    "pki": "other",
    "httpHost": "auto",
    "addons": "other.py",
    "log": "-",
    "onLogFailure": "continue",
    "admin": "none",
    "adminToken": "other",
    "drainS": "2",
    "graceS": "1.5",
    "limits.totalS": "7.5",
    "limits.leastRate": "0",
    "limits.maxWaiting": "2000000",
    "limits.maxConnections": "1234",
    "limits.maxPerSource": "123",
    "limits.maxHello": "2048",
    "udpListen": "127.0.0.1:7",
    "udpForward": "127.0.0.1:8=other.example:8",
    "limits.udpIdleS": "9",
    "limits.udpSessions": "10",
    "limits.udpPerSource": "11",
    "limits.dnsNewNames": "7",
    "limits.dnsNewNamesBurst": "8",
    "limits.dnsPerSource": "9",
    "limits.dnsLabels": "2",
    "limits.maxAddresses": "2",
    **{f"limits.{name}": "7.5" for name in ("helloS", "headS", "silenceS", "resolveS", "dialS", "idleS")},
}


def test_every_field_of_the_model_can_be_said() -> None:
    said = {name.partition(".")[0] for key in KEYS for name in key.fields}

    assert said == {field.name for field in fields(Config)}


def test_no_two_keys_share_a_name() -> None:
    for name in ("path", "flag", "variable", "argument"):
        names = [getattr(key, name) for key in KEYS]
        assert len(set(names)) == len(names), name


def test_paths_in_a_file_are_relative_to_it_and_others_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "gate.yaml").write_text("policy: p.yaml\npki: ../pki\n")
    monkeypatch.chdir(tmp_path)

    config = read_config("conf/gate.yaml", {"OUTGATE_TAGS": "t.json:/u.json"}, {"log": "log"})

    assert config.policy == ("conf/p.yaml",)  # cited in every record: as the operator named it
    assert config.pki == f"{tmp_path}/conf/../pki"
    assert config.tags == ("t.json", "/u.json")
    assert config.log == f"{tmp_path}/log"


def test_a_dash_is_standard_error_for_the_log_and_a_file_elsewhere() -> None:
    config = read_config(None, {}, {"log": "-", "policy": ("-",)})

    assert config.log == "-"
    assert config.policy == ("-",)


@pytest.mark.parametrize(
    ("variables", "flags", "hosts"),
    [
        ({"OUTGATE_HOST": "a.example=1.1.1.1,b.example=[::1]:80"}, {}, ["a.example", "b.example"]),
        ({"OUTGATE_HOST": " a.example=1.1.1.1  b.example=2.2.2.2 "}, {}, ["a.example", "b.example"]),
        ({}, {"hosts": ("a.example=1.1.1.1", "a.example=2.2.2.2")}, ["a.example"]),
    ],
    ids=["commas", "spaces", "one name twice"],
)
def test_hosts_are_said_as_text(variables: dict[str, str], flags: dict[str, object], hosts: list[str]) -> None:
    config = read_config(None, variables, {**POLICY, **flags})

    assert list(config.hosts) == hosts
    if flags:
        assert config.hosts[Hostname("a.example")].addresses == (ip_address("1.1.1.1"), ip_address("2.2.2.2"))


def test_an_empty_variable_and_an_unsaid_flag_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("policy: p.yaml\nworkers: 3\nlisten: 127.0.0.1:1")

    config = read_config(str(path), {"OUTGATE_WORKERS": "", "OUTGATE_LISTEN": ""}, {"workers": None, "listen": ()})

    assert (config.workers, config.listen) == (3, (("127.0.0.1", 1),))


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "", policy=("/p.yaml",)) == Config(policy=("/p.yaml",))


def test_text_that_looks_like_a_number_is_a_name_on_the_command_line() -> None:
    config = read_config(None, {"OUTGATE_WORKLOAD": "123"}, POLICY)

    assert config.workload == "123"


def test_variables_that_are_no_keys_are_not_read() -> None:
    others = {"OUTGATE_THING": "1", "PATH": "/bin", "OUTGATE": "x", "OUTGATE_": "y"}

    assert read_config(None, others, {"policy": ("/p.yaml",)}) == Config(policy=("/p.yaml",))


def test_a_variable_that_is_nearly_ours_is_warned_of() -> None:
    warned = near_misses({"OUTGATE_POLCY": "p.yaml", "OUTGATE_PROXYLISTEN": "x", "OUTGATE_WORKLAOD": "", "POLCY": "z"})

    assert list(warned) == [
        'OUTGATE_POLCY is not read; did you mean "OUTGATE_POLICY"?',
        'OUTGATE_PROXYLISTEN is not read; did you mean "OUTGATE_PROXY_LISTEN"?',
        'OUTGATE_WORKLAOD is not read; did you mean "OUTGATE_WORKLOAD"?',
    ]


def test_what_kubernetes_says_of_a_service_named_outgate_is_no_near_miss() -> None:
    links = (
        "SERVICE_HOST SERVICE_PORT SERVICE_PORT_ADMIN PORT PORT_80_TCP PORT_80_TCP_PROTO PORT_80_TCP_ADDR ADMIN_PORT"
    )

    assert list(near_misses({f"OUTGATE_{link}": "x" for link in links.split()})) == []


def test_a_variable_that_is_read_is_no_near_miss() -> None:
    assert list(near_misses(dict.fromkeys(("OUTGATE_CONFIG", *(key.variable for key in KEYS)), "x"))) == []


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "of_one"), [("1000", 500), ("1", 1), ("3", 1)])
def test_one_source_has_half_of_all_connections_unless_told(most: str, of_one: int) -> None:
    """Else a limit below the default of one source would let it take every connection."""
    config = read_config(None, {}, {**POLICY, "limits_max_connections": most})

    assert (config.limits.max_per_source, config.bounds.per_source) == (of_one, of_one)


def test_among_the_defaults_one_source_has_half_as_well() -> None:
    config = Config(policy=())

    assert config.limits.max_per_source * 2 == config.limits.max_connections
    assert config.bounds.per_source * 2 == config.bounds.connections


# --- doors -----------------------------------------------------------------------------------------------------------

ANY6, ANY4 = ("::", 15001), ("0.0.0.0", 15001)
LO6, LO4, PROXY = ("::1", 15001), ("127.0.0.1", 15001), ("127.0.0.1", 3128)


@pytest.mark.parametrize(
    ("mode", "has_ipv6", "doors"),
    [
        ("gateway", True, [Door(ANY6)]),
        ("gateway", False, [Door(ANY4)]),
        ("sidecar", True, [Door(LO4), Door(LO6)]),
        ("sidecar", False, [Door(LO4)]),
        ("proxy", True, [Door(PROXY, DoorKind.PROXY)]),
        ("proxy", False, [Door(PROXY, DoorKind.PROXY)]),
    ],
)
def test_each_mode_has_doors_by_default(mode: str, has_ipv6: bool, doors: list[Door]) -> None:
    config = read_config(None, {}, {**POLICY, "mode": mode, "workload": "w"})

    assert list(config.doors(has_ipv6=has_ipv6)) == doors


def test_a_door_that_was_asked_for_stays_on_a_host_without_ipv6() -> None:
    flags = {**POLICY, "listen": ("[::]:15001", "[::1]:1"), "proxy_listen": ("[::1]:2",)}
    config = read_config(None, {}, flags)

    asked = [Door(ANY6), Door(("::1", 1)), Door(("::1", 2), DoorKind.PROXY)]
    assert list(config.doors(has_ipv6=False)) == asked


def test_a_gateway_that_is_a_proxy_too_keeps_its_own_door() -> None:
    config = read_config(None, {}, {**POLICY, "proxy_listen": ("127.0.0.1:3128",)})

    assert list(config.doors()) == [Door(ANY6), Door(PROXY, DoorKind.PROXY)]
