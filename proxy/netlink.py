"""Asks netfilter in this network namespace, over a netlink socket. What is asked is written in `wire`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence

from proxy.wire.netlink import DONE, ERROR, MalformedNetlink, Message, messages

_NETFILTER = 12  # NETLINK_NETFILTER, linux/netlink.h
_MAX_REPLY = 64 * 1024
_BUFFER = 4 * 1024 * 1024
_PATIENCE_S = 5.0  # the kernel answers within the call
_NUMBERS = 1 << 31


class Netfilter:
    """One socket. Raises OSError."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        self._sock.settimeout(_PATIENCE_S)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._sock.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def numbers(self, count: int = 1) -> range:
        """The next sequence numbers, for requests to `ask` with."""
        first = self._sequence % _NUMBERS + 1
        self._sequence = first + count - 1
        return range(first, first + count)

    def ask(self, request: bytes, sequence: int) -> Iterator[Message]:
        """The messages that answer one request, to its end. Raises OSError for the kernel's refusal."""
        self._sock.sendto(request, (0, 0))
        while True:
            for message in self._receive():
                if message.sequence != sequence:  # of a request that was given up
                    continue
                if message.type not in (ERROR, DONE):
                    yield message
                    continue
                _raise(message.errno)
                return

    def tell(self, requests: Sequence[bytes], sequences: range) -> list[int]:
        """Requests that are only acknowledged; the error number of each, 0 where it was done. Raises OSError."""
        outcome: dict[int, int] = {}
        self._sock.sendto(b"".join(requests), (0, 0))
        while len(outcome) < len(requests):
            for message in self._receive():
                if message.type == ERROR and message.sequence in sequences:
                    outcome[message.sequence] = message.errno
        return [outcome[sequence] for sequence in sequences]

    def _receive(self) -> Iterator[Message]:
        try:
            yield from messages(self._sock.recv(_MAX_REPLY))
        except MalformedNetlink as error:
            raise OSError(errno.EBADMSG, str(error)) from error


def _raise(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))
