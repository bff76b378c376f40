"""`outgate trust doctor` over real programs, and over stubs that do what no real one should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from pki.authority import Authority, certificates_pem, create_authority
from pki.clients import CLIENTS
from pki.distribution import environment, trust_files
from pki.store import save
from pki.trust import write_trust
from tests.pki.clients import SEARCHED, serving
from tests.proxy.commands_of import invoke

RUSTUP = os.environ.get("RUSTUP_HOME", os.path.expanduser("~/.rustup"))  # cargo may be a stub that looks there
TRIED = [one.name for one in CLIENTS if one.name != "gnutls-cli"]
OTHER = certificates_pem(*create_authority(datetime.now(UTC)).trusted)

# Each names roots that do not sign our leaves.
ELSEWHERE = {
    "SSL_CERT_FILE": "other.pem",
    "SSL_CERT_DIR": ".",
    "CURL_CA_BUNDLE": "other.pem",
    "REQUESTS_CA_BUNDLE": "other.pem",
    "PIP_CERT": "other.pem",
    "CARGO_HTTP_CAINFO": "other.pem",
    "GIT_SSL_CAINFO": "other.pem",
    "NODE_EXTRA_CA_CERTS": "other.pem",
    "DENO_CERT": "other.pem",
    "NPM_CONFIG_CAFILE": "other.pem",
    "WGETRC": "other.rc",
    "JDK_JAVA_OPTIONS": "-Djavax.net.ssl.trustStore=other.jks",
}

type Json = dict[str, Any]  # Any: what a JSON document holds


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine whose user stands in `home`, with an authority in `home/pki`."""

    home: Path
    authority: Authority

    def doctor(self, *arguments: str, env: Mapping[str, str] | None = None) -> Result:
        """Asks with the variables `env` and no others."""
        plain = {"PATH": SEARCHED, "HOME": str(self.home), "RUSTUP_HOME": RUSTUP}
        given = dict.fromkeys(os.environ) | plain | dict(env or {})
        before = os.getcwd()
        os.chdir(self.home)
        try:
            return invoke("trust", "doctor", *arguments, env=given)  # type: ignore[arg-type]  # None unsets it
        finally:
            os.chdir(before)

    def ask(self, *arguments: str, env: Mapping[str, str] | None = None) -> Json:
        answer: Json = json.loads(self.doctor("--pki", "pki", "--json", *arguments, env=env).stdout)
        return answer

    def trusting(self, existing: Mapping[str, str] | None = None) -> dict[str, str]:
        """The variables with which every program trusts the authority."""
        directory = self.home / "trust"
        files = trust_files(str(directory), certificates_pem(*self.authority.trusted), b"")
        write_trust(directory, files)
        return environment(str(directory), existing or {}).over(existing or {})

    def stub(self, name: str, script: str) -> dict[str, str]:
        """The variables under which `name` is this shell script, and no other client is on PATH."""
        (self.home / "bin").mkdir(exist_ok=True)
        path = self.home / "bin" / name
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {name} 1.2.3 && exit\n{script}\n')
        path.chmod(0o755)
        return {"PATH": str(self.home / "bin")}


def machine_at(home: Path, permitted: tuple[str, ...] = ()) -> Machine:
    authority = create_authority(datetime.now(UTC), permitted=permitted)
    save(authority, home / "pki")
    (home / "other.pem").write_bytes(OTHER)
    (home / "other.rc").write_text("ca_certificate = other.pem\n")
    return Machine(home, authority)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return machine_at(tmp_path)


def only(answer: Json) -> Json:
    (one,) = answer["clients"]
    found: Json = one
    return found


# Real programs


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Json]:
    """A machine whose programs read other roots, and what the doctor says of it."""
    machine = machine_at(tmp_path_factory.mktemp("machine"))
    return machine, machine.ask(env=ELSEWHERE)


def test_where_nothing_trusts_us_every_client_is_told_apart_and_has_a_fix(refused: tuple[Machine, Json]) -> None:
    machine, answer = refused
    assert {one["client"]: one["trusts"] for one in answer["clients"]} == {
        one["client"]: "no" for one in answer["clients"]
    }
    for one in answer["clients"]:
        assert one["version"][0].isdigit(), one
        assert one["fix"]["run"], one
        assert one["said"].isprintable(), one
    assert {one["client"] for one in answer["clients"]} | set(answer["missing"]) == {one.name for one in CLIENTS}
    assert machine.doctor("--pki", "pki", "python", env={"PATH": os.path.dirname(sys.executable)}).exit_code == 1


@pytest.mark.client
@pytest.mark.parametrize("name", TRIED)
def test_the_fix_that_it_prints_repairs_the_client(name: str, refused: tuple[Machine, Json]) -> None:
    machine, answer = refused
    of_it = [one for one in answer["clients"] if one["client"] == name]
    if not of_it:
        pytest.skip(f"{name} is not installed")
    env = dict(ELSEWHERE)
    for one in of_it:
        fix = one["fix"]
        assert fix["run"][:3] == ["outgate", "trust", "bundle"]
        bundle(machine, *fix["run"][3:])
        env = {key: value for key, value in env.items() if key not in fix["unset"]} | fix["set"]
    repaired = machine.ask(name, env=env)
    assert [one["trusts"] for one in repaired["clients"]] == ["yes"] * len(of_it), repaired


def bundle(machine: Machine, *arguments: str) -> None:
    before = os.getcwd()
    os.chdir(machine.home)
    try:
        assert invoke("trust", "bundle", *arguments, "--public", "none").exit_code == 0
    finally:
        os.chdir(before)


@pytest.mark.client
def test_where_all_trust_us_the_answer_is_yes(machine: Machine) -> None:
    names = ["curl", "openssl", "python"]
    result = machine.doctor("--pki", "pki", *names, env=machine.trusting(ELSEWHERE))
    assert result.exit_code == 0, result.output
    assert "to repair it" not in result.stdout


@pytest.mark.client
def test_gnutls_cli_reads_the_systems_store_alone_and_its_fix_is_to_install(refused: tuple[Machine, Json]) -> None:
    of_it = [one for one in refused[1]["clients"] if one["client"] == "gnutls-cli"]
    if not of_it:
        pytest.skip("gnutls-cli is not installed")
    assert of_it[0]["fix"] == {
        "run": ["outgate", "trust", "install", "--pki", "pki"],
        "set": {},
        "unset": [],
        "change": "",
    }


@pytest.mark.client
def test_a_client_that_was_told_not_to_verify_is_found_out(machine: Machine) -> None:
    env = machine.trusting() | {"NODE_TLS_REJECT_UNAUTHORIZED": "0"}
    one = only(machine.ask("node", env=env))
    assert one["trusts"] == "does not verify"
    assert one["fix"]["unset"] == ["NODE_TLS_REJECT_UNAUTHORIZED"]
    del env["NODE_TLS_REJECT_UNAUTHORIZED"]
    assert only(machine.ask("node", env=env))["trusts"] == "yes"


@pytest.mark.client
def test_settings_that_switch_verification_off_are_named(machine: Machine) -> None:
    (machine.home / ".curlrc").write_text("insecure\n")
    result = machine.doctor("--pki", "pki", "curl", env=machine.trusting())
    assert result.exit_code == 1
    assert "does not verify" in result.stdout
    assert "insecure in ~/.curlrc" in result.stdout


@pytest.mark.client
def test_settings_that_win_over_the_variable_are_named(machine: Machine) -> None:
    (machine.home / ".curlrc").write_text(f"cacert = {machine.home}/other.pem\n")
    one = only(machine.ask("curl", env=machine.trusting()))
    assert one["trusts"] == "no"
    assert one["fix"]["change"].startswith("CURL_CA_BUNDLE is right, so something stronger chooses its roots: cacert")


@pytest.mark.client
def test_a_trust_directory_without_our_root_is_written_anew_and_no_variable_changed(machine: Machine) -> None:
    stale = machine.home / "stale"
    write_trust(stale, trust_files(str(stale), OTHER, b""))
    env = environment(str(stale), {}).over({})
    fix = only(machine.ask("openssl", env=env))["fix"]
    assert fix["run"] == ["outgate", "trust", "bundle", "--pki", "pki", "--to", str(stale)]
    assert (fix["set"], fix["unset"], fix["change"]) == ({}, [], "")
    bundle(machine, *fix["run"][3:])
    assert only(machine.ask("openssl", env=env))["trusts"] == "yes"


@pytest.mark.client
def test_proxies_of_the_environment_are_no_way_to_the_loopback(machine: Machine) -> None:
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:1")
    answer = machine.ask("curl", "python", env=machine.trusting() | dead)
    assert {one["trusts"] for one in answer["clients"]} == {"yes"}


@pytest.mark.client
@pytest.mark.parametrize("name", ["curl", "openssl", "git", "python", "node"])
def test_a_constrained_issuing_ca_offers_a_name_that_it_may(name: str, tmp_path: Path) -> None:
    machine = machine_at(tmp_path, permitted=("build.example",))
    answer = machine.ask(name, env=machine.trusting())
    if not answer["clients"]:
        pytest.skip(f"{name} is not installed")
    assert answer["url"].startswith("https://build.example:")
    assert {one["trusts"] for one in answer["clients"]} == {"yes"}, answer


# A URL instead


@pytest.mark.client
def test_a_url_is_tried_where_no_key_is_kept(machine: Machine) -> None:
    with serving(machine.authority.issuer, "localhost") as port:
        url = f"https://localhost:{port}/"
        trusted = machine.doctor("--url", url, "curl", "python", env=machine.trusting())
        (machine.home / "trust").rename(machine.home / "gone")
        refused = machine.doctor("--url", url, "curl", "python")
    assert trusted.exit_code == 0, trusted.output
    assert refused.exit_code == 1
    assert f"outgate trust bundle --pki DIR --to {machine.home}/trust" in refused.stdout


@pytest.mark.client
def test_a_url_is_reached_by_the_proxy_of_the_environment(machine: Machine) -> None:
    with serving(machine.authority.issuer) as port:
        proxy = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), f"http://127.0.0.1:{port}")
        result = machine.doctor("--url", "https://api.example/", "curl", "python", env=machine.trusting() | proxy)
    assert result.exit_code == 0, result.output


@pytest.mark.client
def test_a_url_that_nobody_answers_is_no_verdict(machine: Machine) -> None:
    result = machine.doctor("--url", "https://localhost:1/", "curl")
    assert result.exit_code == 3
    assert "unclear" in result.stdout


# Programs that do what no real one should


def test_a_client_that_accepts_every_server_does_not_verify(machine: Machine) -> None:
    result = machine.doctor("--pki", "pki", "curl", env=machine.stub("curl", "echo answered 200"))
    assert result.exit_code == 1
    assert "does not verify" in result.stdout


def test_a_client_that_hangs_is_ended_with_all_it_started(machine: Machine) -> None:
    stub = machine.stub("curl", "/bin/sleep 600 & echo $! > pid; wait")
    result = machine.doctor("--pki", "pki", "--timeout", "3", "curl", env=stub)
    assert result.exit_code == 3
    assert "no answer in 3 s" in result.stdout
    assert not_running(int((machine.home / "pid").read_text()))


def not_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody has reaped it yet
    except FileNotFoundError:
        return True


def test_a_client_cannot_move_the_cursor_or_forge_a_line(machine: Machine) -> None:
    words = r"printf '\033[31mcurl: certificate \033]0;title\007\302\233\342\200\256refused\r\033[2Kyes\n'; exit 60"
    env = machine.stub("curl", words)
    result = machine.doctor("--pki", "pki", "curl", env=env)
    assert result.exit_code == 1
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert only(machine.ask(env=env))["said"] == "curl: certificate refused"


def test_a_client_that_prints_without_end_is_cut_short(machine: Machine) -> None:
    stub = machine.stub("curl", "while :; do echo certificate; done")
    result = machine.doctor("--pki", "pki", "--timeout", "0.5", "--json", "curl", env=stub)
    assert only(json.loads(result.stdout))["trusts"] == "unclear"


def test_a_client_that_fails_over_something_else_is_no_refusal(machine: Machine) -> None:
    one = only(machine.ask(env=machine.stub("curl", "echo curl: out of memory >&2; exit 1")))
    assert (one["trusts"], one["said"], one["fix"]) == ("unclear", "curl: out of memory", None)


def test_the_report_for_a_person(machine: Machine) -> None:
    words = 'echo "curl: (60) SSL certificate problem: unable to get local issuer certificate"; exit 60'
    result = machine.doctor("--pki", "pki", "curl", "deno", env=machine.stub("curl", words) | {"SSL_CERT_FILE": "x"})
    first, *lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert first.startswith("tried with https://localhost:")
    assert lines == [
        "",
        "client version trusts us reads its roots from says",
        "curl 1.2.3 no SSL_CERT_FILE=x curl: (60) SSL certificate problem: unable to get local issuer certificate",
        "",
        "not found: deno",
        "",
        "to repair it",
        f"outgate trust bundle --pki pki --to {machine.home}/trust # first",
        f"export CURL_CA_BUNDLE={machine.home}/trust/bundle.pem # curl",
        "",
        f"for all variables at once: . {machine.home}/trust/env.sh",
    ]


# What it cannot do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "whose authority?", id="neither authority nor URL"),
        pytest.param(["--url", "http://a.example/"], "is no https URL", id="plain URL"),
        pytest.param(["--url", "https:///"], "is no https URL", id="URL without a host"),
        pytest.param(["--pki", "pki", "curly"], "did you mean", id="unknown client"),
        pytest.param(["--pki", "pki", "--timeout", "0"], "0", id="no time"),
        pytest.param(["--pki", "pki", "--trust", "a:b"], "has a colon", id="trust directory with a colon"),
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], message: str, machine: Machine) -> None:
    result = machine.doctor(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def without_key(home: Path) -> None:
    next((home / "pki" / "issuing").glob("*/ca.key")).unlink()


def without_store(home: Path) -> None:
    (home / "pki").rename(home / "gone")


@pytest.mark.parametrize("spoil", [without_key, without_store])
def test_without_an_issuing_key_it_points_to_a_url(spoil: Callable[[Path], None], machine: Machine) -> None:
    spoil(machine.home)
    result = machine.doctor("--pki", "pki", "curl", env=machine.stub("curl", ""))
    assert result.exit_code == 3
    assert result.stderr.startswith("outgate: pki")
    assert result.stderr.count("\n") == 1
    assert ("--url" in result.stderr) == (spoil is without_key)


def test_a_client_that_was_asked_for_and_is_missing_is_exit_3(machine: Machine) -> None:
    stub = machine.stub("curl", "echo answered 200")
    alone = machine.doctor("--pki", "pki", "deno", env=stub)
    assert alone.exit_code == 3
    assert alone.stderr == "outgate: nothing to try on PATH: deno; install one of them\n"


def test_a_version_managers_stub_is_no_client(machine: Machine) -> None:
    env = machine.stub("curl", "")
    (machine.home / "bin" / "curl").write_text("#!/bin/sh\necho curl: command not found; exit 127\n")
    assert machine.doctor("--pki", "pki", env=env).exit_code == 3


def test_help_imports_no_cryptography() -> None:
    script = (
        "import sys; from proxy.commands.trust import trust; trust(['doctor', '--help'], standalone_mode=False); "
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "outgate trust doctor --pki pki" in done.stdout
