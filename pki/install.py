"""A machine's own trust store: roots put in it and taken out of it by the distribution's own mechanism.

It knows which directory and which program each distribution has. What the roots sign is not its business.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pki.distribution import MalformedBundle, certificates
from pki.files import PUBLIC, make_directory, read_file, remove_file, write_file
from pki.trust import MAX_BUNDLE

TIMEOUT_S = 300  # Debian's hook for Java takes seconds on a slow machine
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # not the caller's: root runs what is found
_OURS = re.compile(r"outgate-([0-9a-f]{16})\.(?:crt|pem)")


class InstallError(Exception):
    """The machine does not trust what it was to trust, or still does. `str()` has the place and the repair."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """How one family of distributions keeps the machine's roots. Paths have no leading slash.

    anchors  where an administrator puts roots: one file each, with this suffix
    command  makes the bundle anew
    bundle   what programs read
    marker   is there where this mechanism is
    """

    anchors: str
    suffix: str
    command: tuple[str, ...]
    bundle: str
    marker: str


MECHANISMS = (
    Mechanism(  # RHEL, Fedora, Amazon Linux
        "etc/pki/ca-trust/source/anchors",
        ".pem",
        ("update-ca-trust", "extract"),
        "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "etc/pki/ca-trust/source",
    ),
    Mechanism(  # SUSE
        "etc/pki/trust/anchors",
        ".pem",
        ("update-ca-certificates",),
        "var/lib/ca-certificates/ca-bundle.pem",
        "etc/pki/trust",
    ),
    Mechanism(  # Debian, Ubuntu, Alpine. Debian reads .crt alone; both want one certificate in a file
        "usr/local/share/ca-certificates",
        ".crt",
        ("update-ca-certificates",),
        "etc/ssl/certs/ca-certificates.crt",
        "usr/share/ca-certificates",
    ),
)


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of the store.

    anchors  the directory of our files; `added`, `kept` and `removed` are names in it
    bundle   the file that holds, or no longer holds, our roots
    """

    anchors: Path
    bundle: Path
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def install(roots: bytes, prefix: Path = Path("/")) -> Changed:
    """Has the machine whose files stand at `prefix` trust these roots (PEM), and of ours no others.

    A second time it changes nothing. Raises InstallError; then our files are those that were there before.
    """
    wanted = certificates(roots, "our roots")
    if not wanted:
        raise InstallError("our roots: no certificate in it; nothing to install")
    return _become(wanted, prefix)


def uninstall(prefix: Path = Path("/")) -> Changed:
    """Takes our roots out again, and nothing else. Raises InstallError; then our files are those that were there."""
    return _become({}, prefix)


def mechanism_of(prefix: Path) -> Mechanism:
    """The mechanism of the machine at `prefix`: by what is there, whatever it calls itself. Raises InstallError."""
    for mechanism in MECHANISMS:
        if (prefix / mechanism.marker).is_dir() and _program(mechanism, prefix):
            return mechanism
    raise InstallError(f"{prefix}: neither update-ca-certificates nor update-ca-trust there; install ca-certificates")


def _become(wanted: Mapping[bytes, bytes], prefix: Path) -> Changed:
    if os.geteuid() != 0:
        raise InstallError("only root may change what a machine trusts; run the same command with sudo")
    mechanism = mechanism_of(prefix)
    anchors, bundle = _inside(prefix, mechanism.anchors), _inside(prefix, mechanism.bundle)
    try:
        before = _ours(anchors)
        after = {f"outgate-{_id(der)}{mechanism.suffix}": pem for der, pem in wanted.items()}
        added = tuple(name for name, pem in after.items() if before.get(name) != pem)
        removed = tuple(name for name in before if name not in after)
        gone = {der for name in removed for der in certificates(before[name], name)}
        if added or removed or not _held(bundle).keys() >= wanted.keys():
            with _undone_on_failure(anchors, before, after, mechanism, prefix):
                _put(anchors, before, after)
                _update(mechanism, prefix, removed)
                _require_held(bundle, wanted, gone)
    except OSError as error:
        advice = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable for root"
        raise InstallError(f"{error.filename or anchors}: {error.strerror}; {advice}") from error
    return Changed(anchors, bundle, added, tuple(name for name in after if name not in added), removed)


@contextmanager
def _undone_on_failure(
    anchors: Path, before: Mapping[str, bytes], after: Mapping[str, bytes], mechanism: Mechanism, prefix: Path
) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _put(anchors, after, before)
        try:
            _update(mechanism, prefix, tuple(name for name in after if name not in before))
        except InstallError:
            pass  # the first failure is the one to tell
        raise


def _put(anchors: Path, former: Mapping[str, bytes], files: Mapping[str, bytes]) -> None:
    make_directory(anchors, 0o755)
    for name, pem in files.items():
        write_file(anchors / name, pem, PUBLIC)
    for name in former:
        if name not in files:
            remove_file(anchors / name)


def _ours(anchors: Path) -> dict[str, bytes]:
    """Our files there. One that bears our name and holds another certificate was made by somebody else, and stays."""
    found = {}
    for path in sorted(anchors.glob("outgate-*")):
        named = _OURS.fullmatch(path.name)
        if named is None or path.is_symlink():
            continue
        pem = read_file(path, MAX_BUNDLE)
        if named[1] in {_id(der) for der in _certificates_or_none(pem, path)}:
            found[path.name] = pem
    return found


def _update(mechanism: Mechanism, prefix: Path, removed: tuple[str, ...]) -> None:
    """Makes the bundle anew. Raises InstallError."""
    program = _program(mechanism, prefix)
    assert program is not None
    # Debian's forgets links and Java's store of a file that is simply gone. What its configuration deselects it removes
    # everywhere, so for this one run the configuration deselects our files. The other programs need no such thing.
    if removed and b"--certsconf" in read_file(program, MAX_BUNDLE):
        with _deselecting(removed, prefix) as configuration:
            _run((*mechanism.command, "--certsconf", configuration), prefix)
    else:
        _run(mechanism.command, prefix)


@contextmanager
def _deselecting(names: tuple[str, ...], prefix: Path) -> Iterator[str]:
    """A configuration of update-ca-certificates that is the machine's own but for these names. Its path in `prefix`."""
    own = _inside(prefix, "etc/ca-certificates.conf")
    text = read_file(own, MAX_BUNDLE) if own.exists() else b""
    with tempfile.NamedTemporaryFile(dir=own.parent, prefix=".outgate-", suffix=".conf") as file:
        file.write(text + b"".join(f"\n!{name}\n".encode() for name in names))
        file.flush()
        yield f"/etc/{Path(file.name).name}"


def _run(command: tuple[str, ...], prefix: Path) -> None:
    words = command if prefix == Path("/") else ("chroot", str(prefix), *command)
    clean = {"PATH": _PATH, "LC_ALL": "C.UTF-8"}  # as from cron: no SSL_CERT_FILE, no JAVA_TOOL_OPTIONS
    shown = " ".join(words)
    try:
        done = subprocess.run(
            words, env=clean, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, umask=0o022
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{shown}: not done after {TIMEOUT_S} seconds; run it to see why") from error
    except OSError as error:
        raise InstallError(f"{shown}: {error.strerror}; run it to see why") from error
    if done.returncode != 0:
        last = (done.stderr or done.stdout).decode(errors="replace").strip().rpartition("\n")[2]
        raise InstallError(f"{shown}: exit status {done.returncode}: {last or 'it said nothing'}; run it to see why")


def _program(mechanism: Mechanism, prefix: Path) -> Path | None:
    places = (prefix / directory.lstrip("/") / mechanism.command[0] for directory in _PATH.split(":"))
    return next((place for place in places if place.is_file()), None)


def _inside(prefix: Path, place: str) -> Path:
    """A path below `prefix`. A link in an image must not lead us to write outside it. Raises InstallError."""
    path = prefix / place
    if not path.resolve().is_relative_to(prefix.resolve()):
        raise InstallError(f"{path}: a link leads out of {prefix}; repair the image, or install where it runs")
    return path


def _require_held(bundle: Path, wanted: Mapping[bytes, bytes], gone: set[bytes]) -> None:
    """The bundle has every root that is wanted and none that is gone, or InstallError."""
    held = _held(bundle)
    if missing := [_id(der) for der in wanted if der not in held]:
        raise InstallError(f"{bundle}: without root {missing[0]} although it was made anew; see what its programs say")
    if left := [_id(der) for der in gone if der in held]:
        raise InstallError(f"{bundle}: root {left[0]} is put there by another file too; remove that one first")


def _held(bundle: Path) -> Mapping[bytes, bytes]:
    return _certificates_or_none(read_file(bundle, MAX_BUNDLE), bundle) if bundle.exists() else {}


def _certificates_or_none(pem: bytes, path: Path) -> Mapping[bytes, bytes]:
    try:
        return certificates(pem, str(path))
    except MalformedBundle:
        return {}


def _id(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()[:16]
