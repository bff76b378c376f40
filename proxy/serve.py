"""`outgate serve`: a service in the foreground, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from proxy.child import leave_no_core
from proxy.config import Config, DoorKind
from proxy.hosts import system_nameservers
from proxy.issuing import reminder
from proxy.log.target import Target, Turns
from proxy.options import Misused, Unready, checked_addons, checked_upstream_ca, say
from proxy.original_dst import parse_address
from proxy.own_doors import OwnDoors
from proxy.record import show_peer
from proxy.service.compiler import compile_policy, request_for
from proxy.service.doors import DoorTaken, OpenDoor, open_doors
from proxy.service.supervisor import Supervisor

USAGE, NOT_STARTED = 2, 3


def serve(config: Config) -> int:
    """Serve until SIGINT or SIGTERM. Returns 0; after one clear line 2 (misused) or 3 (not started)."""
    leave_no_core()
    try:
        _check_files(config)
        doors = open_doors(config)
        _check_nameservers(config, doors)
        _check_log(config.log)
        asyncio.run(_serve(config, doors))
    except (Unready, DoorTaken) as error:
        say(str(error))
        return USAGE if isinstance(error, Misused) else NOT_STARTED
    return 0


def check(config: Config) -> int:
    """Whether a gate would start with it, as far as can be told without taking its ports. Returns as `serve` does."""
    try:
        _check_files(config)
        report, policy = asyncio.run(compile_policy(request_for(config)))
    except Unready as error:
        say(str(error))
        return USAGE if isinstance(error, Misused) else NOT_STARTED
    if policy:
        policy.close()
    say(report.closed)
    if report.issuers:
        say(reminder(report.issuers, time.time()))
    print(f"mode {config.mode}, policy {report.generation}: would start")
    return 0


async def _serve(config: Config, doors: Sequence[OpenDoor]) -> None:
    """Raises Unready."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    supervisor = Supervisor(config, doors)
    loop.add_signal_handler(signal.SIGHUP, supervisor.hang_up)
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            for what, where in dict.fromkeys((door.kind.says, door.shown) for door in doors):
                say(f"serving {what} on {where}")
            if admin := supervisor.admin_address:
                say(f"answering /readyz and /metrics on {show_peer(admin)}")
            await supervisor.run(stop, hurry)
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await supervisor.finish(hurry)


def _check_files(config: Config) -> None:
    """Raises Unready for a file that no worker could use: they would say so late, and each for itself."""
    checked_upstream_ca(config.upstream_ca)
    checked_addons(config.addons)
    if config.credentials:
        from proxy.explicit import credentials

        try:
            credentials.read_credentials(Path(config.credentials))
        except credentials.CredentialsError as error:
            raise Unready(str(error)) from error
    if config.upstream_proxy and config.upstream_proxy.credentials:
        from proxy import upstream_proxy

        try:
            upstream_proxy.read_credentials(config.upstream_proxy.credentials)
        except upstream_proxy.CredentialsUnusable as error:
            raise Unready(str(error)) from error


def _check_nameservers(config: Config, doors: Sequence[OpenDoor]) -> None:
    """Raises Unready for a gate that would ask itself: no name would ever be found, whoever asks."""
    own = OwnDoors(door.address for door in doors if door.kind is DoorKind.DNS)
    asked = system_nameservers() if config.nameservers is None else config.nameservers
    for server in (*asked, *chain.from_iterable(config.dns_forward.values())):
        if own.holds(parse_address(server[0]), server[1]):
            shown = show_peer(server)
            raise Unready(f"name server {shown} is --dns-listen of this gate itself; name the site's with --nameserver")


def _check_log(target: str | None) -> None:
    """Raises Unready where the log cannot be written; each worker opens it for itself."""
    try:
        Target(target, Turns()).close()
    except OSError as error:
        raise Unready(f"--log {target}: {error.strerror or error}") from error
