"""Reads and compiles the policy in a process of its own, so that a reload takes nothing from connections or supervisor.

`compile_policy` is the supervisor's side: it holds no policy, only the memory that the process wrote it to. To the
process one request comes over its socket; one report and the policy go back.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

from proxy import child
from proxy.channel import MAX_MESSAGE, Channel
from proxy.config import Config
from proxy.options import Misused, Unready, inspected_rule, issuing_pem, load_authority, require_workload

LOAD_S = 120.0  # 32 MiB of rules on a slow machine take less
NICENESS = 10
MAX_LINES, MAX_LINE = 50, 400  # of what it has to say: nobody reads on, and a message has an end


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to compile, and for which gate.

    workload     whose rules count; None: everybody's
    has_users    the gate knows proxy clients by their credentials
    pki          the authority's directory
    has_issuing  the gate has read its authority, which stays until it is started again
    known        the generation in force, which is not compiled again
    niceness     of the process: connections come first
    """

    paths: tuple[str, ...]
    tags: tuple[str, ...] = ()
    workload: str | None = None
    has_users: bool = False
    pki: str | None = None
    has_issuing: bool = False
    known: str | None = None
    niceness: int = NICENESS


def request_for(config: Config) -> Request:
    """What a gate of this configuration starts with: nobody is served yet, so there is nobody to be nice to."""
    return Request(
        paths=config.policy,
        tags=config.tags,
        workload=config.workload,
        has_users=config.credentials is not None,
        pki=config.pki,
        niceness=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What there is to say of a policy that can be served.

    generation  twelve hex digits that stand in every record
    inspects    a rule ends TLS
    issuing     what signs leaves, in PEM; None where no directory is named, or the gate has read it
    closed      rules of a kind that is not carried yet, one a line
    """

    generation: str
    inspects: bool = False
    issuing: str | None = field(default=None, repr=False)
    closed: str = ""


async def compile_policy(request: Request, deadline_s: float = LOAD_S) -> tuple[Report, BinaryIO | None]:
    """The report on a policy, and the policy in memory as `proxy.compiled` writes it; None where it is the known one.

    Raises Unready with every problem, one a line; also where the compiler itself fails or takes too long.
    """
    answered: asyncio.Future[tuple[bytes, int | None]] = asyncio.get_running_loop().create_future()

    def answer(message: bytes, descriptor: int | None) -> None:
        if not answered.done():
            answered.set_result((message, descriptor))

    try:
        asked = child.memory(json.dumps(asdict(request)).encode(), "request")
        process = child.start("proxy.service.compiler")
    except OSError as error:
        raise Unready(f"the compiler did not start: {error.strerror or error}") from error
    channel = Channel(process.sock, received=answer, closed=lambda: answer(b"", None))
    channel.send(b"request", asked)
    try:
        async with asyncio.timeout(deadline_s):
            message, descriptor = await answered
    except TimeoutError as error:
        raise Unready(f"the policy could not be compiled within {deadline_s:g} s") from error
    finally:
        channel.close()
        process.kill()
    if not message:
        raise Unready(f"the compiler ended without a word, with status {process.process.returncode}")
    policy = None if descriptor is None else os.fdopen(descriptor, "rb")
    said = json.loads(message)
    if "problems" in said:
        raise (Misused if said["is_misuse"] else Unready)(said["problems"])
    report = Report(**said)
    if policy is None and report.generation != request.known:
        raise Unready("the policy was compiled, and no descriptor is free to take it")
    return report, policy


# --- the process ---


def main() -> None:
    """`python -m proxy.service.compiler FD PARENT`."""
    descriptor, parent = map(int, sys.argv[1:])
    gc.disable()  # the process is gone before there is anything to collect
    child.die_with(parent)
    with socket.socket(fileno=descriptor) as sock:
        _, descriptors, _, _ = socket.recv_fds(sock, MAX_MESSAGE, 1)
        with open(descriptors[0], "rb") as file:
            request = Request(**json.load(file))
        os.nice(request.niceness)
        try:
            report, policy = _compile(request)
        except Unready as error:
            said = {"problems": _shortened(str(error)), "is_misuse": isinstance(error, Misused)}
            sock.send(json.dumps(said).encode())
        else:
            carried = [] if policy is None else [policy.fileno()]
            socket.send_fds(sock, [json.dumps(asdict(report)).encode()], carried)


def _compile(request: Request) -> tuple[Report, BinaryIO | None]:
    """Raises Unready."""
    from policies.errors import PolicyError
    from proxy.compiled import write_policy
    from proxy.policy_files import load_texts, read_texts
    from proxy.served import closed_rules, refused_keys

    try:
        texts = read_texts(request.paths, tags=request.tags)
        if texts.generation == request.known:
            return Report(generation=texts.generation), None
        policy = load_texts(texts)
    except PolicyError as error:
        raise Unready("\n".join(map(str, error.problems))) from error
    require_workload(policy, request.workload)
    if refused := refused_keys(policy, request.workload, has_users=request.has_users):
        raise Unready("\n".join(map(str, refused)))
    inspected = inspected_rule(policy, request.workload)
    if inspected and not (request.pki or request.has_issuing):
        raise Unready(f"{inspected} is inspected: give the authority that signs its leaves with --pki DIR")
    # Also where nothing is inspected yet: the next policy may, and leaves are signed by one authority from the start.
    issuing = issuing_pem(load_authority(request.pki)) if request.pki and not request.has_issuing else None
    closed = _shortened("\n".join(map(str, closed_rules(policy, request.workload))))
    report = Report(generation=policy.generation, inspects=inspected is not None, issuing=issuing, closed=closed)
    return report, write_policy(policy)


def _shortened(text: str) -> str:
    lines = [line[:MAX_LINE] for line in text.splitlines()]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
