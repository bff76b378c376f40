"""Run on a machine of a workload: what its policy allows, step by step. What came back goes to standard output as JSON.

The arguments are a list of steps as JSON, each a word and what it needs, and for how long an answer is waited for.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys

from tests.end_to_end.inside_attacks import question

type Step = list[str | int]


def ask(address: str, port: int, message: bytes) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))
        sock.send(message)
        return sock.recv(1 << 16)


def look_up(address: str, name: str, kind: int) -> int:
    """How many records are told."""
    return int.from_bytes(ask(address, 53, question(name, kind))[6:8])


def _over_tls(address: str, name: str, protocol: str) -> ssl.SSLSocket:
    """Under whatever certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    return context.wrap_socket(socket.create_connection((address, 443)), server_hostname=name)


def fetch(address: str, name: str, path: str) -> str:
    """The status of a request."""
    with _over_tls(address, name, "http/1.1") as tls:
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        return tls.makefile("rb").readline().decode().split()[1]


def fetch_by_http2(address: str, name: str, path: str) -> str:
    """The same; what no HTTP/1.1 client is, another process of the gate serves."""
    from h2.connection import H2Connection
    from h2.events import ResponseReceived

    it = H2Connection()
    with _over_tls(address, name, "h2") as tls:
        it.initiate_connection()
        it.send_headers(
            1, [(":method", "GET"), (":scheme", "https"), (":authority", name), (":path", path)], end_stream=True
        )
        tls.sendall(it.data_to_send())
        while message := tls.recv(1 << 16):
            for event in it.receive_data(message):
                if isinstance(event, ResponseReceived):
                    return dict(event.headers or ())[b":status"].decode()
            tls.sendall(it.data_to_send())
    return "ended"


def speak(address: str, port: int, message: str) -> str:
    with socket.create_connection((address, port)) as sock:
        sock.sendall(message.encode())
        return sock.recv(100).decode()


def take(step: Step) -> object:
    match step:
        case ["dns", str(address), str(name), int(kind)]:
            return look_up(address, name, kind)
        case ["https", str(address), str(name), str(path)]:
            return fetch(address, name, path)
        case ["http2", str(address), str(name), str(path)]:
            return fetch_by_http2(address, name, path)
        case ["tcp", str(address), int(port), str(message)]:
            return speak(address, port, message)
        case ["udp", str(address), int(port), str(message)]:
            return ask(address, port, bytes.fromhex(message))[:8].decode("latin-1")
        case ["ntp", str(address)]:
            return ask(address, 123, b"\x23" + bytes(47))[12:16].decode("latin-1")
    raise ValueError(step)


def main(steps: str, patience_s: str) -> None:
    socket.setdefaulttimeout(float(patience_s))
    found = []
    for step in json.loads(steps):
        try:
            found.append(take(step))
        except OSError as error:
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
