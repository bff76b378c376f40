"""The DNS codec: ordinary messages, hostile ones, and mitmproxy's codec as a second opinion."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import perf_counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mitmproxy import dns as oracle

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.wire.dns import (
    AAAA,
    CNAME,
    MAX_UDP,
    SOA,
    A,
    Answer,
    ExtendedError,
    MalformedQuery,
    MalformedResponse,
    Note,
    Query,
    Rcode,
    build_addresses,
    build_failure,
    build_name_error,
    build_nodata,
    build_query,
    build_truncated,
    encode_name,
    parse_query,
    parse_response,
)
from tests.proxy.nameserver import address, alias, record, reply, soa, wire

NAME = Hostname("www.example.com")
OPT = struct.pack("!BHHBBHH", 0, 41, 4096, 0, 0, 0x8000, 0)
QUESTION = wire(NAME) + struct.pack("!HH", A, 1)


def message(*, flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0), body: bytes = QUESTION) -> bytes:
    return struct.pack("!6H", 0x1234, flags, *counts) + body


# --- parse_query


def test_a_plain_question_is_read() -> None:
    assert parse_query(message()) == Query(0x1234, NAME, A, 1, QUESTION, echoed=0x0100)


def test_opt_gives_the_size_and_do() -> None:
    query = parse_query(message(counts=(1, 0, 0, 1), body=QUESTION + OPT))
    assert (query.udp_size, query.dnssec_ok) == (4096, True)


def test_options_inside_opt_are_stepped_over() -> None:
    cookie = struct.pack("!BHHIH", 0, 41, 1232, 0, 12) + struct.pack("!HH8s", 10, 8, b"fixed id")
    assert parse_query(message(counts=(1, 0, 0, 1), body=QUESTION + cookie)).udp_size == 1232


@pytest.mark.parametrize(
    ("size", "limit"), [(None, 512), (0, 512), (511, 512), (1000, 1000), (65535, MAX_UDP)], ids=str
)
def test_a_datagram_back_is_as_long_as_client_and_path_take(size: int | None, limit: int) -> None:
    assert replace(parse_query(message()), udp_size=size).udp_limit == limit


def test_case_is_folded_in_the_name_and_kept_in_the_question() -> None:
    body = b"\x03wWw\x07ExAmPlE\x03CoM\0\0\x01\0\x01"
    query = parse_query(message(body=body))
    assert (query.name, query.question) == (NAME, body)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([b"a.b", b"example"], r"a\046b.example"),
        ([b"a", b"b", b"example"], "a.b.example"),
        ([b"back\\slash"], r"back\092slash"),
        ([b"a b"], r"a\032b"),
        ([b"nul\0"], r"nul\000"),
        ([b"\xc3\xbc"], r"\195\188"),
        ([b"_dmarc", b"example"], "_dmarc.example"),
        ([], ""),
    ],
    ids=["dot inside a label", "three labels", "backslash", "space", "nul", "utf-8", "underscore", "root"],
)
def test_no_two_names_read_alike(labels: list[bytes], text: str) -> None:
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    assert parse_query(message(body=name + b"\0\x01\0\x01")).name == text


@pytest.mark.parametrize(
    ("qtype", "qclass", "text"),
    [
        (1, 1, "A"),
        (28, 1, "AAAA"),
        (65, 1, "HTTPS"),
        (999, 1, "TYPE999"),
        (16, 3, "CLASS3/TXT"),
        (1, 255, "CLASS255/A"),
    ],
)
def test_type_in_words(qtype: int, qclass: int, text: str) -> None:
    assert parse_query(message(body=wire(NAME) + struct.pack("!HH", qtype, qclass))).type_text == text


LONGEST = [b"\x3f" + b"a" * 63] * 3

MALFORMED = {
    "empty": (b"", "cut short"),
    "a response": (message(flags=0x8100), "not a standard query"),
    "opcode notify": (message(flags=0x2000), "not a standard query"),
    "opcode update": (message(flags=0x2800), "not a standard query"),
    "truncated bit": (message(flags=0x0300), "not a standard query"),
    "no question": (message(counts=(0, 0, 0, 0), body=b""), "sections of 0, 0, 0 and 0"),
    "two questions": (message(counts=(2, 0, 0, 0), body=QUESTION * 2), "sections of 2, 0, 0 and 0"),
    "huge count": (message(counts=(65535, 0, 0, 0)), "sections of 65535"),
    "an answer in a query": (message(counts=(1, 1, 0, 0)), "sections of 1, 1, 0 and 0"),
    "an authority in a query": (message(counts=(1, 0, 1, 0)), "sections of 1, 0, 1 and 0"),
    "two additionals": (message(counts=(1, 0, 0, 2), body=QUESTION + OPT * 2), "sections of 1, 0, 0 and 2"),
    "tsig": (message(counts=(1, 0, 0, 1), body=QUESTION + OPT.replace(b"\0\x29", b"\0\xfa")), "not OPT"),
    "opt with a name": (message(counts=(1, 0, 0, 1), body=QUESTION + b"\1a" + OPT), "not OPT"),
    "opt missing": (message(counts=(1, 0, 0, 1)), "cut short"),
    "opt longer than the message": (message(counts=(1, 0, 0, 1), body=QUESTION + OPT[:-1] + b"\4"), "-4 bytes after"),
    "edns 1": (message(counts=(1, 0, 0, 1), body=QUESTION + OPT.replace(b"\0\0\x80", b"\0\1\x80")), "EDNS version 1"),
    "trailing byte": (message() + b"\0", "1 bytes after the end"),
    "opt that is not counted": (message(body=QUESTION + OPT), "11 bytes after the end"),
    "pointer": (message(body=b"\xc0\x0c\0\x01\0\x01"), "pointer"),
    "pointer after a label": (message(body=b"\1a\xc0\x0c\0\x01\0\x01"), "pointer"),
    "reserved label 0x40": (message(body=b"\x40" + b"a" * 64 + b"\0\0\x01\0\x01"), "pointer or reserved"),
    "label to the end": (message(body=b"\x3fabc"), "cut short"),
    "name of 256 bytes": (message(body=b"".join([*LONGEST, b"\x3e", b"a" * 62, b"\0\0\x01\0\x01"])), "longer than 255"),
}


@pytest.mark.parametrize(("given_message", "why"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_one_ordinary_question_is_malformed(given_message: bytes, why: str) -> None:
    with pytest.raises(MalformedQuery, match=why):
        parse_query(given_message)


def test_a_name_of_255_bytes_is_read() -> None:
    body = b"".join([*LONGEST, b"\x3d", b"a" * 61, b"\0\0\x01\0\x01"])
    assert len(parse_query(message(body=body)).name) == 253


def test_a_question_cut_anywhere_is_malformed() -> None:
    whole = message(counts=(1, 0, 0, 1), body=QUESTION + OPT)
    parse_query(whole)
    for length in range(len(whole)):
        with pytest.raises(MalformedQuery):
            parse_query(whole[:length])


# --- our answers, read by another codec


def asked(*, opt: bool = True, qtype: int = A, flags: int = 0x0110) -> Query:
    body = wire(NAME).replace(b"www", b"wWw") + struct.pack("!HH", qtype, 1)
    return parse_query(message(flags=flags, counts=(1, 0, 0, int(opt)), body=body + (OPT if opt else b"")))


def test_an_answer_gives_addresses_under_the_name_as_the_client_spelled_it() -> None:
    answer = oracle.DNSMessage.unpack(
        build_addresses(asked(), [IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")], 60)
    )
    assert answer.questions[0].name == "wWw.example.com"
    assert [(rr.name, rr.type, rr.ttl, str(rr.ipv4_address)) for rr in answer.answers] == [
        ("wWw.example.com", A, 60, "192.0.2.1"),
        ("wWw.example.com", A, 60, "192.0.2.2"),
    ]
    assert (answer.id, answer.query, answer.recursion_available, answer.authoritative_answer) == (
        0x1234,
        False,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("build", "rcode"),
    [(build_nodata, Rcode.NOERROR), (build_name_error, Rcode.NXDOMAIN)],
    ids=["nodata", "name error"],
)
def test_an_absence_carries_a_soa(build: Callable[[Query, int], bytes], rcode: Rcode) -> None:
    answer = oracle.DNSMessage.unpack(build(asked(), 5))
    (authority,) = answer.authorities
    assert (answer.response_code, answer.answers) == (rcode, [])
    assert (authority.name, authority.type, authority.ttl) == ("wWw.example.com", SOA, 5)
    assert authority.data.startswith(wire("outgate.invalid"))
    assert int.from_bytes(authority.data[-4:]) == 5  # MINIMUM (RFC 2308 5)


def test_a_failure_has_no_soa_and_so_is_not_kept() -> None:
    answer = oracle.DNSMessage.unpack(build_failure(asked()))
    assert (answer.response_code, answer.authorities) == (Rcode.SERVFAIL, [])


def test_truncation_says_so_and_gives_nothing() -> None:
    answer = oracle.DNSMessage.unpack(build_truncated(asked()))
    assert (answer.truncation, answer.answers) == (True, [])


def test_the_extended_error_follows_rfc_8914() -> None:
    note = Note(ExtendedError.BLOCKED, "no_rule")
    (opt,) = oracle.DNSMessage.unpack(build_name_error(asked(), 5, note)).additionals
    assert (opt.type, opt.class_) == (41, MAX_UDP)
    assert opt.data == struct.pack("!HHH", 15, 2 + 7, 15) + b"no_rule"


def test_opt_answers_opt_and_nothing_else_does() -> None:
    note = Note(ExtendedError.BLOCKED, "no_rule")
    assert oracle.DNSMessage.unpack(build_name_error(asked(opt=False), 5, note)).additionals == []
    (opt,) = oracle.DNSMessage.unpack(build_addresses(asked(), [], 5)).additionals
    assert (opt.ttl, opt.data) == (0x8000, b"")  # DO given back (RFC 3225 3)


def test_rd_and_cd_are_given_back_and_ad_is_not() -> None:
    def flags(built: bytes) -> int:
        return int.from_bytes(built[2:4])

    assert flags(build_nodata(asked(flags=0x0130), 5)) == 0x8190
    assert flags(build_nodata(asked(flags=0x0000), 5)) == 0x8080


# --- our question


def test_our_question_is_ours() -> None:
    built = build_query(NAME, AAAA, 0xBEEF)
    (opt,) = oracle.DNSMessage.unpack(built).additionals
    assert parse_query(built) == Query(0xBEEF, NAME, AAAA, 1, wire(NAME) + b"\0\x1c\0\x01", 0x0100, MAX_UDP)
    assert opt.data == b""  # no client subnet, no cookie


labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63)
names = st.lists(labels, min_size=1, max_size=8).map(".".join).filter(lambda name: len(name) <= 253).map(Hostname)
ids = st.integers(0, 0xFFFF)


@given(names, st.sampled_from([A, AAAA]), ids)
def test_a_question_comes_back_from_its_bytes(name: Hostname, qtype: int, query_id: int) -> None:
    query = parse_query(build_query(name, qtype, query_id))
    assert (query.id, query.name, query.type) == (query_id, name, qtype)


@given(names, ids, st.lists(st.ip_addresses(v=4), min_size=1, max_size=20), st.integers(0, 2**31 - 1))
def test_addresses_come_back_from_their_bytes(name: Hostname, query_id: int, given_: list[Address], ttl_s: int) -> None:
    built = build_addresses(parse_query(build_query(name, A, query_id)), given_, ttl_s)
    assert parse_response(built, query_id, name, A) == Answer(Rcode.NOERROR, tuple(given_), ttl_s)


@given(names, ids, st.integers(0, 2**31 - 1))
def test_an_absence_comes_back_from_its_bytes(name: Hostname, query_id: int, ttl_s: int) -> None:
    query = parse_query(build_query(name, AAAA, query_id))
    assert parse_response(build_name_error(query, ttl_s), query_id, name, AAAA) == Answer(
        Rcode.NXDOMAIN, negative_ttl_s=ttl_s
    )


# --- parse_response

QUERY = build_query(NAME, A, 7)
HERE = b"\xc0\x0c"  # a pointer to the question's name


def parse(response: bytes) -> Answer:
    return parse_response(response, 7, NAME, A)


def found(*texts: str, ttl_s: int = 60) -> Answer:
    return Answer(Rcode.NOERROR, tuple(map(ip_address, texts)), ttl_s)


LOOP = [alias(NAME, "a.example"), alias("a.example", "b.example"), alias("b.example", "a.example")]
CHAIN = [alias(f"n{i}.example", f"n{i + 1}.example") for i in range(20)]

ACCEPTED = {
    "plain": (reply(QUERY, [address(HERE, "192.0.2.1")]), found("192.0.2.1")),
    "name written out": (reply(QUERY, [address(NAME, "192.0.2.1")]), found("192.0.2.1")),
    "name in other case": (reply(QUERY, [address(NAME.upper(), "192.0.2.1")]), found("192.0.2.1")),
    "question in other case": (
        reply(QUERY, [address(HERE, "192.0.2.1")], question=QUESTION.replace(b"www", b"WwW")),
        found("192.0.2.1"),
    ),
    "alias": (
        reply(QUERY, [alias(HERE, "cdn.example", 9), address("cdn.example", "192.0.2.1", 60)]),
        found("192.0.2.1", ttl_s=9),
    ),
    "alias after its target": (
        reply(QUERY, [address("cdn.example", "192.0.2.1"), alias(HERE, "cdn.example")]),
        found("192.0.2.1"),
    ),
    "alias by pointer into the question": (
        reply(QUERY, [alias(HERE, b"\3cdn\xc0\x10"), address("cdn.example.com", "192.0.2.1")]),
        found("192.0.2.1"),
    ),
    "shortest ttl of two": (
        reply(QUERY, [address(HERE, "192.0.2.1", 60), address(HERE, "192.0.2.2", 7)]),
        found("192.0.2.1", "192.0.2.2", ttl_s=7),
    ),
    "ttl with the top bit": (reply(QUERY, [address(HERE, "192.0.2.1", 1 << 31)]), found("192.0.2.1", ttl_s=0)),
    "address beside the chain": (
        reply(QUERY, [address("other.example", "198.51.100.1"), address(HERE, "192.0.2.1")]),
        found("192.0.2.1"),
    ),
    "only an address beside the chain": (reply(QUERY, [address("other.example", "198.51.100.1")]), Answer(0)),
    "one label that looks like the name": (
        reply(QUERY, [record(b"\x0fwww.example.com\0", A, 60, b"\xc6\x33\x64\x01")]),
        Answer(0),
    ),
    "address in the authority section": (reply(QUERY, authority=[address(HERE, "198.51.100.1")]), Answer(0)),
    "another type": (reply(QUERY, [address(HERE, "2001:db8::1")]), Answer(0)),
    "another class": (reply(QUERY, [HERE + struct.pack("!HHIH", A, 3, 60, 4) + b"\xc0\0\2\1"]), Answer(0)),
    "unknown record between": (
        reply(QUERY, [record(HERE, 46, 60, b"signature"), address(HERE, "192.0.2.1")]),
        found("192.0.2.1"),
    ),
    "alias without target": (
        reply(QUERY, [alias(HERE, "cdn.example")], authority=[soa("example", 900, 30)]),
        Answer(0, negative_ttl_s=30),
    ),
    "nodata": (reply(QUERY, authority=[soa("example.com", 20, 30)]), Answer(0, negative_ttl_s=20)),
    "nodata without soa": (reply(QUERY, authority=[record("example.com", 2, 60, wire("ns.example"))]), Answer(0)),
    "name error": (reply(QUERY, rcode=3, authority=[soa("com", 900, 30)]), Answer(3, negative_ttl_s=30)),
    "servfail": (reply(QUERY, rcode=2), Answer(2)),
    "truncated": (reply(QUERY, [address(HERE, "192.0.2.1")], flags=0x8380), Answer(0, truncated=True)),
    "sixteen aliases": (
        reply(QUERY, [alias(HERE, "n5.example"), *CHAIN[5:], address("n20.example", "192.0.2.1")]),
        found("192.0.2.1"),
    ),
}


@pytest.mark.parametrize(("response", "answer"), ACCEPTED.values(), ids=ACCEPTED)
def test_an_answer_holds_what_the_question_leads_to(response: bytes, answer: Answer) -> None:
    assert parse(response) == answer


def with_answer(body: bytes, count: int = 1) -> bytes:
    return struct.pack("!6H", 7, 0x8180, 1, count, 0, 0) + QUESTION + body


END = 12 + len(QUESTION)  # where the answer section starts
TAIL = struct.pack("!HHIH", A, 1, 60, 4) + b"\xc0\0\2\1"
DEEP = HERE + b"".join(struct.pack("!H", 0xC000 | END + 12 + 2 * i) for i in range(39))  # each to the one before


REFUSED = {
    "another id": (reply(QUERY, query_id=8), "not a response to this query"),
    "a query": (QUERY, "not a response to this query"),
    "another opcode": (reply(QUERY, flags=0xA180), "not a response to this query"),
    "another name": (reply(QUERY, question=wire("www.example.org") + b"\0\1\0\1"), "another question"),
    "a longer name": (reply(QUERY, question=wire("a.www.example.com") + b"\0\1\0\1"), "another question"),
    "another type": (reply(QUERY, question=wire(NAME) + b"\0\x1c\0\1"), "another type"),
    "another class": (reply(QUERY, question=wire(NAME) + b"\0\1\0\3"), "another type"),
    "no question": (struct.pack("!6H", 7, 0x8180, 0, 0, 0, 0) + QUESTION, "another question"),
    "huge answer count": (with_answer(HERE + TAIL, 0xFFFF), "65535 and 0 records"),
    "count above the records": (with_answer(HERE + TAIL, 2), "cut short"),
    "pointer to itself": (with_answer(struct.pack("!H", 0xC000 | END) + TAIL), "does not lead backwards"),
    "pointer forwards": (with_answer(struct.pack("!H", 0xC000 | END + 2) + TAIL), "does not lead backwards"),
    "pointer into the header": (with_answer(b"\xc0\0" + TAIL), "does not lead backwards"),
    "label and pointer to that label": (
        with_answer(b"\1a" + struct.pack("!H", 0xC000 | END) + TAIL),
        "does not lead backwards",
    ),
    "pointers without end": (
        with_answer(record(HERE, 99, 60, DEEP) + struct.pack("!H", 0xC000 | END + 12 + 78) + TAIL, 2),
        "too many pointers",
    ),
    "reserved label": (with_answer(b"\x80\x0c" + TAIL), "does not lead backwards"),
    "name over 255 bytes": (with_answer((b"\x3f" + b"a" * 63) * 4 + b"\0" + TAIL), "longer than 255"),
    "address of three bytes": (with_answer(HERE + struct.pack("!HHIH", A, 1, 60, 3) + b"\0\0\0"), "address of 3 bytes"),
    "address of sixteen bytes": (with_answer(record(HERE, A, 60, bytes(16))), "address of 16 bytes"),
    "record longer than the message": (with_answer(HERE + struct.pack("!HHIH", A, 1, 60, 400) + b"\0"), "longer than"),
    "alias longer than its name": (with_answer(record(HERE, CNAME, 60, wire("a.example") + b"x")), "longer or shorter"),
    "alias shorter than its name": (
        with_answer(HERE + struct.pack("!HHIH", CNAME, 1, 60, 3) + wire("a.example")),
        "longer or shorter",
    ),
    "alias loop": (reply(QUERY, LOOP), "without end"),
    "alias to itself": (reply(QUERY, [alias(HERE, HERE)]), "without end"),
    "seventeen aliases": (
        reply(QUERY, [alias(HERE, "n4.example"), *CHAIN[4:], address("n20.example", "192.0.2.1")]),
        "without end",
    ),
    "soa cut short": (reply(QUERY, authority=[record(HERE, SOA, 60, b"abc")]), "SOA record cut short"),
}


@pytest.mark.parametrize(("response", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_answer_to_our_question_is_malformed(response: bytes, why: str) -> None:
    with pytest.raises(MalformedResponse, match=why):
        parse(response)


def test_an_answer_cut_in_its_sections_is_malformed() -> None:
    whole = reply(QUERY, [alias(HERE, "cdn.example")], authority=[soa("example", 900, 30)])[:-11]
    parse(whole)
    for length in range(len(whole)):
        with pytest.raises(MalformedResponse):
            parse(whole[:length])


def test_the_worst_answer_is_read_in_no_time() -> None:
    # 1024 records, each with a name of 120 labels at the end of sixteen pointers, and no two by the same pointer.
    name = b"\1a" * 120 + b"\0"
    start = END + len(name) + 10
    hops = [END, *(start + 2 * i for i in range(13))]
    doors = [start + 2 * 13] * 1023
    content = b"".join(struct.pack("!H", 0xC000 | target) for target in hops + doors)
    first = name + struct.pack("!HHIH", 99, 1, 60, len(content)) + content
    rest = b"".join(struct.pack("!HHHIH", 0xC000 | start + 28 + 2 * i, 99, 1, 60, 0) for i in range(1023))
    began = perf_counter()
    assert parse(with_answer(first + rest, 1024)) == Answer(0)
    assert perf_counter() - began < 1


@given(st.binary(max_size=200))
@example(message()[:12] + b"\0")
def test_garbage_is_a_query_or_malformed(garbage: bytes) -> None:
    for given_message in (garbage, message()[:12] + garbage, message(counts=(1, 0, 0, 1), body=QUESTION + garbage)):
        try:
            query = parse_query(given_message)
        except MalformedQuery:
            continue
        assert given_message[12:].startswith(query.question)
        for built in (build_nodata(query, 5), build_failure(query, Note(ExtendedError.BLOCKED, "no_rule"))):
            assert built[12:].startswith(query.question)
            assert len(built) <= query.udp_limit


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 40), ids)
def test_garbage_is_an_answer_or_malformed(garbage: bytes, answers: int, authorities: int, flags: int) -> None:
    header = struct.pack("!6H", 7, flags | 0x8000, 1, answers, authorities, 0)
    for response in (garbage, header + QUESTION + garbage):
        try:
            answer = parse(response)
        except MalformedResponse:
            continue
        assert all(isinstance(each, IPv4Address) for each in answer.addresses)


@given(st.data())
def test_a_flipped_byte_never_brings_another_exception(data: st.DataObject) -> None:
    response = bytearray(
        reply(
            QUERY, [alias(HERE, b"\3cdn\xc0\x10"), address("cdn.example.com", "192.0.2.1")], authority=[soa("", 9, 9)]
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        response[data.draw(st.integers(0, len(response) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse(bytes(response))
    except MalformedResponse:
        pass


def naive_name(whole: bytes, offset: int, seen: tuple[int, ...] = ()) -> list[bytes]:
    """The slow and obvious reader: RFC 1035 4.1.4 by recursion."""
    length = whole[offset]
    if length == 0:
        return []
    if length >= 0xC0:
        target = (length & 0x3F) << 8 | whole[offset + 1]
        return naive_name(whole, target, (*seen, offset))
    return [whole[offset + 1 : offset + 1 + length].lower(), *naive_name(whole, offset + 1 + length, seen)]


@given(st.lists(labels, min_size=1, max_size=4), st.integers(0, 2))
def test_compressed_names_read_as_the_naive_reader_reads_them(prefix: list[str], at: int) -> None:
    # The target is PREFIX + a pointer to the rest of the question's name; the address stands under the name in full.
    offset = 12 + (0, 4, 12)[at]
    target = b"".join(bytes((len(label),)) + label.encode() for label in prefix) + struct.pack("!H", 0xC000 | offset)
    start = END + 12
    response = reply(QUERY, [alias(HERE, target)])
    full = b".".join(naive_name(response, start)).decode()
    assert parse(reply(QUERY, [alias(HERE, target), address(full, "192.0.2.1")])) == found("192.0.2.1")


@pytest.mark.parametrize("text", ["2001:db8::1", "::ffff:192.0.2.1", "fe80::1"])
def test_an_ipv6_address_is_itself(text: str) -> None:
    query = build_query(NAME, AAAA, 7)
    answer = parse_response(reply(query, [address(HERE, text)]), 7, NAME, AAAA)
    assert answer.addresses == (IPv6Address(text),)


def test_names_in_wire_form() -> None:
    assert encode_name(Hostname("a.bc")) == b"\1a\2bc\0"
