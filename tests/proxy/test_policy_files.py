"""Policies from disk: what cannot be read is a problem with a place, and the shipped data is found."""

from __future__ import annotations

import gc
import json
import os
from ipaddress import ip_network
from pathlib import Path

import pytest

from policies.errors import PolicyError
from policies.hostnames import parse_hostname
from policies.model import TransportRule
from policies.tree import MAX_BYTES
from proxy.policy_files import Catalogue, ServiceTags, is_public_suffix, read_policy, shared_suffix

TAG_POLICY = "version: 1\nworkloads: {app: {rules: [{tcp: {tag: storage.eastus2, ports: 445}}]}}"


def write(directory: Path, name: str, content: str | bytes) -> str:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def problems(*paths: str, tags: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read_policy(paths, tags=tags)
    return [str(problem) for problem in caught.value.problems]


def service_tags(**prefixes: list[str]) -> str:
    """A file in the form Microsoft publishes."""
    values = [
        {
            "name": name.replace("_", "."),
            "id": name,
            "properties": {"changeNumber": 7, "region": "", "platform": "Azure", "addressPrefixes": listed},
        }
        for name, listed in prefixes.items()
    ]
    return json.dumps({"changeNumber": 311, "cloud": "Public", "values": values})


def test_several_files_are_read_and_merged(tmp_path: Path) -> None:
    one = write(tmp_path, "a.yaml", "version: 1\nworkloads: {app: {rules: [{host: a.example}]}}")
    two = write(tmp_path, "b.yaml", b"\xef\xbb\xbfversion: 1\nworkloads: {app: {use: [letsencrypt]}}")

    rules = read_policy([two, one]).workloads["app"].rules

    assert [str(rule) for rule in rules] == [
        f"{one}:2 (app/rules[0])",
        "catalogue/letsencrypt.yaml:6 (app/use[0]/letsencrypt[0])",
    ]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    one = write(tmp_path, "a.yaml", "version: 1\nsets: {s: []}\nworkloads: {app: {rules: [{host: a.example}]}}")

    assert len(read_policy([one, one]).workloads["app"].rules) == 1


def test_files_that_cannot_be_read_are_problems_beside_those_of_others(tmp_path: Path) -> None:
    missing, directory = str(tmp_path / "missing.yaml"), str(tmp_path)
    latin = write(tmp_path, "latin.yaml", "version: 1 # é".encode("latin-1"))

    assert sorted(problems(missing, directory, latin, "nul\0")) == sorted(
        [
            f"{missing}:1:1: cannot be read: No such file or directory",
            f"{directory}:1:1: cannot be read: Is a directory",
            f"{latin}:1:14: byte 0xe9 is not UTF-8; save the file as UTF-8",
            "nul\0:1:1: is no path: embedded null byte",
        ]
    )


def test_a_file_without_an_end_is_too_large() -> None:
    assert problems("/dev/zero") == ["/dev/zero:1:1: larger than 32 MiB; split it into several files"]


def test_a_sparse_file_over_the_limit_is_too_large(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "")
    os.truncate(path, MAX_BYTES + 1)

    assert problems(path) == [f"{path}:1:1: larger than 32 MiB; split it into several files"]


@pytest.mark.parametrize("was_enabled", [True, False])
def test_loading_leaves_garbage_collection_as_it_was(tmp_path: Path, was_enabled: bool) -> None:
    path = write(tmp_path, "a.yaml", "version: 2")
    before = gc.isenabled()
    try:
        (gc.enable if was_enabled else gc.disable)()
        problems(path)

        assert gc.isenabled() is was_enabled
    finally:
        (gc.enable if before else gc.disable)()


# --- catalogue -----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_found_with_its_folders() -> None:
    catalogue = Catalogue()

    assert {"ubuntu", "azure/kubernetes-service"} <= set(catalogue)
    assert len(catalogue) == len(set(catalogue))
    assert catalogue["azure/kubernetes-service"].file == "catalogue/azure/kubernetes-service.yaml"
    assert "../examples/weather" not in catalogue


# --- service tags --------------------------------------------------------------------------------------------------


def test_a_tag_is_the_prefixes_of_the_published_file(tmp_path: Path) -> None:
    policy = write(tmp_path, "p.yaml", TAG_POLICY)
    tags = write(
        tmp_path, "t.json", service_tags(Storage_EastUS2=["20.38.0.0/20", "2603:1030:40c::/46"], Other=["1.2.3.0/24"])
    )

    (rule,) = read_policy([policy], tags=[tags]).workloads["app"].rules

    assert isinstance(rule, TransportRule)
    assert rule.networks == (ip_network("20.38.0.0/20"), ip_network("2603:1030:40c::/46"))


def test_a_tag_without_any_imported_file_says_what_to_import(tmp_path: Path) -> None:
    policy = write(tmp_path, "p.yaml", TAG_POLICY)

    assert problems(policy) == [
        f'{policy}:2:39: unknown service tag "storage.eastus2"; import the cloud\'s published file with --tags FILE'
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"values": 1}',
        '{"values": [1]}',
        '{"values": [{"name": "a"}]}',
        '{"values": [{"name": "a", "properties": {"addressPrefixes": 1}}]}',
        '{"values": [{"name": "a", "properties": {"addressPrefixes": [1]}}]}',
        '{"values": [{"name": [], "properties": {"addressPrefixes": []}}]}',
        b"\xff\xfe",
        "[" * 100_000,
    ],
)
def test_another_file_is_no_service_tag_file(tmp_path: Path, content: str | bytes) -> None:
    policy, tags = write(tmp_path, "p.yaml", TAG_POLICY), write(tmp_path, "t.json", content)

    assert problems(policy, tags=(tags,)) == [
        f"{tags}:1:1: not a service-tag file; "
        "give the JSON file that Microsoft publishes as Azure IP Ranges and Service Tags"
    ]


def test_a_tag_in_two_files_is_an_error_and_never_a_union(tmp_path: Path) -> None:
    one = write(tmp_path, "public.json", service_tags(Storage_EastUS2=["20.38.0.0/20"]))
    two = write(tmp_path, "china.json", service_tags(Storage_EastUS2=["40.72.0.0/18"]))

    assert problems(write(tmp_path, "p.yaml", TAG_POLICY), tags=(one, two)) == [
        f'{two}:1:1: service tag "Storage.EastUS2" is in {one} too; give the file of one cloud, and the newest only'
    ]


def test_a_prefix_that_is_none_is_an_error_when_its_tag_is_used(tmp_path: Path) -> None:
    policy = write(tmp_path, "p.yaml", TAG_POLICY)
    tags = write(tmp_path, "t.json", service_tags(Storage_EastUS2=["20.38.0.1/20"], Other=["nonsense"]))

    assert problems(policy, tags=(tags,)) == [
        f'{tags}:1:1: service tag "Storage.EastUS2": 20.38.0.1/20 has host bits set; download the file again'
    ]


def test_prefixes_become_networks_only_when_asked_for() -> None:
    tags = ServiceTags()
    tags.add("t.json", service_tags(Good=["10.0.0.0/8"], Bad=["nonsense"]).encode())

    assert set(tags) == {"Good", "Bad"}
    assert len(tags) == 2
    assert tags["Good"] == (ip_network("10.0.0.0/8"),)


# --- public suffixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("com", True),
        ("co.uk", True),
        ("xn--p1ai", True),
        ("foo.ck", True),  # *.ck
        ("www.ck", False),  # !www.ck
        ("example.com", False),
        ("github.io", False),  # a company's, in the private section
        ("internal", False),
        ("cluster.local", False),
    ],
)
def test_a_public_suffix_is_one_of_icann(name: str, expected: bool) -> None:
    assert is_public_suffix(parse_hostname(name)) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("github.io", "github.io"),
        ("blob.core.windows.net", "blob.core.windows.net"),
        ("core.windows.net", "blob.core.windows.net"),
        ("windows.net", "blob.core.windows.net"),
        ("acme.github.io", None),
        ("ubuntu.com", None),
        ("data.mcr.microsoft.com", None),
    ],
)
def test_a_shared_suffix_is_found_at_or_below_a_name(name: str, expected: str | None) -> None:
    assert shared_suffix(parse_hostname(name)) == expected
