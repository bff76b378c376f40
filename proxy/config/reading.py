"""A gate's configuration from all that was said: flag over variable over gate.yaml over default. It opens no more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policies.errors import PolicyError, Problem
from policies.keys import Scope, Wrong
from policies.model import Place
from policies.spelling import nearest
from policies.tree import ListNode, Node, Scalar, Source, parse
from proxy.config import IN_CLUSTER, Config, DoorKind, GateMode, Kubernetes, SocketAddress, UpstreamProxy
from proxy.config.file import read_gate
from proxy.config.key import PREFIX, ConfigKey
from proxy.config.keys import BY_PATH, KEYS
from proxy.config.values import STDERR
from proxy.options import Misused
from proxy.record import show_peer

CONFIG_VARIABLE = PREFIX + "CONFIG"
NO_PATHS = frozenset({("log", STDERR), ("kubernetes.api", IN_CLUSTER)})
CITED = frozenset({"policy", "tags"})  # a rule is cited by its file as the operator named it
# What Kubernetes sets in a pod for every Service whose name begins with `outgate`.
_SERVICE_LINK = re.compile(r"(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_[0-9]+_\w+)?)")
_UNQUOTED_IPV6 = re.compile(r"""(?<!["'])\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]:[0-9]""")  # to YAML it is a list


@dataclass(frozen=True, slots=True)
class Said:
    """One value, and who said it: a flag, a variable, or a place in gate.yaml."""

    value: Any  # of whatever type the key has
    by: str


type Layer = dict[str, Said]  # by the path of the key


def read_config(file: str | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """The configuration that all three together mean.

    file     path of a gate.yaml
    environ  OUTGATE_ variables; an empty one says nothing, one that is no key is not read
    flags    text, or several texts, by the name that the command has for the key; None or () says nothing

    Raises Misused with every problem, one a line. What several keys contradict each other in is looked for once each
    of them can be read.
    """
    problems: list[str] = []
    said: Layer = {}
    for layer in (_read_file(file, problems), _read_variables(environ, problems), _read_flags(flags, problems)):
        said |= layer
    if not problems:
        config = _build(said)
        problems += _contradictions(config, said)
    if problems:
        raise Misused("\n".join(problems))
    return config


def near_misses(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that is nearly one of ours: it is not read, and was probably meant to be."""
    known = {name.removeprefix(PREFIX) for name in (CONFIG_VARIABLE, *(key.variable for key in KEYS))}
    for name in sorted(environ):
        rest = name.removeprefix(PREFIX)
        if rest == name or rest in known or _SERVICE_LINK.fullmatch(rest):
            continue
        if meant := nearest(rest, known):
            yield f'{name} is not read; did you mean "{PREFIX}{meant}"?'


# --- the three ways ------------------------------------------------------------------------------------------------


def _read_file(file: str | None, problems: list[str]) -> Layer:
    if file is None:
        return {}
    from proxy.policy_files import read_sources

    directory = Path(file).parent
    try:
        [source] = read_sources([file])
        found = read_gate(_parse(source), _scope(file))
        return {key.path: Said(_anchored(key, placed.value, directory), _where(placed.place)) for key, placed in found}
    except (PolicyError, Wrong) as error:
        problems += map(str, error.problems)
        return {}


def _parse(source: Source) -> Node:
    try:
        return parse(source)
    except PolicyError as error:
        lines = source.text.splitlines()
        raise PolicyError(_look_for_ipv6(problem, lines) for problem in error.problems) from error


def _look_for_ipv6(problem: Problem, lines: Sequence[str]) -> Problem:
    """`listen: [::]:15001` is not YAML, and what YAML says of it helps nobody."""
    number = problem.place.line  # one more than there are, where something is not closed
    if not _UNQUOTED_IPV6.search("".join(lines[number - 1 : number])):
        return problem
    return replace(problem, hint='an address of IPv6 stands in quotes: "[::]:15001"')


def _read_variables(environ: Mapping[str, str], problems: list[str]) -> Layer:
    texts = {}
    for key in KEYS:
        if text := environ.get(key.variable):
            several = re.split(key.many, text) if key.many else [text]
            texts[key.variable] = (key, [one for one in several if one])
    return _read_texts(texts, problems)


def _read_flags(flags: Mapping[str, object], problems: list[str]) -> Layer:
    texts = {}
    for key in KEYS:
        match flags.get(key.argument):
            case str(text):
                texts[key.flag] = (key, [text])
            case [*several] if several:
                texts[key.flag] = (key, [str(text) for text in several])
    return _read_texts(texts, problems)


def _read_texts(texts: Mapping[str, tuple[ConfigKey, Sequence[str]]], problems: list[str]) -> Layer:
    """Text of flags and variables, read as the same text in gate.yaml would be."""
    layer: Layer = {}
    for by, (key, values) in texts.items():
        try:
            value = (key.texts or key.shape).read(_node(key, values), _scope(by))
        except Wrong as error:
            problems += [f"{by}: {_told(problem)}" for problem in error.problems]
        else:
            layer[key.path] = Said(_anchored(key, value, Path()), by)
    return layer


def _node(key: ConfigKey, texts: Sequence[str]) -> Scalar | ListNode:
    is_number = key.shape.schema.get("type") in ("integer", "number")
    nodes = tuple(Scalar(text, is_number, 1, 1) for text in texts)  # other text is what it is, as if in quotes
    return ListNode(nodes, 1, 1) if key.many else nodes[0]


def _scope(file: str) -> Scope:
    return Scope(file, None, lambda _: False)


def _where(place: Place) -> str:
    return f"{place.file}:{place.line}:{place.column}"


def _told(problem: Problem) -> str:
    return problem.message + (f"; {problem.hint}" if problem.hint else "")


def _anchored(key: ConfigKey, value: Any, directory: Path) -> Any:
    """Paths made absolute, but those by which a rule is cited. `..` stays: only the kernel knows it behind a link."""
    if not key.is_path or (not key.many and (key.path, value) in NO_PATHS):
        return value
    if key.path not in CITED:
        directory = Path.cwd() / directory
    return tuple(str(directory / path) for path in value) if key.many else str(directory / value)


# --- together ------------------------------------------------------------------------------------------------------


def _build(said: Layer) -> Config:
    from proxy.inspector.handover import Bounds
    from proxy.limits import Limits

    parts: dict[str, dict[str, Any]] = {"": {"policy": ()}, "limits": {}, "bounds": {}, "upstream_proxy": {}}
    parts["kubernetes"] = {}
    for path, found in said.items():
        for field in BY_PATH[path].fields:
            above, _, name = field.rpartition(".")
            parts[above][name] = found.value
    if "limits.maxConnections" in said and "limits.maxPerSource" not in said:  # as among the defaults
        half = max(1, said["limits.maxConnections"].value // 2)
        parts["limits"]["max_per_source"] = parts["bounds"]["per_source"] = half
    return Config(
        **parts[""],
        limits=Limits(**parts["limits"]),
        bounds=Bounds(**parts["bounds"]),
        upstream_proxy=_upstream_proxy(**parts["upstream_proxy"]),
        kubernetes=_kubernetes(**parts["kubernetes"]),
    )


def _upstream_proxy(url: tuple[str, int] | None = None, **rest: Any) -> UpstreamProxy | None:
    return UpstreamProxy(*url, **rest) if url else None


def _kubernetes(api: str | None = None, **rest: Any) -> Kubernetes | None:
    return Kubernetes(api, **rest) if api else None


def _contradictions(config: Config, said: Layer) -> Iterator[str]:
    """What no key alone has wrong, each with who said it and the repair."""
    if not config.policy:
        yield f"no policy: {_ways('policy')}"
    if config.mode is GateMode.SIDECAR and config.workload is None:
        yield f"{said['mode'].by}: mode sidecar does not know whose rules hold for its pod; {_ways('workload')}"
    if config.mode is GateMode.PROXY and "listen" in said:
        repair = f"say {BY_PATH['proxyListen'].flag}, or mode gateway"
        yield f"{said['listen'].by}: mode proxy takes no redirected connections; {repair}"
    if config.mode is GateMode.PROXY and config.dns_listen:
        yield f"{said['dnsListen'].by}: clients of mode proxy send names and ask for none; say mode gateway"
    if config.mode is GateMode.PROXY and config.udp_listen:
        repair = f"say {BY_PATH['udpForward'].flag}, or mode gateway"
        yield f"{said['udpListen'].by}: mode proxy takes no redirected datagrams; {repair}"
    if config.mode is GateMode.PROXY and config.dnstap_listen:
        yield f"{said['dnstapListen'].by}: clients of mode proxy look nothing up for themselves; say mode gateway"
    if "dnsSearch" in said and not config.dns_listen and not config.dnstap_listen:
        yield f"{said['dnsSearch'].by}: dnsSearch is about DNS questions, and none are taken; {_ways('dnsListen')}"
    if config.openings:
        yield from _opens_nothing(config, said)
    yield from _asks_itself(config, said)
    if not any(door.kind is DoorKind.PROXY for door in config.doors()):
        for path in ("credentials", "proxyProtocolFrom", "kubernetes.tokenAudience"):
            if path in said:
                yield f"{said[path].by}: {path} is for clients of a proxy, and there is none; {_ways('proxyListen')}"
    if config.upstream_proxy is None:
        for path in ("upstreamProxy.credentials", "upstreamProxy.direct"):
            if path in said:
                yield f"{said[path].by}: {path} without the proxy it is about; {_ways('upstreamProxy.url')}"
    if config.kubernetes is None:
        for path in ("kubernetes.onStale", "kubernetes.staleS", "kubernetes.tokenAudience"):
            if path in said:
                yield f"{said[path].by}: {path} without the cluster it is about; {_ways('kubernetes.api')}"
    elif config.workload is not None:
        who = f"every connection is {config.workload}'s, whatever its pod"
        yield f"{said['kubernetes.api'].by}: {who}; leave out {BY_PATH['workload'].flag}, or this"
    most = min(config.limits.max_connections, config.bounds.connections)  # that of inspected ones is lower by default
    if (per_source := said.get("limits.maxPerSource")) and per_source.value > most:
        message = f"{per_source.value} for one source, where all together may have {most}"
        yield f"{per_source.by}: {message}; {_ways('limits.maxConnections')}"
    yield from _twice(config, said)


def _opens_nothing(config: Config, said: Layer) -> Iterator[str]:
    by = said["openings"].by
    if config.mode is not GateMode.GATEWAY:
        yield f"{by}: in mode {config.mode} the gate carries everything; say mode gateway, or openings: false"
    elif not config.dns_listen and not config.dnstap_listen:
        yield f"{by}: openings follow lookups, and the gate hears of none; {_ways('dnsListen')}"


def _asks_itself(config: Config, said: Layer) -> Iterator[str]:
    """A name server that is this gate's own would ask itself until nothing is left."""
    asked = [("nameservers", server) for server in config.nameservers or ()]
    asked += [("dnsForward", server) for servers in config.dns_forward.values() for server in servers]
    for path, server in asked:
        if server in config.dns_listen:
            yield f"{said[path].by}: {show_peer(server)} is this gate's own dnsListen; name the site's server"


def _twice(config: Config, said: Layer) -> Iterator[str]:
    doors = [(door.kind, door.address) for door in config.doors()]
    streams = [(kind.value, address) for kind, address in doors if kind.is_stream]
    if config.admin:
        streams.append(("admin", config.admin))
    datagrams = [(kind.value, address) for kind, address in doors if kind.is_datagram]
    for listened in (streams, datagrams):
        first: dict[SocketAddress, str] = {}
        for path, address in listened:
            before = first.get(address)
            if before and address[1]:  # port 0 is another port each time
                by = said.get(path) or said[before]  # the defaults are not at odds, so one of the two was said
                yield f"{by.by}: {show_peer(address)} is taken twice, by {before} and {path}; say another port"
            first.setdefault(address, path)


def _ways(path: str) -> str:
    """How a key is said, in each of the three ways."""
    key = BY_PATH[path]
    return f"say {key.flag} {key.metavar}, {key.variable}, or {path} in gate.yaml"
