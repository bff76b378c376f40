"""`outgate pki import`: a CA that somebody else issued signs for this gate, or becomes its root."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.commands import NO, NOT_STARTED, Json, json_option
from proxy.commands.pki import pki_option
from proxy.commands.pki.check import show_faults
from proxy.commands.pki.keys import KEY, is_remote, password_option
from proxy.commands.pki.showing import ISSUING, ROOT, certificate_json, show_ca

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from collections.abc import Sequence
    from datetime import datetime

    from cryptography.x509 import Certificate

    from pki.authority import Authority, CaKey, Issuing
    from pki.lint import Fault
    from pki.pkcs12 import Loaded

EPILOG = """\b
The CA is linted first (outgate pki check), and not taken with a fault. A self-signed one becomes a root, and a new
issuing CA is made below it. Where no authority stands yet it is in use at once. Where one does, it takes over if
workloads trust its root already; else, and with --stage, it waits, and the commands that go on are printed.
--root FILE is needed for trust bundles; a gate inspects without.

\b
Exit codes: 0 imported; 1 the CA has faults, or is not to be taken now; 2 usage; 3 could not read or write.
JSON keys: pki state issuing[id subject sha256 expires] root[as issuing, or null] advice[what repair breaks]
  state is active or staged

\b
Examples:
  outgate pki import --pki pki --p12 from-the-vault.pfx --root corporate-root.crt
  outgate pki import --pki pki --cert ca.crt --key ca.key --chain chain.pem --stage
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """What came in: an issuing CA, and its root. `root_key`: where the root itself came in."""

    issuing: Issuing
    root: Certificate | None
    root_key: CaKey | None = None


@click.command("import", epilog=EPILOG)
@pki_option
@click.option("--p12", type=click.Path(path_type=Path), metavar="FILE", help="PKCS#12 (a PFX) with the CA and its key.")
@click.option("--cert", type=click.Path(path_type=Path), metavar="FILE", help="The CA's certificate, PEM or DER.")
@click.option("--key", metavar=KEY, help="Its key, if it is not in the same file.")
@click.option("--chain", type=click.Path(path_type=Path), metavar="FILE", help="Who signed it, up to the root.")
@click.option("--root", type=click.Path(path_type=Path), metavar="FILE", help="The root, which workloads trust.")
@password_option
@click.option("--stage", is_flag=True, help="Let it wait, whoever trusts its root.")
@json_option
def take(
    directory: Path,
    p12: Path | None,
    cert: Path | None,
    key: str | None,
    chain: Path | None,
    root: Path | None,
    password_file: Path | None,
    stage: bool,
    as_json: bool,
) -> None:
    """Sign with a CA that somebody else issued: PKCS#12 or PEM."""
    from datetime import UTC, datetime

    from pki.authority import AuthorityError
    from pki.lint import Profile, faults
    from pki.signer import SignerError
    from pki.store import StoreError
    from proxy.console import Console, stop

    file = cert or p12
    if file is None or (cert and p12):
        raise click.UsageError("name the CA with --p12, or with --cert and --key")
    if key and not cert:
        raise click.UsageError("--key goes with --cert")
    now = datetime.now(UTC)
    loaded = _read(file, key, [path for path in (chain, root) if path], password_file)
    found = [*faults(loaded, Profile.STRICT, now), *_unfit(loaded, root)]
    if any(fault.breaks for fault in found):
        show_faults(Console(sys.stderr), file, found)
        raise SystemExit(NO)
    try:
        taken = _taken(loaded, now)
        is_active = _store(directory, taken, now, stage=stage)
    except AuthorityError as error:
        stop(f"{directory}: {error}", NO)
    except (StoreError, SignerError) as error:
        stop(str(error), NOT_STARTED)
    known = _root_of(directory, taken)
    if as_json:
        Console().json(_json(directory, taken, known, found, is_active=is_active))
        return
    show_faults(Console(sys.stderr), file, found)
    _show(directory, taken, known, is_active=is_active)
    if not (key and is_remote(key)):
        Console().line(f"# {key or file} still has the key: delete it, or keep it where no gate runs", indent=2)


def _read(file: Path, key: str | None, above: Sequence[Path], password_file: Path | None) -> Loaded:
    from pki.pkcs12 import Unreadable, assemble, read_file, read_password
    from pki.signer import SignerError, open_key
    from proxy.console import stop

    try:
        password = read_password(password_file) if password_file else None
        found = [read_file(file, password)]
        remote = open_key(key) if key and is_remote(key) else None
        if key and remote is None:
            found.append(read_file(Path(key), password))
        further = [one for path in above for one in read_file(path).certificates]
    except (Unreadable, SignerError) as error:
        stop(str(error), NOT_STARTED)
    try:
        return assemble(*found, key=remote, above=further)
    except Unreadable as error:
        stop(f"{file}: {error}", NOT_STARTED)


def _unfit(loaded: Loaded, root: Path | None) -> list[Fault]:
    """What stands against signing with it here, beyond what is wrong with the CA."""
    from pki.chains import is_self_signed
    from pki.lint import Fault

    found = []
    if loaded.key is None:
        found.append(Fault("no private key in it", "name the key's file with --key, or take PKCS#12 with the key"))
    if root and not is_self_signed((loaded.certificate, *loaded.chain)[-1]):
        found.append(
            Fault(f"{root} is no root that leads to it", "name the root, and with --chain what stands between")
        )
    return found


def _taken(loaded: Loaded, now: datetime) -> Taken:
    """Raises AuthorityError, SignerError."""
    from pki.authority import Issuing, Root, create_issuing
    from pki.chains import is_self_signed
    from pki.profile import organisation_of

    assert loaded.key is not None
    ca = loaded.certificate
    if is_self_signed(ca):
        issuing = create_issuing(Root(ca, loaded.key), now, name=organisation_of(ca))
        return Taken(issuing, ca, loaded.key)
    between = tuple(one for one in loaded.chain if not is_self_signed(one))
    root = next((one for one in loaded.chain if is_self_signed(one)), None)
    return Taken(Issuing(ca, loaded.key, (ca, *between), since=now), root)


def _store(directory: Path, taken: Taken, now: datetime, *, stage: bool) -> bool:
    """Whether it is in use now. Raises StoreError; AuthorityError where it does not fit what stands there."""
    from pki.authority import Authority, Root
    from pki.store import StoreExists, changing, save

    roots = (Root(taken.root, taken.root_key, since=now),) if taken.root else ()
    try:
        save(Authority(roots, (taken.issuing,)), directory)
        return True
    except StoreExists:
        pass
    with changing(directory) as change:
        change.authority, is_active = _added(change.authority, taken, now, stage=stage)
    return is_active


def _added(authority: Authority, taken: Taken, now: datetime, *, stage: bool) -> tuple[Authority, bool]:
    """The authority with what was taken, and whether that is in use. Raises AuthorityError."""
    from pki.authority import State
    from pki.chains import path_from
    from pki.rotation import NotNow, activate_issuing, root_of, stage_foreign, with_root_key

    if taken.root_key and taken.root in authority.trusted:
        raise NotNow("this root is here already; outgate pki rotate issuing makes an issuing CA below it")
    known = root_of(authority, taken.issuing)
    issuing = replace(taken.issuing, line=known.line) if known else taken.issuing
    staged = stage_foreign(authority, issuing, [taken.root] if taken.root else [], now)
    if taken.root_key:
        staged = with_root_key(staged, taken.root_key)
    if known is None:  # then it is trusted as the present one is, if one root, which is not here, signed both
        present = [_signer(path_from(one.certificate, one.chain)[-1]) for one in authority.issuers]
        is_trusted = taken.root is None and _signer(issuing.chain[-1]) in present
    else:
        is_trusted = known.state is not State.STAGED
    return (staged, False) if stage or not is_trusted else (activate_issuing(staged, now), True)


def _signer(certificate: Certificate) -> tuple[object, bytes | None]:
    from cryptography.x509 import AuthorityKeyIdentifier

    identifier = certificate.extensions.get_extension_for_class(AuthorityKeyIdentifier).value.key_identifier
    return certificate.issuer, identifier


def _root_of(directory: Path, taken: Taken) -> Certificate | None:
    """The root above it, if that is here, came it now or was it known before."""
    from pki.chains import is_signed_by
    from pki.store import load_trusted

    top = taken.issuing.chain[-1]
    return next((root for root in load_trusted(directory) if is_signed_by(top, root)), None)


def _json(directory: Path, taken: Taken, root: Certificate | None, advice: Sequence[Fault], *, is_active: bool) -> Json:
    from dataclasses import asdict

    return {
        "pki": str(directory),
        "state": "active" if is_active else "staged",
        "issuing": certificate_json(taken.issuing.certificate),
        "root": certificate_json(root) if root else None,
        "advice": [asdict(one) for one in advice],
    }


def _show(directory: Path, taken: Taken, root: Certificate | None, *, is_active: bool) -> None:
    """What is there now and what to do next, for a person."""
    from pki.authority import State
    from pki.store import survey
    from proxy.console import Console

    console, found = Console(), survey(directory)
    where = shlex.quote(str(directory))
    console.line(f"imported into {directory}, and {'in use' if is_active else 'staged: it signs nothing yet'}")
    console.blank()
    if root is not None:
        show_ca(console, ROOT, root, "what workloads trust")
    purpose = "what the gate signs with" if is_active else "what it is to sign with"
    show_ca(console, ISSUING, taken.issuing.certificate, purpose)
    console.blank()
    if root is None:
        console.line(
            "its root is not here: workloads must trust it already, for there can be no trust bundle without it"
        )
        console.line("(to have one, import into another directory, with --root FILE)")
        console.blank()
    console.line("next:")
    if root is not None:
        console.line("# have workloads trust the root", indent=2)
        console.code([f"outgate trust bundle --pki {where} --to trust"], indent=2)
    if not is_active:
        is_new = any(one.certificate == root and one.state is State.STAGED for one in found.roots)
        console.line("# then sign with it", indent=2)
        console.code([f"outgate pki rotate {'root' if is_new else 'issuing'} --activate --pki {where}"], indent=2)
    elif any(one.state is State.RETIRING for one in found.issuing):
        console.line("# delete the key of the former issuing CA, which signs nothing any more", indent=2)
        console.code([f"outgate pki rotate issuing --retire --pki {where}"], indent=2)
