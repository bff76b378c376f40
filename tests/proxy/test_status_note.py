"""What is said of policy files that were refused to whoever reaches the admin port."""

from __future__ import annotations

import pytest

from proxy.service.status import refused_note

FILES = tuple(f"policy/{number}.yaml" for number in range(1, 12))
ENDS = "cannot be loaded; policy 0123 stays in force, and the log says why"


@pytest.mark.parametrize(
    ("problems", "named"),
    [
        pytest.param("policy/7.yaml:3:1: not YAML: secret.example", "policy/7.yaml", id="one of many"),
        pytest.param("policy/2.yaml:3:1: a\npolicy/10.yaml: c", "policy/2.yaml, policy/10.yaml", id="two"),
        pytest.param("policy/1.yaml2:3:1: a", "the policy files", id="a name that only begins like one"),
        pytest.param("the compiler ended", "the policy files", id="no file"),
    ],
)  # fmt: skip
def test_the_files_are_named_and_not_what_they_say(problems: str, named: str) -> None:
    assert refused_note(FILES, problems, "0123") == f"{named} {ENDS}"
