"""Short words for tests: `policy(text)` and `attempt("GET https://h/p")`."""

from __future__ import annotations

from textwrap import dedent

from policies.engine import decide
from policies.index import Policy
from policies.load import Source, load
from policies.model import Attempt, Verdict
from policies.words import parse_words

WORKLOAD = "app"


def policy(text: str, file: str = "p.yaml") -> Policy:
    """The policy of this YAML text, with no catalogue and with `com`, `co.uk` and `org` as public suffixes."""
    return load(
        [Source(file, dedent(text))],
        catalogue={},
        tags={},
        is_public_suffix=lambda name: name in {"com", "co.uk", "org"},
    )


def rules(text: str, workload: str = WORKLOAD) -> Policy:
    """A policy with one workload that has these rules."""
    indented = "\n".join("      " + line for line in dedent(text).strip().splitlines())
    return policy(f"version: 1\nworkloads:\n  {workload}:\n    rules:\n{indented}\n")


def attempt(words: str, workload: str = WORKLOAD, time: float = 0.0) -> Attempt:
    return parse_words(workload, words, time)


def verdict(of: Policy, words: str, workload: str = WORKLOAD, time: float = 0.0) -> Verdict:
    """The verdict on the attempt itself, at its own stage."""
    return decide(of, attempt(words, workload, time))
