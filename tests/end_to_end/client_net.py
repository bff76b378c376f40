"""Three machines: a client, a gate, and origins that speak every HTTP. Which mode the gate is in, a test says."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

from pki import distribution
from tests.end_to_end import inside_origins
from tests.end_to_end.inside_origins import API, PLAIN_PORT, PORTS
from tests.end_to_end.namespaces import Namespaces, machines
from tests.end_to_end.placed import CLEAN, Placed, make_authority
from tests.end_to_end.world import CHECKOUT, OUTGATE

CLIENT, BRIDGE, OUTSIDE, ORIGIN, ASKED = "10.77.1.2", "10.77.1.1", "10.77.2.1", "10.77.2.2", "203.0.113.7"
LEADS = PORTS | {"index.example": PORTS[API], "one.example": PLAIN_PORT, "two.example": PLAIN_PORT}


class Net:
    """A client, a machine for a gate, the origins; the client trusts the gate as docs/pki.md has it."""

    def __init__(self, stack: ExitStack) -> None:
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-clients-")))
        self.net = stack.enter_context(machines("client", "gateway", "origin"))
        self._build(self.net)
        origins = stack.enter_context(
            subprocess.Popen(
                self.net.inside("origin", [sys.executable, "-m", inside_origins.__name__, str(self.directory)]),
                stdin=PIPE, stdout=PIPE, text=True, cwd=CHECKOUT,
            )
        )  # fmt: skip
        assert origins.stdout
        assert origins.stdout.readline() == "ready\n"
        make_authority(self.directory)
        self._trust()
        self._hosts = self.directory / "hosts"
        self.add_hosts(dict.fromkeys(LEADS, ASKED))

    def add_hosts(self, addresses: Mapping[str, str]) -> None:
        """Names that the client finds in its /etc/hosts."""
        with self._hosts.open("a") as file:
            file.writelines(f"{address} {name}\n" for name, address in addresses.items())

    def serve(self, policy: str, command: Sequence[str]) -> Placed:
        """`outgate serve` on the gate's machine: the names lead to the origins."""
        (self.directory / "policy.yaml").write_text(policy)
        leads = [word for name, port in LEADS.items() for word in ("--host", f"{name}={ORIGIN}:{port}")]
        options = ["--upstream-ca", "origin.pem", "--log", "decisions.jsonl", *leads]
        return Placed(self.directory, self.net.inside("gateway", [str(OUTGATE), *command, *options]))

    def _build(self, net: Namespaces) -> None:
        net.link("gateway", "br0", "client", "eth0")
        net.link("gateway", "out", "origin", "wire")
        net.address("client", "eth0", f"{CLIENT}/24")
        net.address("gateway", "br0", f"{BRIDGE}/24")
        net.address("gateway", "out", f"{OUTSIDE}/24")
        net.address("origin", "wire", f"{ORIGIN}/24")
        net.default("client", BRIDGE)

    def _trust(self) -> None:
        [root] = (self.directory / "pki" / "roots").glob("*/ca.crt")
        trust = self.directory / "trust"
        trust.mkdir()
        public = (self.directory / "origin.pem").read_bytes()
        for name, content in distribution.trust_files(str(trust), root.read_bytes(), public).items():
            (trust / name).write_bytes(content)
        made = distribution.environment(str(trust), CLEAN)
        self._env = {name: value for name, value in CLEAN.items() if name not in made.removed} | dict(made.variables)

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A client, with pipes to all it says and hears."""
        line = self.net.inside("client", command, hosts=self._hosts)
        return subprocess.Popen(
            line, cwd=self.directory, env=self._env, stdin=PIPE, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip

    def run(self, command: Sequence[str]) -> str:
        """What a client prints, which must end well."""
        line = self.net.inside("client", command, hosts=self._hosts)
        done = subprocess.run(line, cwd=self.directory, env=self._env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, program: str, *arguments: str) -> str:
        return self.run([sys.executable, "-c", program, *arguments])
