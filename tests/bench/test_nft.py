"""How long a DNS answer waits for the kernel to open what it names: by the library, and by the program `nft`."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import count

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from proxy.elements import Element, Opening, open_text, restore_text
from proxy.layout import read_layout
from proxy.nft import Library, Program
from proxy.ruleset import render
from tests.proxy.kernel_rules import NEEDS_ROOT, in_namespace

pytestmark = NEEDS_ROOT
GOAL_S = 0.001  # by the library
OPEN_ALREADY = 10_000


@pytest.mark.parametrize("nft", [Library, Program])
def test_an_element_is_opened(benchmark: BenchmarkFixture, nft: type[Library] | type[Program]) -> None:
    def element(number: int) -> Element:
        return Element(ip_address("10.1.0.7"), ip_address(0x0A000000 + number), "tcp", 22)

    with in_namespace("br0"):
        made = nft()
        made.run(render(read_layout("gateway", {}, {})))
        made.run(restore_text(Opening(element(number), 600, 600) for number in range(OPEN_ALREADY)))
        numbers = count(OPEN_ALREADY)

        def run() -> None:
            made.run(open_text({element(next(numbers)): 600}))

        benchmark.pedantic(run, rounds=50, warmup_rounds=1)  # type: ignore[no-untyped-call]  # it has no types
        benchmark.extra_info["goal_s"] = GOAL_S
