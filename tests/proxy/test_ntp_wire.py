"""The NTP codec: ordinary packets, hostile ones, and the numbers of 2036."""

from __future__ import annotations

import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.ntp import (
    SIZE,
    UNSYNCHRONISED,
    Answer,
    KissOfDeath,
    Leap,
    MalformedPacket,
    Query,
    Reply,
    UnusableReply,
    build_answer,
    build_query,
    parse_query,
    parse_reply,
    posix_ns,
    timestamp,
)

PACKET = struct.Struct("!BBbbII4sQQQQ")
NS = 10**9
COOKIE = 0x0123_4567_89AB_CDEF
NOW = timestamp(int(datetime(2026, 11, 22, tzinfo=UTC).timestamp()) * NS)
SECOND = 1 << 32


def client(head: int = 0x23, *, cookie: int = COOKIE, size: int = SIZE) -> bytes:
    """A client's packet that says all it can: covert bits in every field."""
    packet = PACKET.pack(head, 7, 10, -6, 0xDEAD, 0xBEEF, b"LEAK", 1, 2, 3, cookie)
    return (packet + b"extension fields")[:size]


def server(
    head: int = 0x24,
    stratum: int = 2,
    *,
    delay: int = 0,
    dispersion: int = 0,
    reference_id: bytes = b"GPS\0",
    origin: int = COOKIE,
    receive: int = NOW,
    transmit: int = NOW + 1,
) -> bytes:
    return PACKET.pack(head, stratum, 6, -20, delay, dispersion, reference_id, 0, origin, receive, transmit)


# --- a client's query


@pytest.mark.parametrize(("head", "version"), [(0x23, 4), (0x1B, 3), (0xE3, 4), (0xDB, 3)], ids=hex)
def test_of_a_query_the_version_and_the_cookie_are_kept_and_nothing_else(head: int, version: int) -> None:
    assert parse_query(client(head)) == Query(version, COOKIE)


REFUSED = {
    "empty": (b"", "length"),
    "one byte short": (client(size=47), "length"),
    "one byte long": (client(size=49), "length"),
    "extension field": (client(size=64), "length"),
    "symmetric active": (client(0x21), "mode 1"),
    "symmetric passive": (client(0x22), "mode 2"),
    "server": (client(0x24), "mode 4"),
    "broadcast": (client(0x25), "mode 5"),
    "control": (client(0x26), "mode 6"),
    "private": (client(0x27), "mode 7"),
    "reserved": (client(0x20), "mode 0"),
    "version 0": (client(0x03), "version 0"),
    "version 1": (client(0x0B), "version 1"),
    "version 2": (client(0x13), "version 2"),
    "version 5": (client(0x2B), "version 5"),
    "version 7": (client(0x3B), "version 7"),
    "monlist": (b"\x17\x00\x03\x2a" + bytes(4), "length"),
}


@pytest.mark.parametrize(("message", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_clients_query_is_malformed(message: bytes, why: str) -> None:
    with pytest.raises(MalformedPacket) as error:
        parse_query(message)
    assert str(error.value) == why


@given(st.binary(max_size=100))
def test_garbage_is_a_query_or_malformed(message: bytes) -> None:
    try:
        query = parse_query(message)
    except MalformedPacket:
        return
    assert len(message) == SIZE
    assert query.version in (3, 4)


def test_only_a_whole_packet_is_a_query() -> None:
    whole = client()
    for size in range(SIZE):
        with pytest.raises(MalformedPacket):
            parse_query(whole[:size])
    assert parse_query(whole)


# --- our answer


def test_an_answer_is_48_bytes_with_the_cookie_and_our_own_numbers() -> None:
    answer = Answer(Leap.INSERT, 3, 0.5, 0.25, 1_800_000_000 * NS, 1_800_000_001 * NS, 1_800_000_002 * NS)
    sent = build_answer(Query(3, COOKIE), answer)
    assert len(sent) == SIZE
    assert PACKET.unpack(sent) == (
        1 << 6 | 3 << 3 | 4,
        3,
        6,
        -20,
        0x8000,
        0x4000,
        b"GATE",
        timestamp(1_800_000_000 * NS),
        COOKIE,
        timestamp(1_800_000_001 * NS),
        timestamp(1_800_000_002 * NS),
    )


def test_an_answer_without_time_says_so_in_every_way() -> None:
    sent = build_answer(Query(4, COOKIE), Answer(Leap.UNKNOWN, UNSYNCHRONISED))
    assert sent == PACKET.pack(0xE4, 16, 6, -20, 0, 0, bytes(4), 0, COOKIE, 0, 0)


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_two_clients_differ_in_nothing_but_what_is_theirs(message: bytes) -> None:
    """Whatever a client writes into the other fields, its answer is that of every other client."""
    try:
        query = parse_query(message)
    except MalformedPacket:
        return
    answer = Answer(Leap.NONE, 3, 0.1, 0.1, NS, 2 * NS, 3 * NS)
    theirs = build_answer(query, answer)
    plain = build_answer(Query(query.version, 0), answer)
    assert (theirs[:24], theirs[32:]) == (plain[:24], plain[32:])
    assert theirs[24:32] == message[40:]


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_no_number_breaks_an_answer_or_shrinks_on_its_way(delay_s: float, dispersion_s: float) -> None:
    sent = PACKET.unpack(build_answer(Query(4, 1), Answer(Leap.NONE, 3, delay_s, dispersion_s, 0, 0, 0)))
    assert sent[4] / 65536 >= min(delay_s, 65535)
    assert sent[5] / 65536 >= min(dispersion_s, 65535)


# --- our own query


def test_our_query_says_nothing_but_a_random_number() -> None:
    assert build_query(COOKIE) == PACKET.pack(0x23, 0, 0, 0x20, 0, 0, bytes(4), 0, 0, 0, COOKIE)


# --- a server's answer


def test_a_reply_is_read() -> None:
    message = server(0x64, 15, delay=0x18000, dispersion=0x8000)
    assert parse_reply(message, COOKIE) == Reply(Leap.INSERT, 15, 1.5, 0.5, NOW, NOW + 1)


STRAYS = {
    "too short": (server()[:47], "length"),
    "with an extension field": (server() + bytes(16), "length"),
    "a client's": (server(0x23), "mode 3"),
    "symmetric": (server(0x22), "mode 2"),
    "broadcast": (server(0x25), "mode 5"),
    "version 1": (server(0x0C), "version 1"),
    "another cookie": (server(origin=COOKIE + 1), "origin"),
    "no cookie": (server(origin=0), "origin"),
    "a kiss with another cookie": (server(stratum=0, reference_id=b"DENY", origin=1), "origin"),
}


@pytest.mark.parametrize(("message", "why"), STRAYS.values(), ids=STRAYS)
def test_what_does_not_answer_our_query_is_no_reply(message: bytes, why: str) -> None:
    with pytest.raises(MalformedPacket) as error:
        parse_reply(message, COOKIE)
    assert str(error.value) == why


UNUSABLE = {
    "stratum 16": (server(stratum=16), "not synchronised"),
    "stratum 255": (server(stratum=255), "not synchronised"),
    "leap unknown": (server(0xE4), "not synchronised"),
    "stratum 0 with bytes": (server(stratum=0, reference_id=b"\1\2\3\4"), "stratum 0"),
    "stratum 0 with an escape": (server(stratum=0, reference_id=b"\x1b[2J"), "stratum 0"),
    "root dispersion": (server(dispersion=16 << 16), "root distance"),
    "root delay": (server(delay=32 << 16), "root distance"),
    "both": (server(delay=16 << 16, dispersion=8 << 16), "root distance"),
    "no receive time": (server(receive=0), "timestamps"),
    "no transmit time": (server(transmit=0), "timestamps"),
    "sent before it came": (server(receive=NOW + SECOND, transmit=NOW), "timestamps"),
}


@pytest.mark.parametrize(("message", "why"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_reply_that_gives_no_time_says_why(message: bytes, why: str) -> None:
    with pytest.raises(UnusableReply) as error:
        parse_reply(message, COOKIE)
    assert str(error.value) == why


@pytest.mark.parametrize("code", ["DENY", "RSTR", "RATE", "ABCD"])
def test_a_kiss_of_death_is_told_by_its_code(code: str) -> None:
    with pytest.raises(KissOfDeath) as error:
        parse_reply(server(0xE4, 0, reference_id=code.encode()), COOKIE)
    assert error.value.code == code


@given(st.binary(max_size=100), st.integers(0, 2**64 - 1))
def test_garbage_is_a_reply_or_one_of_our_errors(message: bytes, cookie: int) -> None:
    try:
        reply = parse_reply(message, cookie)
    except (MalformedPacket, UnusableReply, KissOfDeath):
        return
    assert 1 <= reply.stratum <= 15


@given(st.binary(min_size=24, max_size=24), st.binary(min_size=16, max_size=16))
def test_garbage_around_the_right_cookie_is_a_reply_or_one_of_our_errors(head: bytes, tail: bytes) -> None:
    try:
        reply = parse_reply(b"\x24" + head[1:] + COOKIE.to_bytes(8) + tail, COOKIE)
    except (UnusableReply, KissOfDeath):
        return
    assert 1 <= reply.stratum <= 15
    assert reply.root_delay_s / 2 + reply.root_dispersion_s < 16
    assert posix_ns(reply.transmit) >= posix_ns(reply.receive)


# --- numbers


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (datetime(2026, 11, 22, tzinfo=UTC), 4_004_294_400),
        (datetime(2036, 2, 7, 6, 28, 15, tzinfo=UTC), 2**32 - 1),
        (datetime(2036, 2, 7, 6, 28, 16, tzinfo=UTC), 0),
        (datetime(2100, 1, 1, tzinfo=UTC), 6_311_433_600 - 2**32),
    ],
    ids=["today", "the last second of era 0", "the first of era 1", "2100"],
)
def test_a_timestamp_of_either_era_is_read_back(moment: datetime, seconds: int) -> None:
    ns = int(moment.timestamp()) * NS
    assert posix_ns(timestamp(ns)) == ns
    assert timestamp(ns) >> 32 == seconds


@given(st.integers(1_735_689_600 * NS, 4_000_000_000 * NS))
def test_a_timestamp_is_exact_to_a_nanosecond(ns: int) -> None:
    assert posix_ns(timestamp(ns)) == ns
