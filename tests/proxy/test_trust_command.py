import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from pki.authority import Authority, certificates_pem, create_authority
from pki.distribution import JAVA, PHP_SCAN, Environment, environment
from pki.store import save
from proxy.commands.trust.env import FORMATS
from tests.pki.clients import PYTHON, program, run, serving
from tests.proxy.commands_of import invoke, start

HOSTILE = "/it's “a ‘trust’ directory”/$(touch owned)`x`/$HOME/%PATH%/\\n\\/{{x}};*\""
ADDED = ("PWD", "OLDPWD", "_", "SHLVL", "LC_CTYPE", "LINES", "COLUMNS")  # by shells, to any environment


@pytest.fixture(scope="module")
def authority() -> Authority:
    return create_authority(datetime.now(UTC))


@pytest.fixture(scope="module")
def pki(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("store") / "pki"
    save(authority, directory)
    return str(directory)


@pytest.fixture(autouse=True)
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine chose is no business of a test."""
    for name in (*environment("/trust", {}).variables, "SSL_CERT_DIR", "OUTGATE_PKI"):
        monkeypatch.delenv(name, raising=False)


# bundle


def test_bundle_writes_a_trust_directory_once(pki: str, authority: Authority, tmp_path: Path) -> None:
    trust = tmp_path / "trust"
    first = invoke("trust", "bundle", "--pki", pki, "--to", str(trust))
    assert (first.exit_code, first.stderr) == (0, "")
    names = "ca.crt, bundle.pem, truststore.jks, wgetrc, outgate.ini, env.sh, manifest.json"
    assert first.stdout == f"{trust}: wrote {names}\n"
    assert (trust / "ca.crt").read_bytes() == certificates_pem(*authority.trusted)
    assert invoke("trust", "bundle", "--pki", pki, "--to", str(trust)).stdout == f"{trust}: as it should be\n"


def test_two_directories_for_the_same_place_are_the_same_bytes(pki: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = invoke(
            "trust", "bundle", "--pki", pki, "--to", str(tmp_path / name), "--mount-path", "/trust", "--json"
        )
        assert json.loads(result.stdout)["mount_path"] == "/trust"
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (tmp_path / "one" / "wgetrc").read_text() == "ca_certificate = /trust/bundle.pem\n"


def test_a_relative_directory_is_named_from_the_root(pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("trust", "bundle", "--pki", pki, "--to", "trust")
    assert (tmp_path / "trust" / "wgetrc").read_text() == f"ca_certificate = {tmp_path}/trust/bundle.pem\n"


def test_the_public_roots_are_the_ones_that_were_named(pki: str, authority: Authority, tmp_path: Path) -> None:
    ours = certificates_pem(*authority.trusted)
    other = certificates_pem(*create_authority(datetime.now(UTC)).trusted)
    (tmp_path / "corp.pem").write_bytes(b"# ours\r\n" + other.replace(b"\n", b"\r\n"))
    for public, expected in {"none": ours, str(tmp_path / "corp.pem"): ours + other}.items():
        invoke("trust", "bundle", "--pki", pki, "--to", str(tmp_path / "trust"), "--public", public)
        assert (tmp_path / "trust" / "bundle.pem").read_bytes() == expected


FAULTS = [
    pytest.param(["--pki", "nowhere", "--to", "trust"], "nowhere", id="no authority"),
    pytest.param(["--pki", "PKI", "--to", "file/trust"], "choose a directory you may write", id="no directory"),
    pytest.param(["--pki", "PKI", "--to", "trust", "--public", "gone.pem"], "PEM bundle in --public", id="no file"),
    pytest.param(["--pki", "PKI", "--to", "trust", "--public", "file"], "no CERTIFICATE in it", id="no roots"),
    pytest.param(["--pki", "PKI", "--to", "trust", "--mount-path", "trust"], "write it from /", id="relative place"),
    pytest.param(["--pki", "PKI", "--to", "a:b"], "has a colon", id="colon"),
]


@pytest.mark.parametrize("command", ["bundle", "env"])
@pytest.mark.parametrize(("words", "message"), FAULTS)
def test_what_is_wrong_is_one_line_and_exit_3(
    command: str, words: list[str], message: str, pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    result = invoke("trust", command, *(pki if word == "PKI" else word for word in words))
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("outgate: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]


def test_no_key_is_needed_and_none_is_opened(authority: Authority, tmp_path: Path) -> None:
    save(authority, tmp_path / "pki")
    for key in (tmp_path / "pki").rglob("*.key"):
        key.write_bytes(b"this is no key")
        key.chmod(0o666)
    assert invoke("trust", "bundle", "--pki", str(tmp_path / "pki"), "--to", str(tmp_path / "trust")).exit_code == 0


# env, in every format


def show(path: Path) -> list[str]:
    """A command that leaves its environment in a file."""
    return [PYTHON, "-c", "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))", str(path)]


def in_sh(shell: str, text: str, shown: list[str]) -> list[str]:
    return [program(shell), "-euc", f"{text}\nexec {shlex.join(shown)}"]


def in_fish(text: str, shown: list[str]) -> list[str]:
    words = " ".join(f"'{word.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'" for word in shown)
    return [program("fish"), "--no-config", "-c", f"{text}\nexec {words}"]


def in_powershell(text: str, shown: list[str]) -> list[str]:
    words = " ".join("'" + word.replace("'", "''") + "'" for word in shown)
    return [program("pwsh"), "-NoProfile", "-NonInteractive", "-Command", f"{text}\n& {words}"]


EXISTING = {
    "SSL_CERT_DIR": "/etc/ssl/certs",
    "NPM_CONFIG_CAFILE": "/npm.pem",
    "SSL_CERT_FILE": "/corp.pem",
    JAVA: "-Xmx1g '-Da=b c' \"-Dd=it's\" \\ $HOME",
    PHP_SCAN: "/etc/php",
}


@pytest.mark.client
@pytest.mark.parametrize("shell", ["dash", "bash", "fish", "pwsh"])
@pytest.mark.parametrize("directory", ["/trust", HOSTILE], ids=["plain", "hostile"])
def test_what_a_shell_evaluates_is_the_environment_that_was_meant(shell: str, directory: str, tmp_path: Path) -> None:
    found = environment(directory, EXISTING)
    spelling = {"fish": "fish", "pwsh": "powershell"}.get(shell, "sh")
    text, shown = "\n".join(FORMATS[spelling](found)), show(tmp_path / "shown")
    evaluate = {"fish": in_fish, "pwsh": in_powershell}.get(shell)
    command = evaluate(text, shown) if evaluate else in_sh(shell, text, shown)
    subprocess.run(command, env=EXISTING | {"HOME": str(tmp_path)}, cwd=tmp_path, check=True, timeout=60)
    variables = json.loads((tmp_path / "shown").read_text())
    expected = found.over(EXISTING)
    assert {name: variables.get(name) for name in expected} == expected
    assert not variables.keys() & set(found.removed)
    assert not (tmp_path / "owned").exists()


def test_powershell_doubles_every_character_that_is_a_single_quote_to_it() -> None:
    text = FORMATS["powershell"](Environment({"A": "'‘’‚‛“$x`"}))
    assert text == ["$env:A = '''‘‘’’‚‚‛‛“$x`'"]


@pytest.mark.parametrize("spelling", ["dotenv", "github"])
def test_lines_carry_a_value_as_it_is(spelling: str) -> None:
    """What docker and GitHub do: the name ends at the first `=`, the value at the end of the line."""
    found = environment(HOSTILE, {})
    read = dict(line.split("=", 1) for line in FORMATS[spelling](found))
    assert read == dict(found.variables)


def kubernetes_expands(value: str, variables: Mapping[str, str]) -> str:
    """$(NAME) is the variable's value if there is one; $$ is one dollar (core/v1 EnvVar.value)."""

    def expanded(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", expanded, value)


def test_kubernetes_reads_from_yaml_what_was_meant() -> None:
    variables = {"touch owned": "expanded", "HOME": "expanded"}
    found = environment("/$(HOME)/$$(HOME)" + HOSTILE, {})
    entries = yaml.safe_load("\n".join(FORMATS["yaml"](found)))
    read = {entry["name"]: kubernetes_expands(entry["value"], variables) for entry in entries}
    assert read == dict(found.variables)


def test_env_makes_the_directory_and_names_what_it_replaced(
    pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURL_CA_BUNDLE", "/corp.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    monkeypatch.setenv(JAVA, "-Xmx1g")
    result = invoke("trust", "env", "--pki", pki, "--to", str(tmp_path / "trust"))
    assert f"export SSL_CERT_FILE={tmp_path}/trust/bundle.pem\n" in result.stdout
    assert f"export {JAVA}='-Xmx1g -Djavax.net.ssl.trustStore={tmp_path}/trust/truststore.jks" in result.stdout
    assert "unset SSL_CERT_DIR\n" in result.stdout
    assert result.stderr == "outgate: replaced: CURL_CA_BUNDLE SSL_CERT_DIR\n"
    assert (tmp_path / "trust" / "bundle.pem").exists()


def test_what_a_format_cannot_take_away_is_named(pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    result = invoke("trust", "env", "--pki", pki, "--to", str(tmp_path), "--format", "github")
    assert result.stderr == ("outgate: still set, and may keep programs from trusting us: SSL_CERT_DIR; unset them\n")


@pytest.mark.parametrize("spelling", ["dotenv", "yaml"])
def test_nothing_of_this_environment_enters_another_machines(
    spelling: str, pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JAVA, "-javaagent:/here/agent.jar")
    words = ["trust", "env", "--pki", pki, "--to", str(tmp_path), "--mount-path", "/trust", "--format", spelling]
    result = invoke(*words)
    assert "agent" not in result.stdout
    assert "/trust/truststore.jks" in result.stdout
    assert str(tmp_path) not in result.stdout
    assert result.stderr == ""


def test_a_line_break_does_not_become_a_variable_of_githubs(
    pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JAVA, "-Da=b\nPATH=/evil")
    result = invoke("trust", "env", "--pki", pki, "--to", str(tmp_path), "--format", "github")
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"{JAVA} has a line break" in result.stderr


def test_json_says_what_is_set_and_what_is_not(pki: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    result = json.loads(invoke("trust", "env", "--pki", pki, "--to", str(tmp_path), "--format", "json").stdout)
    assert result["variables"]["DENO_CERT"] == f"{tmp_path}/ca.crt"
    assert result["removed"] == result["replaced"] == ["SSL_CERT_DIR"]


def test_evaluated_twice_nothing_more_changes_and_a_retired_root_does_not_stay(
    authority: Authority, tmp_path: Path
) -> None:
    trust = str(tmp_path / "trust")
    former = create_authority(datetime.now(UTC))
    for name, one in (("former", former), ("pki", authority)):
        save(one, tmp_path / name)
    text = invoke("trust", "env", "--pki", str(tmp_path / "former"), "--to", trust, "--format", "json").stdout
    sourced = json.loads(text)["variables"]
    words = ["trust", "env", "--pki", str(tmp_path / "pki"), "--to", trust, "--format", "json"]
    again = json.loads(invoke(*words, env=sourced).stdout)
    assert (again["variables"], again["replaced"]) == (sourced, [])
    assert certificates_pem(*former.trusted) not in (tmp_path / "trust" / "bundle.pem").read_bytes()


# run


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trust directories are made."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


def wait_until_empty(directory: Path) -> None:
    deadline = time.monotonic() + 20
    while left := os.listdir(directory):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@pytest.fixture
def started(pki: str, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that waits for a signal, and says which came."""
    script = (
        "import os, signal, sys\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n"
        "    signal.signal(number, lambda number, frame: (print(number), sys.exit(9)))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: signal.pause()\n"
    )
    command = [sys.executable, "-m", "proxy", "trust", "run", "--pki", pki, "--", PYTHON, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_command_has_the_variables_and_its_directory_goes_with_it(
    pki: str, authority: Authority, temporary: Path
) -> None:
    found = start("trust", "run", "--pki", pki, "--", "sh", "-c", 'cat "$NODE_EXTRA_CA_CERTS"; exit 7')
    assert (found.stdout, found.stderr, found.returncode) == (certificates_pem(*authority.trusted).decode(), "", 7)
    wait_until_empty(temporary)


@pytest.mark.client
def test_a_client_under_run_trusts_the_gate(pki: str, authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issuer) as port:
        curl = [program("curl"), "-sS", f"https://localhost:{port}/"]
        assert not run(curl, {}, tmp_path).trusted
        found = start("trust", "run", "--pki", pki, "--", *curl)
    assert found.stdout == "trusted", found.stderr


def test_existing_java_options_are_added_to_and_other_values_replaced(
    pki: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JAVA, "-Xmx1g")
    monkeypatch.setenv("CURL_CA_BUNDLE", "/corp.pem")
    found = start("trust", "run", "--pki", pki, "--", "sh", "-c", f'echo "${JAVA}"; echo "$CURL_CA_BUNDLE"')
    java, curl = found.stdout.splitlines()
    assert java.startswith(f"-Xmx1g -Djavax.net.ssl.trustStore={temporary}/")
    assert curl.startswith(f"{temporary}/")


def test_a_directory_that_was_named_stays(pki: str, temporary: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", 'echo "$SSL_CERT_FILE"']
    found = start("trust", "run", "--pki", pki, "--trust", str(tmp_path / "trust"), "--", *command)
    assert found.stdout == f"{tmp_path}/trust/bundle.pem\n"
    assert (tmp_path / "trust" / "manifest.json").exists()
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_the_commands(number: signal.Signals, started: subprocess.Popen[str], temporary: Path) -> None:
    assert started.stdout is not None
    assert int(started.stdout.readline()) == started.pid
    started.send_signal(number)
    assert started.stdout.read() == f"{number.value}\n"  # and nobody else holds the pipe
    assert started.wait(20) == 9
    wait_until_empty(temporary)


def test_a_command_that_is_killed_leaves_no_directory(started: subprocess.Popen[str], temporary: Path) -> None:
    assert started.stdout is not None
    started.stdout.readline()
    assert len(os.listdir(temporary)) == 1
    started.kill()
    assert started.wait(20) == -signal.SIGKILL
    wait_until_empty(temporary)


def test_a_command_has_no_child_that_it_does_not_know_and_ignores_no_signal_that_it_did_not(pki: str) -> None:
    script = "grep SigIgn /proc/$$/status; cat /proc/$$/task/$$/children"  # of a shell: it ignores none by itself
    found = start("trust", "run", "--pki", pki, "--", "sh", "-c", script)
    ignored, children = found.stdout.splitlines()
    assert not int(ignored.split()[1], 16) & sum(1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))
    assert len(children.split()) == 1  # `cat` alone


NOT_RUN = [
    pytest.param(["--pki", "PKI", "--", "outgate-no-such-command"], 127, "command not found", id="not found"),
    pytest.param(["--pki", "PKI", "--", "/"], 126, "Permission denied", id="not executable"),
    pytest.param(["--pki", "nowhere", "--", "true"], 125, "nowhere", id="no authority"),
    pytest.param(["--pki", "PKI", "--trust", "/dev/null/x", "--", "true"], 125, "Not a directory", id="no directory"),
    pytest.param(["--pki", "PKI"], 125, "Missing argument", id="no command"),
    pytest.param(["--nonsense", "--", "true"], 125, "No such option", id="usage"),
]


@pytest.mark.parametrize(("words", "status", "message"), NOT_RUN)
def test_a_command_that_does_not_run_is_told_as_env_tells_it(
    words: list[str], status: int, message: str, pki: str, temporary: Path
) -> None:
    found = start("trust", "run", *(pki if word == "PKI" else word for word in words))
    assert (found.returncode, found.stdout) == (status, "")
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    wait_until_empty(temporary)


# install and uninstall: the work is tested in tests/pki/test_install.py


@pytest.mark.parametrize(
    "words", [["install"], ["install", "--root", "x", "--prefix", "gone"], ["uninstall", "--prefix", "gone"]]
)
def test_wrong_usage_of_install_is_exit_2(words: list[str]) -> None:
    assert invoke("trust", *words).exit_code == 2


def test_what_is_no_cas_certificate_is_not_installed(authority: Authority, tmp_path: Path) -> None:
    from pki.authority import issue_leaf

    leaf = issue_leaf(authority.issuer, "example.com", datetime.now(UTC))
    (tmp_path / "leaf.pem").write_bytes(leaf.pem())
    result = invoke("trust", "install", "--root", str(tmp_path / "leaf.pem"), "--prefix", str(tmp_path))
    assert result.exit_code == 3
    assert "leaf.pem: no CA's certificate; name the root" in result.stderr


# start-up


@pytest.mark.parametrize("command", ["bundle", "env", "run", "install", "uninstall"])
def test_help_shows_an_example_and_loads_no_cryptography(command: str) -> None:
    script = (
        "import sys; from proxy.cli import outgate; "
        f"outgate(['trust', {command!r}, '--help'], standalone_mode=False, prog_name='outgate'); "
        "sys.exit('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"outgate trust {command}" in done.stdout
    assert "Example" in done.stdout
