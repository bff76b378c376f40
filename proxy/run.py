"""`outgate run`: one command in a sandbox, one gate around it, and what was refused said at the end."""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from policies.index import Policy
from policies.model import PortRange
from proxy import own_code
from proxy.config import HttpHost
from proxy.issuing import Issuers, describe, left_out, reminder
from proxy.options import (
    GateOptions,
    Unready,
    decision_log,
    gives_http2,
    inspected_rule,
    load_authority,
    load_issuers,
    new_authority,
    read_gate_policy,
    require_served,
    say,
    settings_of,
)
from proxy.served import IN_SANDBOX
from proxy.service.watch import Watch

if TYPE_CHECKING:  # nothing that starts a thread or an event loop may be loaded before the fork
    from pki.authority import Authority
    from pki.key_uri import KeyUri
    from proxy.record import Record
    from proxy.runtime import Gate, Settings
    from proxy.sandbox import Ports, Sandbox

NOT_STARTED = 125  # as env(1), nohup(1) and docker run: the command's own codes stay its own

OPENSSL_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENSSL_CONF", "OPENSSL_MODULES")  # files that our TLS loads

# Capture is transparent: a proxy that the user's shell names cannot be reached from inside and is not needed.
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")


def run(options: GateOptions, command: Sequence[str], *, proxy_env: bool) -> int:
    """Run `command` under the policy. Returns its exit status, or 125 after one clear line when it was not started."""
    from proxy.sandbox import SandboxUnavailable

    trust = tempfile.mkdtemp(prefix="outgate-")
    try:
        return _run(options, command, Path(trust), proxy_env=proxy_env)
    except (Unready, SandboxUnavailable) as error:
        say(str(error))
        return NOT_STARTED
    finally:
        shutil.rmtree(trust, ignore_errors=True)


def _run(options: GateOptions, command: Sequence[str], trust: Path, *, proxy_env: bool) -> int:
    policy = read_gate_policy(options)
    options = _with_workload(options, policy)
    assert options.workload is not None
    require_served(policy, options.workload, carried=() if proxy_env else IN_SANDBOX)
    # Followed by its real path: a link to it is the command's to change.
    directory = os.path.realpath(options.pki) if options.pki else None
    store = Watch((), directory)  # from before it is read: what comes later is news
    authority = load_authority(options.pki) if options.pki else new_authority()
    issuers = describe(authority.issuers)
    renewals = Renewals(policy, options.workload, issuers, store, directory)
    settings = settings_of(options, lambda: issuers.text)
    environment = _environment(options, authority, settings, trust)
    if proxy_env:
        from proxy.advisory import run_advisory

        told = Told(policy, settings, options.log)
        return run_advisory(policy, settings, command, environment, told, renewals)
    from proxy.sandbox import launch

    tokens = _tokens(authority)
    store_places = _places(directory) if directory else []
    # The authority's keys are the user's to read, not the command's.
    hidden = [*store_places, *(str(token.pin_source) for token in tokens if token.pin_source)]
    ports = _ports(policy, options.workload)
    if options.log:
        _create(options.log)
    # What the gate still reads or loads while the command runs, and the record of it. A store that the command could
    # put in the place of ours might name a PKCS#11 library, which the gate would run outside.
    named = (settings.upstream_ca, options.log, *settings.addons, *map(os.environ.get, OPENSSL_VARIABLES))
    modules = (str(token.module) for token in tokens)
    kept = [*own_code.places(), *options.paths, *options.tags, *filter(None, named), *store_places, *modules]
    with launch(command, ports=ports, environment=environment, hide=hidden, keep=kept) as sandbox:
        return asyncio.run(_serve(policy, settings, sandbox, options.log, renewals))


async def _serve(policy: Policy, settings: Settings, sandbox: Sandbox, log: str | None, renewals: Renewals) -> int:
    from proxy.child import leave_no_core
    from proxy.original_dst import local_dst
    from proxy.runtime import Gate

    assert settings.workload is not None
    leave_no_core()  # of the gate: the command has been forked, and leaves what it likes
    with Told(policy, settings, log) as told:
        gate = Gate(policy, settings, original_dst=local_dst, record=told.record)
        renewing = asyncio.create_task(renewals.carry_out(gate))
        try:
            gate.enter(sandbox)
            if needs_inspector(policy, settings):
                gate.start_inspector()  # beside the command's own start, or its first request would wait for it
            sandbox.release()
            return await sandbox.wait()
        finally:
            renewing.cancel()
            await gate.close()


def needs_inspector(policy: Policy, settings: Settings) -> bool:
    """Whether something that the command may ask for takes mitmproxy's process."""
    workload = settings.workload
    is_forced = settings.http_host is HttpHost.MITMPROXY
    return gives_http2(policy, workload) or (is_forced and inspected_rule(policy, workload) is not None)


class Renewals:
    """The issuing CAs of a gate that has no supervisor: followed to others in its store while the command runs.

    issuers    to begin with
    directory  the store; None: there is none, and nothing to follow

    Raises Unready where no client would accept a leaf of theirs for a name that is inspected.
    """

    def __init__(self, policy: Policy, workload: str, issuers: Issuers, store: Watch, directory: str | None) -> None:
        self._policy = policy
        self._workload = workload
        self._digest = issuers.digest
        self._store = store
        self._directory = directory
        self._check(issuers)
        if directory:
            say(reminder(issuers, time.time()))

    async def carry_out(self, gate: Gate) -> None:
        """Until cancelled: what cannot be taken over is told, and the former issuing CAs stay in force."""
        while self._directory:
            await self._store.changed()
            try:
                issuers = await asyncio.to_thread(load_issuers, self._directory)
                self._check(issuers)
            except Unready as error:
                say(f"the issuing CA is not replaced, the former stays in force:\n{error}")
                continue
            if issuers.digest != self._digest:  # else a root was staged, or a file touched
                self._digest = issuers.digest
                gate.sign_by(issuers.text)

    def _check(self, issuers: Issuers) -> None:
        if outside := left_out(self._policy, self._workload, issuers):
            raise Unready("\n".join(map(str, outside)))


class Told:
    """Where the records of one run go: the log, if one was asked for, and the closing summary on standard error."""

    def __init__(self, policy: Policy, settings: Settings, log: str | None) -> None:
        from proxy.summary import Summary

        self._summary = Summary(policy, settings.workload or "")
        self._log = decision_log(log) if log else None

    def __enter__(self) -> Told:
        return self

    def record(self, record: Record) -> None:
        self._summary(record)
        if self._log:
            self._log(record)

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.close()
        for line in self._summary.lines():
            print(line, file=sys.stderr)


def _places(store: str) -> list[str]:
    """The store, and what stands in it: a folder may be a link to another place."""
    return [store, *(path for depth in ("*", "*/*") for path in glob.glob(os.path.join(glob.escape(store), depth)))]


def _tokens(authority: Authority) -> list[KeyUri]:
    """Where those of its keys are that no file holds."""
    from pki.key_uri import parse_uri

    keys = [*(root.key for root in authority.roots), *(one.key for one in authority.issuing)]
    return [parse_uri(uri) for key in keys if (uri := getattr(key, "uri", None))]  # as `pki/signer.py` makes them


def _create(log: str) -> None:
    """A file that is not there cannot be kept from the command. Raises Unready."""
    try:
        if log != "-" and not os.path.exists(log):
            open(log, "a").close()
    except OSError as error:
        raise Unready(f"--log {log}: {error.strerror or error}") from error


def _with_workload(options: GateOptions, policy: Policy) -> GateOptions:
    """The options with the workload named: where there is only one, it is meant."""
    from dataclasses import replace

    if options.workload is not None:
        return options
    if len(policy.workloads) != 1:
        names = ", ".join(sorted(policy.workloads)) or "none"
        raise Unready(f"which workload? add -w NAME (the policy has: {names})")
    return replace(options, workload=next(iter(policy.workloads)))


def _environment(options: GateOptions, authority: Authority, settings: Settings, trust: Path) -> dict[str, str]:
    """The command's environment: every runtime trusts the gate, and `outgate why` knows where it is."""
    from pki.authority import certificates_pem
    from pki.trust import TrustError
    from proxy.trusting import trusting

    roots = certificates_pem(*authority.trusted)
    if settings.upstream_ca:  # what the gate accepts upstream the command accepts on passthrough
        roots += b"\n" + Path(settings.upstream_ca).read_bytes()
    kept = {name: value for name, value in os.environ.items() if name.lower() not in PROXY_VARIABLES}
    if shutil.which("outgate") is None:  # `outgate why` answers inside too
        kept["PATH"] = os.pathsep.join([kept.get("PATH", os.defpath), str(Path(sys.prefix) / "bin")])
    try:
        variables = trusting(trust, roots, kept, say)
    except TrustError as error:
        raise Unready(str(error)) from error
    return variables.over(kept) | {
        "OUTGATE_POLICY": _joined(options.paths),
        "OUTGATE_TAGS": _joined(options.tags),
        "OUTGATE_WORKLOAD": settings.workload or "",
    }


def _joined(paths: Sequence[str]) -> str:
    """Paths as click reads them from a variable; the command may change its directory."""
    return os.pathsep.join(str(Path(path).resolve()) for path in paths)


def _ports(policy: Policy, workload: str) -> Ports:
    """The ports that the workload's rules name."""
    from proxy.hosts import DNS_PORT
    from proxy.sandbox import Ports
    from proxy.wire.ntp import PORT as NTP_PORT

    index = policy.index[workload]
    return Ports(
        tcp=_numbers(index.host_ports | index.tcp.ports),
        udp=_numbers(index.udp.ports) - {DNS_PORT, NTP_PORT} | ({NTP_PORT} if index.ntp else set()),
    )


def _numbers(ranges: Iterable[PortRange]) -> frozenset[int]:
    return frozenset(port for ports in ranges for port in range(ports.first, ports.last + 1))
