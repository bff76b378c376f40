"""The shipped rule sets: each loads, none is wider than its source, and each file names that source."""

from __future__ import annotations

import re
from functools import cache
from ipaddress import ip_network

import pytest

from policies.document import Document, read_document
from policies.errors import PolicyError
from policies.index import Policy
from policies.keys import Scope
from policies.load import Source, load
from policies.model import HostRule, NameRule, Network, TransportRule
from policies.sets import parameters
from policies.tree import MapNode, parse
from proxy.policy_files import Catalogue, is_public_suffix, shared_suffix

CATALOGUE = Catalogue()
TAGS: dict[str, tuple[Network, ...]] = {
    "AzureCloud.eastus2": (ip_network("20.36.0.0/14"),),
    "AzureMonitor": (ip_network("13.69.51.0/24"),),
}
VALUES = {"location": "eastus2", "region": "eu-central-1", "resource": "acme", "vault": "acme", "owner": "acme"}

# As Microsoft's page lists them for the public cloud (see the file); a change there is a deliberate change here.
AKS_REQUIRED = {
    "*.hcp.eastus2.azmk8s.io",
    "mcr.microsoft.com",
    "*.data.mcr.microsoft.com",
    "mcr-0001.mcr-msedge.net",
    "management.azure.com",
    "login.microsoftonline.com",
    "packages.microsoft.com",
    "acs-mirror.azureedge.net",
    "packages.aks.azure.com",
}


@cache
def document(file: str) -> Document:
    source = CATALOGUE[file]
    return read_document(parse(source), Scope(source.file, None, is_public_suffix))


ALL_SETS = [name for file in CATALOGUE for name in document(file).sets]


def use(*names: str) -> Policy:
    """One workload with these sets, every parameter given."""
    wanted = {name: parameters(document(file).sets[name]) for file in CATALOGUE for name in document(file).sets}
    uses = [", ".join([f"set: {name}", *(f"{key}: {VALUES[key]}" for key in wanted[name])]) for name in names]
    text = "version: 1\nworkloads:\n  app:\n    use:\n" + "".join(f"      - {{{each}}}\n" for each in uses)
    return load([Source("p.yaml", text)], catalogue=CATALOGUE, tags=TAGS, is_public_suffix=is_public_suffix)


def hosts(policy: Policy) -> set[str]:
    return {str(rule.pattern) for rule in policy.workloads["app"].rules if isinstance(rule, HostRule)}


def test_the_catalogue_has_the_promised_sets() -> None:
    promised = {"azure/kubernetes-service", "ubuntu", "docker-hub", "letsencrypt", "github"}
    models = {"anthropic", "openai", "azure-openai", "aws-bedrock", "google-gemini", "mistral", "cohere", "groq"}

    assert promised <= set(ALL_SETS)
    assert {f"llm/{name}" for name in (*models, "deepseek", "openrouter")} <= set(ALL_SETS)


@pytest.mark.parametrize("file", list(CATALOGUE))
def test_a_file_begins_with_its_public_source_and_the_date(file: str) -> None:
    header = CATALOGUE[file].text.partition("\nversion:")[0]

    assert all(line.startswith("#") for line in header.splitlines())
    assert "https://" in CATALOGUE[file].text
    assert re.search(r"\b20[0-9]{2}-[0-9]{2}\b", header)


@pytest.mark.parametrize("file", list(CATALOGUE))
def test_a_file_has_only_sets_and_they_bear_its_name(file: str) -> None:
    node = parse(CATALOGUE[file])

    assert isinstance(node, MapNode)
    assert [key.text for key, _ in node.entries] == ["version", "sets"]
    assert all(name == file or name.startswith(f"{file}/") for name in document(file).sets)


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_set_loads_alone(name: str) -> None:
    assert use(name).workloads["app"].rules


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_set_names_no_suffix_where_anyone_can_own_a_name(name: str) -> None:
    rules = [rule for rule in use(name).workloads["app"].rules if not isinstance(rule, TransportRule)]

    assert [str(rule) for rule in rules if rule.pattern.wildcard and shared_suffix(rule.pattern.host)] == []


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_set_grants_no_private_address_and_no_bare_prefix(name: str) -> None:
    for rule in use(name).workloads["app"].rules:
        assert isinstance(rule, NameRule) or not rule.private
        assert not isinstance(rule, TransportRule) or rule.tag or not rule.networks


def test_the_sets_of_kubernetes_on_azure_fit_together() -> None:
    family = [name for name in ALL_SETS if name.startswith("azure/kubernetes-service")]

    assert len(use(*family).workloads["app"].rules) > 60


def test_kubernetes_on_azure_has_exactly_the_required_names() -> None:
    assert hosts(use("azure/kubernetes-service")) == AKS_REQUIRED


def test_the_control_plane_tunnel_is_a_service_tag_of_the_region() -> None:
    rules = use("azure/kubernetes-service/network").workloads["app"].rules

    found = {
        (rule.stage.value, rule.tag, rule.ports[0].first, rule.networks)
        for rule in rules
        if isinstance(rule, TransportRule)
    }
    networks = TAGS["AzureCloud.eastus2"]
    assert found == {("udp", "AzureCloud.eastus2", 1194, networks), ("tcp", "AzureCloud.eastus2", 9000, networks)}


def test_a_set_of_the_catalogue_needs_its_parameters() -> None:
    text = "version: 1\nworkloads: {app: {use: [azure/kubernetes-service]}}"

    with pytest.raises(PolicyError, match='needs a value for its parameter "location"'):
        load([Source("p.yaml", text)], catalogue=CATALOGUE, tags={}, is_public_suffix=is_public_suffix)
