"""What the certificates of origins are verified against, the same in every HTTP host. It opens no connection."""

from __future__ import annotations

import ssl
from collections.abc import Sequence


def trust_origins(authorities: str | None = None, more: Sequence[str] = ()) -> ssl.SSLContext:
    """Verifies origins by the system's store, or by the PEM file `authorities` alone. Raises OSError.

    They are offered HTTP/1.1, and before it what is in `more` (ALPN).
    """
    context = ssl.create_default_context(cafile=authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False  # RFC 9525 6.3: the subject alternative names alone
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # 3.13's default; passthrough clients do not ask for it either
    context.set_alpn_protocols([*more, "http/1.1"])
    return context
