"""HTTP/2 frames on hyper-h2, with bounds: small windows, counted buffers, an end to floods. No sockets, no clock.

hyper-h2 knows the protocol's states. What it leaves to its user is here: bodies that wait for a window, bytes that are
acknowledged only when somebody has taken them, and how much a peer may ask for before it is cut off. What heads say is
`heads`' work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, RemoteSettingsChanged, StreamReset, WindowUpdated
from h2.exceptions import FrameTooLargeError, ProtocolError, TooManyStreamsError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream, StreamClosedBy, StreamState
from hpack import Encoder, HPACKError
from hpack.struct import Header
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from proxy.inspector.heads import MAX_LIST

MAX_STREAMS = 100  # at a time, and said so in SETTINGS; one more is refused (RFC 9113 5.1.2)
STREAM_WINDOW = 256 * 1024  # what one stream whose reader is slow can make us hold
CONNECTION_WINDOW = 4 * 1024 * 1024  # and all of a connection: sixteen stalled streams leave room for the others
MAX_BLOCK = MAX_LIST + 32 * 1024  # a compressed head; what is a little too large is still read, to be answered 431
MAX_FRAMES = 256  # read before the loop gets its turn: 64 KiB may hold 7,000 frames
FRAME_OF_HEAD = 32  # bytes of a compressed head that count as a frame more: each may unfold into a field
_TABLE = 4096  # of our HPACK encoder, whatever the peer offers: it would be filled with what the peer makes us send

# What a peer may send at once, and how much more every second. A browser that leaves a page resets what is open; HTTP/2
# keep-alive is a ping each ten seconds. Rapid reset (CVE-2023-44487) and the floods of CVE-2019-9511 to 9518 are
# hundreds a millisecond.
RESETS, RESETS_PER_S = 200, 30
CONTROLS, CONTROLS_PER_S = 1000, 100
UPDATES, UPDATES_PER_S = 1000, 100
UPDATES_PER_DATA = 4  # window updates that one DATA frame of ours explains
_SETTINGS_COST = 10

_HEADERS, _PUSH_PROMISE, _CONTINUATION = HeadersFrame.type, PushPromiseFrame.type, ContinuationFrame.type
_CONFIGURATIONS = {
    client_side: H2Configuration(
        client_side=client_side,
        header_encoding=False,
        validate_inbound_headers=False,  # `heads` does, and refuses one stream where h2 would end the connection
        validate_outbound_headers=False,
        normalize_inbound_headers=False,
        normalize_outbound_headers=False,
    )
    for client_side in (True, False)
}


class Flood(ProtocolError):
    """More of something than any peer needs."""

    error_code = ErrorCodes.ENHANCE_YOUR_CALM


class _Buffer(FrameBuffer):
    """h2's buffer, with a bound for a head in CONTINUATION frames (CVE-2024-27316 and its like)."""

    def __next__(self) -> Frame:
        if len(self._data) >= 3 and int.from_bytes(self._data[:3]) > self.max_frame_size:  # h2 would wait for it
            raise FrameTooLargeError("a frame is larger than was agreed")
        return super().__next__()

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        whole = super()._update_header_buffer(f)
        if sum(len(part.data) for part in self._headers_buffer) > MAX_BLOCK or len(self._headers_buffer) > 16:
            raise Flood("a head in too many frames")
        if isinstance(whole, HeadersFrame) and len(whole.data) > MAX_BLOCK:
            raise Flood("a head that is too large")
        return whole

    @property
    def has_part_of_head(self) -> bool:
        """A preface or a head has begun and not ended."""
        begun = bool(self._data) and (len(self._data) < 4 or self._data[3] in (_HEADERS, _CONTINUATION))
        return begun or bool(self._headers_buffer) or 0 < self._preamble_len < 24


class _Encoder(Encoder):
    """Without Huffman coding, which costs more time in Python than its third of a head saves."""

    def encode(self, headers: Iterable[Any], huffman: bool = False) -> bytes:  # Any: as hpack has it
        return super().encode(headers, huffman)


@dataclass(slots=True)
class _Outgoing:
    """What of one stream's body waits for a window."""

    chunks: deque[memoryview] = field(default_factory=deque)
    size: int = 0
    ends: bool = False
    trailers: list[Header] | None = None


class Frames(H2Connection):
    """One connection.

    ended       streams whose END_STREAM went out since somebody last looked
    moved       streams of whose body something went out since somebody last looked
    is_leaving  the peer sent GOAWAY, or we did: no new streams
    has_more    more frames are here than `receive` reads in one turn
    count       frames that were read
    """

    MAX_CLOSED_STREAMS = 1024  # h2 would remember 65,536 of every connection

    def __init__(self, *, client_side: bool) -> None:
        super().__init__(_CONFIGURATIONS[client_side])
        self.local_settings = Settings(
            client_side,
            {
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_LIST,
            },
        )
        self.incoming_buffer: _Buffer = _Buffer(server=not client_side)
        self.incoming_buffer.max_frame_size = self.max_inbound_frame_size
        self.decoder.max_header_list_size = MAX_BLOCK  # an HPACK bomb ends there
        self.encoder = _Encoder()
        self.ended: set[int] = set()
        self.moved: set[int] = set()
        self.is_leaving = False
        self.has_more = False
        self.count = 0
        self._outgoing: dict[int, _Outgoing] = {}
        self._ready: dict[int, None] = {}  # streams of which something may be sent, in turn
        self._unacknowledged: dict[int, int] = {}
        self._resets, self._controls, self._updates = RESETS, CONTROLS, UPDATES

    def open(self) -> None:
        """The preface: settings, and the connection's window."""
        self.initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    # --- what comes ---

    def receive(self, data: bytes) -> Iterator[Event]:
        """What `data` says, event by event; when it is too much for one turn, `has_more` is set and b"" goes on.

        Raises ProtocolError; Flood when it is one.
        """
        self.incoming_buffer.add_data(data)
        self.has_more = False
        left = MAX_FRAMES
        while left > 0:
            try:
                frame = next(self.incoming_buffer, None)
            except (HyperframeError, ValueError, IndexError) as error:
                raise ProtocolError(f"malformed frame: {error}") from error
            if frame is None:
                return
            self.count += 1
            left -= 1 + (len(frame.data) // FRAME_OF_HEAD if isinstance(frame, HeadersFrame) else 0)
            self._charge(frame)
            for event in self._receive_frame(frame):
                self._note(event)
                yield event
        self.has_more = True

    @property
    def has_part_of_head(self) -> bool:
        return self.incoming_buffer.has_part_of_head

    def ease(self) -> None:
        """A second has passed: a little more is borne."""
        self._resets = min(self._resets + RESETS_PER_S, RESETS)
        self._controls = min(self._controls + CONTROLS_PER_S, CONTROLS)
        self._updates = min(self._updates + UPDATES_PER_S, UPDATES)

    def credit(self) -> None:
        """An exchange came to its end: who does much may also break much off."""
        self._resets = min(self._resets + 1, RESETS)

    def charge_reset(self) -> None:
        """The peer reset a stream, or made us do it (CVE-2025-8671). Raises Flood."""
        self._resets -= 1
        if self._resets < 0:
            raise Flood("more streams were reset than any peer needs to")

    def _charge(self, frame: Frame) -> None:
        match frame:
            case RstStreamFrame():
                self.charge_reset()
                return
            case WindowUpdateFrame():
                self._updates -= 1
            case DataFrame():
                is_idle = not frame.data and "END_STREAM" not in frame.flags
                self._controls -= is_idle or frame.stream_id not in self.streams
            case HeadersFrame() if frame.stream_id not in self.streams and frame.stream_id <= self._highest_seen:
                self._controls -= 1
            case HeadersFrame():  # browsers send a priority with each request
                self._controls = min(self._controls + 2, CONTROLS)
            case SettingsFrame():
                self._controls -= _SETTINGS_COST
            case _:
                self._controls -= 1
        if self._controls < 0 or self._updates < 0:
            raise Flood("more control frames than any peer needs")

    @property
    def _highest_seen(self) -> int:
        return self.highest_outbound_stream_id if self.config.client_side else self.highest_inbound_stream_id

    def _note(self, event: Event) -> None:
        """What an event means for windows and buffers."""
        match event:
            case DataReceived(stream_id=int(stream_id), flow_controlled_length=int(size)):
                self._unacknowledged[stream_id] = self._unacknowledged.get(stream_id, 0) + size
            case WindowUpdated(stream_id=int(stream_id)):
                if stream_id in self._outgoing:
                    self._ready[stream_id] = None
            case RemoteSettingsChanged(changed_settings=changed):
                if SettingCodes.INITIAL_WINDOW_SIZE in changed:
                    self._ready |= dict.fromkeys(self._outgoing)
            case StreamReset(stream_id=int(stream_id), remote_reset=is_theirs):
                self._drop(stream_id)
                if not is_theirs:
                    self.charge_reset()

    def _begin_new_stream(self, stream_id: int, allowed_ids: AllowedStreamIDs) -> H2Stream:
        stream = super()._begin_new_stream(stream_id, allowed_ids)
        # h2 ends the connection over a wrong length, and overlooks one that ends with its head or with trailers.
        vars(stream).update(_initialize_content_length=_leave_to_heads, _track_content_length=_leave_to_heads)
        return stream

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        """One stream too many is refused, where h2 would end the connection."""
        try:
            return super()._receive_headers_frame(frame)
        except TooManyStreamsError:
            if frame.stream_id <= self.highest_inbound_stream_id or frame.stream_id % 2 == 0:
                raise
        self._controls -= 1
        try:
            self.decoder.decode(frame.data, raw=True)  # the table is the whole connection's
        except HPACKError as error:
            raise ProtocolError(str(error)) from error
        self.highest_inbound_stream_id = frame.stream_id
        self._closed_streams[frame.stream_id] = StreamClosedBy.SEND_RST_STREAM
        refusal = RstStreamFrame(frame.stream_id)
        refusal.error_code = ErrorCodes.REFUSED_STREAM
        return [refusal], []

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """h2 takes it for the end; the streams that the peer has taken up still come to theirs (RFC 9113 6.8)."""
        self.is_leaving = True
        event = ConnectionTerminated()
        event.error_code, event.last_stream_id = ErrorCodes.NO_ERROR, frame.last_stream_id
        return [], [event]

    def _acknowledge_settings(self) -> list[Frame]:
        frames = super()._acknowledge_settings()
        if self.encoder.header_table_size > _TABLE:
            self.encoder.header_table_size = _TABLE
        return frames

    # --- what was received is taken ---

    def take(self, stream_id: int, waiting: int = 0) -> None:
        """All that was received on a stream was taken, but for `waiting` bytes: the peer may send as much again."""
        size = self._unacknowledged.get(stream_id, 0) - waiting
        if size > 0:
            self.acknowledge_received_data(size, stream_id)
            if waiting:
                self._unacknowledged[stream_id] = waiting
            else:
                del self._unacknowledged[stream_id]

    @property
    def untaken(self) -> tuple[int, ...]:
        """Streams of which something was received that nobody has taken yet."""
        return tuple(self._unacknowledged)

    # --- what goes ---

    def backlog(self, stream_id: int) -> int:
        """Bytes of a body that wait for the peer to open a window."""
        outgoing = self._outgoing.get(stream_id)
        return outgoing.size if outgoing else 0

    def can_send(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        return (
            stream is not None
            and stream.state_machine.state in (StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE)
            and not self.is_ending(stream_id)
        )

    def is_open(self, stream_id: int) -> bool:
        stream = self.streams.get(stream_id)
        return stream is not None and not stream.closed

    def queue(self, stream_id: int, data: bytes) -> None:
        """Send a part of a body, when windows allow it."""
        if data and self.can_send(stream_id):
            outgoing = self._outgoing.setdefault(stream_id, _Outgoing())
            outgoing.chunks.append(memoryview(data))
            outgoing.size += len(data)
            self._ready[stream_id] = None

    def send_head(self, stream_id: int, fields: list[Header], *, ends: bool = False) -> None:
        """Send a head at once; nothing of a body may be queued."""
        self.send_headers(stream_id, fields, end_stream=ends)
        if ends:
            self.ended.add(stream_id)

    def end(self, stream_id: int, trailers: list[Header] | None = None) -> None:
        """End a stream, behind all that is queued."""
        if self.can_send(stream_id):
            outgoing = self._outgoing.setdefault(stream_id, _Outgoing())
            outgoing.ends, outgoing.trailers = True, trailers
            self._ready[stream_id] = None

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        self._drop(stream_id)
        if self.is_open(stream_id):
            self.reset_stream(stream_id, code)

    def leave(self, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """GOAWAY: no new streams. Those that are open go on, unless it is an error."""
        self.is_leaving = True
        frame = GoAwayFrame(0, last_stream_id=self.highest_inbound_stream_id, error_code=code)
        self._data_to_send += frame.serialize()

    def say_goodbye(self) -> None:
        """GOAWAY that ends nothing: what the peer has sent already is served (RFC 9113 6.8)."""
        self._data_to_send += GoAwayFrame(0, last_stream_id=self.HIGHEST_ALLOWED_STREAM_ID).serialize()

    def pump(self) -> None:
        """Send what windows allow, a frame of each stream in turn."""
        blocked: dict[int, None] = {}
        while self._ready:
            stream_id = next(iter(self._ready))
            del self._ready[stream_id]
            outgoing = self._outgoing.get(stream_id)
            if outgoing is None:
                continue
            if outgoing.chunks and self.outbound_flow_control_window <= 0:
                blocked[stream_id] = None
            elif self._push(stream_id, outgoing):
                self._ready[stream_id] = None
        self._ready = blocked

    def _push(self, stream_id: int, outgoing: _Outgoing) -> bool:
        """Send one frame of a stream. Whether there is more to try."""
        if not self.is_open(stream_id):
            self._drop(stream_id)
            return False
        if not outgoing.chunks:
            if outgoing.ends:
                self._send_end(stream_id, outgoing.trailers)
            return False
        room = min(self.local_flow_control_window(stream_id), self.max_outbound_frame_size)
        if room <= 0:
            return False
        chunk = outgoing.chunks[0]
        if len(chunk) > room:
            outgoing.chunks[0] = chunk[room:]
            chunk = chunk[:room]
        else:
            outgoing.chunks.popleft()
        outgoing.size -= len(chunk)
        is_last = outgoing.ends and not outgoing.chunks and outgoing.trailers is None
        self.send_data(stream_id, chunk, end_stream=is_last)
        self.moved.add(stream_id)
        self._updates = min(self._updates + UPDATES_PER_DATA, UPDATES)
        if is_last:
            self._finish(stream_id)
        elif not outgoing.chunks and not outgoing.ends:
            del self._outgoing[stream_id]
        return not is_last

    def _send_end(self, stream_id: int, trailers: list[Header] | None) -> None:
        if trailers is None:
            self.end_stream(stream_id)
        else:
            self.send_headers(stream_id, trailers, end_stream=True)
        self._finish(stream_id)

    def _finish(self, stream_id: int) -> None:
        del self._outgoing[stream_id]
        self.ended.add(stream_id)

    def is_ending(self, stream_id: int) -> bool:
        """All of a body is here, and some of it waits."""
        outgoing = self._outgoing.get(stream_id)
        return outgoing is not None and outgoing.ends

    def _drop(self, stream_id: int) -> None:
        self._outgoing.pop(stream_id, None)
        self._ready.pop(stream_id, None)


def _leave_to_heads(*_: object) -> None:
    """`heads` reads lengths and `http2` counts."""
