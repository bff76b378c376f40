"""What of a verified proxy credential reaches the judge: a salted digest, by which a later request shows the same one.

The judge never sees the credential's file, and nothing that is written anywhere holds the value or its digest.
"""

from __future__ import annotations

import os
from hashlib import sha256
from hmac import compare_digest

# Of this run: a digest that leaks from one is of no use for guessing faster in another.
_SALT = os.urandom(16)


def seal(value: bytes) -> str:
    """`SALT:DIGEST` of a `Proxy-Authorization` value (as received, without the spaces around it), both in hex."""
    return f"{_SALT.hex()}:{sha256(_SALT + value).hexdigest()}"


def is_sealed(value: bytes, credential: str) -> bool:
    """Whether `value` is the one that `seal` gave `credential` for, in this process or another."""
    salt, _, digest = credential.partition(":")
    return compare_digest(sha256(bytes.fromhex(salt) + value).hexdigest(), digest)
