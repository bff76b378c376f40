"""Run on the machine of the origins: HTTP/2 and HTTP/1.1 (Node), gRPC (grpcio) and WebSocket (websockets), by name.

The argument is a directory: it gets `origin.pem`, the root of all of them.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import trustme
from websockets.asyncio.server import ServerConnection, serve

API, GRPC, SOCKETS = "api.example", "grpc.example", "sockets.example"
PORTS = {API: 8443, GRPC: 8444, SOCKETS: 8445}
PLAIN_PORT = 8080  # of names that speak HTTP/1.1 without TLS


class Forecast(grpc.GenericRpcHandler):
    """A service without messages: bytes in, bytes out."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        match details.method:
            case "/weather.Forecast/Echo":
                return grpc.unary_unary_rpc_method_handler(lambda message, _context: message)
            case "/weather.Forecast/Talk":
                return grpc.stream_stream_rpc_method_handler(self._talk)
        return None

    def _talk(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in messages:
            yield message.upper()
        context.set_trailing_metadata((("x-said", "all"),))


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


def serve_grpc(certificate: trustme.LeafCert, chain: bytes) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Forecast()])
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    server.add_secure_port(f"[::]:{PORTS[GRPC]}", credentials)
    server.start()
    return server


async def serve_sockets(certificate: trustme.LeafCert, until: Callable[[], object]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    async with serve(echo, None, PORTS[SOCKETS], ssl=context, max_size=None):
        await asyncio.to_thread(until)


def main(directory: Path) -> None:
    authority = trustme.CA(organization_name="The Origins' Own Authority")
    issued = authority.issue_cert(*PORTS, "index.example")
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    (directory / "chain.pem").write_bytes(chain)
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    script = Path(__file__).with_name("many_http.mjs")
    files = [str(script), str(directory / "chain.pem"), str(directory / "key.pem")]
    command = ["node", *files, str(PORTS[API]), str(PLAIN_PORT)]
    node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server = serve_grpc(issued, chain)

    def told_to_end() -> None:
        assert node.stdout
        print(node.stdout.readline(), end="", flush=True)
        sys.stdin.read()

    asyncio.run(serve_sockets(issued, told_to_end))
    server.stop(0)
    node.communicate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
