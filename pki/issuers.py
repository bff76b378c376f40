"""What signs leaves, as one text: so it travels in memory from the process that reads the store to those that mint.

The text holds the keys, or where they are (`signer`). It stands in no file, argument, environment or log.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cryptography import x509

from pki.authority import Issuing, Line, certificates_pem
from pki.signer import key_of, key_text


def issuers_text(issuers: Sequence[Issuing]) -> str:
    """The text of `Authority.issuers`. Equal issuers give equal texts."""
    return json.dumps(
        [
            {"line": one.line, "chain": certificates_pem(*one.chain).decode(), "key": key_text(one.key).decode()}
            for one in issuers
        ]
    )


def read_issuers(text: str) -> tuple[Issuing, ...]:
    """The issuers of a text. A key in a token is opened when it first signs.

    Raises ValueError, KeyError, TypeError, SignerError for what `issuers_text` never wrote.
    """
    return tuple(_read(**fields) for fields in json.loads(text))


def _read(line: str, chain: str, key: str) -> Issuing:
    certificates = tuple(x509.load_pem_x509_certificates(chain.encode()))
    return Issuing(certificates[0], key_of(key.encode(), certificates[0].public_key()), certificates, line=Line(line))
