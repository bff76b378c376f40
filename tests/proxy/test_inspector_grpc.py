"""gRPC through the gate: grpcio's own client and server, and what a client sees of a denial."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from proxy.inspector import Configuration
from tests.proxy.inspecting import HOST, WAIT_S, Rig

POLICY = f"""
version: 1
workloads:
  app:
    rules:
      - host: {HOST}
        tls: inspect
        name: forecasts
        allow: ["POST /weather.Forecast/**"]
        deny: ["* /weather.Forecast/Secret"]
"""
MIB = 1024 * 1024


# `Any`: calls and channels of grpcio, whose types follow messages that are generated elsewhere.


class Forecast(grpc.GenericRpcHandler):
    """A service without messages: bytes in, bytes out."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.metadata: list[Any] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        found = getattr(self, "_" + details.method.rpartition("/")[2].lower(), None)
        return found() if found else None

    def _echo(self) -> Any:
        def echo(message: bytes, context: grpc.ServicerContext) -> bytes:
            self.metadata = list(context.invocation_metadata())
            context.send_initial_metadata((("x-initial", "1"),))
            context.set_trailing_metadata((("x-trailing", "2"), ("x-binary-bin", b"\x00\xff")))
            return message

        return grpc.unary_unary_rpc_method_handler(echo)

    def _count(self) -> Any:
        return grpc.unary_stream_rpc_method_handler(
            lambda message, _context: (b"%d" % number for number in range(int(message)))
        )

    def _sum(self) -> Any:
        return grpc.stream_unary_rpc_method_handler(lambda messages, _context: b"%d" % sum(map(len, messages)))

    def _talk(self) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda messages, _context: (one.upper() for one in messages))

    def _missing(self) -> Any:
        def missing(_message: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such city: Malmö")

        return grpc.unary_unary_rpc_method_handler(missing)

    def _early(self) -> Any:
        """Ends before its client does."""

        def early(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            yield next(messages)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")

        return grpc.stream_stream_rpc_method_handler(early)

    def _never(self) -> Any:
        def never(_message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            context.add_callback(self.cancelled.set)
            yield b"begun"
            self.cancelled.wait(WAIT_S)

        return grpc.unary_stream_rpc_method_handler(never)

    def _secret(self) -> Any:
        return self._echo()


@dataclass
class GrpcRig(Rig):
    """A gate in front of a gRPC server."""

    policy: str = POLICY
    origin_ca: str = field(default="")

    def configuration(self) -> Configuration:
        return replace(super().configuration(), upstream_ca=self.origin_ca)


@contextmanager
def forecasts(directory: Path) -> Iterator[tuple[GrpcRig, Forecast, Any]]:
    """A server, the gate, and a client's channel through it."""
    authority, service = trustme.CA(), Forecast()
    authority.cert_pem.write_to_path(str(directory / "grpc-ca.pem"))
    issued = authority.issue_cert(HOST)
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[service])
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), chain)]))
    server.start()
    try:
        rig = GrpcRig(directory, upstream_port=port, origin_ca=str(directory / "grpc-ca.pem"))
        with rig as gate, channel_to(gate) as channel:
            yield gate, service, channel
    finally:
        server.stop(0).wait(WAIT_S)


def channel_to(gate: Rig) -> Any:
    return grpc.secure_channel(
        f"127.0.0.1:{gate.port}",
        grpc.ssl_channel_credentials(gate.roots.read_bytes()),
        [("grpc.ssl_target_name_override", HOST), ("grpc.default_authority", HOST), ("grpc.enable_http_proxy", 0)],
    )


def path(method: str) -> str:
    return f"/weather.Forecast/{method}"


def failure_of(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value


def test_a_unary_call_with_metadata_both_ways(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (gate, service, channel):
        answer, call = channel.unary_unary(path("Echo")).with_call(
            b"Oslo", metadata=(("x-city", "Oslo"), ("x-raw-bin", b"\xff\x00")), timeout=WAIT_S
        )
        assert answer == b"Oslo"
        assert ("x-initial", "1") in [tuple(one) for one in call.initial_metadata()]
        assert [tuple(one) for one in call.trailing_metadata()] == [("x-trailing", "2"), ("x-binary-bin", b"\x00\xff")]
        sent = [tuple(one) for one in service.metadata]
        assert ("x-city", "Oslo") in sent
        assert ("x-raw-bin", b"\xff\x00") in sent
        (record,) = gate.wait_for_records(1)
    assert (record["verdict"], record["http.request.method"]) == ("allow", "POST")
    assert record["url.full"] == f"https://{HOST}/weather.Forecast/Echo"


def test_streams_of_the_server_and_of_the_client(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        counted = list(channel.unary_stream(path("Count"))(b"500", timeout=WAIT_S))
        assert counted == [b"%d" % number for number in range(500)]
        chunks = (bytes(10_000) for _ in range(300))
        assert channel.stream_unary(path("Sum"))(chunks, timeout=WAIT_S) == b"3000000"


def test_both_sides_stream_in_turns(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        turns = iter([b"one", b"two", b"three"])

        def messages() -> Iterator[bytes]:
            for turn in turns:
                yield turn
                assert heard.acquire(timeout=WAIT_S)  # nothing is said before the last was answered

        heard = threading.Semaphore(0)
        answers = []
        for answer in channel.stream_stream(path("Talk"))(messages(), timeout=WAIT_S):
            answers.append(answer)
            heard.release()
        assert answers == [b"ONE", b"TWO", b"THREE"]


def test_calls_at_the_same_time(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        call = channel.unary_unary(path("Echo"))
        pending = [call.future(b"%d" % number, timeout=WAIT_S) for number in range(100)]
        assert [one.result() for one in pending] == [b"%d" % number for number in range(100)]


def test_a_message_larger_than_every_window(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        assert channel.unary_unary(path("Echo"))(bytes(3 * MIB), timeout=WAIT_S) == bytes(3 * MIB)


def test_an_error_in_trailers_alone(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        error = failure_of(lambda: channel.unary_unary(path("Missing"))(b"", timeout=WAIT_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such city: Malmö")


def test_a_server_that_ends_before_its_client(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        over = threading.Event()

        def messages() -> Iterator[bytes]:
            yield b"first"
            over.wait(WAIT_S)

        answers = channel.stream_stream(path("Early"))(messages(), timeout=WAIT_S)
        assert next(answers) == b"first"
        error = failure_of(lambda: next(answers))
        over.set()
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")


def test_a_deadline_ends_the_call_at_the_server_too(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (gate, service, channel):
        answers = channel.unary_stream(path("Never"))(b"", timeout=1.0)
        assert next(answers) == b"begun"
        assert failure_of(lambda: next(answers)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert service.cancelled.wait(WAIT_S)
        gate.wait_for_records(1)
        assert channel.unary_unary(path("Echo"))(b"on", timeout=WAIT_S) == b"on"


def test_a_call_that_the_client_cancels_is_cancelled_at_the_server(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (gate, service, channel):
        answers = channel.unary_stream(path("Never"))(b"", timeout=WAIT_S)
        assert next(answers) == b"begun"
        answers.cancel()
        assert service.cancelled.wait(WAIT_S)
        (record,) = gate.wait_for_records(1)
    assert record["reason"] == "client_gone"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (path("Secret"), "POST /weather.Forecast/Secret on weather.test is denied by p.yaml:6 (forecasts)"),
        ("/weather.Admin/Drop", "lists what is allowed on weather.test, and POST /weather.Admin/Drop is not listed"),
    ],
    ids=["deny-entry", "not-listed"],
)
def test_a_denied_method_is_permission_denied_and_says_why(tmp_path: Path, method: str, words: str) -> None:
    with forecasts(tmp_path) as (gate, _, channel):
        error = failure_of(lambda: channel.unary_unary(method)(b"", timeout=WAIT_S))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert words in error.details()
        (record,) = gate.wait_for_records(1)
        assert (record["verdict"], record["http.response.status_code"]) == ("deny", 200)
        assert str(record["id"]) in dict(error.initial_metadata() or error.trailing_metadata())["outgate-decision"]
        assert channel.unary_unary(path("Echo"))(b"on", timeout=WAIT_S) == b"on"


def test_a_denied_stream_ends_while_its_client_still_sends(tmp_path: Path) -> None:
    with forecasts(tmp_path) as (_, _, channel):
        over = threading.Event()

        def messages() -> Iterator[bytes]:
            while not over.is_set():
                yield bytes(10_000)

        error = failure_of(lambda: channel.stream_unary("/weather.Admin/Drop")(messages(), timeout=WAIT_S))
        over.set()
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


def test_an_origin_that_cannot_be_had_is_unavailable(tmp_path: Path) -> None:
    with Rig(tmp_path, policy=POLICY, refuses=True) as gate, channel_to(gate) as channel:
        error = failure_of(lambda: channel.unary_unary(path("Echo"))(b"", timeout=WAIT_S))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "weather.test refused the connection" in error.details()
