"""`outgate tags import`: each cloud's own form, what changes, and what is no such file."""

from __future__ import annotations

import json
import sys
import timeit
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.addresses import PrefixMap
from policies.tags import Cloud, MalformedTags, compare_tags, read_tags, write_tags
from proxy.policy_files import ServiceTags, read_policy
from tests.proxy.commands_of import invoke

AZURE = {
    "changeNumber": 300,
    "cloud": "Public",
    "values": [
        {
            "name": "Storage.EastUS2",
            "id": "Storage.EastUS2",
            "properties": {
                "changeNumber": 7,
                "region": "eastus2",
                "systemService": "AzureStorage",
                "addressPrefixes": ["20.38.0.0/24", "20.38.1.0/24", "2603:1030:40c:1::/64"],
            },
        },
        {"name": "Empty", "properties": {"addressPrefixes": []}},
    ],
}
AWS = {
    "syncToken": "1700000000",
    "createDate": "2026-11-20-00-00-00",
    "prefixes": [
        {"ip_prefix": "52.218.0.0/17", "region": "eu-west-1", "service": "S3", "network_border_group": "eu-west-1"},
        {"ip_prefix": "52.218.0.0/17", "region": "eu-west-1", "service": "AMAZON", "network_border_group": "eu-west-1"},
        {"ip_prefix": "3.5.0.0/19", "region": "us-east-1", "service": "S3", "network_border_group": "us-east-1"},
    ],
    "ipv6_prefixes": [
        {"ipv6_prefix": "2a05:d07a::/40", "region": "eu-west-1", "service": "S3", "network_border_group": "eu-west-1"}
    ],
}
GCP: dict[str, Any] = {
    "syncToken": "1700000000",
    "creationTime": "2026-11-20T00:00:00",
    "prefixes": [
        {"ipv4Prefix": "34.1.208.0/20", "service": "Google Cloud", "scope": "africa-south1"},
        {"ipv6Prefix": "2600:1900:8000::/44", "service": "Google Cloud", "scope": "us-east1"},
    ],
}
GOOG = {"syncToken": "1", "creationTime": "x", "prefixes": [{"ipv4Prefix": "8.8.4.0/24"}]}


def put(directory: Path, content: Any, name: str = "published.json") -> str:
    path = directory / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def shown(cloud: str, content: Any) -> dict[str, list[str]]:
    tags = read_tags(Cloud(cloud), json.dumps(content).encode())
    return {name: list(map(str, networks)) for name, networks in tags.items()}


@pytest.mark.parametrize(
    ("cloud", "content", "tags"),
    [
        ("azure", AZURE, {"Storage.EastUS2": ["20.38.0.0/23", "2603:1030:40c:1::/64"]}),
        (
            "aws",
            AWS,
            {
                "AWS.AMAZON": ["52.218.0.0/17"],
                "AWS.AMAZON.eu-west-1": ["52.218.0.0/17"],
                "AWS.S3": ["3.5.0.0/19", "52.218.0.0/17", "2a05:d07a::/40"],
                "AWS.S3.eu-west-1": ["52.218.0.0/17", "2a05:d07a::/40"],
                "AWS.S3.us-east-1": ["3.5.0.0/19"],
            },
        ),
        (
            "gcp",
            GCP,
            {
                "GoogleCloud": ["34.1.208.0/20", "2600:1900:8000::/44"],
                "GoogleCloud.africa-south1": ["34.1.208.0/20"],
                "GoogleCloud.us-east1": ["2600:1900:8000::/44"],
            },
        ),
        ("gcp", GOOG, {"Google": ["8.8.4.0/24"]}),
    ],
    ids=["azure", "aws", "gcp", "goog"],
)
def test_each_cloud_is_read_in_its_own_form(cloud: str, content: Any, tags: dict[str, list[str]]) -> None:
    assert shown(cloud, content) == tags


@pytest.mark.parametrize(("cloud", "content"), [("azure", AZURE), ("aws", AWS), ("gcp", GCP)])
def test_what_is_written_is_what_the_gate_reads(cloud: str, content: Any) -> None:
    tags = read_tags(Cloud(cloud), json.dumps(content).encode())
    loaded = ServiceTags()
    loaded.add("written", write_tags(tags))
    assert dict(loaded) == tags
    assert read_tags(Cloud.AZURE, write_tags(tags)) == tags
    assert write_tags(read_tags(Cloud.AZURE, write_tags(tags))) == write_tags(tags)


@pytest.mark.parametrize(
    ("cloud", "content", "why"),
    [
        ("aws", AZURE, "not the ip-ranges.json that AWS publishes"),
        ("azure", AWS, "not the JSON file that Microsoft publishes"),
        ("gcp", AZURE, "not the cloud.json or goog.json that Google publishes"),
        ("gcp", AWS, "not the cloud.json or goog.json"),
        ("azure", "no JSON", "not the JSON file"),
        ("azure", {"values": []}, "no prefix in it"),
        ("azure", {"values": [{"name": 7, "properties": {"addressPrefixes": ["10.0.0.0/8"]}}]}, "not the JSON"),
        ("gcp", {"prefixes": [{"ipv4Prefix": "34.1.208.1/20"}]}, "Google: 34.1.208.1/20 has host bits set"),
        ("gcp", {"prefixes": [{"ipv4Prefix": "0.0.0.0/0"}]}, "Google: 0.0.0.0/0 is more than any cloud has"),
        ("gcp", {"prefixes": [{"ipv6Prefix": "2000::/3"}]}, "Google: 2000::/3 is more than any cloud has"),
    ],
)
def test_a_file_that_is_something_else_changes_nothing(tmp_path: Path, cloud: str, content: Any, why: str) -> None:
    output = tmp_path / "out.json"
    result = invoke("tags", "import", cloud, put(tmp_path, content), "-o", str(output))
    assert (result.exit_code, output.exists()) == (3, False)
    assert why in result.stderr


WORDS = "values prefixes ipv6_prefixes name properties addressPrefixes service scope ipv4Prefix ip_prefix region"
KEYS = st.sampled_from(WORDS.split())
JSON = st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner))


@given(st.sampled_from(Cloud), JSON)
def test_garbage_is_tags_or_our_error(cloud: Cloud, content: Any) -> None:
    try:
        assert read_tags(cloud, json.dumps(content).encode())
    except MalformedTags:
        pass


def test_an_import_prints_what_comes_and_goes(tmp_path: Path) -> None:
    output = tmp_path / "gcp.json"

    def bring(content: Any, *options: str) -> tuple[int, str]:
        result = invoke("tags", "import", "gcp", put(tmp_path, content), "-o", str(output), *options)
        return result.exit_code, result.stdout

    assert bring(GCP, "--check") == (1, "")
    assert not output.exists()
    assert bring(GCP) == (0, f"{output}: 3 tags, 4 prefixes\n")
    first = output.read_bytes()
    assert bring(GCP) == (0, f"{output}: 3 tags, 4 prefixes, as before\n")
    assert bring(GCP, "--check")[0] == 0
    other = {"ipv4Prefix": "34.2.0.0/16", "service": "Google Cloud", "scope": "us-east1"}
    newer = {"prefixes": [GCP["prefixes"][0], other]}
    lines = "GoogleCloud: +34.2.0.0/16 -2600:1900:8000::/44\nGoogleCloud.us-east1: +34.2.0.0/16 -2600:1900:8000::/44\n"
    assert bring(newer, "--check") == (1, lines)
    assert output.read_bytes() == first
    assert bring(newer) == (0, f"{lines}{output}: 3 tags, 4 prefixes; 2 tags have changed\n")


def test_a_long_change_is_shortened(tmp_path: Path) -> None:
    output = str(tmp_path / "out.json")
    invoke("tags", "import", "gcp", put(tmp_path, GOOG), "-o", output)
    many = {"prefixes": [{"ipv4Prefix": f"8.{number}.0.0/16"} for number in range(0, 60, 2)]}
    said = invoke("tags", "import", "gcp", put(tmp_path, many), "-o", output).stdout
    assert "… and 23 more" in said.splitlines()[0]


def test_a_policy_uses_what_was_imported(tmp_path: Path) -> None:
    output = tmp_path / "aws.json"
    assert invoke("tags", "import", "aws", put(tmp_path, AWS), "-o", str(output)).exit_code == 0
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nworkloads:\n  app:\n    rules: [{tcp: {tag: AWS.S3.eu-west-1, ports: [443]}}]\n"
        "tests: {app: {allow: ['tcp://52.218.3.4:443'], deny: ['tcp://3.5.0.1:443']}}\n"
    )
    assert read_policy([str(policy)], tags=[str(output)]).workloads["app"].rules
    assert invoke("test", "-p", str(policy), "--tags", str(output)).exit_code == 0


def test_a_tag_that_comes_or_goes_is_a_change() -> None:
    one, two = (ip_network("8.8.4.0/24"),), (ip_network("8.8.8.0/24"),)
    [gone, new] = compare_tags({"A": one}, {"B": two})
    assert (gone.name, gone.added, gone.removed) == ("A", (), one)
    assert (new.name, new.added, new.removed) == ("B", two, ())


def test_a_lookup_among_a_hundred_thousand_prefixes_costs_no_more_than_among_few() -> None:
    """Two microseconds on a machine that is left alone; under others' load only the order of it can be held to."""
    lengths = (12, 14, 16, 18, 20, 22, 23, 24, 26, 28)
    found = {(number * 2654435761 % 2**32 >> 32 - size, size) for number in range(11_000) for size in lengths}
    prefixes = PrefixMap((ip_network((base << 32 - size, size)), "tag") for base, size in found)
    assert len(found) > 75_000
    address = ip_address("52.218.3.4")
    took = min(timeit.repeat(lambda: prefixes.covering(address), number=2_000, repeat=9)) / 2_000
    print(f"a lookup among {len(found):,} prefixes: {took * 1e6:.2f} µs", file=sys.stderr)
    assert took < 50e-6
