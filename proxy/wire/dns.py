"""DNS messages as bytes: a workload's question, our answer, our own question, a server's answer. No sockets, no clock.

RFC 1035, with 2308 (absence), 6891 (OPT) and 8914 (extended errors). Nothing here copies bytes of a workload's message
into one for a server, or of a server's into one for a workload: both are read into values and written anew.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from policies.addresses import Address
from policies.hostnames import Hostname
from proxy.wire import svcb, targets
from proxy.wire.svcb import HTTPS, SVCB, Service
from proxy.wire.targets import PTR, SRV, Target

A, CNAME, SOA, AAAA, OPT = 1, 5, 6, 28, 41
IN = 1
TYPE_NAMES = {A: "A", 2: "NS", CNAME: "CNAME", SOA: "SOA", PTR: "PTR", 15: "MX", 16: "TXT", AAAA: "AAAA", SRV: "SRV"}
TYPE_NAMES |= {43: "DS", 46: "RRSIG", 48: "DNSKEY", 52: "TLSA", SVCB: "SVCB", HTTPS: "HTTPS", 255: "ANY", 257: "CAA"}

MAX_MESSAGE = 65535  # RFC 1035 4.2.2: the length prefix over TCP is 16 bits
MIN_UDP = 512  # RFC 1035 4.2.1: what every client takes
MAX_UDP = 1232  # DNS flag day 2020: above it answers are fragmented, and fragments can be forged
MAX_NAME = 255  # RFC 1035 2.3.4, with the root's zero byte
MAX_LABEL = 63
MAX_POINTERS = 16  # per name; a chain of thousands costs the reader, not the writer
MAX_RECORDS = 1024  # per section, for the same reason
MAX_TTL = 0x7FFF_FFFF  # RFC 2181 8
MAX_ALIASES = 16  # CNAMEs followed from the question

_HEADER = struct.Struct("!6H")
_QUESTION_END = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length; the name stands before it
_OPT = struct.Struct("!BHHBBHH")  # root, OPT, size, upper rcode, version, flags, length

# Header bits (RFC 1035 4.1.1, RFC 4035 3.1.6)
_RESPONSE = 0x8000
_OPCODE = 0x7800
_TRUNCATED = 0x0200
_RECURSION_DESIRED = 0x0100
_RECURSION_AVAILABLE = 0x0080
_CHECKING_DISABLED = 0x0010
_ECHOED = _RECURSION_DESIRED | _CHECKING_DISABLED  # RFC 4035 3.2.2: CD is given back as it came
_DNSSEC_OK = 0x8000
_EDE = 15  # RFC 8914 2
_SOA_SOURCE = b"\x07outgate\x07invalid\0\0"  # MNAME and, as the root, RNAME (RFC 1035 3.3.13)
_NAME_POINTER = b"\xc0\x0c"  # the question's name, always at offset 12
_SIZES = {A: 4, AAAA: 16}
_PLAIN_NAME = re.compile(rb"[!-\[\]-~]*")  # printable ASCII without the backslash
_PLAIN_BYTES = frozenset(range(0x21, 0x7F)) - {0x2E, 0x5C}


class Rcode(IntEnum):
    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class ExtendedError(IntEnum):
    """Why an answer is empty, for a person with `dig` (RFC 8914 4)."""

    OTHER = 0
    BLOCKED = 15  # the policy says no
    PROHIBITED = 18  # this client is no known workload
    NO_REACHABLE_AUTHORITY = 22


class MalformedQuery(ValueError):
    """Not one ordinary question. `str()` says what is wrong."""


class MalformedResponse(ValueError):
    """Not an answer to our question. `str()` says what is wrong."""


@dataclass(frozen=True, slots=True)
class Query:
    """One question of a workload, as received.

    name      lower case without the final dot, the root is ""; bytes no hostname has are written \\DDD (RFC 1035 5.1)
    question  the question section's bytes, for an answer in the client's own spelling
    echoed    the header bits an answer gives back
    udp_size  what its OPT record offers to take, None without one
    """

    id: int
    name: str
    type: int
    qclass: int
    question: bytes
    echoed: int = 0
    udp_size: int | None = None
    dnssec_ok: bool = False

    @property
    def udp_limit(self) -> int:
        """The longest answer that may go back in a datagram."""
        return MIN_UDP if self.udp_size is None else min(max(self.udp_size, MIN_UDP), MAX_UDP)

    @property
    def type_text(self) -> str:
        """`AAAA`, `TYPE1234`; with its class where that is not the Internet's: `CLASS3/TXT`."""
        text = TYPE_NAMES.get(self.type) or f"TYPE{self.type}"
        return text if self.qclass == IN else f"CLASS{self.qclass}/{text}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to our question.

    addresses       of the asked type, found along the CNAME chain from the asked name and nowhere else
    services        the same of HTTPS and SVCB, as far as a client may see them
    targets         the same of SRV and PTR
    ttl_s           the shortest along that chain; 0 without either
    negative_ttl_s  how long the absence holds (RFC 2308 5), None if the server gave no SOA
    truncated       nothing else was read: ask again over TCP
    """

    rcode: int
    addresses: tuple[Address, ...] = ()
    ttl_s: int = 0
    negative_ttl_s: int | None = None
    truncated: bool = False
    services: tuple[Service, ...] = ()
    targets: tuple[Target, ...] = ()


# --- A workload's question


def parse_query(message: bytes) -> Query:
    """The one question of a query. Raises MalformedQuery for anything else, trailing bytes included."""
    try:
        return _parse_query(message)
    except (struct.error, IndexError):
        raise MalformedQuery("cut short") from None


def _parse_query(message: bytes) -> Query:
    query_id, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(message)
    if flags & (_RESPONSE | _OPCODE | _TRUNCATED):
        raise MalformedQuery(f"not a standard query: flags {flags:04x}")
    if questions != 1 or answers or authorities or additionals > 1:
        raise MalformedQuery(f"sections of {questions}, {answers}, {authorities} and {additionals} records")
    name, offset = _read_question_name(message)
    qtype, qclass = _QUESTION_END.unpack_from(message, offset)
    end = offset + 4
    udp_size, dnssec_ok, after = _read_opt(message, end) if additionals else (None, False, end)
    if after != len(message):
        raise MalformedQuery(f"{len(message) - after} bytes after the end")
    return Query(query_id, name, qtype, qclass, message[12:end], flags & _ECHOED, udp_size, dnssec_ok)


def _read_question_name(message: bytes) -> tuple[str, int]:
    labels = []
    offset = _HEADER.size
    while length := message[offset]:
        if length > MAX_LABEL:  # nothing stands before the question that a pointer could mean
            raise MalformedQuery("a pointer or reserved label in the question")
        labels.append(message[offset + 1 : offset + 1 + length])
        offset += length + 1
    offset += 1
    if offset - _HEADER.size > MAX_NAME:
        raise MalformedQuery("name longer than 255 bytes")
    joined = b".".join(labels)
    if _PLAIN_NAME.fullmatch(joined) and joined.count(b".") == max(len(labels) - 1, 0):
        return joined.decode("ascii").lower(), offset
    return ".".join(map(_escape_label, labels)).lower(), offset


def _escape_label(label: bytes) -> str:
    # One label `a.b` must never read as the two labels of another name.
    return "".join(chr(byte) if byte in _PLAIN_BYTES else f"\\{byte:03d}" for byte in label)


def _read_opt(message: bytes, offset: int) -> tuple[int, bool, int]:
    """Size, DO and where the record ends. Its options are stepped over: nothing of them is used or passed on."""
    root, rtype, size, _, version, flags, length = _OPT.unpack_from(message, offset)
    if root != 0 or rtype != OPT:
        raise MalformedQuery("an additional record that is not OPT")
    if version != 0:
        raise MalformedQuery(f"EDNS version {version}")
    return size, bool(flags & _DNSSEC_OK), offset + _OPT.size + length


# --- Our answers to it


@dataclass(frozen=True, slots=True)
class Note:
    """An extended error with words for a person; left out when the client sent no OPT (RFC 8914 2)."""

    code: ExtendedError
    text: str


def build_addresses(query: Query, addresses: Iterable[Address], ttl_s: int) -> bytes:
    """NOERROR with these addresses under the asked name. The caller gives only addresses of the asked type."""
    return build_records(query, (address.packed for address in addresses), ttl_s)


def build_records(query: Query, contents: Iterable[bytes], ttl_s: int) -> bytes:
    """NOERROR with records of the asked name and type (`svcb.write_service`, `targets.write_target`)."""
    records = [_NAME_POINTER + _RECORD.pack(query.type, IN, ttl_s, len(content)) + content for content in contents]
    return _build(query, Rcode.NOERROR, answers=records)


def build_nodata(query: Query, ttl_s: int, note: Note | None = None) -> bytes:
    """The name exists and has nothing of this type (RFC 2308 2.2)."""
    return _build(query, Rcode.NOERROR, authority=_soa(ttl_s), note=note)


def build_name_error(query: Query, ttl_s: int, note: Note | None = None) -> bytes:
    """NXDOMAIN: neither this name exists nor anything below it (RFC 8020 2)."""
    return _build(query, Rcode.NXDOMAIN, authority=_soa(ttl_s), note=note)


def build_failure(query: Query, note: Note | None = None) -> bytes:
    """SERVFAIL: the client may ask again."""
    return _build(query, Rcode.SERVFAIL, note=note)


def build_truncated(query: Query) -> bytes:
    """An empty answer with TC: the client asks again over TCP."""
    return _build(query, Rcode.NOERROR, flags=_TRUNCATED)


def _build(
    query: Query,
    rcode: Rcode,
    *,
    answers: Sequence[bytes] = (),
    authority: bytes = b"",
    note: Note | None = None,
    flags: int = 0,
) -> bytes:
    flags |= _RESPONSE | _RECURSION_AVAILABLE | query.echoed | rcode
    opt = b"" if query.udp_size is None else _opt(query.dnssec_ok, note)
    header = _HEADER.pack(query.id, flags, 1, len(answers), 1 if authority else 0, 1 if opt else 0)
    return b"".join((header, query.question, *answers, authority, opt))


def _opt(dnssec_ok: bool, note: Note | None) -> bytes:
    option = b""
    if note is not None:
        text = note.text.encode()
        option = struct.pack("!HHH", _EDE, 2 + len(text), note.code) + text
    return _OPT.pack(0, OPT, MAX_UDP, 0, 0, _DNSSEC_OK if dnssec_ok else 0, len(option)) + option


def _soa(ttl_s: int) -> bytes:
    # Owned by the asked name itself: whatever zone a caching client believes it asked, this SOA lies inside it.
    body = _SOA_SOURCE + struct.pack("!5I", 1, 3600, 600, 86400, ttl_s)
    return _NAME_POINTER + _RECORD.pack(SOA, IN, ttl_s, len(body)) + body


# --- Our own question


def encode_name(name: Hostname) -> bytes:
    """The name in wire form, with the root's zero byte."""
    return b"".join(bytes((len(label),)) + label for label in name.encode("ascii").split(b".")) + b"\0"


def build_query(name: Hostname, qtype: int, query_id: int) -> bytes:
    """A question that is ours alone: of the workload's message only the judged name and type reach a server.

    Its OPT asks for answers of 1232 bytes and carries no client subnet (RFC 7871) and no cookie.
    """
    header = _HEADER.pack(query_id, _RECURSION_DESIRED, 1, 0, 0, 1)
    return header + encode_name(name) + _QUESTION_END.pack(qtype, IN) + _opt(False, None)


# --- A server's answer


def parse_response(message: bytes, query_id: int, name: Hostname, qtype: int) -> Answer:
    """What a server answers to `build_query(name, qtype, query_id)`; MalformedResponse if this is no answer to that."""
    try:
        return _parse_response(message, query_id, encode_name(name), qtype)
    except (struct.error, IndexError):
        raise MalformedResponse("cut short") from None


def parse_answered(message: bytes) -> tuple[Query, Answer]:
    """The question that a server answered to somebody else, and what it answered; of types other than A and AAAA only
    its code. Raises MalformedResponse, also for another class."""
    try:
        query_id, flags, questions, *_ = _HEADER.unpack_from(message)
        if questions != 1 or not flags & _RESPONSE:
            raise MalformedResponse("not a response to one question")
        name, offset = _read_question_name(message)
        qtype, qclass = _QUESTION_END.unpack_from(message, offset)
        query = Query(query_id, name, qtype, qclass, message[_HEADER.size : offset + 4])
        if qtype not in _SIZES or qclass != IN or flags & 0xF != Rcode.NOERROR:
            return query, Answer(flags & 0xF)
        return query, _parse_response(message, query_id, message[_HEADER.size : offset].lower(), qtype)
    except MalformedQuery as error:
        raise MalformedResponse(str(error)) from None
    except (struct.error, IndexError):
        raise MalformedResponse("cut short") from None


def _parse_response(message: bytes, query_id: int, name: bytes, qtype: int) -> Answer:
    got_id, flags, questions, answers, authorities, _ = _HEADER.unpack_from(message)
    if got_id != query_id or flags & (_RESPONSE | _OPCODE) != _RESPONSE:
        raise MalformedResponse("not a response to this query")
    offset = _HEADER.size + len(name)
    # Lower case may be taken of wire bytes: a length is at most 63 and 'A' is 65.
    if questions != 1 or message[_HEADER.size : offset].lower() != name:
        raise MalformedResponse("answers another question")
    if _QUESTION_END.unpack_from(message, offset) != (qtype, IN):
        raise MalformedResponse("answers another type")
    if answers > MAX_RECORDS or authorities > MAX_RECORDS:
        raise MalformedResponse(f"{answers} and {authorities} records")
    rcode = flags & 0xF
    if flags & _TRUNCATED:
        return Answer(rcode, truncated=True)

    found, aliases, offset = _read_answers(message, offset + 4, answers, name[:-1], qtype)
    owner, contents, ttl_s = _follow(name[:-1], found, aliases)
    if contents and qtype in svcb.TYPES:
        read = tuple(filter(None, (svcb.read_service(content, (owner, name[:-1])) for content in contents)))
        return Answer(rcode, ttl_s=ttl_s, services=read) if read else Answer(rcode, negative_ttl_s=ttl_s)
    if contents and qtype in targets.TYPES:
        led = tuple(filter(None, (targets.read_target(content, qtype) for content in contents)))
        return Answer(rcode, ttl_s=ttl_s, targets=led) if led else Answer(rcode, negative_ttl_s=ttl_s)
    if contents:
        make = IPv4Address if qtype == A else IPv6Address
        return Answer(rcode, tuple([make(packed) for packed in contents]), ttl_s)
    return Answer(rcode, negative_ttl_s=_read_negative_ttl(message, offset, authorities))


type _Found = dict[bytes, list[tuple[int, bytes]]]  # by owner: TTL and content
type _Aliases = dict[bytes, tuple[int, bytes]]  # by owner: TTL and target


def _read_answers(message: bytes, offset: int, count: int, name: bytes, qtype: int) -> tuple[_Found, _Aliases, int]:
    found: _Found = {}
    aliases: _Aliases = {}
    owners = {_NAME_POINTER: name}  # by pointer: nearly every record of an answer points to the same few names
    size = _SIZES.get(qtype)
    for _ in range(count):
        pointer = message[offset : offset + 2]
        owner = owners.get(pointer)
        if owner is not None:
            offset += 2
        else:
            owner, offset = _read_name(message, offset)
            if pointer[0] >= 0xC0:
                owners[pointer] = owner
        rtype, rclass, ttl_s, length = _RECORD.unpack_from(message, offset)
        offset += _RECORD.size
        end = offset + length
        if end > len(message):
            raise MalformedResponse("a record longer than the message")
        if rclass != IN:
            pass
        elif rtype == qtype:
            if size and length != size:
                raise MalformedResponse(f"an address of {length} bytes")
            content = _expand(message, offset, end, qtype) if qtype in targets.TYPES else message[offset:end]
            found.setdefault(owner, []).append((_ttl(ttl_s), content))
        elif rtype == CNAME:
            target, after = _read_name(message, offset)
            if after != end:
                raise MalformedResponse("a CNAME longer or shorter than its name")
            aliases.setdefault(owner, (_ttl(ttl_s), target))
        offset = end
    return found, aliases, offset


def _expand(message: bytes, offset: int, end: int, qtype: int) -> bytes:
    """The content of a record that ends in a name, with that name whole and without its zero byte."""
    name_at = offset + targets.NUMBERS[qtype]
    name, after = _read_name(message, name_at)
    if after != end:
        raise MalformedResponse("a record longer or shorter than its name")
    return message[offset:name_at] + name


def _follow(name: bytes, found: _Found, aliases: _Aliases) -> tuple[bytes, tuple[bytes, ...], int]:
    """The end of the chain that starts at `name` and the records there. One beside that chain answers nothing."""
    shortest_s = MAX_TTL
    for _ in range(MAX_ALIASES + 1):
        if records := found.get(name):
            shortest_s = min(shortest_s, *[ttl_s for ttl_s, _ in records])
            return name, tuple([content for _, content in records]), shortest_s
        if name not in aliases:
            return name, (), 0
        ttl_s, name = aliases[name]
        shortest_s = min(shortest_s, ttl_s)
    raise MalformedResponse("a CNAME chain without end")


def _read_negative_ttl(message: bytes, offset: int, count: int) -> int | None:
    for _ in range(count):
        _, offset = _read_name(message, offset)
        rtype, _, ttl_s, length = _RECORD.unpack_from(message, offset)
        end = offset + _RECORD.size + length
        if rtype == SOA:
            if length < 4 or end > len(message):
                raise MalformedResponse("an SOA record cut short")
            # RFC 2308 5: the smaller of the record's own TTL and its MINIMUM, the last field.
            return min(_ttl(ttl_s), _ttl(int.from_bytes(message[end - 4 : end])))
        offset = end
    return None


def _read_name(message: bytes, offset: int) -> tuple[bytes, int]:
    """Labels in wire form, lower case, without the root's zero byte; and where the name ends."""
    labels = []
    size = 0
    end = 0
    pointers = 0
    start = offset  # of the labels being read
    while length := message[offset]:
        if length <= MAX_LABEL:
            labels.append(message[offset : offset + 1 + length])
            offset += length + 1
            size += length + 1
            if size >= MAX_NAME:
                raise MalformedResponse("name longer than 255 bytes")
            continue
        target = (length & 0x3F) << 8 | message[offset + 1]
        pointers += 1
        # Backwards from where these labels began, not from the pointer: `a` + pointer to that `a` would never end.
        if length < 0xC0 or target >= start or target < _HEADER.size:
            raise MalformedResponse("a pointer that does not lead backwards")
        if pointers > MAX_POINTERS:
            raise MalformedResponse("too many pointers in one name")
        end = end or offset + 2
        start = offset = target
    return b"".join(labels).lower(), end or offset + 1


def _ttl(ttl_s: int) -> int:
    return ttl_s if ttl_s <= MAX_TTL else 0  # RFC 2181 8: with the top bit set it counts as zero
