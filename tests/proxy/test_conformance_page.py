"""docs/http.md says what the conformance table says, and its list of rows on which the hosts differ is exact."""

from __future__ import annotations

from pathlib import Path

from tests.proxy.conformance.hostile import origin_rows
from tests.proxy.conformance.page import render

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text() == render(), "python -m tests.proxy.conformance.page > docs/http.md"


def test_an_origin_that_the_lane_does_not_believe_is_not_believed_by_the_other_host() -> None:
    lenient = [
        row.id for row in origin_rows() if row.mitmproxy and row.told.is_refusal and not row.mitmproxy[0].is_refusal
    ]
    assert lenient == []
