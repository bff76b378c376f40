"""Java truststores (JKS version 2, trusted certificates only) as bytes. The same certificates give the same bytes.

JKS and not PKCS#12: Java opens it with its password and without one, whichever way a program's options are written.
The format is that of `sun.security.provider.JavaKeyStore`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

PASSWORD = "changeit"  # noqa: S105  Java's own default; it seals public certificates against accident, not against people

_MAGIC = 0xFEEDFEED
_VERSION = 2
_TRUSTED_CERTIFICATE = 2
_CREATED_MS = 0  # no clock here, so that equal stores are equal files


def truststore(certificates: Iterable[bytes], password: str = PASSWORD) -> bytes:
    """A store that trusts these DER certificates, each once, under the alias `ca-` and 16 digits of its SHA-256."""
    entries = {f"ca-{hashlib.sha256(der).hexdigest()[:16]}": der for der in certificates}
    content = struct.pack(">III", _MAGIC, _VERSION, len(entries))
    content += b"".join(_entry(alias, der) for alias, der in sorted(entries.items()))
    # The format prescribes SHA-1 and this sentence. Without a password Java does not look at the digest.
    seal = hashlib.sha1(password.encode("utf-16-be") + b"Mighty Aphrodite" + content, usedforsecurity=False)
    return content + seal.digest()


def _entry(alias: str, der: bytes) -> bytes:
    kind = struct.pack(">I", _TRUSTED_CERTIFICATE)
    return kind + _text(alias) + struct.pack(">Q", _CREATED_MS) + _text("X.509") + struct.pack(">I", len(der)) + der


def _text(text: str) -> bytes:
    spelled = text.encode("ascii")  # Java's modified UTF-8 is ASCII for what we write
    return struct.pack(">H", len(spelled)) + spelled
