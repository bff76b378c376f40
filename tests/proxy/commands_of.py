"""Running `outgate`: in process through click's runner, and once as the program that a user starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from click.testing import CliRunner, Result

from proxy.cli import outgate

EXAMPLES = Path(__file__).parents[2] / "policies" / "examples"

WEATHER = """\
version: 1
workloads:
  weather:
    rules:
      - host: dataservice.accuweather.com
        name: search
        tls: inspect
        allow: ["GET /search/**"]
        deny: ["* /forecasts/**"]
      - {name: apt, host: "*.ubuntu.com", ports: [80, 443]}
tests:
  weather:
    allow: ["GET https://dataservice.accuweather.com/search?q=Oslo", "tls://archive.ubuntu.com"]
    deny: ["GET https://dataservice.accuweather.com/forecasts/v1", "tls://ubuntu.com"]
"""


def invoke(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    """What `outgate ARGUMENTS` answers. An exception that would be a traceback to the user is raised here."""
    return CliRunner().invoke(
        outgate, list(arguments), env=dict(env or {}), prog_name="outgate", catch_exceptions=False
    )


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`outgate ARGUMENTS` as a program of its own."""
    return subprocess.run(
        [sys.executable, "-m", "proxy", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def write(directory: Path, text: str, name: str = "p.yaml") -> str:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return str(path)
