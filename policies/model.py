"""The values of a policy: what a workload attempts, what a rule says, what a verdict answers. No text is parsed here.

Text becomes these values in `document` (policy files), `words` (attempts in words) and at the gate's edge (packets);
`engine` compares them. Everything is frozen, so one `Policy` may be shared by every part and swapped in one assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

from policies.addresses import Address as Address  # part of this vocabulary: re-exported
from policies.addresses import Network as Network
from policies.hostnames import Hostname, Pattern
from policies.paths import PathPattern

UNKNOWN = "unknown"  # the workload of a source that matches none; it may have rules, never `match`

# In place of a workload, of a source that nobody can vouch for. No policy can give these names, so none has rules.
AMBIGUOUS = "(ambiguous)"
STALE = "(stale)"
CONTRADICTED = "(contradicted)"


class Stage(StrEnum):
    """Where an attempt is judged. An HTTPS request is judged at `dns`, then `tls`, then (inspected) `http`."""

    DNS = "dns"
    TLS = "tls"
    HTTP = "http"
    TCP = "tcp"
    UDP = "udp"
    NTP = "ntp"


class Action(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


class Mode(StrEnum):
    ENFORCE = "enforce"
    AUDIT = "audit"


class Tls(StrEnum):
    """What is done with TLS that a rule admits: carried undecrypted, or ended here and judged by request."""

    PASSTHROUGH = "passthrough"
    INSPECT = "inspect"


class Dial(StrEnum):
    """Which address the gate opens: what it resolves for the name, or (address rules) the one asked for."""

    NAME = "name"
    ORIGINAL = "original"


class Reason(StrEnum):
    """Why. A closed list: metrics, tests and docs/decision-record.md name exactly these."""

    # admitted
    RULE = "rule"  # a rule admits it
    # the policy says no
    GUARD = "guard"  # an entry of `guard` denies it, for every workload
    DENY_RULE = "deny_rule"  # a deny entry of a matching rule
    NO_RULE = "no_rule"  # nothing names this destination
    PORT = "port"  # the name has rules, none for this port
    NO_ALLOW_ENTRY = "no_allow_entry"  # the rule lists what it allows; this method and path are not listed
    EXPIRED = "expired"  # the rule that would admit it is past its `until`
    ANCESTOR = "ancestor"  # dns: a name above an allowed one; exists, has no addresses for you (RFC 8020)
    QUERY_TYPE = "query_type"  # dns: the name may be looked up, this record type may not
    LOOKUP_BUDGET = "lookup_budget"  # dns: more new names below a wildcard, or longer ones, than a program needs
    BUDGET = "budget"  # udp: the rule's budget is used up
    UPGRADE = "upgrade"  # an Upgrade the rule does not admit
    UNKNOWN_WORKLOAD = "unknown_workload"
    AMBIGUOUS_WORKLOAD = "ambiguous_workload"  # two pods claim the address, or two workloads match the pod
    STALE_WORKLOAD = "stale_workload"  # the cluster has not told for too long which pod has which address
    CREDENTIALS = "credentials"  # explicit proxy: none given and no rule for the address, or wrong ones (407)
    # the attempt is not what it says
    WRONG_PROTOCOL = "wrong_protocol"  # TLS on a plain port, plain bytes on a TLS port
    NO_SNI = "no_sni"
    ECH = "ech"  # Encrypted Client Hello on passthrough: the name shown is not the name meant
    HOST_MISMATCH = "host_mismatch"  # Host is not the name this connection was opened for (421)
    MALFORMED_NAME = "malformed_name"  # not a hostname, or an address literal where a name must stand
    MALFORMED_HELLO = "malformed_hello"
    MALFORMED_PATH = "malformed_path"  # a spelling that two servers may read differently (400)
    MALFORMED_REQUEST = "malformed_request"  # method, Host or framing that cannot be judged (400)
    MALFORMED_QUERY = "malformed_query"  # dns
    # the address
    NEVER_REACHED = "never_reached"  # cloud metadata, loopback, link-local, multicast, ... whatever any rule says
    PRIVATE_ADDRESS = "private_address"  # a public name that resolved to a private address
    # the gate or the far end could not
    NAME_NOT_FOUND = "name_not_found"
    RESOLVER_FAILED = "resolver_failed"
    UPSTREAM_REFUSED = "upstream_refused"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    UPSTREAM_CERTIFICATE = "upstream_certificate"
    UPSTREAM_FAILED = "upstream_failed"
    CLIENT_CERTIFICATE_REFUSED = "client_certificate_refused"  # the client does not trust our leaf
    HELLO_TIMEOUT = "hello_timeout"
    HELLO_TOO_LARGE = "hello_too_large"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    OVERLOADED = "overloaded"  # too many bytes wait in the gate, and this source's are more than its part (503)
    TOO_SLOW = "too_slow"  # a body moved slower than any transfer needs, or a request lasted too long
    HTTP2_FLOOD = "http2_flood"  # more resets, settings or pings than any client needs
    CLIENT_GONE = "client_gone"
    NOT_SERVED = "not_served"  # a rule admits it and this gate does not carry its kind yet
    LOG_FAILED = "log_failed"  # decision records cannot be written, and the operator said deny
    ADDON_FAILED = "addon_failed"  # the operator's own addon raised, or changed what was judged
    GATE_FAILED = "gate_failed"  # a part of the gate failed; closed, recorded, never let through


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rule stands. Lines and columns count from 1."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of `allow` or `deny`: `METHOD[,METHOD] PATH`. `methods` empty is any method; `path` None is `all`."""

    methods: frozenset[str]
    path: PathPattern | None
    text: str  # as written

    @property
    def is_all(self) -> bool:
        return self.path is None


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


HTTPS_PORT = PortRange(443, 443)
# UDP ports that no udp rule opens, wherever a gate runs, and whose they are.
ELSEWHERE = {
    53: "that port is the DNS guard's, which answers for the names of rules",
    123: "that port is the time relay's; write an ntp rule",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What every kind of rule carries. `label` is `workload/rules[i]`, `workload/use[i]/SET[j]` or `guard[i]`."""

    place: Place
    label: str
    name: str | None = None
    reason: str | None = None
    owner: str | None = None
    until: date | None = None  # the last valid day, UTC

    def __str__(self) -> str:
        """The one way a rule is cited: `weather.yaml:9 (accuweather)` or `weather.yaml:9 (weather/rules[0])`."""
        return f"{self.place} ({self.name or self.label})"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRule(Rule):
    """`host:` a name or `*.name` reached by TLS (or plain HTTP on plain ports)."""

    pattern: Pattern
    ports: tuple[PortRange, ...] = (HTTPS_PORT,)
    plain: tuple[PortRange, ...] = ()  # ports beside 80 that carry plain HTTP
    tls: Tls = Tls.PASSTHROUGH
    allow: tuple[Entry, ...] | None = None  # None: no list written; () cannot be written
    deny: tuple[Entry, ...] = ()
    private: bool = False
    encoded_slash: bool = False  # `encodedSlash: literal`
    ech: bool | None = None  # None: as the workload says
    http2: bool | None = None  # None: only for clients that offer nothing else
    upgrade: frozenset[str] = frozenset()
    upstream_pool: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportRule(Rule):
    """`tcp:` or `udp:` to one name, or to prefixes (written as CIDRs or imported through a tag)."""

    stage: Stage  # TCP or UDP
    host: Hostname | None
    networks: Sequence[Network] = ()
    tag: str | None = None
    ports: tuple[PortRange, ...]
    private: bool = False
    budget: int | None = None  # bytes an hour, udp
    quic: str | None = None  # `sni`, udp


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule(Rule):
    """`ntp:` a time source (exact name), or `dns:` a name or `*.name` that may be looked up and nothing more."""

    stage: Stage  # NTP or DNS
    pattern: Pattern


type AnyRule = HostRule | TransportRule | NameRule


@dataclass(frozen=True, slots=True)
class KubernetesMatch:
    namespace: str | None = None
    service_account: str | None = None
    labels: tuple[tuple[str, str], ...] = ()  # sorted


@dataclass(frozen=True, slots=True)
class Match:
    """Which sources are this workload. Exactly one of the three is set."""

    place: Place
    kubernetes: KubernetesMatch | None = None
    address: Sequence[Network] = ()
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload with its rules as written, sets already unfolded. `index.build` makes it fast to ask."""

    name: str
    place: Place
    rules: Sequence[AnyRule]
    match: Match | None = None
    mode: Mode = Mode.ENFORCE
    log_query: bool = False
    ech: bool = False  # `ech: allow`


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a workload tries to do, at one stage. Made by the gate from packets, and by `words` from text.

    host       the name asked for: SNI, Host, the DNS or NTP name; None where there is none
    names      tcp and udp: the names whose current lookup by this workload gave `address`
    address    the address the client asked for, where there is one
    opened_for http: the name its connection was opened for (SNI; on a plain port the first Host)
    target     http: the request target as received, origin form (`/path?query`)
    plain      http: True without TLS
    fault      what was malformed, found where text or bytes were read; such an attempt is always denied with it
    time       POSIX seconds UTC (the core has no clock); decides `until`
    """

    stage: Stage
    workload: str
    host: Hostname | None = None
    port: int = 443
    time: float = 0.0
    address: Address | None = None
    names: tuple[Hostname, ...] = ()
    ech: bool = False
    method: str = ""
    target: str = ""
    plain: bool = False
    upgrade: str | None = None
    opened_for: Hostname | None = None
    query_type: str = "A"
    fault: Reason | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer: an action, the reason, and the rule that gave it.

    rule     the rule that admits; on a denial the one that denies, or that covers the name and missed
    tls      at the tls stage of an allow: what to do with the bytes
    dial     which address to open: the one resolved for `host` (None: the attempt's own), or the original
    private  the rule admits private addresses
    would_be audit mode: `action` is allow, and enforcement would have answered this
    """

    action: Action
    reason: Reason
    stage: Stage
    rule: AnyRule | None = None
    tls: Tls | None = None
    dial: Dial = Dial.NAME
    host: Hostname | None = None
    private: bool = False
    would_be: Verdict | None = None

    @property
    def is_allow(self) -> bool:
        return self.action is Action.ALLOW


@dataclass(frozen=True, slots=True)
class Test:
    """One line under `tests:`: attempt in words, and the action it must get."""

    __test__ = False  # not a pytest class

    place: Place
    workload: str
    words: str
    expect: Action
