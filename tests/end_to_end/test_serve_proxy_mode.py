"""The explicit proxy, by the commands that README and docs/proxy-mode.md print, and by nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.end_to_end.client_net import BRIDGE, LEADS, Net
from tests.end_to_end.clients import CURL
from tests.end_to_end.documented import SERVICE, command
from tests.end_to_end.placed import Placed
from tests.end_to_end.service import eventually
from tests.end_to_end.world import OUTGATE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl", "node")
    ),
]

PAGE, HEADING = "docs/proxy-mode.md", "The explicit proxy"
POLICY = """
version: 1
workloads:
  build:
    match: {user: build}
    rules:
      - {host: api.example, tls: inspect, allow: ["GET /bytes/**", "POST /sum"]}
      - {host: one.example, ports: [80]}
      - {host: two.example, ports: [80], allow: ["GET /public/**"]}
  weather:
    match: {user: weather}
    rules: [{host: two.example, ports: [80]}]
"""
"""


class Transcript(Net):
    \"\"\"A reader who types what the pages print.\"\"\"
"""
