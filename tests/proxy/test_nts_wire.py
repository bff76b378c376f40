"""The records of a key exchange and packets with a proof, as bytes: whole, in parts, wrong, and random."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import nts
from proxy.wire.ntp import SIZE, KissOfDeath, MalformedPacket, build_query
from proxy.wire.nts import Agreed, MalformedExchange, RefusedExchange, build_request, open_answer, parse_response
from tests.proxy.ntp_servers import answer
from tests.proxy.nts_servers import (
    AUTHENTICATOR,
    COOKIE,
    PLACEHOLDER,
    UNIQUE,
    extension,
    fields,
    record,
    response,
    sealed,
)

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
COOKIES = [bytes([number]) * 100 for number in range(8)]

# --- the key exchange


def test_the_request_is_three_records() -> None:
    assert build_request().hex() == "80010002" + "0000" + "80040002" + "000f" + "80000000"


def test_a_response_is_read_whole_and_byte_by_byte() -> None:
    whole = response(record(6, b"time.example"), record(7, b"\0\x7b"), cookies=COOKIES)
    assert parse_response(whole) == Agreed(tuple(COOKIES), "time.example", 123)
    for end in range(len(whole)):
        assert parse_response(whole[:end]) is None


WRONG = {
    "bytes after the end": response(cookies=COOKIES) + b"\0",
    "an end with a body": response(cookies=COOKIES, end=False) + record(0, b"x"),
    "no cookie": response(),
    "an empty cookie": response(cookies=[b""]),
    "a long cookie": response(cookies=[bytes(513)]),
    "another protocol": response(protocol=b"\0\1", cookies=COOKIES),
    "two protocols": response(protocol=b"\0\0\0\1", cookies=COOKIES),
    "another AEAD": response(aead=b"\0\x1e", cookies=COOKIES),
    "half an AEAD": response(aead=b"\0", cookies=COOKIES),
    "two AEADs": response(record(4, b"\0\x0f"), cookies=COOKIES),
    "nothing agreed": record(5, b"cookie") + record(0, b""),
    "an unknown critical record": response(record(0x1234, b""), cookies=COOKIES),
    "an empty server": response(record(6, b""), cookies=COOKIES),
    "a server that is no ASCII": response(record(6, b"\xff"), cookies=COOKIES),
    "port 0": response(record(7, b"\0\0"), cookies=COOKIES),
    "a long port": response(record(7, b"\0\0\x7b"), cookies=COOKIES),
    "two servers": response(record(6, b"a"), record(6, b"b"), cookies=COOKIES),
    "too long": record(0x1234, bytes(nts.MAX_RESPONSE), critical=False),
}


@pytest.mark.parametrize("stream", WRONG.values(), ids=WRONG)
def test_what_is_no_response_is_malformed(stream: bytes) -> None:
    with pytest.raises(MalformedExchange):
        parse_response(stream)


REFUSED = {
    "an error": (record(2, b"\0\1"), "bad request"),
    "an error without a code": (record(2, b""), "unrecognized critical record"),
    "an error of no known kind": (record(2, b"\x12\x34"), "4660"),
    "a warning": (record(3, b"\0\0"), "warning"),
    "no NTPv4": (response(protocol=b"", cookies=COOKIES), "NTPv4"),
    "no AEAD": (response(aead=b"", cookies=COOKIES), "AES-SIV-CMAC-256"),
}


@pytest.mark.parametrize(("stream", "says"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_why(stream: bytes, says: str) -> None:
    with pytest.raises(RefusedExchange, match=says):
        parse_response(stream)


def test_an_unknown_record_that_is_not_critical_is_passed_over() -> None:
    assert parse_response(response(record(0x1234, b"x", critical=False), cookies=COOKIES)) == Agreed(tuple(COOKIES))


@given(st.binary(max_size=300) | st.builds(response, st.binary(max_size=60), cookies=st.lists(st.binary(max_size=40))))
def test_garbage_is_a_value_or_too_little_or_our_error(stream: bytes) -> None:
    try:
        agreed = parse_response(stream)
    except (MalformedExchange, RefusedExchange):
        return
    assert agreed is None or (agreed.cookies and all(agreed.cookies))


# --- packets


def query(held: int = 7, cookie: bytes = COOKIES[0]) -> nts.Query:
    return nts.build_query(build_query(1), cookie, unique=bytes(32), nonce=bytes(16), key=KEY, held=held)


def test_a_query_shows_a_cookie_and_asks_for_as_many_as_are_missing() -> None:
    for held in range(8):
        kinds = [kind for kind, _ in fields(query(held).message)]
        assert kinds == [UNIQUE, COOKIE, *[PLACEHOLDER] * (7 - held), AUTHENTICATOR]
        assert len(query(held).message) <= 1280
    assert query().message[:SIZE] == build_query(1)


def test_long_cookies_do_not_make_a_query_that_no_way_carries() -> None:
    message = query(0, bytes(512)).message
    assert len(message) <= 1280
    assert [kind for kind, _ in fields(message)].count(PLACEHOLDER) == 1


def test_cookies_come_from_inside_the_proof_alone() -> None:
    asked = query()
    packet = answer(asked.message[:SIZE]) + extension(UNIQUE, bytes(32)) + extension(COOKIE, COOKIES[1])
    whole = sealed(packet, KEY, extension(COOKIE, COOKIES[2])) + extension(COOKIE, COOKIES[3])
    opened = open_answer(whole, asked, KEY)
    assert (opened.packet, opened.cookies) == (packet[:SIZE], (COOKIES[2],))


def forgeries() -> dict[str, bytes]:
    asked = query()
    plain = answer(asked.message[:SIZE])
    named = plain + extension(UNIQUE, bytes(32))
    right = sealed(named, KEY)
    return {
        "the proof is missing": named,
        "all fields are missing": plain,
        "another key": sealed(named, OTHER_KEY),
        "another question's": sealed(plain + extension(UNIQUE, b"\1" * 32), KEY),
        "no identifier": sealed(plain, KEY),
        "an identifier after the proof": sealed(plain, KEY) + extension(UNIQUE, bytes(32)),
        "a shorter identifier": sealed(plain + extension(UNIQUE, bytes(28)), KEY),
        "another time": right[:40] + bytes(8) + right[48:],
        "another identifier before the right one": sealed(named + extension(UNIQUE, b"\1" * 32), KEY),
        "cut": right[:-4],
        "our own query": asked.message,
        "a field without end": named + b"\x04\x04\xff\xfc" + bytes(40),
        "a field of no length": named + b"\x04\x04\0\0" + bytes(40),
        "a nonce of no length": named + extension(AUTHENTICATOR, b"\0\0\0\x10" + bytes(32)),
        "a ciphertext beyond its field": named + extension(AUTHENTICATOR, b"\0\x10\xff\xff" + bytes(32)),
        "a nonce beyond its field": named + extension(AUTHENTICATOR, b"\xff\xff\0\x10" + bytes(32)),
        "a kiss that nobody has signed": answer(
            asked.message[:SIZE], head=0xE4, stratum=0, reference_id=b"DENY"
        ) + extension(UNIQUE, bytes(32)),
        "a NAK to another question": answer(
            asked.message[:SIZE], head=0xE4, stratum=0, reference_id=b"NTSN"
        ) + extension(UNIQUE, b"\1" * 32),
        "a NAK to another number": answer(
            bytes(SIZE), head=0xE4, stratum=0, reference_id=b"NTSN"
        ) + extension(UNIQUE, bytes(32)),
        "nothing": b"",
    }  # fmt: skip


@pytest.mark.parametrize("message", forgeries().values(), ids=forgeries())
def test_what_nobody_can_prove_is_malformed(message: bytes) -> None:
    with pytest.raises(MalformedPacket):
        open_answer(message, query(), KEY)


def test_every_flipped_bit_before_the_end_of_the_proof_is_seen() -> None:
    asked = query()
    whole = sealed(answer(asked.message[:SIZE]) + extension(UNIQUE, bytes(32)), KEY, extension(COOKIE, COOKIES[1]))
    assert open_answer(whole, asked, KEY)
    for at in range(len(whole)):
        with pytest.raises(MalformedPacket):
            open_answer(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], asked, KEY)


def test_a_nak_is_known_by_our_own_numbers() -> None:
    asked = query()
    nak = answer(asked.message[:SIZE], head=0xE4, stratum=0, reference_id=b"NTSN") + extension(UNIQUE, bytes(32))
    with pytest.raises(KissOfDeath, match="NTSN"):
        open_answer(nak, asked, KEY)


@given(st.binary(max_size=200), st.booleans())
def test_a_random_packet_is_malformed(tail: bytes, is_named: bool) -> None:
    asked = query()
    head = answer(asked.message[:SIZE]) + (extension(UNIQUE, bytes(32)) if is_named else b"")
    with pytest.raises(MalformedPacket):
        open_answer(head + tail, asked, KEY)


@given(st.binary(max_size=200))
def test_what_a_server_proves_may_still_be_garbage_inside(inside: bytes) -> None:
    asked = query()
    whole = sealed(answer(asked.message[:SIZE]) + extension(UNIQUE, bytes(32)), KEY, inside)
    try:
        opened = open_answer(whole, asked, KEY)
    except MalformedPacket:
        return
    assert len(opened.packet) == SIZE


def test_two_queries_share_nothing_but_what_all_have() -> None:
    one, two = (
        nts.build_query(
            build_query(int.from_bytes(os.urandom(8))),
            cookie,
            unique=os.urandom(32),
            nonce=os.urandom(16),
            key=KEY,
            held=7,
        ).message
        for cookie in COOKIES[:2]
    )
    assert len(one) == len(two)
    for (kind, body), (_, other) in zip(fields(one), fields(two), strict=True):
        assert body != other or kind == PLACEHOLDER
