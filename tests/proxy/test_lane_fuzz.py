"""The lane's grammar against h11 and llhttp, briefly (`python -m tests.fuzz` takes its time), and whole connections."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz import claims, connections, making
from tests.proxy.conformance.hosts import TableRig, rig_of

RANDOM = st.randoms(use_true_random=False)
FIXED = settings(max_examples=700, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ANYTHING = st.binary(max_size=200)


@FIXED
@given(RANDOM)
def test_a_request_that_is_accepted_reads_the_same_elsewhere(random: Random) -> None:
    claims.request_reads_alike(making.a_request(random))


@FIXED
@given(RANDOM)
def test_a_response_that_is_accepted_reads_the_same_elsewhere(random: Random) -> None:
    claims.response_reads_alike(making.a_response(random))


@FIXED
@given(RANDOM, st.booleans())
def test_chunks_read_the_same_however_they_come(random: Random, in_request: bool) -> None:
    claims.chunks_read_alike(random, making.a_body(random), in_request=in_request)


@given(ANYTHING)
@example(b"HTTP/1.1 200 OK\r\n\n\r\n")  # two ends overlap
def test_where_a_head_ends_does_not_depend_on_how_it_came(data: bytes) -> None:
    claims.request_reads_alike(data)
    claims.response_reads_alike(data)


@given(ANYTHING, RANDOM)
def test_garbage_is_no_body_of_chunks(data: bytes, random: Random) -> None:
    claims.chunks_read_alike(random, data)


@pytest.mark.parametrize("seed", range(3))
def test_the_fuzzers_are_not_idle(seed: int) -> None:
    """Most cases that are refused would prove little."""
    random = Random(seed)
    accepted = sum(claims.request_reads_alike(making.a_request(random)) for _ in range(500))
    assert 150 < accepted < 450


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRig]:
    with rig_of("lane", tmp_path_factory.mktemp("fuzz")) as rig:
        yield rig


@pytest.mark.parametrize("seed", range(8))
def test_an_origin_gets_nothing_that_was_not_allowed(rig: TableRig, seed: int) -> None:
    random = Random(seed)
    assert sum(connections.run(rig, random) for _ in range(15)) > 0
