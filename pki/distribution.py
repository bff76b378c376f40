"""The trust bundle as bytes, and the variables that make every runtime read it. It reads and writes no file.

Runtimes differ in one thing above all: a variable either replaces the roots a program trusts (it must then name
`bundle.pem`, the public roots and ours) or adds to them (`ca.crt`, ours alone). docs/pki.md has the table.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pki import jks
from pki.der import SEQUENCE, MalformedDer, elements

CA, BUNDLE, TRUSTSTORE, WGETRC, PHP, ENV, MANIFEST = (
    "ca.crt",
    "bundle.pem",
    "truststore.jks",
    "wgetrc",
    "outgate.ini",
    "env.sh",
    "manifest.json",
)

REPLACING = (
    "SSL_CERT_FILE",  # OpenSSL, Python ssl, httpx, aiohttp, Go, Ruby, .NET, rustls-native-certs, uv, pnpm 12
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",  # requests does not look at SSL_CERT_FILE; nor do the tools built on it (Azure CLI)
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "GIT_SSL_CAINFO",  # Debian's git (GnuTLS) looks at nothing else
    "CARGO_HTTP_CAINFO",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "HTTPLIB2_CA_CERTS",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "NIX_SSL_CERT_FILE",
    "npm_config_cafile",  # npm and yarn 1; npm looks at NODE_EXTRA_CA_CERTS only while no npmrc has a cafile
    "BUNDLE_SSL_CA_CERT",
    "PERL_LWP_SSL_CA_FILE",
    "COMPOSER_CAFILE",
    "HEX_CACERTS_PATH",  # Elixir's Hex has roots of its own and looks at nothing else
)
ADDING = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")
CONSTANT = {"DENO_TLS_CA_STORE": "system,mozilla", "NODE_USE_SYSTEM_CA": "1"}
# Clients disagree on whether a directory adds to SSL_CERT_FILE or goes before it. Unset, all of them read the file.
REMOVED = ("SSL_CERT_DIR",)

JAVA = "JAVA_TOOL_OPTIONS"
_JAVA_STRONGER = ("JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")  # read after JAVA_TOOL_OPTIONS, so a trust store there would win
_JAVA_TRUST = "-Djavax.net.ssl.trustStore"

PHP_SCAN = "PHP_INI_SCAN_DIR"  # PHP's curl looks at no variable, but PHP reads every .ini file in these directories

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_PEM = re.compile(_BEGIN + rb"([^-]*)" + _END)  # base64 has no dash


class MalformedBundle(ValueError):
    """A PEM text that is no list of certificates. `str()` names the text and the certificate."""


class UnusableDirectory(ValueError):
    """A path that a variable or an rc file cannot carry."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What becomes of a program's variables.

    variables  to set
    removed    to unset
    replaced   of the existing ones, those that are set to something else or unset: tell the user
    kept       of the existing ones, those that stay and may keep their runtime from trusting us: tell the user
    """

    variables: Mapping[str, str]
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def over(self, existing: Mapping[str, str]) -> dict[str, str]:
        """`existing` with these changes made: the environment to start a program with."""
        left = {name: value for name, value in existing.items() if name not in self.removed}
        return left | dict(self.variables)


def trust_files(directory: str, roots: bytes, public: bytes) -> dict[str, bytes]:
    """The files of a trust directory that will stand at `directory`, by name; `manifest.json` is last.

    roots   PEM of the certificates that workloads must trust: ours
    public  PEM of the roots that they trust already; may be empty. It is carried as text: old public roots have serial
            numbers and encodings that a strict parser refuses.

    Raises MalformedBundle, and UnusableDirectory for a path that is relative, or has a line break or a colon.
    """
    _require_usable(directory)
    ours = certificates(roots, "our roots")
    if not ours:
        raise MalformedBundle("our roots: no certificate in it; workloads would trust nothing of ours")
    everyone = ours | {der: text for der, text in certificates(public, "public roots").items() if der not in ours}
    files = {
        CA: b"".join(ours.values()),
        BUNDLE: b"".join(everyone.values()),
        TRUSTSTORE: jks.truststore(everyone),
        WGETRC: f"ca_certificate = {directory}/{BUNDLE}\n".encode(),
        PHP: _php_settings(directory).encode(),
        ENV: shell_script(directory).encode(),
    }
    return files | {MANIFEST: _manifest(files, ours, everyone)}


def environment(directory: str, existing: Mapping[str, str], *, keep_existing: bool = False) -> Environment:
    """The variables with which every runtime trusts the files at `directory`.

    Inside `outgate run` the program must trust us, so values that exist are replaced. In a pod nobody asked us to do
    that: with `keep_existing` no name that exists is touched. Java's options and PHP's directories are added to what is
    there in both cases, except that `keep_existing` leaves alone options that choose a trust store.
    Raises UnusableDirectory.
    """
    _require_usable(directory)
    plain = _plain(directory)
    merged = _java(directory, existing, keep_existing=keep_existing) | {PHP_SCAN: _php(directory, existing)}
    if keep_existing:
        fresh = {name: value for name, value in plain.items() if not _spellings(name, existing)}
        kept = [
            name for wanted, value in plain.items() for name in _spellings(wanted, existing) if existing[name] != value
        ]
        kept += [name for name in REMOVED if name in existing]
        kept += _java_stores(directory, existing)
        return Environment(fresh | merged, kept=tuple(kept))
    removed = [name for name in REMOVED if name in existing]
    removed += [name for wanted in plain for name in _spellings(wanted, existing) if name != wanted]
    replaced = [name for name, value in plain.items() if name in existing and existing[name] != value]
    return Environment(plain | merged, tuple(removed), tuple(replaced + removed))


def shell_script(directory: str) -> str:
    """`env.sh`: the same variables for any POSIX shell to source, once or again. Raises UnusableDirectory."""
    _require_usable(directory)
    options, place = shlex.quote(_java_options(directory)), shlex.quote(directory)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in _plain(directory).items()]
    return "\n".join(
        [
            "# Source this file: . " + shlex.quote(f"{directory}/{ENV}"),
            *lines,
            f"unset {' '.join(REMOVED)}",
            f'case "${{{JAVA}-}}" in',
            f"*{options}) ;;",
            f'*{options}*) export {JAVA}="${{{JAVA}%%{options}*}}${{{JAVA}#*{options}}} "{options} ;;',
            f'*) export {JAVA}="${{{JAVA}:+${JAVA} }}"{options} ;;',
            "esac",
            f'case ":${{{PHP_SCAN}-}}:" in',
            f"*:{place}:*) ;;",
            f'*) export {PHP_SCAN}="${{{PHP_SCAN}-:}}${{{PHP_SCAN}:+:}}"{place} ;;',
            "esac",
            "",
        ]
    )


def _plain(directory: str) -> dict[str, str]:
    bundle = dict.fromkeys(REPLACING, f"{directory}/{BUNDLE}")
    ours = dict.fromkeys(ADDING, f"{directory}/{CA}")
    return bundle | ours | CONSTANT | {"WGETRC": f"{directory}/{WGETRC}"}


def _spellings(name: str, existing: Mapping[str, str]) -> list[str]:
    """How `name` is written in `existing`. npm alone reads its variables in any case."""
    if not name.startswith("npm_config_"):
        return [name] if name in existing else []
    return [other for other in existing if other.lower() == name]


def _java(directory: str, existing: Mapping[str, str], *, keep_existing: bool) -> dict[str, str]:
    """The JVM takes the last of two equal options, so ours go last wherever a trust store is chosen."""
    ours = _java_options(directory)
    chosen = _java_stores(directory, existing)
    if keep_existing and chosen:
        return {}
    return {name: _ending(existing.get(name, ""), ours) for name in dict.fromkeys([JAVA, *chosen])}


def _ending(options: str, ours: str) -> str:
    """The options with ours at their end, and nowhere else."""
    return f"{options.replace(ours, '').strip()} {ours}".lstrip()


def _java_stores(directory: str, existing: Mapping[str, str]) -> list[str]:
    """The variables in which somebody else chose a trust store, and not before ours."""
    ours = _java_options(directory)
    later = {name: existing.get(name, "").rpartition(ours)[2] for name in (JAVA, *_JAVA_STRONGER)}
    return [name for name, options in later.items() if _JAVA_TRUST in options]


def _java_options(directory: str) -> str:
    path = shlex.quote(f"{directory}/{TRUSTSTORE}")  # the JVM reads quotes as a shell does, without backslashes
    return f"{_JAVA_TRUST}={path} {_JAVA_TRUST}Type=jks {_JAVA_TRUST}Password={jks.PASSWORD}"


def _php(directory: str, existing: Mapping[str, str]) -> str:
    """The directories that PHP scans, and ours. An empty one stands for those that PHP was built with."""
    scanned = existing.get(PHP_SCAN)
    if scanned is None:
        return f":{directory}"
    if directory in scanned.split(":"):
        return scanned
    return f"{scanned}:{directory}" if scanned else directory


def _php_settings(directory: str) -> str:
    path = re.sub(r'[\\"$]', r"\\\g<0>", f"{directory}/{BUNDLE}")
    return f'openssl.cafile = "{path}"\ncurl.cainfo = "{path}"\n'


def certificates(pem: bytes, what: str) -> dict[bytes, bytes]:
    """Each certificate once, DER to PEM, in the order given; comments and line ends are left behind.

    So are OpenSSL's TRUSTED CERTIFICATE blocks: they may say that a certificate is not to be trusted.
    Raises MalformedBundle, which calls the text `what`.
    """
    found: dict[bytes, bytes] = {}
    blocks = _PEM.findall(pem)
    if len(blocks) != pem.count(_BEGIN):
        raise MalformedBundle(f"{what}: a certificate has no end")
    for number, block in enumerate(blocks, start=1):
        try:
            der = base64.b64decode(b"".join(block.split()), validate=True)
        except binascii.Error as error:
            raise MalformedBundle(f"{what}: certificate {number} is not base64") from error
        if not _is_der_sequence(der):
            raise MalformedBundle(f"{what}: certificate {number} is cut off or no certificate")
        found[der] = _pem(der)
    return found


def _is_der_sequence(der: bytes) -> bool:
    """One whole DER SEQUENCE. Java would refuse the entire store over one that is cut off."""
    try:
        return [tag for tag, _ in elements(der)] == [SEQUENCE]
    except MalformedDer:
        return False


def _pem(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([_BEGIN, *lines, _END, b""])


def _manifest(files: Mapping[str, bytes], ours: Iterable[bytes], everyone: Mapping[bytes, bytes]) -> bytes:
    """What a reader compares, and who is trusted. No date in it: the same roots give the same bytes."""
    manifest = {
        "version": 1,
        "roots": [hashlib.sha256(der).hexdigest() for der in ours],
        "certificates": len(everyone),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _require_usable(directory: str) -> None:
    if not directory.startswith("/"):
        raise UnusableDirectory(f"{directory!r} is relative, but programs change directories; write it from /")
    if not directory.isprintable():
        raise UnusableDirectory(f"{directory!r} has a character that wgetrc cannot carry; choose another directory")
    if ":" in directory:
        raise UnusableDirectory(f"{directory!r} has a colon, where PHP cuts paths; choose another directory")
