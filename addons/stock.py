"""The policy in stock mitmproxy, to watch and debug it in mitmweb; `outgate.py` is what `-s` loads.

The same judge, answers and records as in the gate; what opens connections, ends TLS and shows flows is mitmproxy's own.
A place to look at a policy, not a wall: what the gate bounds and refuses before mitmproxy's parsers see it (hellos,
heads, bodies of denied requests) has mitmproxy's own bounds here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import orjson
from mitmproxy import connection, ctx, dns, exceptions, http, tls
from mitmproxy.addonmanager import Loader
from mitmproxy.net.dns import response_codes
from mitmproxy.proxy.mode_specs import RegularMode
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from addons.answers import answer
from addons.gate import ANSWER, FAILURE, JUDGEMENT, Gate
from addons.judge import FORBIDDEN, Conversation, Judge, Judgement, Unreachable
from addons.outcome import Outcome
from addons.upstream import Upstream, trust_origins
from policies.engine import admit, decide, identify
from policies.errors import PolicyError
from policies.hostnames import Hostname, MalformedName, parse_hostname
from policies.index import Policy
from policies.model import UNKNOWN, Action, Address, Attempt, Dial, Reason, Stage, Tls, Verdict
from proxy.hosts import MalformedHostOption, parse_host_options, read_hosts_file, system_nameservers
from proxy.inspector.outcome import record_of_outcome
from proxy.inspector.reading import find_fault
from proxy.inspector.wiring import resolve_for_dial
from proxy.original_dst import parse_address
from proxy.policy_files import read_policy
from proxy.record import Record, new_id, record_of
from proxy.resolver import Resolver
from proxy.wire.client_hello import MalformedHello, parse_hello

_POLICY = {"policy", "policy_tags", "policy_workload"}
_STREAMED = ("application/grpc", "text/event-stream")  # what waits for its own end would never be seen


@dataclass(slots=True)
class _Client:
    """One client connection.

    conversation  what the judge knows of it
    authority     the name that a CONNECT asked for, which must then be the SNI
    refused       it was denied before its first request: whatever it opens is refused
    """

    conversation: Conversation
    authority: Hostname | None = None
    refused: Reason | None = None


class Stock:
    """Every connection of one mitmproxy. Until a policy is loaded nothing passes."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._clients: dict[str, _Client] = {}
        judge = Judge(self._decide, now=time.time, new_id=new_id)
        self._gate = Gate(judge, self._conversation_of)
        self._upstream = Upstream(partial(resolve_for_dial, Resolver({}, ())), trust_origins(), self._conversation_of)

    # --- options ---

    def load(self, loader: Loader) -> None:
        loader.add_option("policy", Sequence[str], [], "Policy files of Outgate; they merge.")
        loader.add_option("policy_tags", Sequence[str], [], "Service-tag files of the policy.")
        loader.add_option("policy_workload", str, "", "Whose rules count; empty: as the source address says.")
        loader.add_option("policy_hosts", Sequence[str], [], "NAME=ADDR[:PORT]: dial this address for the name.")
        loader.add_option("policy_log", str, "", "Append decision records (JSON lines) to this file.")

    def configure(self, updated: set[str]) -> None:
        """Raises OptionsError: at the start mitmproxy ends with it; later the last good policy stays in force."""
        if ctx.options.connection_strategy != "lazy":  # eager would open connections before anything is judged
            ctx.options.connection_strategy = "lazy"
        if updated & _POLICY and ctx.options.policy:
            self._policy = _read(ctx.options.policy, ctx.options.policy_tags, ctx.options.policy_workload)
        if "policy_hosts" in updated:
            try:
                hosts = parse_host_options(ctx.options.policy_hosts)
            except MalformedHostOption as error:
                raise _wrong(str(error)) from error
            resolver = Resolver(hosts, system_nameservers(), system_hosts=read_hosts_file())
            self._upstream = Upstream(partial(resolve_for_dial, resolver), trust_origins(), self._conversation_of)

    def running(self) -> None:
        if self._policy is None:
            logging.error("outgate: no policy, so nothing passes: add --set policy=FILE")

    # --- connections ---

    def client_connected(self, client: connection.Client) -> None:
        source = client.peername[:2]
        workload = ctx.options.policy_workload or (
            identify(self._policy, parse_address(source[0])) if self._policy else UNKNOWN
        )
        self._clients[client.id] = _Client(Conversation(workload, 0, True, source))

    def client_disconnected(self, client: connection.Client) -> None:
        self._clients.pop(client.id, None)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A CONNECT to a name can be refused at once, in words; one to an address waits for its SNI."""
        client = self._clients[flow.client_conn.id]
        client.authority = _hostname(flow.request.host)
        if client.authority is None:
            return
        attempt = self._attempt(Stage.TLS, client, client.authority, flow.request.port)
        verdict = self._decide(attempt)
        if verdict.is_allow or verdict.reason is Reason.WRONG_PROTOCOL:  # plain HTTP may be tunnelled too
            return
        judgement = Judgement(new_id(), attempt, verdict, FORBIDDEN)
        flow.response = _response(judgement)
        self._note(flow, judgement)
        self._write(record_of(attempt, verdict, id=judgement.id, source=client.conversation.source, status=FORBIDDEN))

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        client = self._clients[data.context.client.id]
        host, ech, fault = _read_hello(data.client_hello)
        asked, port = data.context.server.address or ("", 443)
        if client.authority and host not in (None, client.authority):
            fault = Reason.HOST_MISMATCH
        attempt = self._attempt(Stage.TLS, client, host, port, address=_address(asked), ech=ech, fault=fault)
        verdict = self._decide(attempt)
        if verdict.is_allow and verdict.tls is Tls.INSPECT:
            conversation = client.conversation
            conversation.opened_for, conversation.port, conversation.plain = host, port, False
            return
        self._settle(client, attempt, verdict)
        data.ignore_connection = True  # carried as it is; where it was denied, to nowhere

    def _settle(self, client: _Client, attempt: Attempt, verdict: Verdict) -> None:
        """What is carried undecrypted, or not at all, is decided and recorded once."""
        conversation = client.conversation
        if verdict.is_allow:
            conversation.opened_for = verdict.host or attempt.host
            conversation.port, conversation.allowed = attempt.port, verdict
        else:
            client.refused = verdict.reason
        self._write(record_of(attempt, verdict, id=new_id(), source=conversation.source))

    async def server_connect(self, data: ServerConnectionHookData) -> None:
        """The last door: nothing is dialled that was not allowed, and no address that was not admitted."""
        client = self._clients.get(data.client.id)
        if client is None or data.server.transport_protocol != "tcp" or data.server.address is None:
            data.server.error = "Outgate carries TCP alone here"
            return
        asked, port = data.server.address
        if client.refused is None and client.conversation.allowed is None:  # opaque bytes
            attempt = self._attempt(Stage.TCP, client, None, port, address=_address(asked))
            self._settle(client, attempt, self._decide(attempt))
        verdict = client.conversation.allowed
        if client.refused is not None or verdict is None:
            data.server.error = f"denied by policy: {client.refused}"
        elif verdict.dial is not Dial.ORIGINAL:
            await self._upstream.server_connect(data)
        elif (address := _address(asked)) is None or not (admitted := admit(verdict, address)).is_allow:
            data.server.error = f"denied by policy: {admitted.reason if address else Reason.GATE_FAILED}"

    def dns_request(self, flow: dns.DNSFlow) -> None:
        client = self._clients[flow.client_conn.id]
        for question in flow.request.questions:
            attempt = self._attempt(Stage.DNS, client, _hostname(question.name), 53)
            verdict = self._decide(attempt)
            self._write(record_of(attempt, verdict, id=new_id(), source=client.conversation.source))
            if not verdict.is_allow:
                flow.response = flow.request.fail(response_codes.NXDOMAIN)
                return

    # --- requests ---

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        try:
            self._judge(flow)
        except Exception:  # mitmproxy would log it and forward the request, on a connection that is open already
            flow.kill()  # type: ignore[no-untyped-call]  # mitmproxy leaves it untyped
            raise

    def _judge(self, flow: http.HTTPFlow) -> None:
        conversation = self._clients[flow.client_conn.id].conversation
        if not flow.client_conn.tls:
            conversation.plain, conversation.port = True, flow.request.port
            if isinstance(flow.client_conn.proxy_mode, RegularMode):  # each request names its own host
                conversation.opened_for = _hostname(flow.request.host)
        self._gate.requestheaders(flow)
        if flow.request.stream:  # else mitmproxy would show no body
            flow.request.stream = _is_streamed(flow.request)
        self._note(flow, flow.metadata[JUDGEMENT])

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None or flow.metadata.get(ANSWER):
            return
        if fault := find_fault(flow.request, flow.response):
            flow.metadata[FAILURE] = Unreachable(Reason.UPSTREAM_FAILED, fault)
            flow.response = None
            flow.kill()  # type: ignore[no-untyped-call]  # mitmproxy leaves it untyped
        elif _is_streamed(flow.response):
            flow.response.stream = True

    def response(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self._gate.error(flow)
        self._finish(flow)

    def _finish(self, flow: http.HTTPFlow) -> None:
        judgement: Judgement | None = flow.metadata.get(JUDGEMENT)
        if judgement is None or self._policy is None:
            return
        self._note(flow, judgement)
        outcome = Outcome(
            judgement,
            self._conversation_of(flow.client_conn),
            flow.request.timestamp_start,
            flow.server_conn.peername,
            flow.response.status_code if flow.response else None,
            len(flow.request.raw_content or b""),
            len(flow.response.raw_content or b"") if flow.response else 0,
        )
        self._write(record_of_outcome(self._policy, outcome))

    # --- what they share ---

    def _conversation_of(self, client: connection.Client) -> Conversation:
        return self._clients[client.id].conversation

    def _decide(self, attempt: Attempt) -> Verdict:
        if self._policy is None:
            return Verdict(Action.DENY, Reason.GATE_FAILED, attempt.stage)
        return decide(self._policy, attempt)

    def _attempt(
        self,
        stage: Stage,
        client: _Client,
        host: Hostname | None,
        port: int,
        *,
        address: Address | None = None,
        ech: bool = False,
        fault: Reason | None = None,
    ) -> Attempt:
        names = (client.authority,) if client.authority else ()
        return Attempt(
            stage,
            client.conversation.workload,
            host,
            port,
            time=time.time(),
            address=address,
            names=names,
            ech=ech,
            fault=fault,
        )

    def _note(self, flow: http.HTTPFlow, judgement: Judgement) -> None:
        """What mitmweb shows beside the flow."""
        verdict = judgement.verdict
        flow.marked = "" if verdict.is_allow else ":no_entry:"
        flow.comment = f"{verdict.action} {verdict.reason} {verdict.rule or ''} {judgement.id}".replace("  ", " ")

    def _write(self, record: Record) -> None:
        if ctx.options.policy_log:
            with open(ctx.options.policy_log, "ab") as file:
                file.write(orjson.dumps(record) + b"\n")


def _read(paths: Sequence[str], tags: Sequence[str], workload: str) -> Policy:
    try:
        policy = read_policy(paths, tags=tags)
    except PolicyError as error:
        raise _wrong("\n".join(map(str, error.problems))) from error
    if workload and workload not in policy.workloads:
        known = ", ".join(sorted(policy.workloads)) or "none"
        raise _wrong(f'policy_workload "{workload}": the policy has {known}')
    return policy


def _wrong(text: str) -> exceptions.OptionsError:
    return exceptions.OptionsError(text)  # type: ignore[no-untyped-call]  # mitmproxy leaves it untyped


def _read_hello(hello: tls.ClientHello) -> tuple[Hostname | None, bool, Reason | None]:
    """The SNI, whether there is ECH, and what is wrong, read as the gate reads it."""
    try:
        found = parse_hello(hello.raw_bytes())
    except MalformedHello:
        return None, False, Reason.MALFORMED_HELLO
    if found is None:
        return None, False, Reason.MALFORMED_HELLO
    if found.sni is None:
        return None, found.ech, None
    host = _hostname(found.sni)
    return host, found.ech, None if host else Reason.MALFORMED_NAME


def _hostname(text: str) -> Hostname | None:
    try:
        return parse_hostname(text)
    except MalformedName:
        return None


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_streamed(message: http.Message) -> bool:
    return str(message.headers.get("content-type", "")).startswith(_STREAMED)


def _response(judgement: Judgement) -> http.Response:
    made = answer(judgement, closes=True)
    return http.Response.make(made.status, made.body, http.Headers(made.headers))
