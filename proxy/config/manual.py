"""docs/configuration.md, from the table of keys: `python -m proxy.config.manual > docs/configuration.md`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter

from proxy.config import Config, GateMode, SocketAddress
from proxy.config.key import ConfigKey
from proxy.config.keys import KEYS, PARTS
from proxy.record import show_peer

WIDTH = 120
INTRODUCTION = f"""\
# The configuration of a gate

Everything that `outgate serve` can be told besides the policy. Generated from the table that reads it
(`proxy/config/keys.py`); after a change there: `python -m proxy.config.manual > docs/configuration.md` and
`outgate schema --gate > docs/gate.schema.json`.

Each key can be said in three ways, and the first of these that says it wins, key by key:

1. a flag: `--proxy-listen 127.0.0.1:3128`; one that takes several values is repeated
2. a variable: `OUTGATE_PROXY_LISTEN=127.0.0.1:3128`; several paths are separated by `{os.pathsep}`,
   several other values by commas or spaces; an empty variable says nothing
3. the file that `--config FILE` or `OUTGATE_CONFIG` names, here called gate.yaml

Paths in gate.yaml are relative to its directory, those in flags and variables to the working directory.
`outgate serve --config gate.yaml --check` reads configuration and policy, says every problem with its place and repair,
and ends: 0 it would start, 2 the configuration is wrong, 3 the policy or a file that it names is.
gate.yaml is a closed world: a key that is not listed here is an error, and so are a duplicate key, an anchor, an alias
and a tag. Editors complete and check by [its schema](gate.schema.json): begin the file with
`# yaml-language-server: $schema=gate.schema.json`.
A variable that begins with `OUTGATE_` and is no key is not read; one that is nearly a key is warned of.
"""
TOGETHER = """\
## What must fit together

- A policy is required.
- `mode: sidecar` needs `workload`: every connection comes from the one pod.
- `mode: proxy` has no `listen`. In the other modes `proxyListen` opens a proxy beside it.
- `mode: proxy` has no `dnsListen` and no `dnstapListen`: its clients send names. `dnsSearch` needs one of the two, and
  no name server is a `dnsListen`.
- `mode: proxy` has no `udpListen`: nothing is redirected to it. `udpForward` is for every mode.
- `openings: true` is for `mode: gateway` with a `dnsListen` or a `dnstapListen`, behind the rules of
  `outgate firewall`; without these the gate does not start.
- `credentials` and `proxyProtocolFrom` need a `proxyListen`; that of `mode: proxy` by default is one.
- `proxyProtocolFrom` names balancers, at most a /8 of IPv4 or a /16 of IPv6: whoever is in it can say to be any source.
- `upstreamProxy` needs its `url`. Its password stands in a file, never in the url.
- No address is listened on twice, for connections or for datagrams. Port 0 is a free port, which the gate says when it
  has it.
- On a host without IPv6 the default `[::]:15001` is `0.0.0.0:15001`, and the default `[::1]:15001` is left out. An
  address that was asked for and cannot be had is an error.
- `maxPerSource` is not above `maxConnections`. Limits are those of one worker: a gate with four has four times as many
  connections. A connection takes two to six descriptors; the gate raises its limit to the hard one (`ulimit -Hn`).
"""

# What an example says, in place of the example of the key; the keys that it leaves as comments are not here.
_SAID: Mapping[GateMode, Mapping[str, str]] = {
    GateMode.GATEWAY: {
        "policy": "[policy.yaml, team-b.yaml]",
        "mode": "gateway",
        "listen": '"[::]:15001"',
        "pki": "pki",
        "log": "/var/log/outgate/decisions.jsonl",
        "workers": "2",
    },
    GateMode.SIDECAR: {
        "policy": "policy.yaml",
        "workload": "weather",
        "mode": "sidecar",
        "listen": '[127.0.0.1:15001, "[::1]:15001"]',
        "pki": "pki",
    },
    GateMode.PROXY: {
        "policy": "policy.yaml",
        "mode": "proxy",
        "proxyListen": "0.0.0.0:3128",
        "credentials": "credentials",
        "proxyProtocolFrom": "[10.0.5.0/28]",
        "upstreamProxy.url": "http://proxy.corp.example:3128",
        "upstreamProxy.credentials": "upstream-credentials",
        "upstreamProxy.direct": '["*.corp.example", 10.0.0.0/8]',
    },
}
_CLUSTER = frozenset({"kubernetes.api", "kubernetes.onStale", "kubernetes.staleS", "kubernetes.tokenAudience"})
_OF_NO_USE: Mapping[GateMode, frozenset[str]] = {
    GateMode.GATEWAY: frozenset({"workload"}),
    GateMode.SIDECAR: frozenset({"openings", "credentials", "proxyProtocolFrom", *_CLUSTER}),
    GateMode.PROXY: frozenset(
        {"listen", "dnsListen", "dnstapListen", "dnsSearch", "udpListen", "openings", "workload"}
    ),
}


def manual() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_tables(), TOGETHER, *_examples()]).rstrip("\n") + "\n"


def example(mode: GateMode) -> str:
    """A complete gate.yaml of a mode; what is not needed stands in comments, with another value than the default."""
    lines = ["# yaml-language-server: $schema=gate.schema.json"]
    part = ""
    for key in KEYS:
        if key.path in _OF_NO_USE[mode]:
            continue
        said = _SAID[mode].get(key.path)
        above, _, name = key.path.rpartition(".")
        if above and above != part:
            is_said = any(path.startswith(f"{above}.") for path in _SAID[mode])
            lines += _line("" if is_said else "#", f"{above}:", PARTS[above])
        part = above
        lines += _line(("  " if above else "") + ("" if said else "#"), f"{name}: {said or key.example}", key.says)
    return "\n".join(lines) + "\n"


def _line(before: str, text: str, says: str) -> list[str]:
    """One key with its comment: behind it, or above where that is too long."""
    beside = f"{before + text:<48} # {says}"
    return [beside] if len(beside) <= WIDTH else [f"{before.rstrip('#')}# {says}", before + text]


def _tables() -> Iterator[str]:
    defaults = Config(policy=())
    for group, keys in groupby(KEYS, key=lambda key: key.group):
        yield f"## {group}\n\n| key | example | flag and variable | default | meaning |\n|---|---|---|---|---|"
        for key in keys:
            metavar = key.metavar.replace("|", r"\|")
            said = f"`{', '.join(key.flags or [key.flag])} {metavar}` `{key.variable}`"
            meaning = key.says + (" Several." if key.many else "")
            yield f"| `{key.path}` | `{key.example}` | {said} | {key.unsaid or _default(key, defaults)} | {meaning} |"
        yield ""


def _default(key: ConfigKey, defaults: Config) -> str:
    """What `Config` has; where the inspector has another bound, both."""
    values = dict.fromkeys(_shown(attrgetter(field)(defaults)) for field in key.fields)
    return ", inspected: ".join(values)


def _shown(value: str | float | SocketAddress) -> str:
    if isinstance(value, tuple):
        return f"`{show_peer(value)}`"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}"


def _examples() -> Iterator[str]:
    for mode in GateMode:
        yield f"## Example: {mode}\n\n```yaml\n{example(mode)}```\n"


if __name__ == "__main__":
    sys.stdout.write(manual())
