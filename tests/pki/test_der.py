"""DER by hand: what is written is read again, and what is cut off is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pki.der import OCTETS, SEQUENCE, MalformedDer, element, elements


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=5))
def test_what_is_written_is_read(values: list[tuple[int, bytes]]) -> None:
    assert list(elements(b"".join(element(tag, content) for tag, content in values))) == values


@pytest.mark.parametrize("size", [0, 127, 128, 255, 256, 65_535, 65_536])
def test_a_length_takes_as_few_octets_as_it_can(size: int) -> None:
    octets = 1 if size < 128 else 1 + (size.bit_length() + 7) // 8
    assert len(element(OCTETS, bytes(size))) == 1 + octets + size


@pytest.mark.parametrize(
    ("der", "said"),
    [
        (b"\x30", "a tag without a length"),
        (b"\x30\x02\x00", "a value that is cut off"),
        (b"\x30\x82\x01", "a value that is cut off"),
        (b"\x30\x80\x04\x00\x00\x00", "a length that is left open"),
        (element(SEQUENCE, b"ab") + b"\x04", "a tag without a length"),
    ],
    ids=["a tag alone", "half a value", "half a length", "an open length", "a tag alone behind a value"],
)
def test_what_is_no_der_is_refused(der: bytes, said: str) -> None:
    with pytest.raises(MalformedDer, match=said):
        list(elements(der))


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_refused(content: bytes) -> None:
    try:
        found = list(elements(content))
    except MalformedDer:
        return
    assert sum(len(held) for _, held in found) <= max(0, len(content) - 2 * len(found))
