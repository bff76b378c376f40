"""`outgate serve`: a gate in the foreground for connections that the kernel redirects to it."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address

from policies.index import Policy
from policies.model import HostRule
from proxy.decision_log import DecisionLog
from proxy.options import (
    GateOptions,
    Misused,
    Unready,
    decision_log,
    inspected_rule,
    issuing_pem,
    load_authority,
    new_authority,
    read_gate_policy,
    require_served,
    say,
    settings_of,
)
from proxy.original_dst import redirected_dst
from proxy.record import show_peer
from proxy.runtime import Gate, Settings

USAGE, NOT_STARTED = 2, 3
BACKLOG = 4096


def serve(options: GateOptions, listen: str) -> int:
    """Serve until SIGINT or SIGTERM. Returns 0; after one clear line 2 (misused) or 3 (not started)."""
    try:
        policy, sources = read_gate_policy(options)
        require_served(policy, options.workload)
        inspected = inspected_rule(policy, options.workload)
        settings = settings_of(options, sources, _issuing(options, inspected))
        door = _open_door(listen)
        log = decision_log(options.log, sources)
    except Unready as error:
        say(str(error))
        return USAGE if isinstance(error, Misused) else NOT_STARTED
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a flow takes up to six (Limits.max_connections)
    try:
        asyncio.run(_serve(policy, settings, door, log, starts_inspector=inspected is not None))
    finally:
        log.close()
    return 0


async def _serve(
    policy: Policy, settings: Settings, door: socket.socket, log: DecisionLog, *, starts_inspector: bool
) -> None:
    gate = Gate(policy, settings, original_dst=redirected_dst, record=log)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        gate.listen(door)
        if starts_inspector:
            gate.start_inspector()
        say(f"serving redirected connections on {show_peer(door.getsockname()[:2])}")
        await stop.wait()
    finally:
        await gate.close()


def _issuing(options: GateOptions, inspected: HostRule | None) -> Callable[[], str]:
    """What signs leaves. A gate that ends no TLS needs nothing of the kind, and loads nothing for it."""
    if inspected is None:
        return lambda: issuing_pem(new_authority())
    if not options.pki:
        raise Unready(f"{inspected} is inspected: give the authority that signs its leaves with --pki DIR")
    return partial(issuing_pem, load_authority(options.pki))


def _open_door(listen: str) -> socket.socket:
    """A listening socket on `ADDR:PORT` or `[ADDR6]:PORT`. Raises Misused, Unready."""
    host, _, port = listen.rpartition(":")
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        both = str(address) == "::" and socket.has_dualstack_ipv6()  # as every other server that is told [::]
        return socket.create_server((str(address), number), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (ValueError, OverflowError) as error:
        raise Misused(f'--listen "{listen}": write ADDR:PORT, for example 0.0.0.0:15001 or [::]:15001') from error
    except OSError as error:
        raise Unready(f"--listen {listen}: {error.strerror or error}") from error
