"""What stands where in a store: names, and nothing that opens a file. `store` says what they hold."""

from __future__ import annotations

STATE = "state.json"  # a store changes as this one file does
ROOTS, ISSUING, GIVEN = "roots", "issuing", "given"  # a folder for each CA, named by its id
CERTIFICATE, KEY, CHAIN = "ca.crt", "ca.key", "chain.pem"
# Of a Secret, and of a directory where one is mounted: as cert-manager and `kubectl create secret tls` name them.
FLAT_CHAIN, FLAT_KEY, FLAT_ROOTS = "tls.crt", "tls.key", "ca.crt"


def cross_name(cross_id: str) -> str:
    """The file of a root's cross certificate."""
    return f"cross-{cross_id}.crt"
