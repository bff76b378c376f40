"""`outgate schema`: a schema that validates what loads and refuses what does not."""

from __future__ import annotations

import json

import yaml
from jsonschema import Draft202012Validator

from tests.proxy.commands_of import WEATHER, invoke, start


def test_it_prints_a_schema_that_knows_the_policy_language() -> None:
    result = invoke("schema")
    schema = json.loads(result.stdout)

    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)

    assert result.exit_code == 0
    assert validator.is_valid(yaml.safe_load(WEATHER))
    assert not validator.is_valid(yaml.safe_load(WEATHER.replace("tls: inspect", "tsl: inspect")))


def test_help_shows_an_example() -> None:
    assert "outgate schema > policy.schema.json" in invoke("schema", "--help").stdout


def test_it_runs_as_a_program() -> None:
    done = start("schema")

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
