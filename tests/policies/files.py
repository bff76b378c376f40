"""Short words for tests of policy files: `read(text)` and `problems(text)`."""

from __future__ import annotations

from ipaddress import ip_network
from textwrap import dedent

import pytest

from policies.errors import PolicyError
from policies.index import Policy
from policies.load import Source, load
from policies.model import Network

TAGS: dict[str, tuple[Network, ...]] = {
    "AzureCloud.eastus2": (ip_network("20.36.0.0/14"),),
    "Storage.EastUS2": (ip_network("20.38.0.0/20"), ip_network("2603:1030:40c::/46")),
}


def read(text: str) -> Policy:
    return load(
        [Source("p.yaml", dedent(text))],
        catalogue={},
        tags=TAGS,
        is_public_suffix=lambda name: name in {"com", "co.uk"},
    )


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        read(text)
    return [str(problem) for problem in caught.value.problems]
