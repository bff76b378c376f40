"""`outgate verify`: its list against the page and the registry of metadata addresses, its words, its exit codes."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from policies import addresses
from proxy.verify.model import LOCAL, Heard, Kind, Manner, Outcome, Probe, Row, Status
from proxy.verify.place import Place, gate_address, look_around
from proxy.verify.probes import DENIED, GROUPS, Names, certificate, probes
from proxy.verify.report import to_json, to_junit
from tests.end_to_end.verifying import documented
from tests.proxy.commands_of import WEATHER, invoke, write

PLACE = Place(
    is_closed=False, has_ipv6=True, routers=("ROUTER",), node="NODE", nameserver=("RESOLVER", 53), api=("SERVICE", 443),
    proxy=("PROXY", 3128), device6=2,
)  # fmt: skip
NAMES = Names(bytes(64), f"NAME.{DENIED}", "HOST", "OTHER", "VEILED")
LISTED = (*probes(PLACE, NAMES), certificate(NAMES))
DOCUMENTATION = [ip_network(text) for text in ("203.0.113.0/24", "2001:db8::/32")]
THIRD_PARTIES = {
    "1.1.1.1", "2606:4700:4700::1111", "8.8.8.8", "2001:4860:4860::8888", "216.239.35.0",  # as the page names them
}  # fmt: skip


def test_the_page_lists_every_row_as_it_is() -> None:
    listed = [(probe.id, probe.target, probe.sends or "nothing") for probe in LISTED]

    assert listed == [(id, row.to, row.sends) for id, row in documented().items()]


def test_every_row_has_a_name_of_its_own_and_a_group_that_says_what_a_leak_means() -> None:
    assert len({probe.id for probe in LISTED}) == len(LISTED)
    assert {probe.group for probe in LISTED} | {"allowed"} == set(GROUPS)
    assert not {probe.id for probe in LISTED} & set(GROUPS) - {"clock"}


def test_no_address_is_anybody_elses() -> None:
    """Nothing is sent to a third party but those the page names."""
    public = set()
    for probe in LISTED:
        if probe.kind in LOCAL or not probe.to[:1].isdigit():
            continue
        address = ip_address(probe.to)
        is_ours = any(address in network for network in DOCUMENTATION if network.version == address.version)
        if not is_ours and addresses.classify(address) is addresses.Reach.PUBLIC:
            public.add(probe.to)
    assert public == THIRD_PARTIES


def test_every_metadata_address_that_the_gate_knows_is_tried() -> None:
    tried = {ip_address(probe.to) for probe in LISTED if probe.group == "metadata"}

    missed = [text for text in addresses._METADATA if not any(each in ip_network(text) for each in tried)]
    assert missed == []


@pytest.mark.parametrize("probe", LISTED, ids=lambda probe: probe.id)
def test_every_row_that_sends_says_what(probe: Probe) -> None:
    assert bool(probe.sends) is (probe.kind not in LOCAL)
    assert probe.say or probe.kind in LOCAL | {Kind.CERTIFICATE}


def test_two_runs_ask_for_different_names() -> None:
    first, second = (
        {row["sends"] for row in json.loads(invoke("verify", "--dry-run", "--json", "--only", "dns-denied").stdout)}
        for _ in range(2)
    )
    assert first.isdisjoint(second)


def test_a_dry_run_prints_the_list() -> None:
    result = invoke("verify", "--dry-run", "--only", "metadata-azure", "--only", "unix-docker")

    assert result.exit_code == 0
    assert result.stdout == (
        "metadata-azure  tcp 168.63.129.16:80   GET /?comp=versions, Host: 168.63.129.16\n"
        "unix-docker     unix /run/docker.sock\n"
        "\n"
        "nothing was sent; a refusal that is not this machine's is asked for once more, "
        "with packets that live no longer than to the gate\n"
    )


def test_a_dry_run_as_json_has_every_byte() -> None:
    [row] = json.loads(invoke("verify", "--dry-run", "--json", "--only", "metadata-alibaba").stdout)

    assert bytes.fromhex(row["bytes"][0]).startswith(b"GET /latest/meta-data/ HTTP/1.1\r\nHost: 100.100.100.200\r\n")
    assert row.keys() == {"id", "group", "what", "to", "sends", "bytes", "absent"}


MISUSES = {
    "an unknown row": (["--only", "metadate"], 2, 'no row and no group; did you mean "metadata"?'),
    "an unknown workload": (["-p", "FILE", "-w", "wether"], 2, 'unknown workload "wether"; did you mean "weather"?'),
    "no port": (["--gate", "10.0.0.1"], 2, "--gate"),
    "a name as gate": (["--gate", "gate.example:15001"], 2, "is not ADDRESS:PORT"),
    "a port that is none": (["--admin", "10.0.0.1:99999"], 2, "--admin"),
    "a name as sink": (["--sink", "sink.example"], 2, '--sink "sink.example" is not an address'),
    "a root without inspection": (["--root", "ca.crt"], 2, "the policy inspects no host"),
    "a root that is not there": (["-p", "FILE", "--root", "nowhere.crt"], 3, "--root nowhere.crt: No such file"),
    "a policy that is not there": (["-p", "nowhere.yaml"], 3, "nowhere.yaml"),
    "too long": (["--timeout", "60"], 2, "--timeout"),
}


@pytest.mark.parametrize("name", list(MISUSES))
def test_what_cannot_be_meant_is_one_clear_line(tmp_path: Path, name: str) -> None:
    arguments, exit_code, said = MISUSES[name]
    path = write(tmp_path, WEATHER)
    result = invoke("verify", "--dry-run", *(path if word == "FILE" else word for word in arguments))

    assert result.exit_code == exit_code
    assert said in result.stderr
    assert result.stdout == ""


def test_it_knows_policy_and_workload_from_its_surroundings(tmp_path: Path) -> None:
    env = {"OUTGATE_POLICY": write(tmp_path, WEATHER), "OUTGATE_WORKLOAD": "weather"}
    result = invoke("verify", "--dry-run", "--only", "tls-fronting", env=env)

    assert "TLS for dataservice.accuweather.com, then GET /" in result.stdout


def test_a_row_that_could_not_be_tried_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine without a descriptor left would have no leaks."""
    monkeypatch.setattr("proxy.verify.running.attempt", lambda probe, patience: Heard(Manner.FAILED, note="no files"))
    result = invoke("verify", "--only", "unix-docker")

    assert result.exit_code == 3
    assert "failed" in result.stdout
    assert "1 not tried" in result.stdout


# --- for machines ---


LEAK = Row(
    Probe(id="metadata", group="metadata", what="x", kind=Kind.HTTP, to="169.254.169.254", port=80),
    Outcome.REACHED, Status.LEAK, False, 'HTTP/1.1 200 "OK" <&>\x1b[31m', elapsed_ms=12,
)  # fmt: skip
GONE = Row(Probe(id="mdns", group="link", what="x", kind=Kind.MULTICAST), Outcome.ABSENT, Status.OK, False)
UNKNOWN = Row(Probe(id="tcp-22", group="raw-ip", what="x", kind=Kind.SPEAK), Outcome.FAILED, Status.FAILED, False)
FINE = Row(Probe(id="tcp-25", group="raw-ip", what="x", kind=Kind.SPEAK), Outcome.SLOW, Status.OK, False)


def test_junit_has_one_case_a_row() -> None:
    import xml.etree.ElementTree as ElementTree

    suite = ElementTree.fromstring(to_junit([LEAK, GONE, UNKNOWN, FINE], 1.5))

    assert [suite.attrib[key] for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    assert [(case.attrib["classname"], case.attrib["name"], case[0].tag) for case in suite] == [
        ("verify.metadata", "metadata", "failure"), ("verify.link", "mdns", "skipped"),
        ("verify.raw-ip", "tcp-22", "error"), ("verify.raw-ip", "tcp-25", "system-out"),
    ]  # fmt: skip
    assert suite[0][0].attrib["message"] == 'reached: tcp 169.254.169.254:80, HTTP/1.1 200 "OK" <&>[31m'


def test_json_says_what_a_leak_means_and_what_closes_it() -> None:
    page = to_json([LEAK, GONE], "app", 1.234)
    rows = page["rows"]

    assert isinstance(rows, list)
    assert (page["ok"], page["gate"], page["seconds"]) == (False, "unseen", 1.23)
    assert page["counts"] == {"leak": 1, "odd": 0, "ok": 1, "failed": 0}
    assert rows[0]["means"] == GROUPS["metadata"].means
    assert rows[1]["repair"] is None


@pytest.mark.parametrize(
    ("text", "expected"), [("10.0.0.1:15001", ("10.0.0.1", 15001)), ("[fd00::1]:80", ("fd00::1", 80))]
)
def test_a_gate_is_an_address_and_a_port(text: str, expected: tuple[str, int]) -> None:
    assert gate_address(text) == expected


def test_the_surroundings_are_read_from_variables() -> None:
    place = look_around({
        "NODE_IP": "10.1.2.3", "KUBERNETES_SERVICE_HOST": "10.43.0.1", "KUBERNETES_SERVICE_PORT": "6443",
        "HTTPS_PROXY": "http://proxy.example:3128",
    })  # fmt: skip

    assert (place.node, place.api, place.proxy) == ("10.1.2.3", ("10.43.0.1", 6443), ("proxy.example", 3128))


@pytest.mark.parametrize("value", ["", "http://", "http://[", "http://x:99999", "socks5://x:1080"])
def test_a_proxy_variable_that_names_no_proxy_is_passed_over(value: str) -> None:
    assert look_around({"https_proxy": value}).proxy is None
