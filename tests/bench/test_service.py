"""A whole service: what a second worker costs, what idle connections hold, how long requests wait during a reload."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import ssl
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import trustme
from pytest_benchmark.fixture import BenchmarkFixture

from tests.bench.load import processes
from tests.end_to_end.service import Service, ask_for
from tests.proxy.commands_of import invoke
from tests.proxy.hellos import hello
from tests.proxy.inspecting import Origin, get, read_reply, response

FORK = get_context("fork")
HEAD = "version: 1\nworkloads:\n  app:\n    rules:\n"
CARRIED = "      - host: carried.test\n"
HELLO = hello("carried.test")
CONNECT = b"CONNECT carried.test:443 HTTP/1.1\r\nHost: carried.test:443\r\n\r\n"

CONNECTIONS, IN_FLIGHT, ROUNDS = 4000, 32, 5
IDLE = 10_000
DESCRIPTORS = IDLE + 2000  # of one process: two workers have half of the connections each, and two for each
RULES = 100_000
REQUESTS_PER_S = 80
RELOADS = 3
PATIENCE_S = 120.0


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(pids: list[int]) -> tuple[float, float]:
    """RSS and PSS."""
    sizes = [
        dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        for pid in pids
    ]
    return sum(int(size["Rss:"]) for size in sizes) / 1024, sum(int(size["Pss:"]) for size in sizes) / 1024


def leads_to(name: str, port: int) -> list[str]:
    return ["--host", f"{name}=127.0.0.1:{port}"]


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_connection_costs_two_workers_what_it_costs_one(
    benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take turns, so that what else the machine does meets all. Fewer connections at a time cost more each: what
    comes together is carried together."""
    spent: dict[tuple[int, int], list[float]] = {(1, IN_FLIGHT): [], (2, IN_FLIGHT): [], (2, 2 * IN_FLIGHT): []}
    with processes(len(HELLO)) as (origin, load), ExitStack() as stack:
        services = {}
        for workers in (1, 2):
            directory = tmp_path / str(workers)
            directory.mkdir()
            options = ["--workers", str(workers), "--log", os.devnull, *leads_to("carried.test", origin[1])]
            services[workers] = stack.enter_context(Service(directory, HEAD + CARRIED, *options))

        def measure() -> None:
            for (workers, in_flight), found in spent.items():
                service = services[workers]
                pids = [service.process.pid, *service.workers()]
                before = cpu_s(pids)
                assert load(service.address, CONNECT + HELLO, CONNECTIONS, in_flight) == CONNECTIONS
                found.append((cpu_s(pids) - before) / CONNECTIONS * 1000)

        benchmark.pedantic(measure, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]  # theirs
    one = statistics.median(spent[1, IN_FLIGHT][1:])
    with capsys.disabled():
        for (workers, in_flight), (_, *found) in spent.items():
            ratio = statistics.median(found) / one
            benchmark.extra_info[f"{workers} workers, {in_flight} in flight: ratio"] = round(ratio, 3)
            print(
                f"\n{workers} workers, {in_flight} in flight: {statistics.median(found):.3f} ms of CPU a connection "
                f"({min(found):.3f} to {max(found):.3f}), {ratio:.2f} times that of one worker (goal 1.1)"
            )


# --- idle connections -------------------------------------------------------------------------------------------------


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < DESCRIPTORS:
        pytest.skip(f"needs {DESCRIPTORS} descriptors in a process, the hard limit is {hard}")


def hold(pipe: Connection) -> None:
    """Open idle tunnels to an address, each with a hello that was heard; hold them until told to let go."""
    raise_descriptor_limit()
    address, count = pipe.recv()
    held = []
    for _ in range(count):
        sock = socket.create_connection(address, PATIENCE_S)
        assert ask_for(sock, "carried.test:443") == 200
        sock.sendall(HELLO)
        assert sock.recv(1) == b"."
        held.append(sock)
    pipe.send(len(held))
    pipe.recv()


def listen(pipe: Connection) -> None:
    """An origin that answers what comes with one byte, and keeps everything open."""
    raise_descriptor_limit()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    pipe.send(listener.getsockname())
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    held = {}
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                held[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
            elif held[fd].recv(65536):
                held[fd].send(b".")
            else:
                held.pop(fd).close()


@contextmanager
def process(run: Callable[[Connection], None]) -> Iterator[Connection]:
    ours, theirs = FORK.Pipe()
    started = FORK.Process(target=run, args=(theirs,), daemon=True)
    started.start()
    theirs.close()
    try:
        yield ours
    finally:
        started.kill()
        started.join(PATIENCE_S)
        ours.close()


def test_idle_connections_hold_little_memory(
    benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_descriptor_limit()
    found: list[tuple[float, float]] = []
    with process(listen) as origin, process(hold) as clients, ExitStack() as stack:
        port = origin.recv()[1]
        options = ["--workers", "2", "--max-connections", str(IDLE), "--max-per-source", str(IDLE)]
        it = stack.enter_context(Service(tmp_path, HEAD + CARRIED, *options, *leads_to("carried.test", port)))
        pids = [it.process.pid, *it.workers()]
        with it.tunnel("carried.test:443") as first:  # what a first connection brings stays
            first.sendall(HELLO)
            assert first.recv(1) == b"."

        def measure() -> None:
            at_rest = memory_mib(pids)
            clients.send((it.address, IDLE))
            assert clients.recv() == IDLE
            time.sleep(3)  # workers have been asked how they are
            found.extend([at_rest, memory_mib(pids)])
            assert it.metric("outgate_connections_open") == IDLE

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    (rss_before, pss_before), (rss, pss) = found
    benchmark.extra_info["RSS MiB above rest"] = round(rss - rss_before, 1)
    with capsys.disabled():
        print(
            f"\n{IDLE} idle connections: RSS {rss_before:.1f} + {rss - rss_before:.1f} MiB, "
            f"PSS {pss_before:.1f} + {pss - pss_before:.1f} MiB (goal + 40 MB); "
            f"{(rss - rss_before) * 1024 / IDLE:.1f} KiB for each"
        )


# --- reload -----------------------------------------------------------------------------------------------------------


def answer(pipe: Connection) -> None:
    """An origin of HTTP/1.1 over TLS, with the certificate in a file."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pipe.recv())
    pipe.send(Origin(context, lambda _head, _sock: response()).port)
    pipe.recv()


type Waits = list[float]  # seconds; a request that failed waited for ever


def ask_until_told(pipe: Connection) -> None:
    """Every second request is one of a kept connection that is inspected, the others are new connections: carried."""
    address, trust, origin_ca = pipe.recv()
    inspected, carried = (ssl.create_default_context(cafile=path) for path in (trust, origin_ca))

    def connect(context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
        sock = socket.create_connection(address, PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert ask_for(sock, f"{host}:443") == 200
        return context.wrap_socket(sock, server_hostname=host)

    def ask(sock: ssl.SSLSocket, host: str) -> None:
        sock.sendall(get("/search", host=host))
        assert read_reply(sock)[0].status == 200

    with connect(inspected, "inspected.test") as kept:
        ask(kept, "inspected.test")
        pipe.send(None)
        while pipe.recv():
            waits: Waits = []
            at = time.perf_counter()
            while not pipe.poll():
                at = max(at + 1 / REQUESTS_PER_S, time.perf_counter() - 1)
                time.sleep(max(0.0, at - time.perf_counter()))
                started = time.perf_counter()
                try:
                    if len(waits) % 2:
                        ask(kept, "inspected.test")
                    else:
                        with connect(carried, "carried.test") as sock:
                            ask(sock, "carried.test")
                    waits.append(time.perf_counter() - started)
                except (OSError, AssertionError):
                    waits.append(float("inf"))
            pipe.recv()
            pipe.send(waits)


def shown(waits: Waits) -> str:
    ordered = sorted(waits)
    late = sum(wait > 0.05 for wait in waits)
    return (
        f"{len(waits)} requests, median {ordered[len(waits) // 2] * 1000:.1f} ms, longest "
        f"{', '.join(f'{wait * 1000:.1f}' for wait in ordered[-3:])} ms, {late} over 50 ms, "
        f"{waits.count(float('inf'))} failed"
    )


def test_the_longest_wait_while_a_large_policy_is_reloaded(
    benchmark: BenchmarkFixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, origin_ca, trust = (tmp_path / name for name in ("origin", "origin-ca.pem", "trust.pem"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(origin_ca))
    issued = authority.issue_cert("inspected.test", "carried.test")
    issued.private_key_and_cert_chain_pem.write_to_path(str(certificate))
    invoke("pki", "init", "--pki", str(tmp_path / "pki"))
    trust.write_bytes(b"".join(path.read_bytes() for path in (tmp_path / "pki").rglob("*.crt")))
    policy = HEAD + CARRIED + "      - {host: inspected.test, tls: inspect}\n" + "".join(
        f"      - {{host: h{i}.d{i % 997}.test, tls: inspect, allow: ['GET /a/{i}/**'], deny: ['* /x/**']}}\n"
        for i in range(RULES)
    )  # fmt: skip
    for number in range(RELOADS):
        (tmp_path / f"policy {number}").write_text(f"{policy}      - host: another{number}.test\n")
    waits: dict[str, Waits] = {"reloads": [], "as long without": []}
    took: list[float] = []

    with process(answer) as origin, process(ask_until_told) as clients, ExitStack() as stack:
        origin.send(str(certificate))
        port = origin.recv()
        options = ["--workers", "2", "--pki", str(tmp_path / "pki"), "--upstream-ca", str(origin_ca)]
        hosts = [*leads_to("inspected.test", port), *leads_to("carried.test", port)]
        it = stack.enter_context(Service(tmp_path, policy, *options, *hosts))
        clients.send((it.address, str(trust), str(origin_ca)))
        clients.recv()

        def during(what: Callable[[], None]) -> Waits:
            clients.send(True)
            what()
            clients.send(None)
            found: Waits = clients.recv()
            return found

        def reload() -> None:
            """By SIGHUP, into another generation with as many rules; and what comes right after."""
            started = time.perf_counter()
            (tmp_path / f"policy {len(took)}").replace(it.policy)
            it.send(signal.SIGHUP)
            said = len(it.said)
            while not any("is in force" in line for line in it.said[said:]):
                assert time.perf_counter() - started < PATIENCE_S, it.said
                time.sleep(0.1)
            took.append(time.perf_counter() - started)
            time.sleep(1)

        def measure() -> None:
            during(lambda: time.sleep(1))  # the first of everything takes longer
            for _ in range(RELOADS):
                waits["reloads"] += during(reload)
                waits["as long without"] += during(lambda: time.sleep(took[-1] + 1))

        benchmark.pedantic(measure, rounds=1)  # type: ignore[no-untyped-call]  # theirs
    benchmark.extra_info["longest wait ms"] = {name: round(max(found) * 1000, 1) for name, found in waits.items()}
    with capsys.disabled():
        print(f"\n{RULES} rules, reloaded in {', '.join(f'{one:.1f}' for one in took)} s:")
        for name, found in waits.items():
            print(f"  {name}: {shown(found)}")
    assert float("inf") not in waits["reloads"]
