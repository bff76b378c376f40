"""A pod as `outgate inject` makes it, played in network namespaces: its rules and its gate by the very arguments that
it has, and a workload with the capabilities that it is left with, which tries to get round them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.clients import CURL
from tests.end_to_end.injected_pod import command_of, container_of, running
from tests.end_to_end.namespaces import machines
from tests.end_to_end.placed import CLEAN
from tests.end_to_end.service import WAIT_S, eventually
from tests.end_to_end.test_serve_modes import (
    ALERT,
    ASKED4,
    BRIDGE4,
    BRIDGE6,
    HOSTS,
    OK,
    ONE4,
    ONE6,
    ORIGIN4,
    RULES,
    Lab,
    towards,
)
from tests.end_to_end.world import OUTGATE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.client,
    pytest.mark.skipif("os.geteuid() != 0", reason="named network namespaces need root"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in ("ip", "nft", "curl", "setpriv", "unshare")
    ),
]

GATE_UID = 1337
POD = """
apiVersion: v1
kind: Pod
metadata: {name: weather, annotations: {outgate/workload: weather}}
spec:
  containers:
    - {name: app, image: app}
    - {name: ordinary, image: app, securityContext: {runAsUser: 1000}}
"""
POLICY = "version: 1\nworkloads:\n  weather:" + RULES + "      - udp: 10.77.2.2:9999\n"
DENIED = "https://denied.example/"


class Pod(Lab):
    """A machine `pod` with what the kubelet would mount, in files. `spec` is what `outgate inject` printed."""

    def prepare(self, *options: str) -> None:
        done = subprocess.run(
            [str(OUTGATE), "inject", "--image", "outgate:1", *options, "-f", "-"],
            input=POD, capture_output=True, text=True, check=True, env=CLEAN,
        )  # fmt: skip
        self.spec: dict[str, Any] = yaml.safe_load(done.stdout)
        self.volumes = {name: self.directory / name for name in ("outgate-policy", "outgate-issuing", "outgate-state")}
        for place in self.volumes.values():
            place.mkdir()
        (self.volumes["outgate-policy"] / "policy.yaml").write_text(POLICY)
        self.volumes["outgate-state"].chmod(0o777)  # as an emptyDir is
        [issuing] = (self.directory / "pki" / "issuing").iterdir()
        [root] = (self.directory / "pki" / "roots").glob("*/ca.crt")
        for name, source in (("tls.crt", issuing / "chain.pem"), ("tls.key", issuing / "ca.key"), ("ca.crt", root)):
            (self.volumes["outgate-issuing"] / name).write_bytes(source.read_bytes())
            (self.volumes["outgate-issuing"] / name).chmod(0o444)  # root's, and no key of the gate's uid

    def line(self, name: str, *more: str) -> list[str]:
        """The command line of one of ours, as the node runs it."""
        container = container_of(self.spec, name)
        command = [*command_of(container, self.volumes), *more]
        return running(self.net, container, command, writable=(self.volumes["outgate-state"],))

    def starts(self, name: str) -> None:
        """An init container that ends."""
        done = subprocess.run(self.line(name), capture_output=True, text=True, env=CLEAN, timeout=60)
        assert done.returncode == 0, done.stderr

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The gate, once its startup probe has succeeded as the kubelet asks: from the node, at the pod's address."""
        with (self.directory / "stdout").open("wb") as stdout, (self.directory / "stderr").open("wb") as stderr:
            gate = subprocess.Popen(
                self.line("outgate-gate", *HOSTS, "--upstream-ca", str(self.directory / "origin.pem")),
                stdout=stdout,
                stderr=stderr,
                env=CLEAN,
            )
        try:
            eventually(lambda: gate.poll() is not None or self.probed("startupProbe"), "the startup probe succeeds")
            assert gate.poll() is None, (self.directory / "stderr").read_text()
            yield
        finally:
            gate.terminate()
            try:
                gate.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                gate.kill()
                gate.wait(WAIT_S)

    def probed(self, name: str) -> bool:
        probe = container_of(self.spec, "outgate-gate")[name]["httpGet"]

        def ask() -> bool:
            url = f"http://{ONE4}:{probe['port']}{probe['path']}"
            try:
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with opener.open(url, timeout=WAIT_S) as reply:
                    return bool(reply.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        return self.net.made_there("router", ask)

    def tries(
        self, container: str, command: list[str], *, changed: dict[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command as that container of the workload's; `changed` is in its context against what injection sets."""
        one = container_of(self.spec, container)
        context = {**one["securityContext"], **(changed or {})}
        line = running(self.net, {**one, "securityContext": context}, command)
        return subprocess.run(line, capture_output=True, text=True, timeout=60, env=CLEAN)

    def curl(self, container: str, url: str, *, at: str = ASKED4, program: str = "curl", **how: Any) -> tuple[int, str]:
        """Exit status and HTTP status of curl for a URL whose name is believed to be `at` an address."""
        line = [program, *CURL[1:], "--cacert", str(self.trust), "-o", "/dev/null", "-w", "%{http_code}"]
        done = self.tries(container, [*line, *(["--insecure"] if at == ORIGIN4 else []), *towards(url, at)], **how)
        self.complaint = done.stderr
        return done.returncode, done.stdout


@contextmanager
def a_pod(*options: str) -> Iterator[Pod]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outgate-injected-")))
        directory.chmod(0o755)
        net = stack.enter_context(machines("pod", "router", "origin"))
        net.link("router", "pod", "pod", "eth0")
        net.address("router", "pod", f"{BRIDGE4}/24", f"{BRIDGE6}/64")
        net.address("pod", "eth0", f"{ONE4}/24", f"{ONE6}/64")
        net.default("pod", BRIDGE4, BRIDGE6)
        net.forward("router")
        made = Pod(net, directory, "router", stack)
        made.prepare(*options)
        yield made


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    """With an authority; its init containers have run twice, as after a node that came back, and its gate is ready."""
    with a_pod("--authority-secret", "outgate-pki") as it:
        for _ in range(2):
            it.starts("outgate-firewall")
            it.starts("outgate-authority")
        with it.serving():
            yield it


CONTAINERS = ["app", "ordinary"]  # as root, and as uid 1000


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_the_policy_names_is_reached(pod: Pod, container: str) -> None:
    status, code = pod.curl(container, "https://four.cdn.example/")
    assert (status, code) == (0, "200")


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_inspected_is_read_by_the_authority_of_the_secret(pod: Pod, container: str) -> None:
    assert pod.curl(container, "https://api.example/search/oslo") == (0, "200"), pod.complaint
    assert pod.curl(container, "https://api.example/forecasts") == (0, "403")


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_it_does_not_name_is_refused(pod: Pod, container: str) -> None:
    status, code = pod.curl(container, DENIED)
    assert (status, code) == (*ALERT, "000")


def test_probes_of_the_kubelet_are_answered(pod: Pod) -> None:
    assert [pod.probed(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")] == [True] * 3


def test_a_decision_names_the_pods_workload(pod: Pod) -> None:
    pod.curl("ordinary", "https://six.denied.example/")
    log = pod.directory / "stdout"

    def seen() -> list[str]:
        records = [json.loads(line) for line in log.read_text().splitlines()]
        return [one["workload"] for one in records if one.get("server.name") == "six.denied.example"]

    assert eventually(seen, "a record of it") == ["weather"]


# --- the workload tries to get round it -------------------------------------------------------------------------------

FORBIDDEN = {
    "becoming the gate": "import os; os.setuid(1337)",
    "becoming the gate for a file": "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.setfsuid(1337)\n"
    "if c.setfsuid(-1) != 1337: raise PermissionError(1, 'fsuid')",
    "a packet socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 255)",
    "an XDP socket": "import socket; socket.socket(44, socket.SOCK_RAW)",
    "a mark": "import socket; socket.socket().setsockopt(1, 36, 128)",
    "another namespace": "import os; os.unshare(os.CLONE_NEWNET)",
    "a user of a namespace of its own": "import os; os.unshare(os.CLONE_NEWUSER); "
    "os.write(os.open('/proc/self/uid_map', os.O_WRONLY), b'0 1337 1')",
    "tracing the gate": "import ctypes, glob, os\n"
    "c = ctypes.CDLL(None, use_errno=True)\n"
    "pids = [p.split('/')[2] for p in glob.glob('/proc/[0-9]*') if os.stat(p).st_uid == 1337]\n"
    "assert pids\n"
    "if all(c.ptrace(16, int(p), 0, 0) != 0 for p in pids): raise PermissionError(ctypes.get_errno(), 'ptrace')",
    "its memory": "import glob, os\n"
    "pid = next(p for p in glob.glob('/proc/[0-9]*') if os.stat(p).st_uid == 1337)\n"
    "open(f'{pid}/mem', 'rb').read(1)",
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_would_lead_round_the_gate_is_not_permitted(pod: Pod, name: str, container: str) -> None:
    done = pod.tries(container, [sys.executable, "-c", FORBIDDEN[name]])
    assert done.returncode == 1, done.stdout
    assert "PermissionError" in done.stderr


def test_the_rules_stay_whoever_tries_to_remove_them(pod: Pod) -> None:
    assert pod.tries("app", ["nft", "delete", "table", "inet", "outgate"]).returncode != 0
    assert pod.curl("app", DENIED)[0] in ALERT


@pytest.fixture
def curl_of_the_gates(pod: Pod) -> Iterator[str]:
    """curl as a set-uid program of the gate's uid, as root with CAP_CHOWN makes one, or an image brings one."""
    if os.statvfs(pod.directory).f_flag & os.ST_NOSUID:
        pytest.skip("set-uid files have no effect where the test's directory is")
    program = pod.directory / "curl-of-the-gates"
    shutil.copy(shutil.which("curl") or "", program)
    os.chown(program, GATE_UID, GATE_UID)
    program.chmod(0o4755)
    yield str(program)
    program.unlink()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_set_uid_program_of_the_gates_does_not_make_a_workload_the_gate(
    pod: Pod, curl_of_the_gates: str, container: str
) -> None:
    assert pod.curl(container, DENIED, at=ORIGIN4, program=curl_of_the_gates)[0] in ALERT
    # And without what injection sets, it does: that is why it is set.
    status, _ = pod.curl(
        container, DENIED, at=ORIGIN4, program=curl_of_the_gates, changed={"allowPrivilegeEscalation": True}
    )
    assert status in OK


def test_a_workload_that_kept_setuid_would_be_the_gate(pod: Pod) -> None:
    """Why the capability is dropped, and refused when it is asked for."""
    become = FORBIDDEN["becoming the gate"]
    kept = {"capabilities": {"add": ["SETUID"]}}
    assert pod.tries("app", [sys.executable, "-c", become], changed=kept).returncode == 0


# --- before the gate, and without it ----------------------------------------------------------------------------------


def test_between_the_rules_and_the_gate_nothing_leaves() -> None:
    with a_pod("--authority-secret", "outgate-pki") as it:
        assert it.curl("app", DENIED, at=ORIGIN4)[0] in OK  # there is a way out
        it.starts("outgate-firewall")
        it.starts("outgate-authority")
        it.origin.look()
        for container in CONTAINERS:
            assert it.curl(container, "https://four.cdn.example/")[0] == 7  # refused at once
        assert it.origin.look().packets == []
        with it.serving():
            assert it.curl("app", "https://four.cdn.example/") == (0, "200")
        assert it.curl("app", "https://four.cdn.example/")[0] == 7


def test_with_udp_the_gate_is_no_root_and_carries_what_a_rule_admits() -> None:
    with a_pod("--udp", "--authority-secret", "outgate-pki") as it:
        it.starts("outgate-firewall")
        it.starts("outgate-authority")
        with it.net.open_socket("origin", 2, 2) as echo, it.serving():
            echo.bind(("10.77.2.2", 9999))
            echo.settimeout(WAIT_S)
            serving = threading.Thread(target=lambda: echo.sendto(b"heard", echo.recvfrom(100)[1]))
            serving.start()
            ask = (
                "import socket; s = socket.socket(2, 2); s.settimeout(15); "
                "s.sendto(b'x', ('10.77.2.2', 9999)); print(s.recv(9))"
            )
            assert it.tries("ordinary", [sys.executable, "-c", ask]).stdout == "b'heard'\n"
            serving.join(WAIT_S)
            found = it.tries("app", [sys.executable, "-c", _GATES]).stdout.split("\n")[:-1]
            both = 1 << 10 | 1 << 13  # CAP_NET_BIND_SERVICE and CAP_NET_RAW
            assert f"{GATE_UID} {both:016x}" in found
            assert set(found) <= {f"{GATE_UID} {both:016x}", f"{GATE_UID} {0:016x}"}


_GATES = """
import glob
for path in glob.glob("/proc/[0-9]*"):
    try:
        said = dict(line.split(":", 1) for line in open(path + "/status"))
        if b"outgate\\0serve\\0" in open(path + "/cmdline", "rb").read() and int(said["Uid"].split()[0]) == 1337:
            print(said["Uid"].split()[0], said["CapEff"].strip())
    except OSError:
        pass
"""
