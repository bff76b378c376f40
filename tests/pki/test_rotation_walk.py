"""One walk through an issuing rotation and a root rotation, with every client program at every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pki.authority import Authority, certificates_pem, create_authority
from pki.clients import Target
from pki.distribution import environment, trust_files
from pki.doctor import Found, answering, fetch, run
from pki.leaves import Leaves
from pki.rotation import activate_issuing, activate_root, retire_issuing, retire_root, stage_issuing, stage_root
from pki.trust import write_trust
from tests.pki.clients import alone, client, program

pytestmark = pytest.mark.client

FETCHES_MANY = ("python", "node", "deno", "bun")  # one process fetches at every step
CLIENTS = (*FETCHES_MANY, "java", "curl", "wget", "openssl", "gnutls-cli", "git", "kubectl")

STEPS: Mapping[str, Callable[[Authority, datetime], Authority]] = {
    "as made": lambda authority, _: authority,
    "issuing staged": stage_issuing,
    "issuing activated": activate_issuing,
    "issuing retired": lambda authority, _: retire_issuing(authority),
    "root staged": stage_root,
    "root activated": activate_root,
    "former issuing retired": lambda authority, _: retire_issuing(authority),
    "issuing staged below the new root": stage_issuing,
    "issuing activated below the new root": activate_issuing,
    "root retired": lambda authority, now: retire_root(authority, now, soak=timedelta(0)),
}

OLD, NEW, BOTH = "old root", "new root", "both roots"
BEFORE, MEANWHILE, AFTER = {OLD, BOTH}, {OLD, NEW, BOTH}, {NEW, BOTH}
TRUSTED_BY = {
    "as made": BEFORE,
    "issuing staged": BEFORE,
    "issuing activated": BEFORE,
    "issuing retired": BEFORE,
    "root staged": MEANWHILE,
    "root activated": MEANWHILE,
    "former issuing retired": MEANWHILE,
    "issuing staged below the new root": MEANWHILE,
    "issuing activated below the new root": MEANWHILE,
    "root retired": AFTER,
}

# What an old client knows that knows no elliptic curves.
RSA_ONLY = {
    "TLS 1.3": ("-tls1_3", "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256"),
    "TLS 1.2": ("-tls1_2", "-cipher", "aRSA"),
}

JAVA = """
import java.net.URL; import javax.net.ssl.HttpsURLConnection;
class Fetch { public static void main(String[] urls) {
  for (var url : urls) {
    try {
      var connection = (HttpsURLConnection) new URL(url).openConnection();
      System.out.println("answered " + connection.getResponseCode() + " " + url);
    } catch (Exception e) { System.out.println("refused " + url + " " + e); }
  }
}}
"""


@dataclass(frozen=True, slots=True)
class Walk:
    """A server for each step, all at once, and a trust directory for each kind of client."""

    targets: Mapping[str, Target]
    directories: Mapping[str, Path]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    now = datetime.now(UTC)
    authority = first = create_authority(now, with_rsa=True)
    with ExitStack() as stack:
        targets = {}
        for step, take in STEPS.items():
            authority = take(authority, now)
            context = Leaves(authority.issuers, lambda: now).context("localhost")
            targets[step] = Target(f"https://localhost:{stack.enter_context(answering(context))}/")
        roots = {OLD: first.trusted, NEW: authority.trusted, BOTH: first.trusted + authority.trusted}
        assert not set(first.trusted) & set(authority.trusted)
        directories = {}
        for who, trusted in roots.items():
            directories[who] = tmp_path_factory.mktemp("trust")
            files = trust_files(str(directories[who]), certificates_pem(*trusted), b"")
            write_trust(directories[who], files)
        yield Walk(targets, directories)


@pytest.mark.parametrize("name", CLIENTS)
def test_at_every_step_a_client_trusts_us_by_the_old_root_the_new_one_or_both(
    name: str, walk: Walk, tmp_path: Path
) -> None:
    if name == "java":
        (tmp_path / "Fetch.java").write_text(JAVA)
        program("javac")  # a source file is launched by compiling it
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda who: _answers(name, walk, who, tmp_path), walk.directories)
        said = dict(zip(walk.directories, answers, strict=True))
    trusted_by = {step: {who for who in said if said[who][step]} for step in walk.targets}
    assert trusted_by == TRUSTED_BY


@pytest.mark.parametrize("options", RSA_ONLY.values(), ids=RSA_ONLY)
def test_a_client_without_elliptic_curves_walks_along_the_rsa_line(
    options: tuple[str, ...], walk: Walk, tmp_path: Path
) -> None:
    shown = {who: _lines_shown(walk, who, tmp_path, options) for who in walk.directories}
    assert {step: {who for who in shown if shown[who][step]} for step in STEPS} == TRUSTED_BY
    assert {line for who in shown for line in shown[who].values() if line} == {"RSA"}


def test_a_client_that_can_read_both_lines_is_shown_elliptic_curves(walk: Walk, tmp_path: Path) -> None:
    assert set(_lines_shown(walk, BOTH, tmp_path, ()).values()) == {"ECDSA"}


def _lines_shown(walk: Walk, who: str, home: Path, options: tuple[str, ...]) -> dict[str, str | None]:
    """With what kind of key the server signed at each step for an openssl that trusts it; None where that does not."""
    found = client("openssl")
    given = found.client.arguments
    openssl = replace(found, client=replace(found.client, arguments=lambda target: (*given(target), *options)))
    shown: dict[str, str | None] = {}
    for step, target in walk.targets.items():
        said = fetch(openssl, target, _variables(walk, who, home), 60).said
        kind = re.search(r"Peer signature type: (RSA|ECDSA)", said)
        shown[step] = kind[1] if kind and openssl.client.answered.search(said) else None
    return shown


def _answers(name: str, walk: Walk, who: str, home: Path) -> dict[str, bool]:
    """At which steps a client trusts us that has the roots of `who`."""
    variables = _variables(walk, who, home)
    urls = [target.url for target in walk.targets.values()]
    if name == "java":
        said = run([program("java"), str(home / "Fetch.java"), *urls], variables, 60).said
        return _by_step(said, walk)
    found = client(name, walk.directories[who] / "ca.crt")
    if name in FETCHES_MANY:
        return _by_step(fetch(_fetching(found, urls), next(iter(walk.targets.values())), variables, 60).said, walk)
    return {
        step: bool(found.client.answered.search(fetch(found, target, variables, 60).said))
        for step, target in walk.targets.items()
    }


def _fetching(found: Found, urls: list[str]) -> Found:
    one = found.client
    return replace(found, client=replace(one, arguments=lambda target: (*one.arguments(target)[:-1], *urls)))


def _by_step(said: str, walk: Walk) -> dict[str, bool]:
    answered = set(re.findall(r"^answered 200 (\S+)$", said, re.MULTILINE))
    refused = set(re.findall(r"^refused (\S+) ", said, re.MULTILINE))
    assert answered | refused == {target.url for target in walk.targets.values()}, said
    return {step: target.url in answered for step, target in walk.targets.items()}


def _variables(walk: Walk, who: str, home: Path) -> dict[str, str]:
    clean = alone(home)
    return environment(str(walk.directories[who]), clean).over(clean)
