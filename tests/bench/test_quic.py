"""What it costs to read the name in a QUIC client's first packets, and to look at a later one."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from proxy.wire.quic import MAX_LATER, InitialReader
from tests.proxy.hellos import X25519_MLKEM768, key_share
from tests.proxy.quic_client import ACK, crypto, datagram, datagrams, quic_hello, sliced

ONE = datagram(crypto(0, quic_hello()))
LARGE = quic_hello("big.example", key_share((X25519_MLKEM768, 1216), (0x001D, 32)))  # of post-quantum size
TWO = datagrams(sliced(LARGE, 900), [1, 1])
LATER = datagram(ACK, packet_number=1)


def read(parts: list[bytes]) -> str | None:
    reader = InitialReader()
    found = [reader.feed(part) for part in parts][-1]
    return found.sni if found else None


def test_hello_in_one_datagram(benchmark: BenchmarkFixture) -> None:
    assert benchmark(read, [ONE]) == "a.example"


def test_hello_in_two_datagrams(benchmark: BenchmarkFixture) -> None:
    assert benchmark(read, TWO) == "big.example"


def test_later_initials(benchmark: BenchmarkFixture) -> None:
    """As many as a session may have; of one, divide."""

    def begin() -> tuple[tuple[InitialReader], dict[str, object]]:
        reader = InitialReader()
        assert reader.feed(ONE)
        return (reader,), {}

    def follow(reader: InitialReader) -> None:
        for _ in range(MAX_LATER):
            reader.follow(LATER)

    benchmark.pedantic(follow, setup=begin, rounds=30)  # type: ignore[no-untyped-call]  # it has no types
