"""The image, as far as its text says. scripts/image-proof builds and runs it."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version

import pytest
from click.testing import CliRunner

from proxy.cli import outgate
from tests.helm.rendering import ROOT
from tests.helm.values_table import README, written

LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
SAID = [line for line in LINES if line and not line.startswith("#")]
RUNS = [line for line in SAID if line.startswith("RUN ")]


def of(word: str) -> str:
    """What the last line of that word says."""
    return [line for line in SAID if line.startswith(word + " ")][-1].removeprefix(word + " ")


def test_it_runs_as_nobody_and_without_a_shell() -> None:
    assert of("USER") == "1337:1337"
    assert json.loads(of("ENTRYPOINT")) == ["/opt/outgate/bin/outgate"]
    assert json.loads(of("CMD")) == ["serve"]
    assert SAID.index("USER 1337:1337") > max(SAID.index(line) for line in RUNS)


def test_its_health_check_is_a_command_of_the_program() -> None:
    words = json.loads(of("HEALTHCHECK").partition("CMD ")[2])
    assert words[0] == json.loads(of("ENTRYPOINT"))[0]
    assert CliRunner().invoke(outgate, [*words[1:], "--help"]).exit_code == 0


def test_nothing_is_installed_whose_hash_is_not_known() -> None:
    fetching = [part for line in RUNS for part in line.split("&&") if "pip install" in part or "pip wheel" in part]
    assert len(fetching) == 4
    for part in fetching:
        assert "--no-deps" in part
        assert "--require-hashes" in part or "--no-index" in part or "--no-build-isolation" in part


def test_the_stage_that_runs_has_no_build_tools() -> None:
    last = SAID[max(index for index, line in enumerate(SAID) if line.startswith("FROM ")) :]
    assert [line for line in last if "pip" in line or line.startswith("ADD")] == []
    assert [line for line in last if line.startswith("COPY")] == ["COPY --from=build /opt/outgate /opt/outgate"]


def test_what_the_program_starts_is_in_the_stage_that_runs() -> None:
    """`setpriv` of util-linux makes a sidecar's gate that carries datagrams no root; libnftables loads the rules."""
    last = SAID[max(index for index, line in enumerate(SAID) if line.startswith("FROM ")) :]
    [installing] = [line for line in last if "apt-get install" in line]
    packages = installing.partition("--no-install-recommends ")[2].partition(" && ")[0].split()
    assert set(packages) == {"ca-certificates", "libnftables1", "util-linux"}


def test_every_base_is_the_one_that_can_be_pinned() -> None:
    assert {line.split()[1] for line in SAID if line.startswith("FROM ")} == {"${BASE}"}


def test_it_is_of_this_version() -> None:
    assert f"ARG VERSION={version('outgate')}" in SAID
    assert 'org.opencontainers.image.licenses="Apache-2.0"' in of("LABEL")


def test_every_package_is_copied_and_nothing_else_is_shown_to_the_build() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {line.split()[-1].rstrip("/") for line in SAID if line.startswith("COPY") and "--from" not in line}
    assert copied == {*packages["packages"], "requirements", "."}
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert shown == {*packages["packages"], "requirements/*.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


@pytest.mark.parametrize("script", ["image-proof"])
def test_the_proof_can_be_run(script: str) -> None:
    assert (ROOT / "scripts" / script).stat().st_mode & 0o111


def test_the_values_are_explained_as_values_yaml_has_them() -> None:
    assert README.read_text() == written(), "run: python -m tests.helm.values_table"
