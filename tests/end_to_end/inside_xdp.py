"""Run in a pod: puts one frame onto a device by an AF_XDP socket, which needs no more than CAP_NET_RAW.

Arguments: the device, and the frame in hexadecimal. It prints "sent", or the step that was refused and why.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys

_AF_XDP, _SOL_XDP = 44, 283
_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6  # linux/if_xdp.h
_TX_PAGE_OFFSET, _COPY = 0x8000_0000, 0x2
_FRAMES, _FRAME_SIZE = 16, 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)


def must(result: int, step: str) -> int:
    if result < 0:
        sys.exit(f"{step}: {os.strerror(ctypes.get_errno())}")
    return result


def main(device: str, frame: bytes) -> None:
    sock = must(_libc.socket(_AF_XDP, socket.SOCK_RAW, 0), "socket")
    size = _FRAMES * _FRAME_SIZE
    frames = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    rings = struct.pack("=i", _FRAMES)
    for option, value in (
        (_UMEM_REG, struct.pack("=QQIII4x", frames, size, _FRAME_SIZE, 0, 0)),
        (_FILL_RING, rings),
        (_COMPLETION_RING, rings),
        (_TX_RING, rings),
    ):
        must(_libc.setsockopt(sock, _SOL_XDP, option, value, len(value)), f"option {option}")
    found = ctypes.create_string_buffer(128)  # struct xdp_mmap_offsets: rx, tx, fill, completion
    must(_libc.getsockopt(sock, _SOL_XDP, _MMAP_OFFSETS, found, ctypes.byref(ctypes.c_uint(128))), "offsets")
    producer, _, descriptors = struct.unpack_from("=QQQ", found, 32)
    ring = _libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, sock, _TX_PAGE_OFFSET)
    address = struct.pack("=HHIII", _AF_XDP, _COPY, socket.if_nametoindex(device), 0, 0)
    must(_libc.bind(sock, address, len(address)), "bind")
    ctypes.memmove(frames, frame, len(frame))
    ctypes.memmove(ring + descriptors, struct.pack("=QII", 0, len(frame), 0), 16)
    ctypes.c_uint.from_address(ring + producer).value = 1
    must(_libc.sendto(sock, None, 0, socket.MSG_DONTWAIT, None, 0), "send")
    print("sent")


if __name__ == "__main__":
    main(sys.argv[1], bytes.fromhex(sys.argv[2]))
