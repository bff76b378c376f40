"""The dnstap codec: frames, None for more bytes, or MalformedFrame; never anything else."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.addresses import Address
from proxy.wire.dns import AAAA, MalformedResponse, parse_answered
from proxy.wire.dnstap import (
    CLIENT_RESPONSE,
    CONTENT_TYPE,
    MAX_FIELDS,
    MAX_FRAME,
    Control,
    FrameStream,
    MalformedFrame,
    Tap,
    parse_tap,
    render_control,
)
from tests.proxy.nameserver import address
from tests.proxy.tapping import (
    ACCEPT,
    FINISH,
    READY,
    SERVER,
    START,
    STOP,
    cname,
    counted,
    dns_response,
    fixed32,
    framed,
    message,
    number,
    tap,
    told,
    varint,
)

RESPONSE = dns_response("api.example", "93.184.216.34")
FRAME = tap(message(RESPONSE))
TWO = framed(FRAME) + framed(b"x")


def peer(text: str, port: int) -> tuple[Address, int]:
    return ip_address(text), port


def read(data: bytes, size: int = 0) -> tuple[list[bytes], bytes, bool]:
    """Frames, what is sent back, and whether it is over; fed whole, or `size` bytes at a time."""
    stream = FrameStream()
    frames, sent = [], b""
    for at in range(0, len(data), size or len(data) or 1):
        frames += list(stream.feed(data[at : at + (size or len(data))]))
        sent += stream.reply()
    return frames, sent, stream.is_over


@pytest.mark.parametrize("size", [0, 1, 3, 7, 100])
def test_a_stream_reads_the_same_whole_and_in_pieces(size: int) -> None:
    assert read(READY + START + TWO + STOP, size) == ([FRAME, b"x"], ACCEPT + FINISH, True)
    assert read(START + TWO + STOP, size) == ([FRAME, b"x"], b"", True)
    assert read(READY + START + TWO, size) == ([FRAME, b"x"], ACCEPT, False)


def test_what_follows_stop_does_not_count() -> None:
    assert read(START + framed(FRAME) + STOP + framed(FRAME)) == ([FRAME], b"", True)


def test_ready_may_offer_several_content_types() -> None:
    offer = render_control(Control.READY, b"protobuf:other", CONTENT_TYPE)
    assert read(offer + START) == ([], ACCEPT, False)


def test_a_frame_that_was_begun_is_known() -> None:
    stream = FrameStream()
    list(stream.feed(START + framed(FRAME)[:9]))
    assert stream.is_amid_frame
    list(stream.feed(framed(FRAME)[9:]))
    assert not stream.is_amid_frame


MALFORMED = {
    "data before START": (framed(FRAME), "before START"),
    "data after READY": (READY + framed(FRAME), "before START"),
    "READY of another type": (render_control(Control.READY, b"text/plain"), "READY for another"),
    "READY of none": (render_control(Control.READY), "READY for another"),
    "START of another type": (render_control(Control.START, b"text/plain"), "START of another"),
    "START of none": (render_control(Control.START), "START of another"),
    "READY twice": (READY + READY, "READY out of turn"),
    "START twice": (START + START, "START out of turn"),
    "READY in between": (START + READY, "READY out of turn"),
    "STOP first": (STOP, "STOP out of turn"),
    "ACCEPT": (ACCEPT, "ACCEPT out of turn"),
    "FINISH": (START + FINISH, "FINISH out of turn"),
    "no control at all": (struct.pack("!IIH", 0, 2, 1), "a control frame that is none"),
    "empty control": (struct.pack("!II", 0, 0), "a control frame that is none"),
    "control 6": (struct.pack("!III", 0, 4, 6), "a control frame that is none"),
    "control field 2": (struct.pack("!IIIII", 0, 12, 2, 2, 0), "a control frame that is none"),
    "control field too long": (struct.pack("!IIIII", 0, 12, 2, 1, 9), "a control frame that is none"),
    "control field cut": (struct.pack("!IIII", 0, 8, 2, 1), "a control frame that is none"),
    "large control": (struct.pack("!II", 0, 513), "a frame of 513 bytes"),
    "large frame": (START + struct.pack("!I", MAX_FRAME + 1), f"a frame of {MAX_FRAME + 1} bytes"),
    "4 GiB announced": (START + b"\xff" * 4, "the limit is"),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", "the limit is"),
}


@pytest.mark.parametrize(("data", "why"), MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("size", [0, 1])
def test_a_malformed_stream_is_refused(data: bytes, why: str, size: int) -> None:
    with pytest.raises(MalformedFrame, match=why):
        read(data, size)


def test_the_largest_answer_fits_into_a_frame() -> None:
    frame = tap(message(bytes(65535), more=counted(10, bytes(65535))))
    assert len(frame) < MAX_FRAME
    assert parse_tap(frame).response == bytes(65535)


# --- the message


def test_a_client_response_is_read() -> None:
    assert parse_tap(FRAME) == Tap(CLIENT_RESPONSE, peer("127.0.0.1", 4711), peer(SERVER, 53), RESPONSE)


def test_ipv4_within_ipv6_is_ipv4() -> None:
    """A server that listens on [::] tells its IPv4 clients so."""
    found = parse_tap(tap(message(RESPONSE, "::ffff:10.0.0.7")))
    assert (found.client, found.server) == (peer("10.0.0.7", 4711), peer(SERVER, 53))


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 99])
def test_of_other_messages_only_the_type_is_read(kind: int) -> None:
    assert parse_tap(tap(message(b"never read", type=kind))) == Tap(kind)


def test_a_message_of_coredns_is_read() -> None:
    """It listens on [::], gives IPv4 in the form of IPv6 with family INET, and does not say where it was asked."""
    mapped = ip_address("::ffff:10.0.0.7").packed
    inner = number(1, 6) + number(2, 1) + number(3, 1) + counted(4, mapped) + number(6, 4711) + counted(14, RESPONSE)
    extra = counted(3, b"metadata")
    assert parse_tap(tap(inner) + extra) == Tap(CLIENT_RESPONSE, peer("10.0.0.7", 4711), None, RESPONSE)


def test_a_server_may_leave_out_what_it_likes() -> None:
    assert parse_tap(tap(number(1, 6))) == Tap(CLIENT_RESPONSE)
    assert parse_tap(tap(number(1, 6) + number(2, 1) + counted(4, bytes(4)))) == Tap(6, peer("0.0.0.0", 0))


BAD_MESSAGES = {
    "nothing": (b"", "no message"),
    "type 2": (counted(14, message(RESPONSE)) + number(15, 2), "no message"),
    "no type": (counted(14, message(RESPONSE)), "no message"),
    "no message": (number(15, 1), "without its type"),
    "no message type": (tap(number(2, 1)), "without its type"),
    "message as a number": (number(14, 1) + number(15, 1), "field 14"),
    "two messages": (counted(14, message(RESPONSE)) + FRAME, "field 14 twice"),
    "two clients": (tap(message(RESPONSE, more=counted(4, bytes(4)))), "field 4 twice"),
    "two responses": (tap(message(RESPONSE, more=counted(14, b"x"))), "field 14 twice"),
    "address of 5 bytes": (tap(number(1, 6) + number(2, 1) + counted(4, bytes(5))), "an address of 5 bytes"),
    "empty address": (tap(number(1, 6) + number(2, 1) + counted(4, b"")), "an address of 0 bytes"),
    "port": (tap(number(1, 6) + number(2, 1) + counted(4, bytes(4)) + number(6, 65536)), "a port above"),
    "port as bytes": (tap(number(1, 6) + counted(6, b"x")), "field 6"),
    "group": (tap(message(RESPONSE, more=varint(20 << 3 | 3))), "wire type 3"),
    "wire type 7": (varint(20 << 3 | 7), "wire type 7"),
    "varint without end": (b"\xff" * 11, "more than 64 bits"),
    "varint of 70 bits": (b"\xff" * 9 + b"\x7f", "more than 64 bits"),
    "cut varint": (FRAME + b"\x80", "ends early"),
    "field overruns": (FRAME + counted(30, b"abc")[:-1], "ends early"),
    "fixed overruns": (FRAME + fixed32(30, 1)[:-1], "ends early"),
    "field of 2^63 bytes": (FRAME + varint(30 << 3 | 2) + varint(1 << 63), "ends early"),
    "many fields": (number(30, 1) * (MAX_FIELDS + 1), "more than 64 fields"),
}


@pytest.mark.parametrize(("frame", "why"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_malformed_message_is_refused(frame: bytes, why: str) -> None:
    with pytest.raises(MalformedFrame, match=why):
        parse_tap(frame)


# --- the answer in it


def test_the_answer_is_that_to_the_question() -> None:
    chain = [cname("a.example", "b.example", 9), cname("b.example", "c.example"), address("c.example", "192.0.2.1")]
    query, answer = parse_answered(dns_response("a.example", chain))
    assert (query.name, query.type_text) == ("a.example", "A")
    assert ([str(found) for found in answer.addresses], answer.ttl_s) == (["192.0.2.1"], 9)
    query, answer = parse_answered(dns_response("a.example", "2001:db8::1", qtype=AAAA))
    assert (query.type_text, [str(found) for found in answer.addresses]) == ("AAAA", ["2001:db8::1"])


@pytest.mark.parametrize(
    "response",
    [
        dns_response("a.example", "192.0.2.1", rcode=3),
        dns_response("a.example", "192.0.2.1", rcode=5),
        dns_response("a.example", "192.0.2.1", flags=0x8380),
        dns_response("a.example", "192.0.2.1", qtype=AAAA),
        dns_response("a.example", [address("b.example", "192.0.2.1")]),
        dns_response("a.example", [cname("b.example", "c.example"), address("c.example", "192.0.2.1")]),
        dns_response("a.example", [cname("a.example", "c.example"), address("b.example", "192.0.2.1")]),
        dns_response("a.example", [bytes(9)], qtype=16),
    ],
    ids=[
        "NXDOMAIN",
        "REFUSED",
        "truncated",
        "another type",
        "another owner",
        "another chain",
        "beside the chain",
        "TXT",
    ],
)
def test_no_address_comes_of_what_is_no_answer_to_the_question(response: bytes) -> None:
    query, answer = parse_answered(response)
    assert (query.name, answer.addresses) == ("a.example", ())


@pytest.mark.parametrize(
    "response",
    [
        b"",
        bytes(12),
        dns_response("a.example", "192.0.2.1", flags=0x0100),
        dns_response("a.example", "192.0.2.1")[:-1],
        dns_response("a.example", [cname("a.example", "a.example")]),
        struct.pack("!6H", 1, 0x8181, 0, 0, 0, 0),
        struct.pack("!6H", 1, 0x8180, 2, 0, 0, 0) + bytes(30),
        struct.pack("!6H", 1, 0x8180, 1, 0, 0, 0) + b"\xc0\x0c" + bytes(4),
    ],
    ids=["empty", "zeros", "a question", "cut", "endless chain", "FORMERR", "two questions", "pointer as question"],
)
def test_what_is_no_response_is_refused(response: bytes) -> None:
    with pytest.raises(MalformedResponse):
        parse_answered(response)


# --- garbage


def outcome(data: bytes, size: int = 0) -> str:
    try:
        for frame in read(data, size)[0]:
            parse_answered(parse_tap(frame).response)
    except (MalformedFrame, MalformedResponse) as error:
        return type(error).__name__
    return "read"


@given(
    st.binary(max_size=300)
    | st.binary(max_size=300).map(lambda data: START + data)
    | st.binary(max_size=300).map(lambda data: START + framed(data))
    | st.binary(max_size=300).map(lambda data: START + framed(tap(data)))
    | st.binary(max_size=300).map(lambda data: START + framed(tap(message(data)))),
    st.integers(1, 50),
)
def test_garbage_is_frames_none_or_malformed(data: bytes, size: int) -> None:
    outcome(data, size)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_stream_is_frames_none_or_malformed(damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(READY + START + told("api.example", "93.184.216.34") + STOP)
    for at, value in damage:
        damaged[at % len(damaged)] = value
    outcome(bytes(damaged))
