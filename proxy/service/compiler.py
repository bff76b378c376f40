"""Reads the policy and the issuing CAs in a process of its own, so that a reload takes nothing from connections or from
the supervisor. Both are read at once, for the names that are inspected must be names that the CAs may sign.

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
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from policies.model import Stage
from proxy import child
from proxy.channel import MAX_MESSAGE, Channel
from proxy.config import Config
from proxy.issuing import Issuers, left_out
from proxy.options import Misused, Unready, gives_http2, inspected_rule, load_issuers, require_workload

if TYPE_CHECKING:
    from policies.index import Policy

LOAD_S = 120.0  # 32 MiB of rules on a slow machine take less
NICENESS = 10
MAX_ISSUERS = 32 * 1024  # bytes of their text: it goes in a message, whose other parts are short
MAX_LINES, MAX_LINE = 50, 400  # of what it has to say: nobody reads on, and a message has an end


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to compile, and for which gate.

    workload   whose rules count; None: everybody's
    has_users  the gate knows proxy clients by their credentials
    has_pods   it watches a cluster
    has_datagrams  it has a door for udp rules
    gives_time  it is for `outgate relay`, which serves ntp rules and no others
    pki        the authority's directory
    known      the generation in force, which is not compiled again; None: the gate starts
    issuers    those in force, without their text
    niceness   of the process: connections come first
    """

    paths: tuple[str, ...]
    tags: tuple[str, ...] = ()
    workload: str | None = None
    has_users: bool = False
    has_pods: bool = False
    has_datagrams: bool = False
    gives_time: bool = False
    pki: str | None = None
    known: str | None = None
    issuers: Issuers | None = None
    niceness: int = NICENESS


def request_for(config: Config) -> Request:
    """What a gate of this configuration starts with: nobody is served yet, so there is nobody to be nice to."""
    return Request(
        paths=config.policy,
        tags=config.tags,
        workload=config.workload,
        has_users=config.credentials is not None,
        has_pods=config.kubernetes is not None,
        has_datagrams=bool(config.udp_listen or config.udp_forward),
        pki=config.pki,
        niceness=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What there is to say of a policy that can be served, and of the issuing CAs.

    generation  twelve hex digits that stand in every record
    inspects    a rule ends TLS
    http2       one gives clients HTTP/2, which takes a process that is started in time
    closed      rules of a kind that is not carried yet, one a line
    issuers     what signs leaves from now on; None: what did before, or nothing
    fault       why the issuing CAs that the store may hold by now are not among this, one a line
    problems    why the newest policy is not either: then the generation is the known one
    """

    generation: str
    inspects: bool = False
    http2: bool = False
    closed: str = ""
    issuers: Issuers | None = None
    fault: str = ""
    problems: str = ""


async def compile_policy(request: Request, deadline_s: float = LOAD_S) -> tuple[Report, BinaryIO | None]:
    """The report on a policy, and the policy in memory as `proxy.compiled` writes it; None where it is the known one.

    Raises Unready with every problem, one a line, where there is nothing new that can be in force; also where the
    compiler itself fails or takes too long.
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
    if "is_misuse" in said:
        raise (Misused if said["is_misuse"] else Unready)(said["problems"])
    report = Report(**_with_issuers(said))
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
            request = Request(**_with_issuers(json.load(file)))
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
    issuers, fault = _newest_issuers(request)
    try:
        report, policy = _compile_policy(request, issuers)
    except Unready as error:
        # New issuing CAs do not wait for a policy that loads, unless it takes one to say whether they may sign for it.
        if request.known is None or issuers is None or _narrows(issuers, request.issuers):
            raise type(error)("\n".join(filter(None, (str(error), fault)))) from error
        return Report(generation=request.known, issuers=issuers, problems=_shortened(str(error))), None
    if fault and request.known is None:
        raise Unready(fault)
    return replace(report, fault=_shortened("\n".join(filter(None, (fault, report.fault))))), policy


def _newest_issuers(request: Request) -> tuple[Issuers | None, str]:
    """Those of the store, None where they are the known ones; and why they cannot be read."""
    if request.pki is None:
        return None, ""
    try:  # also where nothing is inspected yet: the next policy may
        issuers = load_issuers(request.pki)
    except Unready as error:
        return None, str(error)
    if len(issuers.text) > MAX_ISSUERS:
        return None, f"{request.pki}: more than {MAX_ISSUERS} bytes of certificates for its issuing CAs; retire some"
    is_known = request.issuers is not None and issuers.digest == request.issuers.digest
    return None if is_known else issuers, ""


def _narrows(issuers: Issuers, former: Issuers | None) -> bool:
    return bool(issuers.constraints) and (former is None or issuers.constraints != former.constraints)


def _compile_policy(request: Request, issuers: Issuers | None) -> tuple[Report, BinaryIO | None]:
    """The policy under new issuing CAs (None: the known ones). Raises Unready."""
    from policies.errors import PolicyError
    from proxy.compiled import write_policy
    from proxy.policy_files import load_texts, read_texts
    from proxy.served import closed_rules

    fault = ""
    try:
        texts = read_texts(request.paths, tags=request.tags)
        is_known = texts.generation == request.known
        if is_known and not (issuers and _narrows(issuers, request.issuers)):
            return Report(generation=texts.generation, issuers=issuers), None
        policy = load_texts(texts)
    except PolicyError as error:
        raise Unready("\n".join(map(str, error.problems))) from error
    if not is_known:
        _require_served(policy, request)
    if issuers and (outside := left_out(policy, request.workload, issuers)):
        fault = "\n".join(map(str, outside))
        if request.known is None:
            raise Unready(fault)
        issuers = None
    if is_known:
        return Report(generation=policy.generation, issuers=issuers, fault=fault), None
    if issuers is None and request.issuers and (outside := left_out(policy, request.workload, request.issuers)):
        raise Unready("\n".join(map(str, outside)))
    carried = (Stage.UDP,) if request.has_datagrams else ()
    report = Report(
        generation=policy.generation,
        inspects=inspected_rule(policy, request.workload) is not None,
        http2=gives_http2(policy, request.workload),
        closed=_shortened("\n".join(map(str, closed_rules(policy, request.workload, carried=carried)))),
        issuers=issuers,
        fault=fault,
    )
    return report, write_policy(policy)


def _require_served(policy: Policy, request: Request) -> None:
    """Raises Unready for what this gate cannot serve."""
    from proxy.relays.ntp.named import unservable
    from proxy.served import refused_keys

    require_workload(policy, request.workload)
    if request.gives_time:
        if problems := unservable(policy, request.workload):
            raise Unready("\n".join(problems))
        return
    if refused := refused_keys(policy, request.workload, has_users=request.has_users, has_pods=request.has_pods):
        raise Unready("\n".join(map(str, refused)))
    inspected = inspected_rule(policy, request.workload)
    if inspected and not request.pki:
        raise Unready(f"{inspected} is inspected: give the authority that signs its leaves with --pki DIR")


def _with_issuers(fields: dict[str, Any]) -> dict[str, Any]:  # Any: what JSON holds
    issuers = fields["issuers"]
    return {**fields, "issuers": issuers and Issuers.from_fields(issuers)}


def _shortened(text: str) -> str:
    lines = [line[:MAX_LINE] for line in text.splitlines()]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"… and {len(lines) - MAX_LINES} more"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
