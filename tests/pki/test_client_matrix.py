"""Every kind of certificate that an authority issues, before every client program: with the variables of
`outgate trust env` each accepts it, without them none does, and what an issuing CA may not sign none accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pki.authority import (
    Authority,
    Issuing,
    Leaf,
    Root,
    certificates_pem,
    create_authority,
    create_issuing,
    create_root,
    issue_leaf,
)
from pki.clients import Target
from pki.constraints import name_constraints
from pki.distribution import environment, trust_files
from pki.doctor import answering, fetch, sentence
from pki.leaves import Leaves, server_context
from pki.trust import write_trust
from tests.pki.clients import alone, client

pytestmark = pytest.mark.client

CLIENTS = ("curl", "wget", "openssl", "gnutls-cli", "git", "python", "node", "deno", "bun", "java", "kubectl")
ABOVE_64 = "long." * 12 + "name.example"  # no subject, so that its alternative name is critical

ACCEPTED = ("name", "no subject", "address", "RSA", "inside", "the domain itself")
REFUSED = ("outside", "beside", "address under constraints", "outside its root's constraints")

# RFC 5280 6.1 takes of a root its name and key alone, so a client may pass over what else stands in it. That is why
# ours stand in the issuing CA.
NOT_ENFORCED = {("java", "outside its root's constraints"): "the PKIX of Java 17 reads no extension of a trust anchor"}


@dataclass(frozen=True, slots=True)
class Servers:
    """What is to be fetched, by kind of leaf, and the trust directory for all of it."""

    targets: Mapping[str, Target]
    directory: Path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    now = datetime.now(UTC)
    authority = create_authority(now, with_rsa=True)
    main, rsa = authority.issuers
    limited = create_issuing(authority.roots[0], now, name="Limited", permitted=("inside.example",))
    limited_root = _limited_root(now)
    leaves = {
        "name": issue_leaf(main, "a.example", now),
        "no subject": issue_leaf(main, ABOVE_64, now),
        "address": issue_leaf(main, "127.0.0.1", now),
        "inside": issue_leaf(limited, "build.inside.example", now),
        "the domain itself": issue_leaf(limited, "inside.example", now),
        "outside": _forbidden(authority, limited, "outside.example", now),
        "beside": _forbidden(authority, limited, "notinside.example", now),
        "address under constraints": _forbidden(authority, limited, "127.0.0.1", now),
        "outside its root's constraints": issue_leaf(
            create_issuing(limited_root, now, name="Below"), "outside.example", now
        ),
    }
    contexts = {kind: (leaf.host, server_context(leaf)) for kind, leaf in leaves.items()}
    contexts["RSA"] = ("a.example", Leaves([rsa], lambda: now).context("a.example"))
    directory = tmp_path_factory.mktemp("trust")
    roots = certificates_pem(*authority.trusted, limited_root.certificate)
    write_trust(directory, trust_files(str(directory), roots, b""))
    with ExitStack() as stack:
        targets = {}
        for kind, (host, context) in contexts.items():
            port = stack.enter_context(answering(context))
            targets[kind] = Target(f"https://{host}:{port}/", via=None if host == "127.0.0.1" else port)
        yield Servers(targets, directory)


def _forbidden(authority: Authority, limited: Issuing, host: str, now: datetime) -> Leaf:
    """A leaf that `limited` signed though its constraints forbid it, as somebody would who stole its key."""
    twin = create_issuing(authority.roots[0], now, name="Limited", key=limited.key)
    assert twin.certificate.subject == limited.certificate.subject
    return replace(issue_leaf(twin, host, now), chain=limited.chain)


def _limited_root(now: datetime) -> Root:
    root = create_root(now, name="Limited root")
    own = root.certificate
    unsigned = x509.CertificateBuilder(
        own.subject, own.subject, own.public_key(), own.serial_number, own.not_valid_before_utc, own.not_valid_after_utc
    )
    for extension in own.extensions:
        unsigned = unsigned.add_extension(extension.value, extension.critical)
    unsigned = unsigned.add_extension(name_constraints(["inside.example"]), critical=True)
    assert root.key is not None
    return replace(root, certificate=unsigned.sign(root.key, hashes.SHA256()))


def trusts(name: str, kind: str, servers: Servers, variables: Mapping[str, str], *, given: bool = True) -> str | None:
    """None: it does. Otherwise why not."""
    found = client(name, servers.directory / "ca.crt" if given else None)
    done = fetch(found, servers.targets[kind], variables, timeout_s=60)
    return None if found.client.answered.search(done.said) else sentence(done.said)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_accepts_what_the_authority_issues(name: str, servers: Servers, tmp_path: Path) -> None:
    clean = alone(tmp_path)
    variables = environment(str(servers.directory), clean).over(clean)
    assert {kind: trusts(name, kind, servers, variables) for kind in ACCEPTED} == dict.fromkeys(ACCEPTED)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_without_the_variables_refuses_it(name: str, servers: Servers, tmp_path: Path) -> None:
    assert "certif" in (trusts(name, "name", servers, alone(tmp_path), given=False) or "").lower().replace("_", "")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_enforces_the_constraints_of_an_issuing_ca(name: str, servers: Servers, tmp_path: Path) -> None:
    clean = alone(tmp_path)
    variables = environment(str(servers.directory), clean).over(clean)
    why = {kind: trusts(name, kind, servers, variables) for kind in REFUSED}
    accepted = {kind for kind in REFUSED if why[kind] is None}
    assert accepted == {kind for (who, kind) in NOT_ENFORCED if who == name}, why
