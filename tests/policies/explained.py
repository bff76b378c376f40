"""One policy that misses in every way, and how its edits are pasted into its text."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from policies.edits import Change, Edit
from policies.explain import Explanation, explain
from policies.index import Policy
from policies.model import Attempt
from policies.words import enforced, ladder
from tests.builders import attempt, policy

NOW = datetime(2026, 11, 22, tzinfo=UTC).timestamp()

POLICY = """\
version: 1
guard:
  - host: "*.pastebin.example"
    deny: all
  - host: api.example.net
    deny: ["* /admin/**"]
workloads:
  app:
    use: [shared]
    rules:
      - host: weather.example.com
        name: weather
        tls: inspect
        allow:
          - "GET /search/**"
          - "POST /token"
        deny:
          - "* /forecasts/**"
          - "* /search/private/**"
      - host: "*.ubuntu.com"
        ports: [80, 443]
      - host: apt.ubuntu.com
      - ntp: ntp.ubuntu.com
      - tcp: github.com:22
      - tcp: 10.20.0.0/16:6379
      - tcp: 0.0.0.0/0:9999
      - host: closed.example.org
        deny: all
      - tcp: closed.example.org:22
      - host: old.example.org
        until: 2026-01-31
      - tcp: old.example.org:22
        until: 2026-01-31
      - host: "*.wide.example.org"
        tls: inspect
      - host: web.example.org
        ports: [8080]
      - host: api.example.net
        tls: inspect
        deny:
          - "DELETE /**"
      - dns: "*.svc.cluster.local"
  empty: {}
sets:
  shared:
    - host: set.example.com
      tls: inspect
      allow: ["GET /set/**"]
      deny: ["* /set/secret"]
    - host: oldset.example.com
      until: 2026-01-31
"""

SAMPLE = [
    f"{scheme}{host}{end}"
    for host in (
        "weather.example.com", "wether.example.com", "x.weather.example.com", "archive.ubuntu.com", "apt.ubuntu.com",
        "ubuntu.com", "closed.example.org", "old.example.org", "a.wide.example.org", "b.wide.example.org",
        "web.example.org", "api.example.net", "new.example.io", "set.example.com", "oldset.example.com", "github.com",
        "x.pastebin.example", "ntp.ubuntu.com", "cluster.local", "x.svc.cluster.local",
    )
    for scheme, end in (
        ("GET https://", "/search"), ("POST https://", "/search"), ("GET https://", "/search/private"),
        ("GET https://", "/forecasts"), ("GET https://", "/set/secret"), ("DELETE https://", "/x"),
        ("GET https://", "/x"), ("GET http://", "/x"), ("GET https://", ":8443/x"), ("GET http://", ":8080/x"),
        ("tls://", ""), ("tls://", ":8443"),
        ("tls://", ":8080"), ("tcp://", ":22"), ("tcp://", ":443"), ("udp://", ":443"),
        ("quic://", ""), ("ntp://", ""), ("dns://", ""),
    )
] + [
    f"{kind}://{address}:{port}"
    for kind in ("tcp", "udp")
    for address in ("10.20.3.4", "10.20.3.5", "10.21.3.4", "93.184.215.14", "169.254.169.254", "[2606:4700::1111]")
    for port in (22, 443, 6379, 9999)
]  # fmt: skip


def asked(words: str, workload: str = "app") -> Attempt:
    return attempt(words, workload, NOW)


def allowed(of: Policy, sample: Iterable[str] = SAMPLE, workload: str = "app") -> set[str]:
    return {words for words in sample if enforced(ladder(of, asked(words, workload))).is_allow}


def paste(text: str, edits: Iterable[Edit]) -> str:
    """The text with the edits made as a person would make them, the last line first so that no line number moves."""
    lines = text.splitlines()
    for edit in sorted(edits, key=lambda e: (e.place.line, e.change is Change.REMOVE), reverse=True):
        first, column = edit.place.line - 1, edit.place.column - 1
        if edit.key == "rules":
            if edit.change is Change.REMOVE:
                del lines[first : _end(lines, first, column)]
            elif edit.lines[0] == "rules:":
                lines[first] = lines[first].removesuffix(" {}")
                lines[first + 1 : first + 1] = [" " * (column + 2) + line for line in edit.lines]
            else:
                lines[first:first] = [" " * (column - 2) + line for line in edit.lines]
            continue
        key = next(
            (i for i in range(first, _end(lines, first, column)) if lines[i][column:].startswith(f"{edit.key}:")), None
        )
        if edit.change is Change.SET:
            at, gone = (first + 1, 0) if key is None else (key, 1)
            lines[at : at + gone] = [" " * column + line for line in edit.lines]
        elif edit.change is Change.ADD:
            assert key is not None
            lines[key + 1 : key + 1] = [" " * (column + 2) + line for line in edit.lines]
        elif edit.lines[0] == f"{edit.key}:":
            assert key is not None
            del lines[key : key + 1 + sum(line.strip().startswith("- ") for line in edit.lines)]
        else:
            gone_lines = {line.strip() for line in edit.lines}
            lines = [
                line
                for i, line in enumerate(lines)
                if i < first or i >= _end(lines, first, column) or line.strip() not in gone_lines
            ]
    return "\n".join(lines) + "\n"


def _end(lines: list[str], first: int, column: int) -> int:
    """The line after the rule that begins at `first`."""
    deeper = (i for i in range(first + 1, len(lines)) if lines[i][:column].strip())
    return next(deeper, len(lines))


def explained(words: str, workload: str = "app", text: str = POLICY) -> Explanation:
    return explain(policy(text), asked(words, workload))
