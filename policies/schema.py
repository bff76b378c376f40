"""The JSON Schema of policy files, for editors: generated from the very tables that `document` and `rules` read by."""

from __future__ import annotations

from policies.document import DEFINITIONS, POLICY_SCHEMA
from policies.keys import Json


def schema() -> Json:
    """The schema, draft 2020-12. What needs more than one value to judge (two rules that differ) is left to `check`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Outgate policy, version 1",
        "description": "What workloads may say to the outside world. Everything that no rule allows is denied.",
        **POLICY_SCHEMA,
        "$defs": dict(DEFINITIONS),
    }
