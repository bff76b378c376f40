"""`outgate pki adopt`: the CA of a mounted Secret, as a store that the gate reads, and kept like it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pki.layout import FLAT_CHAIN as CHAIN
from pki.layout import FLAT_KEY as KEY
from pki.layout import FLAT_ROOTS as ROOTS
from proxy.commands import NO, NOT_STARTED, YES
from proxy.commands.pki import pki_option

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.authority import Authority

EPILOG = """\b
DIR holds tls.crt (the issuing CA, and what stands between it and the root), tls.key and ca.crt, as Secrets of
cert-manager do. A volume of Kubernetes shows keys to its group, and the gate takes none that others may read: the store
is its owner's alone, best in memory. A CA that is in use there already changes nothing, so it may be run again.

\b
Exit codes: 0 in use (with --watch: ended); 1 the CA has faults; 3 could not read or write.

\b
Example:
  outgate pki adopt /etc/outgate/ca --pki /run/outgate/pki
"""


class Unfit(Exception):
    """The CA is not to be used. `str()` has a line for each fault."""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@pki_option
@click.option("--watch", is_flag=True, help="Stay, and take each CA that comes there.")
def adopt(source: Path, directory: Path, watch: bool) -> None:
    """Sign with the CA of a mounted Secret, and follow it."""
    import asyncio

    from pki.pkcs12 import Unreadable
    from pki.store import StoreError
    from proxy.console import stop

    try:
        asyncio.run(_follow(source, directory)) if watch else _take(source, directory)
    except (Unfit, Unreadable, StoreError) as error:
        stop(str(error), NO if isinstance(error, Unfit) else NOT_STARTED)
    raise SystemExit(YES)


async def _follow(source: Path, directory: Path) -> None:
    """Until it is ended. What is wrong with a later CA is said, and the former one goes on."""
    import asyncio
    import signal

    from pki.pkcs12 import Unreadable
    from pki.store import StoreError
    from proxy.options import say
    from proxy.service.watch import Watch

    def new_watch() -> Watch:
        return Watch([str(source / name) for name in (CHAIN, KEY, ROOTS)])

    ended = asyncio.current_task()
    assert ended is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.cancel)
    try:
        watch = new_watch()
        _take(source, directory)
        while True:
            await watch.changed()
            watch = new_watch()
            try:
                _take(source, directory)
            except (Unfit, Unreadable, StoreError) as error:
                say(f"{error}; the former CA stays in use")
    except asyncio.CancelledError:
        return


def _take(source: Path, directory: Path) -> None:
    """Raises Unfit, Unreadable, StoreError."""
    from pki.store import save
    from proxy.options import say

    authority = _read(source)
    subject = authority.issuer.certificate.subject.rfc4514_string()
    if _in_use(directory) == (authority.issuer.chain, authority.trusted):
        say(f"{directory}: {subject} is in use already")
        return
    save(authority, directory, overwrite=True)
    say(f"{directory}: {subject} is in use")


def _read(source: Path) -> Authority:
    """Raises Unfit, Unreadable."""
    from datetime import UTC, datetime

    from pki.authority import Authority, Issuing, Root
    from pki.chains import is_self_signed
    from pki.lint import Profile, faults
    from pki.pkcs12 import assemble, read_file

    now = datetime.now(UTC)
    roots = read_file(source / ROOTS).certificates
    loaded = assemble(read_file(source / CHAIN), read_file(source / KEY), above=roots)
    if wrong := [fault for fault in faults(loaded, Profile.STRICT, now) if fault.breaks]:
        raise Unfit("\n".join(f"{source / CHAIN}: {fault.what}; {fault.repair}" for fault in wrong))
    if loaded.key is None:
        raise Unfit(f"{source / KEY}: no private key in it; put the CA's there")
    if is_self_signed(loaded.certificate):
        raise Unfit(f"{source / CHAIN}: a root; give a gate an issuing CA below it, which can be replaced")
    between = tuple(one for one in loaded.chain if not is_self_signed(one))
    trusted = tuple(Root(one, since=now) for one in loaded.chain if is_self_signed(one))
    issuing = Issuing(loaded.certificate, loaded.key, (loaded.certificate, *between), since=now)
    return Authority(trusted, (issuing,))


def _in_use(directory: Path) -> object:
    """What is sent and what is trusted; None where there is no store, or none that can be used."""
    from pki.store import StoreError, load

    try:
        found = load(directory)
    except StoreError:
        return None
    return found.issuer.chain, found.trusted
