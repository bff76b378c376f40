"""`outgate pki export`: a CA for another firewall, in the form that it asks for."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, Json, json_option
from proxy.commands.pki import pki_option
from proxy.commands.pki.keys import KEY, lend, password_option
from proxy.commands.pki.showing import ROOT, certificate_json, show_ca

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from datetime import datetime

    from pki.authority import Authority, Issuing, Root

AZURE, AWS = "azure-firewall", "aws-nfw"
CERTIFICATE, CHAIN, PRIVATE_KEY = "certificate.pem", "chain.pem", "private-key.pem"
NAME = "outgate-tls"  # in the key vault

EPILOG = """\b
The CA stands below the root, and workloads that trust the root trust it. Its key is written to FILE or DIR and
nowhere else; the directory keeps the certificate.
  azure-firewall  a PFX without password, RSA-4096, path length 1
  aws-nfw         certificate.pem, chain.pem and private-key.pem in a directory, for AWS Certificate Manager

\b
Exit codes: 0 issued; 1 FILE is there already, or the CA would not fit; 2 usage; 3 could not read or write.
JSON keys: pki profile files[] ca[id subject sha256 expires] root[as ca] root_is_new

\b
Examples:
  outgate pki export --pki pki --profile azure-firewall --to azure.pfx
  outgate pki export --pki pki --profile aws-nfw --to acm --root-key offline.key
"""


@dataclass(frozen=True, slots=True)
class Issued:
    """A CA for somebody else. `root_is_new`: nobody trusts its root yet."""

    ca: Issuing
    root: Root
    root_is_new: bool


@click.command(epilog=EPILOG)
@pki_option
@click.option("--profile", type=click.Choice([AZURE, AWS]), required=True, help="Who is to sign with it.")
@click.option("--to", type=click.Path(path_type=Path), required=True, metavar="FILE|DIR", help="Where it is written.")
@click.option(
    "--root-rsa", is_flag=True, help="Below a root with an RSA key; where there is none, one is made and trusted too."
)
@click.option(
    "--years",
    type=click.IntRange(1, 10),
    default=2,
    show_default=True,
    help="How long it signs, within its root's life.",
)
@click.option("--root-key", metavar=KEY, help="The root's key, where it is kept offline.")
@password_option
@json_option
def export(
    directory: Path,
    profile: str,
    to: Path,
    root_rsa: bool,
    years: int,
    root_key: str | None,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Issue a CA for another firewall, in the form that it asks for."""
    from datetime import UTC, datetime

    from pki.authority import AuthorityError
    from pki.files import repair
    from pki.signer import SignerError
    from pki.store import StoreError, changing
    from proxy.console import Console, stop

    if profile == AZURE and years < 2:
        raise click.BadParameter("Azure Firewall asks for a year forward on any day; take 2", param_hint="--years")
    paths = [to] if profile == AZURE else [to / name for name in (CERTIFICATE, CHAIN, PRIVATE_KEY)]
    if there := next((path for path in paths if os.path.lexists(path)), None):
        stop(f"{there}: is there already; name another place", NO)
    try:
        with _unless_it_fails(paths) as written, changing(directory) as change:
            authority = lend(change.authority, root_key, password_file) if root_key else change.authority
            authority, issued = _issue(directory, authority, profile, datetime.now(UTC), years, root_rsa=root_rsa)
            _write(profile, to, issued, written)
            change.authority = authority
    except AuthorityError as error:
        stop(f"{directory}: {error}", NO)
    except (StoreError, SignerError) as error:
        stop(str(error), NOT_STARTED)
    except FileExistsError as error:
        stop(f"{error.filename2}: is there already; name another place", NO)
    except OSError as error:
        stop(f"{to}: {error.strerror}; {repair(error)}", NOT_STARTED)
    if as_json:
        Console().json(_json(directory, profile, paths, issued))
    else:
        _show(directory, profile, to, issued)


def _issue(
    directory: Path, authority: Authority, profile: str, now: datetime, years: int, *, root_rsa: bool
) -> tuple[Authority, Issued]:
    """The authority with the CA among those given. Raises AuthorityError."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    from pki.authority import YEAR, KeyKind, create_issuing
    from pki.profile import organisation_of
    from proxy.console import stop

    authority, root, is_new = _root(authority, now, root_rsa=root_rsa)
    if root.key is None:
        stop(f"{directory}: the root's key is kept offline; name it with --root-key", NOT_STARTED)
    aws_kind = KeyKind.RSA_3072 if isinstance(root.key, rsa.RSAPrivateKey) else KeyKind.EC_P256
    ca = create_issuing(
        root,
        now,
        name=organisation_of(root.certificate),
        life=years * YEAR,
        kind=KeyKind.RSA_4096 if profile == AZURE else aws_kind,
        path_length=1 if profile == AZURE else 0,
    )
    _require_fit(profile, ca, root, now)
    return replace(authority, given=(*authority.given, ca.certificate)), Issued(ca, root, is_new)


def _root(authority: Authority, now: datetime, *, root_rsa: bool) -> tuple[Authority, Root, bool]:
    """The authority, the root to issue below, and whether that was made now. Raises AuthorityError."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    from pki.authority import AuthorityError, KeyKind, Line, State, create_root
    from pki.profile import organisation_of

    active = [root for root in authority.roots if root.state is State.ACTIVE]
    if not active:
        raise AuthorityError("no root here; import it with its key, or make an authority with a root")
    if not root_rsa:
        return authority, next((root for root in active if root.line is Line.MAIN), active[0]), False
    for root in active:
        if isinstance(root.certificate.public_key(), rsa.RSAPublicKey):
            return authority, root, False
    name = organisation_of(active[0].certificate)
    made = create_root(now, name=name, kind=KeyKind.RSA_4096, line=Line.RSA)
    return replace(authority, roots=(*authority.roots, made)), made, True


def _require_fit(profile: str, ca: Issuing, root: Root, now: datetime) -> None:
    """What is handed out is what would be accepted. Raises AuthorityError: the root is near its end, or limits it."""
    from pki.authority import AuthorityError
    from pki.lint import Profile, faults
    from pki.pkcs12 import Form, Loaded

    chain = () if profile == AZURE else (root.certificate,)
    loaded = Loaded(ca.certificate, ca.key, chain, form=Form.PKCS12 if profile == AZURE else Form.PEM)
    found = [
        *faults(loaded, Profile(profile), now),
        *faults(replace(loaded, chain=(root.certificate,)), Profile.STRICT, now),
    ]
    if broken := next((fault for fault in found if fault.breaks), None):
        raise AuthorityError(f"below root {root.certificate.subject.rfc4514_string()} no CA fits: {broken.what}")


def _write(profile: str, to: Path, issued: Issued, written: list[Path]) -> None:
    """Raises OSError; FileExistsError where somebody was quicker."""
    from pki.authority import certificates_pem, key_pem
    from pki.files import make_directory
    from pki.pkcs12 import passwordless_pfx

    ca = issued.ca
    if profile == AZURE:
        _write_new(to, passwordless_pfx(ca.certificate, ca.key), written)
        return
    make_directory(to, 0o700)
    _write_new(to / CERTIFICATE, certificates_pem(ca.certificate), written)
    _write_new(to / CHAIN, certificates_pem(issued.root.certificate), written)
    _write_new(to / PRIVATE_KEY, key_pem(ca.key), written)


def _write_new(path: Path, content: bytes, written: list[Path]) -> None:
    """Puts `content` at `path`, whole and for its owner alone, and replaces nothing."""
    from pki.files import SECRET, sync_directory, write_file

    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    write_file(beside, content, SECRET)
    try:
        os.link(beside, path)  # unlike a renamed file, a link takes no other's place
        written.append(path)
    finally:
        beside.unlink()
        sync_directory(path.parent)


@contextmanager
def _unless_it_fails(paths: list[Path]) -> Iterator[list[Path]]:
    """The files written within, which are deleted again after an exception: an unrecorded CA is nobody's."""
    written: list[Path] = []
    try:
        yield written
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _json(directory: Path, profile: str, paths: list[Path], issued: Issued) -> Json:
    return {
        "pki": str(directory),
        "profile": profile,
        "files": [str(path) for path in paths],
        "ca": certificate_json(issued.ca.certificate),
        "root": certificate_json(issued.root.certificate),
        "root_is_new": issued.root_is_new,
    }


def _show(directory: Path, profile: str, to: Path, issued: Issued) -> None:
    """What was issued and what to do next, for a person."""
    from proxy.console import Console

    console = Console()
    where, file = shlex.quote(str(directory)), shlex.quote(str(to))
    console.line(f"issued a CA for {profile}: {to} has its key, and {directory} has not")
    console.blank()
    show_ca(console, "CA", issued.ca.certificate, f"what {profile} signs with")
    is_new = "; made now, so no bundle has it yet" if issued.root_is_new else ""
    show_ca(console, ROOT, issued.root.certificate, f"what workloads must trust{is_new}")
    console.blank()
    console.line("next:")
    console.line("# have every workload trust the root before the firewall signs", indent=2)
    console.code([f"outgate trust bundle --pki {where} --to trust"], indent=2)
    if profile == AZURE:
        console.line("# into the key vault, as a certificate: it then warns before it ends", indent=2)
        console.code([f"az keyvault certificate import --vault-name VAULT --name {NAME} --file {file}"], indent=2)
        console.line("# the policy inspects with it, by an identity that may get the vault's secrets", indent=2)
        secret = f"https://VAULT.vault.azure.net/secrets/{NAME}"
        command = "az network firewall policy update --resource-group GROUP --name POLICY --identity IDENTITY"
        console.code([f"{command} --cert-name {NAME} --key-vault-secret-id {secret}"], indent=2)
        console.line("# the only other copy of the key", indent=2)
        console.code([f"rm {file}"], indent=2)
        return
    console.line("# into Certificate Manager; its ARN is the CertificateAuthorityArn of the inspection", indent=2)
    names = zip(("certificate", "certificate-chain", "private-key"), (CERTIFICATE, CHAIN, PRIVATE_KEY), strict=True)
    given = " ".join(f"--{option} {shlex.quote(f'fileb://{to / name}')}" for option, name in names)
    console.code([f"aws acm import-certificate {given}"], indent=2)
    console.line("# the only other copy of the key", indent=2)
    console.code([f"rm {shlex.quote(str(to / PRIVATE_KEY))}"], indent=2)
