"""The explicit proxy by the commands that README, docs/service.md and docs/proxy-mode.md print, typed as they stand."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.end_to_end.client_net import BRIDGE, LEADS, ORIGIN, Net
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
      - {host: api.example, tls: inspect, http2: true, allow: ["GET /bytes/**"]}
      - {host: index.example}
      - {host: one.example, ports: [80]}
      - {host: two.example, ports: [80], allow: ["GET /public/**"]}
  weather:
    match: {user: weather}
    rules: [{host: two.example, ports: [80]}]
"""
PASSWORD = "correct horse battery"


class Transcript(Net):
    """What a reader has who typed the commands, up to the one that serves."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack)
        self.add_hosts({"gate.example": BRIDGE})
        assert command(PAGE, HEADING, "outgate credentials") == "outgate credentials add --generate users build"
        said = self.typed(PAGE, HEADING, "outgate credentials")
        [self.password] = [word for word in said.split() if len(word) > 16]
        self.typed(SERVICE, "An explicit proxy", "outgate credentials", f"{PASSWORD}\n")

    def typed(self, page: str, heading: str, start: str, said: str = "") -> str:
        """What a command of a page prints that ends by itself."""
        words = command(page, heading, start).split()
        done = subprocess.run(
            [str(OUTGATE), *words[1:]], cwd=self.directory, input=said, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serving(self, page: str, heading: str) -> Placed:
        """The gate by the command of a page, and where the origins are."""
        words = command(page, heading, "outgate serve --mode proxy").split()
        return self.serve(POLICY, words[1:])

    def curl(self, *arguments: str, user: str | None = None) -> list[str]:
        """For each URL: exit status, status of its CONNECT, status, version, connections made for it."""
        out = "%{exitcode} %{http_connect} %{http_code} %{http_version} %{num_connects}\n"
        proxy = ["--proxy", "http://gate.example:3128", *(["--proxy-user", user] if user else [])]
        urls = [word for url in arguments for word in ("-o", "/dev/null", url)]
        with self.start([*CURL, "-w", out, *proxy, *urls]) as it:
            return it.communicate(timeout=60)[0].decode().splitlines()


@pytest.fixture(scope="module")
def typed() -> Iterator[Transcript]:
    with ExitStack() as stack:
        yield Transcript(stack)


@pytest.fixture(scope="module")
def served(typed: Transcript) -> Iterator[Placed]:
    with typed.serving(PAGE, HEADING) as it:
        yield it


def test_the_command_of_the_readme_serves_this_machine_alone(typed: Transcript) -> None:
    """The first test: the others have a gate that listens for everybody, on the same ports."""
    with typed.serving("README.md", "`outgate serve`"):
        inside = [
            *CURL,
            "-w",
            "%{http_code}",
            "-o",
            "/dev/null",
            "--proxy",
            f"http://build:{typed.password}@127.0.0.1:3128",
        ]
        done = subprocess.run(
            typed.net.inside("gateway", [*inside, "http://one.example/"]), capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "200"
        assert typed.curl("http://one.example/", user=f"build:{typed.password}") == ["7 000 000 0 0"]


def test_the_same_command_stands_on_both_pages() -> None:
    start = "outgate serve --mode proxy"
    assert command(SERVICE, "An explicit proxy", start) == command(PAGE, HEADING, start)


def test_curl_gets_through_as_the_page_says(typed: Transcript, served: Placed) -> None:
    line = command(PAGE, HEADING, "curl").replace("PASSWORD", typed.password)
    assert line.startswith("curl --proxy http://build:")
    said = typed.run([*CURL, *line.split()[1:], "-w", " %{http_version}"])
    assert said.startswith('{"spoken":"2.0"')
    assert said.endswith(" 2")
    records = {"user.name": "build", "workload": "build", "server.name": "index.example", "verdict": "allow"}
    eventually(lambda: served.records(**records), "its record")


def test_nobody_gets_in_without_a_password_or_with_a_wrong_one(typed: Transcript, served: Placed) -> None:
    for user in (None, f"nobody:{typed.password}", f"weather:{typed.password}"):
        assert typed.curl("http://one.example/", user=user) == ["0 000 407 1.1 1"]
    assert typed.curl("https://index.example/") == ["56 407 000 0 1"]


def test_one_connection_asks_two_hosts_and_each_request_is_judged(typed: Transcript, served: Placed) -> None:
    urls = ["http://one.example/a", "http://two.example/public/b", "http://two.example/c", "http://one.example/d"]
    said = typed.curl(*urls, user=f"build:{typed.password}")
    assert said == ["0 000 200 1.1 1", "0 000 200 1.1 0", "0 000 403 1.1 0", "0 000 200 1.1 0"]


def test_a_tunnel_is_inspected_and_speaks_http2(typed: Transcript, served: Placed) -> None:
    urls = ["https://api.example/bytes/10", "https://api.example/sum", "https://api.example/bytes/20"]
    said = typed.curl(*urls, user=f"build:{typed.password}")
    assert said == ["0 200 200 2 1", "0 000 403 2 0", "0 000 200 2 0"]


def test_each_user_has_rules_of_its_own(typed: Transcript, served: Placed) -> None:
    said = typed.curl("http://two.example/c", "http://one.example/a", user=f"weather:{PASSWORD}")
    assert said == ["0 000 200 1.1 1", "0 000 403 1.1 0"]


def test_no_password_is_in_the_log_or_on_the_terminal(typed: Transcript, served: Placed) -> None:
    """The last test: it looks at what the others left."""
    kept = served.log.read_text() + "".join(served.said) + (typed.directory / "users").read_text()
    assert "build" in kept
    assert typed.password not in kept
    assert PASSWORD not in kept


def test_a_client_that_ignores_the_proxy_gets_nowhere(typed: Transcript, served: Placed) -> None:
    """As the page demands of the network: here the gate's machine forwards nothing."""
    direct = [*CURL, "--max-time", "1", "--insecure", f"https://{ORIGIN}:{LEADS['api.example']}/"]
    with typed.start(direct) as it:
        it.communicate(timeout=60)
    assert it.returncode in (7, 28)
