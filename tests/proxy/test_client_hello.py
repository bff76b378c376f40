"""The ClientHello codec: a value, None for more bytes, or MalformedHello; never anything else."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.client_hello import (
    Alert,
    ClientHello,
    First,
    HelloTooLarge,
    MalformedHello,
    classify_first,
    needs,
    parse_hello,
    render_alert,
)
from tests.proxy.hellos import (
    alpn,
    browser_hello,
    counted,
    ech,
    hello,
    message,
    records,
    server_name,
    supported_versions,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "client_hellos"
RECORDED = {path.stem: bytes.fromhex(path.read_text()) for path in sorted(VECTORS.glob("*.hex"))}
NAME = "dataservice.accuweather.com"
H2 = (b"h2", b"http/1.1")


def parsed(data: bytes) -> ClientHello:
    found = parse_hello(data)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("client", "sni", "protocols"),
    [
        ("curl", NAME, H2),
        ("java", NAME, ()),
        ("node", NAME, H2),
        ("openssl-no-sni", None, ()),
        ("openssl-tls12", NAME, ()),
        ("openssl-tls13", NAME, H2),
        ("python-requests", NAME, ()),
    ],
)
def test_recorded_hello_shows_its_name(client: str, sni: str | None, protocols: tuple[bytes, ...]) -> None:
    data = RECORDED[client]
    found = parsed(data)
    assert (found.sni, found.alpn, found.ech, found.length) == (sni, protocols, False, len(data))
    assert (0x304 in found.supported_versions) == (client != "openssl-tls12")


MADE = {
    "ordinary": hello(),
    "browser": browser_hello(),
    "no sni": hello(None),
    "address literal": hello("192.0.2.1"),
    "long name": hello("a" * 63 + "." + "b" * 63 + "." + "c" * 63 + ".example"),
    "no extensions": records(message(None)),
    "empty extensions": records(message([])),
    "name split over records": records(message([server_name(b"split.example")]), 60, 5, 1),
    "one byte a record": records(message([server_name(b"tiny.example")]), *[1] * 100),
    "header split over records": records(message([server_name(b"head.example")]), 1, 1, 1, 1),
}
WHOLE = {**RECORDED, **MADE}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_hello_reads_the_same_whole_and_byte_by_byte(data: bytes) -> None:
    whole = parsed(data)
    for size in range(len(data)):
        assert parse_hello(data[:size]) is None
    assert whole.length == len(data)


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_bytes_behind_the_hello_take_no_part(data: bytes) -> None:
    assert parse_hello(data + b"\x17\x03\x03\x00\x01\x00") == parse_hello(data + b"garbage") == parse_hello(data)


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_needs_never_asks_for_more_than_the_hello_takes(data: bytes) -> None:
    for size in range(len(data)):
        assert size < needs(data[:size]) <= len(data)
    assert needs(data + b"more") == len(data)


def test_needs_reaches_a_dribbled_hello_in_few_steps() -> None:
    data = records(message([server_name(b"tiny.example"), (21, bytes(2000))]), *[1] * 3000)
    steps, size = 0, 0
    while parse_hello(data[:size]) is None:
        size = needs(data[:size])
        steps += 1
    assert steps < 60  # not one for each of its 2,000 records


def test_names_of_hand_made_hellos() -> None:
    shown = {name: parsed(data).sni for name, data in MADE.items()}
    assert shown == {
        "ordinary": "a.example",
        "browser": "a.example",
        "no sni": None,
        "address literal": "192.0.2.1",
        "long name": "a" * 63 + "." + "b" * 63 + "." + "c" * 63 + ".example",
        "no extensions": None,
        "empty extensions": None,
        "name split over records": "split.example",
        "one byte a record": "tiny.example",
        "header split over records": "head.example",
    }


def test_browser_hello_shows_ech_and_grease_and_is_of_post_quantum_size() -> None:
    found = parsed(browser_hello())
    assert found.ech
    assert found.alpn == (b"\x0a\x0a", *H2)
    assert found.supported_versions == (0x0A0A, 0x304, 0x303)
    assert found.length > 1600


def test_ech_is_seen_whatever_it_holds() -> None:
    assert parsed(hello("outer.example", ech())).ech
    assert parsed(hello("inner.example", (0xFE0D, b"\x01"))).ech
    assert parsed(hello("empty.example", (0xFE0D, b""))).ech


def handshake(message_: bytes) -> bytes:
    return b"\x16\x03\x01" + counted(2, message_)


MALFORMED = {
    "ssl 2 hello": (b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10", "not a handshake record"),
    "application data": (b"\x17\x03\x03\x00\x01\x00", "not a handshake record"),
    "record version 2": (b"\x16\x02\x00\x00\x01\x01", "not a TLS record version"),
    "zero-length record": (b"\x16\x03\x01\x00\x00", "record length"),
    "zero-length record in the middle": (records(message(), 10, 0), "record length"),
    "record over 2^14": (b"\x16\x03\x01\x40\x01", "record length"),
    "server hello": (handshake(b"\x02\x00\x00\x00"), "not a ClientHello"),
    "another record type in the middle": (records(message(), 10)[:15] + b"\x15\x03\x01\x00\x02", "not a handshake"),
    "bytes behind it in its record": (handshake(message() + b"\x00"), "goes on behind"),
    "bytes behind it in its last record": (records(message() + b"\x00", 20), "goes on behind"),
    "legacy version 2": (records(message(version=b"\x02\x00")), "legacy version"),
    "session id of 33 bytes": (records(message(session_id=bytes(33))), "session id"),
    "odd cipher suites": (records(message(suites=b"\x13\x01\x13")), "cipher suites"),
    "no cipher suites": (records(message(suites=b"")), "cipher suites"),
    "no compression": (records(message(compression=b"")), "compression"),
    "empty message": (handshake(b"\x01\x00\x00\x00"), "ends early"),
    "ends in the session id": (handshake(b"\x01" + counted(3, b"\x03\x03" + bytes(32) + b"\x20")), "ends early"),
    "extensions too long": (handshake(b"\x01" + counted(3, message(None)[4:] + b"\x00\x09")), "extensions length"),
    "extensions too short": (
        handshake(b"\x01" + counted(3, message(None)[4:] + b"\x00\x00\x00")),
        "extensions length",
    ),
    "extension header cut": (handshake(b"\x01" + counted(3, message(None)[4:] + counted(2, b"\x00"))), "header"),
    "extension overruns": (
        handshake(b"\x01" + counted(3, message(None)[4:] + counted(2, b"\x00\x15\x00\x09"))),
        "extension length",
    ),
    "duplicate server name": (hello("a.example", server_name(b"b.example")), "duplicate extension"),
    "duplicate grease": (hello("a.example", (0x0A0A, b""), (0x0A0A, b"")), "duplicate extension"),
    "two names": (records(message([server_name(b"a.example", b"b.example")])), "exactly one name"),
    "name of another kind": (records(message([server_name(b"a.example", kind=1)])), "server name"),
    "empty name": (records(message([server_name(b"")])), "server name"),
    "no names": (records(message([(0, b"\x00\x00")])), "server name"),
    "empty server name": (records(message([(0, b"")])), "server name"),
    "name list too short": (records(message([(0, b"\x00\x05\x00\x00\x03abc")])), "exactly one name"),
    "name longer than its list": (records(message([(0, b"\x00\x06\x00\x00\x04abc")])), "exactly one name"),
    "name with raw UTF-8": (records(message([server_name("bücher.example".encode())])), "not ASCII"),
    "empty alpn": (records(message([(16, b"\x00\x00")])), "ALPN list"),
    "alpn with an empty name": (records(message([alpn(b"h2", b"")])), "ALPN name"),
    "alpn overruns": (records(message([(16, b"\x00\x03\x09h2")])), "ALPN name"),
    "no versions": (records(message([supported_versions()])), "supported versions"),
    "half a version": (records(message([(43, b"\x03\x03\x04\x03")])), "supported versions"),
}


@pytest.mark.parametrize(("data", "why"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_hello_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(MalformedHello, match=why):
        parse_hello(data)
    with pytest.raises(MalformedHello, match=why):
        parse_hello(data + bytes(100))
    outcomes = set()
    for size in range(len(data) + 1):
        try:
            outcomes.add(parse_hello(data[:size]))
        except MalformedHello:
            break
    assert outcomes <= {None}  # no beginning of it is taken for a hello


@pytest.mark.parametrize(
    "data",
    [
        handshake(b"\x01\xff\xff\xff"),
        handshake(b"\x01\x00\x40\x00"),
        b"\x16\x03\x01\x40\x00",
        records(message([(21, bytes(3000))]), *[1] * 3100),
    ],
    ids=[
        "16 MB announced",
        "limit reached by the headers",
        "record as large as the limit",
        "inflated by one-byte records",
    ],
)
def test_hello_over_the_limit_is_refused_before_it_is_there(data: bytes) -> None:
    with pytest.raises(HelloTooLarge):
        parse_hello(data)


def test_limit_is_the_callers() -> None:
    data = hello()
    assert parse_hello(data, len(data))
    with pytest.raises(HelloTooLarge):
        parse_hello(data, len(data) - 1)


def outcome(data: bytes) -> ClientHello | str | None:
    try:
        return parse_hello(data)
    except MalformedHello as error:
        return f"{type(error).__name__}"


@given(st.binary(max_size=300) | st.binary(max_size=300).map(handshake))
def test_garbage_is_a_value_none_or_malformed(data: bytes) -> None:
    outcome(data)
    classify_first(data)


@given(
    st.sampled_from(list(WHOLE.values())), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4)
)
def test_damaged_hello_is_a_value_none_or_malformed(data: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, value in damage:
        damaged[at % len(damaged)] = value
    found = outcome(bytes(damaged))
    if isinstance(found, ClientHello):
        assert found.length <= len(damaged)
    elif found is None:
        assert needs(bytes(damaged)) > len(damaged)


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=30))
def test_any_split_into_records_reads_the_same(padding: bytes, sizes: list[int]) -> None:
    handshake_ = message([server_name(b"a.example"), (21, padding)])
    whole = parsed(records(handshake_))
    split = records(handshake_, *sizes)
    if sum(sizes) > len(handshake_):  # empty records are refused
        split = records(handshake_, *[min(size, 3) for size in sizes[: len(handshake_) // 3]])
    assert parsed(split).sni == whole.sni
    assert parsed(split).length == len(split)


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (b"", None),
        (b"\x16", First.TLS),
        (hello(), First.TLS),
        (b"GET / HTTP/1.1\r\n", First.HTTP),
        (b"GET /", First.HTTP),
        (b"OPTIONS * HTTP/1.1", First.HTTP),
        (b"POST http://a.example/ HTTP/1.1", First.HTTP),
        (b"GET HTTP://a.example/ HTTP/1.1", First.HTTP),
        (b"VERSION-CONTROL /a", First.HTTP),
        (b"CONNECT a.example:443", First.HTTP),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", First.HTTP),
        (b"G", None),
        (b"GET ", None),
        (b"GET http", None),
        (b"CONNECT ", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", First.OTHER),
        (b"EHLO mail.example\r\n", First.OTHER),
        (b"PING\r\n", First.OTHER),
        (b"get / HTTP/1.1\r\n", First.OTHER),
        (b"\r\nGET / HTTP/1.1\r\n", First.OTHER),
        (b"A" * 33, First.OTHER),
        (b"\x80\x2e\x01\x03\x01", First.OTHER),
        (b"\x00", First.OTHER),
        (b"\x17\x03\x03", First.OTHER),
    ],
    ids=repr,
)
def test_first_bytes_tell_the_protocol(data: bytes, first: First | None) -> None:
    assert classify_first(data) is first


def test_alert_is_a_fatal_plaintext_record() -> None:
    assert render_alert(Alert.ACCESS_DENIED) == bytes.fromhex("15 0303 0002 02 31")
    assert render_alert(Alert.DECODE_ERROR)[-1] == 50


def test_usual_hello_is_read_quickly() -> None:
    data, rounds = browser_hello(), 300
    started = time.process_time()
    for _ in range(rounds):
        parse_hello(data)
    assert (
        time.process_time() - started
    ) / rounds < 200e-6  # about 6 us; far above it only when it is no longer linear
