"""A compiled policy judges as the one it was written from, costs nothing to read, and cannot be changed or forged."""

from __future__ import annotations

import fcntl
import gc
import os
from dataclasses import replace
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given

from policies.addresses import PrefixMap
from policies.engine import carries_plain, decide, expect, identify
from policies.hostnames import Hostname, Pattern
from policies.index import Policy
from policies.model import Attempt, HostRule, Mode, NameRule, Place, Reason, Stage, Tls, TransportRule
from proxy import compiled
from proxy.compiled import SEALS, NotCompiled, duplicate, read_policy, write_policy
from proxy.wire.rows import MalformedRow, read_row, write_row
from tests.builders import attempt, policy, verdict
from tests.policies.test_engine_oracle import ADDRESSES, NAMES, PORTS, many, policies, some_attempts

EVERYTHING = """
    version: 1
    guard:
      - {host: "*.paste.example", deny: all}
      - {host: api.example, deny: ["DELETE /**"]}
    workloads:
      app:
        match: {address: [10.1.0.0/16, "2001:db8::/48", 10.1.2.0/24]}
        logQuery: true
        ech: allow
        rules:
          - {host: api.example, ports: [80, 443, 8000-8100], plain: [8080], tls: inspect, name: api, owner: us,
             reason: weather, until: 2027-01-31, allow: ["GET,HEAD /a/*", "* /b/**"], deny: ["POST /a/x"],
             private: true, encodedSlash: literal, ech: deny, http2: false, upgrade: [websocket], upstreamPool: true}
          - {host: "*.wild.example", name: "größer"}
          - {host: closed.wild.example, deny: all}
          - {tcp: "db.example:5432"}
          - {tcp: {address: [10.20.0.0/16, "2001:db8:1::/48"], ports: [6379, 7000-7010]}}
          - {udp: {host: time.example, ports: [3478], budget: 10MiB/h, quic: sni}}
          - {ntp: ntp.example}
          - {dns: "*.svc.example"}
          - {dns: svc.example}
      builder:
        match: {user: ci}
        mode: audit
        rules: []
      pod:
        match: {kubernetes: {namespace: n, serviceAccount: s, labels: {a: b}}}
        rules: [{host: x.example}]
    tests:
      app: {allow: ["GET https://api.example/b/1"]}
"""


def again(of: Policy) -> Policy:
    with write_policy(of) as file:
        return read_policy(file)


def memory(content: bytes, *, seals: int = SEALS) -> BinaryIO:
    file = open(os.memfd_create("policy", os.MFD_ALLOW_SEALING), "w+b")  # noqa: SIM115 - the test closes it
    file.write(content)
    file.flush()
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def content_of(of: Policy) -> bytes:
    with write_policy(of) as file:
        return os.pread(file.fileno(), 1 << 20, 0)


def index_of(of: Policy) -> dict[str, object]:
    """Every table of every workload as plain values."""
    found: dict[str, object] = {"users": dict(of.users), "sources": prefixes(of.sources)}
    for name, one in of.index.items():
        found[name] = (
            one.workload,
            dict(one.hosts.exact),
            dict(one.hosts.wildcards),
            one.hosts.closes,
            [
                (dict(table.names), prefixes(table.prefixes), table.ports, table.prefix_ports, table.quic_ports)
                for table in (one.tcp, one.udp)
            ],
            dict(one.ntp),
            dict(one.dns),
            one.host_ports,
            one.plain_ports,
            frozenset(one.ancestors),
        )
    return found


def prefixes(of: PrefixMap[Any]) -> object:  # Any: the values are compared, whatever they are
    return [[(shift, dict(table)) for shift, table in tables] for tables in (of.v4, of.v6)]


# --- the same policy -----------------------------------------------------------------------------------------------


@many(150)
@given(policies(), some_attempts)
def test_a_compiled_policy_gives_the_verdicts_of_the_one_it_was_written_from(of: Policy, tried: list[Attempt]) -> None:
    read = again(of)
    for one in tried:
        assert decide(read, one) == decide(of, one), one
    for port in PORTS:
        for workload in ("app", "unknown", "nobody"):
            assert expect(read, workload, port) is expect(of, workload, port)
            assert carries_plain(read, workload, port) is carries_plain(of, workload, port)


@many(60)
@given(policies())
def test_its_tables_hold_what_the_originals_hold(of: Policy) -> None:
    read = again(of)
    assert index_of(read) == index_of(of)
    for name in map(Hostname, NAMES):
        assert read.guard_table.matching(name) == of.guard_table.matching(name)
        assert read.index["app"].hosts.matching(name) == of.index["app"].hosts.matching(name)
    for address in ADDRESSES:
        assert read.index["app"].tcp.prefixes.covering(address) == of.index["app"].tcp.prefixes.covering(address)


def test_every_key_of_the_language_is_kept() -> None:
    of = policy(EVERYTHING)
    read = again(of)
    assert read == of
    assert index_of(read) == index_of(of)
    assert list(read.workloads) == list(of.workloads) == list(read.index)
    assert read.guard == of.guard
    assert read.tests == of.tests
    assert (read.workloads["app"].log_query, read.index["builder"].workload.mode) == (True, Mode.AUDIT)


def test_it_knows_whose_a_source_is() -> None:
    read = again(policy(EVERYTHING))
    assert identify(read, ip_address("10.1.2.3")) == "app"
    assert identify(read, ip_address("192.0.2.1")) == "unknown"
    assert identify(read, ip_address("192.0.2.1"), "ci") == "builder"
    assert identify(read, ip_address("192.0.2.1"), "\udcff") == "unknown"


def test_a_key_of_one_table_opens_no_other() -> None:
    """Names of users, workloads and hosts lie in one hash table."""
    read = again(policy(EVERYTHING))
    assert "api.example" in read.index["app"].hosts.exact
    for stranger in (
        read.users,
        read.index["app"].hosts.wildcards,
        read.index["app"].ntp,
        read.index["pod"].hosts.exact,
    ):
        assert "api.example" not in stranger
    assert "app" in read.index
    assert read.index.get("api.example") is None
    with pytest.raises(KeyError):
        read.workloads["nobody"]


def test_the_generation_goes_along() -> None:
    assert again(replace(policy(EVERYTHING), generation="0123456789ab")).generation == "0123456789ab"


def test_what_was_read_can_be_compiled_again() -> None:
    of = policy(EVERYTHING)
    assert again(again(of)) == of


def test_a_policy_lives_without_the_file_it_was_read_from() -> None:
    file = write_policy(policy(EVERYTHING))
    other = duplicate(file)
    read = read_policy(file)
    file.close()
    other.close()
    assert verdict(read, "tls://a.wild.example").reason is Reason.RULE


def test_a_policy_that_nobody_holds_is_gone_at_once() -> None:
    """Reloads of 100,000 rules are 40 MB each, and a process may go for hours without looking for cycles."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:policy")

    before = mapped()
    gc.disable()
    try:
        read = again(policy(EVERYTHING))
        assert verdict(read, "GET https://api.example/b/1").reason is Reason.RULE
        assert verdict(read, "tls://unknown.example").reason is Reason.NO_RULE
        assert identify(read, ip_address("10.1.2.3"), "ci") == "builder"
        assert mapped() == before + 1
        del read
        assert mapped() == before
    finally:
        gc.enable()


def test_names_that_nobody_asks_for_again_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KNOWN", 16)
    read = again(policy(EVERYTHING))
    for number in range(200):
        assert verdict(read, f"tls://n{number}.wild.example").reason is Reason.RULE
        assert verdict(read, f"tls://n{number}.attacker.example").reason is Reason.NO_RULE
    reader = read.index["app"].hosts.exact._reader  # type: ignore[attr-defined]  # what is bounded is inside
    assert len(reader._known) <= 16


def test_a_rule_with_many_prefixes_is_read_once() -> None:
    """A service tag has thousands: a copy for each address asked would be gigabytes."""
    networks = tuple(ip_network((number << 8 | 1 << 24, 24)) for number in range(3000))
    rule = TransportRule(
        place=Place("p.yaml", 1), label="app/rules[0]", stage=Stage.TCP, host=None, networks=networks, ports=()
    )
    assert read_row(write_row(rule)) == rule
    listed = ", ".join(map(str, networks))
    read = again(policy(f"version: 1\nworkloads: {{app: {{rules: [{{tcp: {{address: [{listed}], ports: 22}}}}]}}}}"))
    covering = read.index["app"].tcp.prefixes.covering
    assert covering(networks[7][9])[0][0] is covering(networks[2900][9])[0][0]
    assert verdict(read, "tcp://1.0.7.9:22").reason is Reason.RULE


# --- attacks -------------------------------------------------------------------------------------------------------


def test_nobody_changes_a_policy_after_it_was_written() -> None:
    """Each process that serves holds a descriptor: none of them may write, grow or shrink what the others judge by."""
    with write_policy(policy(EVERYTHING)) as file:
        for change in (lambda: os.pwrite(file.fileno(), b"x", 0), lambda: os.ftruncate(file.fileno(), 0)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, 0)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK], ids=["writable", "shrinkable"])
def test_memory_that_could_still_change_is_refused(missing: int) -> None:
    """Shrunk under a reader it would end it (SIGBUS); written to, it would change verdicts."""
    with memory(content_of(policy(EVERYTHING)), seals=SEALS & ~missing) as file, pytest.raises(NotCompiled):
        read_policy(file)


def test_a_file_on_disk_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "policy", "w+b") as file:
        file.write(content_of(policy(EVERYTHING)))
        file.flush()
        with pytest.raises(NotCompiled):
            read_policy(file)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"version: 1\n" * 100, content_of(policy(EVERYTHING))[:200]],
    ids=["empty", "a byte", "policy text", "half"],
)
def test_what_is_no_compiled_policy_is_refused(content: bytes) -> None:
    with memory(content) as file, pytest.raises(NotCompiled):
        read_policy(file)


def test_what_another_version_wrote_is_refused() -> None:
    """A gate that is upgraded under its supervisor: fields that one of them does not know would be lost silently."""
    content = bytearray(content_of(policy(EVERYTHING)))
    content[20] ^= 1
    with memory(bytes(content)) as file, pytest.raises(NotCompiled, match="another version"):
        read_policy(file)


@pytest.mark.parametrize(
    "row",
    [
        b'{"os.system":["true"]}',
        b'{"eval":["1"]}',
        b'{"Policy":{}}',
        b'{"HostRule":{"place":null,"pattern":null}}',
        b'{"HostRule":{},"Place":[]}',
        b'{"PortRange":[1,2,3]}',
        b'{"Tls":["none"]}',
        b'{"networks":3}',
        b'{"date":[0,0,0]}',
        b"{}",
        b"\x80\x05cos\nsystem\n(S'true'\ntR.",
        b"",
    ],
)
def test_a_row_makes_nothing_but_values_of_a_policy(row: bytes) -> None:
    with pytest.raises(MalformedRow):
        read_row(row)


@pytest.mark.parametrize(
    "value", [object(), 1.5, b"bytes", {1, 2}, Reason.RULE], ids=["object", "float", "bytes", "set", "reason"]
)
def test_what_is_no_part_of_a_policy_is_not_written(value: object) -> None:
    with pytest.raises(TypeError):
        write_row(value)


@pytest.mark.parametrize(
    "value",
    [
        HostRule(place=Place("a", 1), label="l", pattern=Pattern(Hostname("h"), wildcard=True), tls=Tls.INSPECT),
        NameRule(place=Place("ä", 1, 2), label="l", stage=Stage.NTP, pattern=Pattern(Hostname("h"), wildcard=False)),
        HostRule(
            place=Place("a", 1), label="l", pattern=Pattern(Hostname("h"), wildcard=True), until=date(2027, 1, 31)
        ),
        frozenset({"a", "b"}),
        (None, True, 0, 1, "", ("x",)),
    ],
    ids=["host", "name", "until", "set", "tuple"],
)
def test_a_row_is_read_as_it_was_written(value: object) -> None:
    read = read_row(write_row(value))
    assert read == value
    assert type(read) is type(value)


def test_a_broken_entry_is_no_allow() -> None:
    """It cannot happen; if memory ever lies, the question fails instead of being answered."""
    content = content_of(policy("version: 1\nworkloads: {app: {rules: [{host: a.example}]}}"))
    at = content.index(b'"HostRule"')
    with memory(content[:at] + b'"HostRul_"' + content[at + 10 :]) as file:
        read = read_policy(file)
        with pytest.raises(MalformedRow):
            decide(read, attempt("tls://a.example"))
