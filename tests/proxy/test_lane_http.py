"""The stories of inspected HTTP/1.1 again, told through the lane: whoever carries it, a client sees the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proxy import test_inspector_http as stories
from tests.proxy.inspecting import HOST_OF_HTTP
from tests.proxy.test_inspector_http import often as often  # a fixture of theirs

# What these say is about mitmproxy's host alone: its parts, or where the lane is to do better.
_OF_MITMPROXY = {
    "test_a_body_that_the_end_of_the_connection_delimits_is_whole",
    "test_a_fault_of_ours_ends_one_connection_closed_and_recorded",
    "test_an_inspector_without_descriptors_refuses_and_goes_on",
    "test_an_origin_that_closes_a_kept_connection_is_for_the_client_to_try_again",
    "test_an_origin_that_says",
    "test_an_origin_that_speaks_before_it_was_asked_is_not_believed",
    "test_an_upload_that_expects_100_is_carried",
    "test_early_hints_reach_the_client",
    "test_nothing_is_looked_up_or_dialled_for_a_denied_request",
    "test_one_source_cannot_take_every_place",
    "test_records_that_the_gate_does_not_take_hold_the_requests",
    "test_the_record_of_a_request",
}

globals().update(
    {name: story for name, story in vars(stories).items() if name.startswith("test_") and name not in _OF_MITMPROXY}
)


@pytest.fixture(autouse=True)
def _through_the_lane() -> Iterator[None]:
    token = HOST_OF_HTTP.set("lane")
    yield
    HOST_OF_HTTP.reset(token)
