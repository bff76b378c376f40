"""The QUIC Initial codec: a ClientHello, None for more datagrams, or MalformedInitial; never anything else."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.wire.client_hello import ClientHello, MalformedHello, parse_message
from proxy.wire.quic import (
    MAX_BYTES,
    MAX_CONNECTIONS,
    MAX_DATAGRAMS,
    MAX_LATER,
    InitialReader,
    MalformedInitial,
    UnknownVersion,
    is_long_header,
)
from proxy.wire.quic_keys import derive_key, open_packet
from tests.proxy.hellos import X25519_MLKEM768, ech, key_share, message, server_name
from tests.proxy.quic_client import (
    ACK,
    ACK_ECN,
    CLOSE,
    DESTINATION,
    HANDSHAKE,
    PING,
    RETRY,
    V1,
    V2,
    ZERO_RTT,
    crypto,
    datagram,
    datagrams,
    number,
    packet,
    quic_hello,
    sliced,
)
from tests.proxy.quic_two_keys import packet_of_two_keys

VECTORS = Path(__file__).parents[1] / "vectors" / "quic_initials"
RECORDED = {path.stem: bytes.fromhex(path.read_text()) for path in sorted(VECTORS.glob("*.hex"))}
HELLO = quic_hello()
BIG = quic_hello("big.example", key_share((X25519_MLKEM768, 1216), (0x001D, 32)), (21, bytes(900)))  # in 3 datagrams
ONE = datagram(crypto(0, HELLO))
OTHER = bytes(range(30, 42))  # a connection ID as a server gives in Retry
POINTS = [1, 50, 53, 57, 90]


def read(*parts: bytes) -> ClientHello | None:
    reader = InitialReader()
    found = [reader.feed(part) for part in parts]
    assert found[:-1] == [None] * (len(parts) - 1)
    return found[-1]


def name_in(*parts: bytes) -> str | None:
    found = read(*parts)
    assert found is not None
    return found.sni


@pytest.mark.parametrize("vector", RECORDED)
def test_published_vectors_are_read(vector: str) -> None:
    found = read(RECORDED[vector])
    assert found is not None
    assert (found.sni, found.alpn, found.ech, found.supported_versions) == ("example.com", (b"alpn",), False, (0x304,))
    assert found.length == 241


def flight(version: int, *, size: int = 0, name: str = "real.example") -> list[bytes]:
    """What a real client sends first; `size` makes its hello so much longer."""
    protocols = ["h3", *("x" * 200 for _ in range(size // 200))]
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=protocols, server_name=name, original_version=version
    )
    client = QuicConnection(configuration=configuration)
    client.connect(("192.0.2.1", 443), now=0.0)
    return [data for data, _ in client.datagrams_to_send(now=0.0)]


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_a_real_client_shows_its_name(version: int) -> None:
    found = read(*flight(version))
    assert found is not None
    assert (found.sni, found.alpn, found.ech) == ("real.example", (b"h3",), False)


@pytest.mark.parametrize("size", [1200, 2200], ids=["2 datagrams", "3 datagrams"])
@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_a_long_hello_of_a_real_client_is_joined_in_any_order(version: int, size: int) -> None:
    parts = flight(version, size=size)
    assert len(parts) == 1 + size // 1000
    for order in itertools.permutations(parts):
        assert name_in(*order) == "real.example"


def test_a_hello_sliced_through_its_name_is_joined() -> None:
    """As Firefox slices: the middle of the name travels apart, the parts in another order."""
    at = HELLO.index(b"a.example") + 4
    pieces = sliced(HELLO, at, at + 3)
    for order in itertools.permutations(pieces):
        assert name_in(datagram(PING, order[0], bytes(3), order[1], PING, order[2])) == "a.example"
        assert name_in(*datagrams(order, [1, 1, 1])) == "a.example"


def test_several_packets_of_a_datagram_are_read() -> None:
    first, second = sliced(HELLO, 60)
    zero_rtt = packet(bytes(50), kind=ZERO_RTT)
    whole = packet(first) + zero_rtt + packet(second + bytes(1200), packet_number=1)
    assert name_in(whole) == "a.example"
    assert name_in(whole + bytes(7)) == "a.example"  # padding that is in no packet


def test_0_rtt_may_come_in_datagrams_of_its_own() -> None:
    first, second = datagrams(sliced(HELLO, 60), [1, 1])
    assert name_in(first, packet(bytes(50), kind=ZERO_RTT), second) == "a.example"


def test_what_was_sent_twice_reads_the_same() -> None:
    first, second = datagrams(sliced(HELLO, 60), [1, 1])
    again = datagram(crypto(20, HELLO[20:80]), packet_number=2)
    assert name_in(first, first, again, second) == "a.example"


@pytest.mark.parametrize(
    "made",
    [
        datagram(crypto(0, HELLO), token=bytes(100)),
        datagram(crypto(0, HELLO), destination=bytes(20)),
        datagram(crypto(0, HELLO), packet_number=300, width=4),
        datagram(crypto(0, HELLO), packet_number=77, width=1),
        datagram(ACK, ACK_ECN, PING, crypto(0, HELLO)),
        datagram(crypto(0, b""), crypto(0, HELLO)),
        datagram(crypto(0, HELLO), size=9000),
    ],
    ids=["token", "long id", "4 bytes of number", "1 byte", "acknowledgements", "empty frame", "jumbo"],
)
def test_any_lawful_initial_is_read(made: bytes) -> None:
    assert name_in(made) == "a.example"


def test_what_the_hello_shows_is_what_the_one_reader_reads() -> None:
    hello = quic_hello("outer.example", ech())
    found = read(datagram(crypto(0, hello)))
    assert found == parse_message(hello)
    assert found is not None
    assert found.ech


def test_a_hello_without_a_name_is_a_value() -> None:
    found = read(datagram(crypto(0, quic_hello(None))))
    assert found is not None
    assert found.sni is None


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not a ClientHello"),
        (b"\x02" + HELLO[1:], "not a ClientHello"),
        (HELLO[:3], "ends early"),
        (HELLO[:-1], "ends early"),
        (HELLO + b"\0", "goes on behind"),
    ],
    ids=["empty", "server hello", "cut in its length", "cut", "more behind"],
)
def test_a_message_is_one_whole_hello_or_malformed(body: bytes, why: str) -> None:
    with pytest.raises(MalformedHello, match=why):
        parse_message(body)


FIRST, SECOND = sliced(HELLO, 60)
MALFORMED: dict[str, tuple[Sequence[bytes], str]] = {
    "empty": ([b""], "short header"),
    "short header": ([b"\x40" + bytes(1300)], "short header"),
    "header alone": ([ONE[:20]], "ends early"),
    "cut": ([ONE[:-1]], "ends early"),
    "not sealed": ([ONE[:40] + bytes(1160)], "another key"),
    "fixed bit": ([datagram(crypto(0, HELLO), first=0x80)], "fixed bit"),
    "reserved bits": ([datagram(crypto(0, HELLO), first=0xC4)], "reserved bits"),
    "small": ([datagram(crypto(0, HELLO), size=1199)], "datagram of 1199 bytes"),
    "second one small": ([datagram(FIRST), datagram(SECOND, size=500, packet_number=1)], "datagram of 500 bytes"),
    "id of 7 bytes": ([datagram(crypto(0, HELLO), destination=bytes(7))], "ID of 7 bytes"),
    "id of 21 bytes": ([datagram(crypto(0, HELLO), destination=bytes(21))], "more than 20 bytes"),
    "begins with 0-RTT": ([packet(bytes(1200), kind=ZERO_RTT)], "type 0-RTT"),
    "begins with Handshake": ([packet(bytes(1200), kind=HANDSHAKE)], "type Handshake"),
    "Retry": ([packet(bytes(1200), kind=RETRY)], "Retry from a client"),
    "Handshake": ([packet(FIRST) + packet(bytes(1200), kind=HANDSHAKE)], "before the ClientHello"),
    "1-RTT": ([packet(FIRST) + b"\x40" + bytes(1200)], "short header"),
    "another id": ([datagram(FIRST), datagram(SECOND, destination=OTHER)], "two connections"),
    "another id, same datagram": ([packet(FIRST) + datagram(SECOND, destination=OTHER)], "two connections"),
    "another version": ([datagram(FIRST), datagram(SECOND, version=V2)], "two connections"),
    "key of another id": ([datagram(crypto(0, HELLO), key=OTHER)], "another key"),
    "no frames": ([packet(b"", width=4) + ONE], "without frames"),
    "stream frame": ([datagram(b"\x08\0x", crypto(0, HELLO))], "type 0x08"),
    "close": ([datagram(CLOSE, crypto(0, HELLO))], "type 0x1c"),
    "long spelling of a type": ([datagram(b"\x40\x06" + crypto(0, HELLO)[1:])], "type 0x40"),
    "frame overruns": ([packet(bytes(1200) + crypto(0, HELLO)[:-1])], "frame ends early"),
    "ACK overruns": ([packet(bytes(1200) + b"\x02\x05\x00" + number(1 << 60) + b"\0")], "frame ends early"),
    "two spellings": ([datagram(FIRST), datagram(crypto(40, b"\xff" * 80), packet_number=1)], "two spellings"),
    "two names in one packet": (
        [datagram(FIRST, SECOND, crypto(60, quic_hello("b.example")[60:]))],
        "two spellings",
    ),
    "server hello": ([datagram(crypto(0, b"\x02" + HELLO[1:]))], "not a ClientHello"),
    "more behind it": ([datagram(crypto(0, HELLO + b"\x01"))], "goes on behind"),
    "more behind it, with a gap": ([datagram(crypto(0, HELLO), crypto(len(HELLO) + 9, b"x"))], "goes on behind"),
    "malformed hello": ([datagram(crypto(0, message([server_name(b"a.b", b"c.d")])))], "exactly one name"),
    "16 MB announced": ([datagram(crypto(0, b"\x01\xff\xff\xff"))], "more than 16384"),
    "far away": ([datagram(crypto(16380, b"12345"))], "more than 16384"),
    "nothing, far away": ([datagram(crypto(1 << 61, b""))], "more than 16384"),
    "9 packets": ([packet(FIRST) * 8 + datagram(FIRST)], "more than 8 packets"),
    "never whole": ([datagram(FIRST)] * (MAX_DATAGRAMS + 1), "no whole ClientHello"),
    "too large": ([datagram(FIRST, size=60000), datagram(SECOND, size=MAX_BYTES - 59999)], "no whole ClientHello"),
}


@pytest.mark.parametrize(("parts", "why"), MALFORMED.values(), ids=MALFORMED.keys())
def test_what_no_client_sends_is_malformed(parts: Sequence[bytes], why: str) -> None:
    reader = InitialReader()
    for part in parts[:-1]:
        assert reader.feed(part) is None
    with pytest.raises(MalformedInitial, match=why):
        reader.feed(parts[-1])


@pytest.mark.parametrize(
    "version", [0, 0x1A2A3A4A, 0xFF00001D, 0x51303530], ids=["negotiation", "GREASE", "draft", "Q050"]
)
def test_an_unknown_version_is_named(version: int) -> None:
    made = ONE[:1] + version.to_bytes(4) + ONE[5:]
    with pytest.raises(UnknownVersion, match=f"version 0x{version:08x}") as found:
        InitialReader().feed(made)
    assert found.value.version == version
    assert is_long_header(made)


# --- after the hello


def reader_after(hello: bytes = HELLO) -> InitialReader:
    reader = InitialReader()
    assert reader.feed(datagram(crypto(0, hello)))
    return reader


LATER: dict[str, Sequence[bytes]] = {
    "nothing": [b""],
    "1-RTT": [b"\x40" + bytes(1300), b"\x00" + bytes(20)],  # RFC 9287: the fixed bit may be cleared by then
    "sent again": [ONE, datagram(FIRST, packet_number=1)],
    "acknowledgement and close": [datagram(ACK, CLOSE, packet_number=1, destination=OTHER, key=DESTINATION)],
    "Handshake": [
        packet(ACK, destination=OTHER, key=DESTINATION, packet_number=1) + packet(bytes(900), kind=HANDSHAKE)
    ],
    "Handshake, fixed bit cleared": [packet(bytes(900), kind=HANDSHAKE, first=0x80)],
    "coalesced 1-RTT": [packet(ACK, destination=OTHER, key=DESTINATION, packet_number=1) + b"\x41" + bytes(900)],
    "after Retry": [datagram(crypto(0, HELLO), destination=OTHER, token=b"retry", packet_number=1)],
    "after Retry, in parts": [
        datagram(SECOND, destination=OTHER, packet_number=2),
        datagram(FIRST, destination=OTHER, packet_number=1),
        datagram(ACK, destination=b"", key=OTHER, packet_number=3),
    ],
    "version 2 chosen": [datagram(ACK, version=V2, destination=OTHER, key=DESTINATION, packet_number=1)],
    "after HelloRetryRequest": [
        datagram(crypto(len(HELLO), quic_hello("a.example", (44, bytes(40)))), destination=OTHER, key=DESTINATION)
    ],
}


@pytest.mark.parametrize("parts", LATER.values(), ids=LATER.keys())
def test_what_a_client_sends_later_passes(parts: Sequence[bytes]) -> None:
    reader = reader_after()
    for part in parts:
        reader.follow(part)


B_HELLO = quic_hello("b.example")
B_PARTS = sliced(B_HELLO, 70)
ATTACKS: dict[str, tuple[Sequence[bytes], str]] = {
    "a second connection": ([datagram(crypto(0, B_HELLO), destination=OTHER)], "another name"),
    "its token is no excuse": ([datagram(crypto(0, B_HELLO), destination=OTHER, token=b"retry")], "another name"),
    "in version 2": ([datagram(crypto(0, B_HELLO), destination=OTHER, version=V2)], "another name"),
    "without a name": ([datagram(crypto(0, quic_hello(None)), destination=OTHER)], "another name"),
    "with ECH": ([datagram(crypto(0, quic_hello("a.example", ech())), destination=OTHER)], "another name"),
    "in two datagrams": (datagrams(B_PARTS, [1, 1], destination=OTHER), "another name"),
    "behind 0-RTT": (
        [packet(bytes(9), kind=ZERO_RTT) + datagram(crypto(0, B_HELLO), destination=OTHER)],
        "another name",
    ),
    "small": ([datagram(crypto(0, B_HELLO), destination=OTHER, size=0)], "another name"),
    "fixed bit cleared": ([datagram(crypto(0, B_HELLO), destination=OTHER, first=0x80)], "another name"),
    "on the first id": ([datagram(crypto(0, B_HELLO), packet_number=1)], "two spellings"),
    "on the first id, version 2": ([datagram(crypto(0, B_HELLO), version=V2, packet_number=1)], "two spellings"),
    "second hello of the connection": ([datagram(crypto(len(HELLO), B_HELLO), packet_number=1)], "another name"),
    "unknown version": ([ONE[:1] + b"\x1a\x2a\x3a\x4a" + ONE[5:]], "version 0x1a2a3a4a"),
    "unknown version, coalesced": ([packet(ACK, packet_number=1) + ONE[:1] + b"\x1a\x2a\x3a\x4a" + ONE[5:]], "version"),
    "sealed with a key of nobody": ([datagram(crypto(0, B_HELLO), key=bytes(9))], "another key"),
    "stream in an Initial": ([datagram(b"\x08\0x", packet_number=1)], "type 0x08"),
    "a fifth connection": (
        [datagram(crypto(0, HELLO), destination=bytes([n]) * 8) for n in range(MAX_CONNECTIONS)],
        "more than 4 connections",
    ),
    "a flood": ([datagram(PING, packet_number=n) for n in range(MAX_LATER + 1)], "more than 128 Initials"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "why"), ATTACKS.values(), ids=ATTACKS.keys())
def test_no_other_name_rides_on_a_flow_that_was_let_through(parts: Sequence[bytes], why: str) -> None:
    reader = reader_after()
    for part in parts[:-1]:
        reader.follow(part)
    with pytest.raises(MalformedInitial, match=why):
        reader.follow(parts[-1])


def test_a_packet_that_two_keys_open_is_refused() -> None:
    """Read with the key of the known connection it may be harmless, and to the server begin another one."""
    made = packet_of_two_keys(DESTINATION, OTHER, destination=OTHER)
    at = len(made) - 1188
    assert (
        open_packet(derive_key(V1, DESTINATION), made, at).payload
        != open_packet(derive_key(V1, OTHER), made, at).payload
    )
    with pytest.raises(MalformedInitial, match="two keys"):
        reader_after().follow(made)


# --- garbage


def outcome(parts: Sequence[bytes], *, follow: bool = False) -> ClientHello | str | None:
    reader = reader_after() if follow else InitialReader()
    found = None
    try:
        for part in parts:
            if follow:
                reader.follow(part)
            else:
                found = reader.feed(part)
    except MalformedInitial as error:
        return str(error)
    return found


garbage = st.lists(st.binary(max_size=200), min_size=1, max_size=5)


@given(garbage | garbage.map(lambda parts: [b"\xc0\0\0\0\x01\x08" + part for part in parts]), st.booleans())
def test_garbage_is_a_value_none_or_malformed(parts: list[bytes], follow: bool) -> None:
    outcome(parts, follow=follow)


@given(
    st.sampled_from([ONE, *RECORDED.values(), *flight(V2, size=1200)]),
    st.lists(st.tuples(st.integers(0, 1300), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_damaged_initial_is_none_or_malformed_or_as_before(
    data: bytes, damage: list[tuple[int, int]], follow: bool
) -> None:
    damaged = bytearray(data)
    for at, value in damage:
        damaged[at % len(damaged)] = value
    found = outcome([bytes(damaged)], follow=follow)
    if isinstance(found, ClientHello):  # its first bits alone are outside the seal
        assert found.sni in ("a.example", "example.com")


@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from([PING, ACK, ACK_ECN, CLOSE, bytes(30)])
        | st.builds(crypto, st.integers(0, 1 << 62 - 1).map(lambda n: n % 17000), st.binary(max_size=60))
        | st.builds(
            lambda start, size: crypto(start, HELLO[start : start + size]), st.integers(0, 90), st.integers(0, 90)
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_any_frames_well_sealed_are_a_value_none_or_malformed(frames: list[bytes], follow: bool) -> None:
    found = outcome([datagram(*frames, packet_number=1)], follow=follow)
    if isinstance(found, ClientHello):
        assert found.sni == "a.example"


@given(st.lists(st.integers(1, len(BIG) - 1), max_size=12), st.randoms(use_true_random=False), st.integers(1, 3))
@example([700, 1500], random.Random(0), 3)
def test_any_split_reads_the_same(cuts: list[int], order: random.Random, count: int) -> None:
    frames = [*sliced(BIG, *cuts, 800, 1600), *sliced(BIG, 1000)]  # some of it twice
    order.shuffle(frames)
    size = -(-len(frames) // count)
    reader = InitialReader()
    found = [hello for part in datagrams(frames, [size] * count) if (hello := reader.feed(part))]
    assert found[0] == parse_message(BIG)


def test_a_datagram_of_tiny_frames_costs_little() -> None:
    frames = (PING + b"\0") * 15000 + crypto(0, b"\x01") * 5000
    started = time.process_time()
    assert read(datagram(frames)) is None
    assert time.process_time() - started < 5  # about 20 ms; a second look at the rest for each frame would take minutes
