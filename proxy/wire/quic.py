"""The ClientHello in the Initials of a QUIC client, versions 1 and 2. Knows datagrams, never a socket or a clock.

RFC 9000 (transport), RFC 9001 (TLS in it), RFC 9369 (version 2).
"""

from __future__ import annotations

from proxy.wire.client_hello import MAX_HELLO, ClientHello, MalformedHello, parse_message
from proxy.wire.quic_keys import NotSealedWithIt, Opened, derive_key, open_packet
from proxy.wire.quic_packets import (
    FIRST_FRAMES,
    HANDSHAKE,
    INITIAL,
    LATER_FRAMES,
    Packet,
    read_frames,
    split,
)
from proxy.wire.quic_packets import MalformedInitial as MalformedInitial
from proxy.wire.quic_packets import UnknownVersion as UnknownVersion
from proxy.wire.quic_packets import is_long_header as is_long_header

MAX_DATAGRAMS = 4  # a hello of post-quantum size takes two or three
MAX_BYTES = 64 * 1024  # of all datagrams until the hello is whole
MAX_WAIT_S = 2.0  # for the caller, who has a clock
MAX_CONNECTIONS = 4  # on the addresses and ports of one: Retry makes two
MAX_HELD = 8 * 1024  # bytes of later datagrams whose hello is not whole; what is beyond is lost, and sent again
MAX_LATER = 128  # Initials after the hello: a handshake takes a few, and each is opened with several keys

_LEAST = 1200  # RFC 9000 14.1: a server discards Initials in smaller datagrams
_CONNECTION_ID = range(8, 21)  # RFC 9000 7.2: what a client makes up for its first Initial has at least 8 bytes


class InitialReader:
    """The Initials of one client to one server: `feed` until the ClientHello is whole, `follow` from then on.

    After MalformedInitial it is of no further use: what the server makes of those datagrams is unknown.
    """

    def __init__(self) -> None:
        self._datagrams = 0
        self._size = 0
        self._connections: list[_Connection] = []
        self._hello: ClientHello | None = None
        self._later = 0
        self._held: list[tuple[list[_Connection], bytes]] = []

    def feed(self, datagram: bytes) -> ClientHello | None:
        """The client's hello once all of it was fed. None: more datagrams are needed. Raises MalformedInitial."""
        self._datagrams += 1
        self._size += len(datagram)
        if self._datagrams > MAX_DATAGRAMS or self._size > MAX_BYTES:
            raise MalformedInitial(f"no whole ClientHello in {MAX_DATAGRAMS} datagrams")
        for packet in split(datagram):
            self._take_first(packet, len(datagram))
        stream = self._connections[0].stream
        self._hello = stream.read_hello()
        if self._hello and stream.has_more():  # RFC 9001 4.1.3: nothing follows before the server's answer
            raise MalformedInitial("goes on behind the ClientHello")
        return self._hello

    def follow(self, datagram: bytes) -> list[bytes]:
        """What may go on after this later datagram of the client's. Raises MalformedInitial if it says another name.

        A new connection may begin at any time on the same addresses and ports, also without bad intent: after Retry.
        Its datagrams are kept until its hello is whole: a server knows a connection by its ID, and would take the rest
        from another port, where nobody has seen the first part. Datagrams that are no `is_long_header` cannot begin
        one, and need not be asked about.
        """
        if not is_long_header(datagram):
            return [datagram]
        touched: list[_Connection] = []
        for packet in split(datagram, only_first_flight=False):
            if packet.kind is not INITIAL:
                continue
            self._later += 1
            if self._later > MAX_LATER:
                raise MalformedInitial(f"more than {MAX_LATER} Initials after the ClientHello")
            connection, opened = self._open(packet)
            touched.append(connection)
            connection.take(opened, LATER_FRAMES)
            while hello := connection.stream.read_hello():  # a second one on a connection answers HelloRetryRequest
                if self._hello is None or (hello.sni, hello.ech) != (self._hello.sni, self._hello.ech):
                    raise MalformedInitial("a later ClientHello with another name")
        return self._release(touched, datagram)

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return sum(len(datagram) for _, datagram in self._held)

    def _release(self, touched: list[_Connection], datagram: bytes) -> list[bytes]:
        """Those whose hellos are whole by now, in order."""
        if not self._held and not any(one.stream.has_more() for one in touched):
            return [datagram]
        held, self._held = [*self._held, (touched, datagram)], []
        whole = []
        for connections, one in held:
            if not any(connection.stream.has_more() for connection in connections):
                whole.append(one)
            elif self.held + len(one) <= MAX_HELD:
                self._held.append((connections, one))
        return whole

    def _take_first(self, packet: Packet, datagram_size: int) -> None:
        if not self._connections:
            if packet.kind is not INITIAL:
                raise MalformedInitial(f"begins with a packet of type {packet.kind}")
            if len(packet.destination) not in _CONNECTION_ID:
                raise MalformedInitial(f"connection ID of {len(packet.destination)} bytes")
            self._connections.append(_Connection(packet.version, packet.destination))
        connection = self._connections[0]
        if (packet.version, packet.destination) != (connection.version, connection.destination):
            raise MalformedInitial("packets of two connections")
        if packet.kind is HANDSHAKE:  # its keys come from the server's answer
            raise MalformedInitial("Handshake packet before the ClientHello")
        if packet.kind is not INITIAL:
            return
        if not packet.bytes[0] & 0x40:  # RFC 9287 3.1: not before the server agreed
            raise MalformedInitial("fixed bit")
        if datagram_size < _LEAST:
            raise MalformedInitial(f"Initial in a datagram of {datagram_size} bytes")
        opened = connection.open(packet)
        if opened is None:
            raise MalformedInitial("sealed with another key")
        connection.take(opened, FIRST_FRAMES)

    def _open(self, packet: Packet) -> tuple[_Connection, Opened]:
        """The connection a later Initial belongs to: a known one, or a new one that begins with its own connection ID.

        AES-GCM does not commit to its key: a packet can be made that two keys open, to different frames.
        """
        candidates = self._connections
        if all(packet.destination != known.destination for known in candidates):
            candidates = [*candidates, _Connection(packet.version, packet.destination)]
        found = [(candidate, opened) for candidate in candidates if (opened := candidate.open(packet))]
        if len(found) != 1:
            raise MalformedInitial("sealed with two keys" if found else "sealed with another key")
        if len(candidates) > MAX_CONNECTIONS and found[0][0] is candidates[-1]:
            raise MalformedInitial(f"more than {MAX_CONNECTIONS} connections")
        if found[0][0] not in self._connections:
            self._connections.append(found[0][0])
        return found[0]


class _Connection:
    """What a client says under the keys of one connection ID."""

    def __init__(self, version: int, destination: bytes) -> None:
        self.version = version
        self.destination = destination
        self.stream = _Stream()
        self._largest = -1

    def open(self, packet: Packet) -> Opened | None:
        """The packet without its protection, or None where it is not of this connection.

        The version is the packet's: a server may choose another on the way, the connection ID stays (RFC 9369 4.1).
        """
        try:
            key = derive_key(packet.version, self.destination)
            return open_packet(key, packet.bytes, packet.number_at, self._largest)
        except NotSealedWithIt:
            return None

    def take(self, opened: Opened, frames: frozenset[int]) -> None:
        if opened.first & 0x0C:
            raise MalformedInitial("reserved bits")
        self._largest = max(self._largest, opened.number)
        for offset, piece in read_frames(opened.payload, frames):
            self.stream.place(offset, piece)


class _Stream:
    """The bytes of CRYPTO frames, which come in any order."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._known = bytearray()  # 1 where the byte of the same place in `_bytes` was sent
        self._read = 0

    def place(self, offset: int, piece: bytes) -> None:
        """Raises MalformedInitial for a second spelling of a byte: the server may believe either."""
        end = offset + len(piece)
        if end > MAX_HELLO:
            raise MalformedInitial(f"ClientHello of more than {MAX_HELLO} bytes")
        if end > len(self._bytes):
            more = bytes(end - len(self._bytes))
            self._bytes += more
            self._known += more
        known = self._known[offset:end]
        if 1 in known and any(
            was_known and was != now for was_known, was, now in zip(known, self._bytes[offset:end], piece, strict=True)
        ):
            raise MalformedInitial("two spellings of one part of the ClientHello")
        self._bytes[offset:end] = piece
        self._known[offset:end] = b"\x01" * len(piece)

    def read_hello(self) -> ClientHello | None:
        """The next ClientHello, once it is whole."""
        start = self._read
        have = self._known.find(0, start)
        if have < 0:
            have = len(self._known)
        if have > start and self._bytes[start] != 1:
            raise MalformedInitial("not a ClientHello")
        if have < start + 4:
            return None
        end = start + 4 + int.from_bytes(self._bytes[start + 1 : start + 4])
        if end > MAX_HELLO:
            raise MalformedInitial(f"ClientHello of more than {MAX_HELLO} bytes")
        if have < end:
            return None
        self._read = end
        try:
            return parse_message(bytes(self._bytes[start:end]))
        except MalformedHello as error:
            raise MalformedInitial(f"ClientHello: {error}") from None

    def has_more(self) -> bool:
        return len(self._bytes) > self._read
