"""The keys that a command line names: in a file, or one that never leaves its token (`pkcs11:`, RFC 7512).

What cannot be used ends the command with one line; no line holds a key or a PIN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pki.key_uri import SCHEME
from pki.layout import STATE
from proxy.commands import NOT_STARTED

if TYPE_CHECKING:  # cryptography costs 80 ms, and `--help` needs none of it
    from pki.authority import Authority, CaKey, Root

KEY = f"FILE|{SCHEME}URI"  # how --help shows it
MAX_FILE = 1 << 16  # bytes; what is longer holds no keys


def password_option[F: Callable[..., Any]](command: F) -> F:  # Any: click's own type of what it decorates
    """`--password-file FILE` as `password_file`."""
    return click.option(
        "--password-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What the key file is encrypted with, in a file of its own.",
    )(command)


def is_remote(source: str) -> bool:
    """Whoever writes the scheme in another way (RFC 3986 3.1) means no file, and is told how it is written."""
    return source.strip().lower().startswith(SCHEME)


def read_keys(source: str, password_file: Path | None = None) -> tuple[CaKey, ...]:
    """The key at a URI, or every key in a file. There is one at least."""
    from pki.files import UnusableSecret, read_secret
    from pki.pkcs12 import Unreadable, read, read_password
    from pki.profile import weakness
    from pki.signer import SignerError, open_key
    from proxy.console import stop

    try:
        if is_remote(source):
            return (open_key(source),)
        password = read_password(password_file) if password_file else None
        keys = read(read_secret(source, MAX_FILE, shows="the key", holds="a key"), password).keys
    except (SignerError, UnusableSecret) as error:
        stop(str(error), NOT_STARTED)
    except Unreadable as error:
        stop(f"{source}: {error}", NOT_STARTED)
    if not keys:
        stop(f"{source}: no key in it; name the file that holds the key", NOT_STARTED)
    for key in keys:
        if why := weakness(key.public_key()):
            stop(f"{source}: {why}", NOT_STARTED)
    return keys


def write_keys(path: Path, keys: Iterable[CaKey], password_file: Path | None) -> None:
    """Writes the keys to a file that is its owner's alone."""
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    from pki.files import SECRET, repair, write_file
    from pki.pkcs12 import Unreadable, read_password
    from proxy.console import stop

    try:
        password = read_password(password_file) if password_file else None
        if password == b"":
            stop(f"{password_file}: empty; write a password there, or leave --password-file out", NOT_STARTED)
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        pem = (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption) for key in keys)
        write_file(path, b"".join(pem), SECRET)
    except Unreadable as error:
        stop(str(error), NOT_STARTED)
    except OSError as error:
        stop(f"{path}: {error.strerror}; {repair(error)}", NOT_STARTED)


def remove_unused_keys(path: Path, directory: Path, roots: Iterable[Root]) -> None:
    """Deletes a key file that was made for `roots`, where the store got none of them: nobody trusts these.

    A write that failed at its very end may have left them there; then the file has their only keys.
    """
    from pki.store import StoreError, load_trusted

    try:
        known = load_trusted(directory)
    except StoreError:
        known = ()
        if (directory / STATE).exists():
            return
    if not any(root.certificate in known for root in roots):
        path.unlink()


def lend(authority: Authority, source: str, password_file: Path | None) -> Authority:
    """The authority with the keys of `source` at their roots. Raises AuthorityError where they are of none."""
    from pki.rotation import with_root_key

    keys = read_keys(source, password_file)
    known = [root.certificate.public_key() for root in authority.roots]
    for key in [key for key in keys if key.public_key() in known] or keys[:1]:
        authority = with_root_key(authority, key)
    return authority
