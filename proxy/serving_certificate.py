"""The certificate that a server of ours shows, from a mounted directory: `tls.crt` and `tls.key`. It follows what is
put there, and goes on with the former one while that cannot be used."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

from proxy.service.watch import Watch

CHAIN, KEY = "tls.crt", "tls.key"


class CertificateUnusable(Exception):
    """No pair of certificate and key. `str()` is one line: where, why, repair."""


class Certificate:
    """`context` always shows what was read last; a connection keeps what it began with. Raises CertificateUnusable."""

    def __init__(self, directory: str, log: Callable[[str], None], *, clock: Callable[[], float] = time.time) -> None:
        self._directory = Path(directory)
        self._log = log
        self._clock = clock
        self._watch = self._new_watch()
        self._shown, self.expires = self._read()
        # A context in place of another for each handshake: one that is loaded anew could fail between its two halves.
        self.context = _context()
        self.context.load_cert_chain(self._directory / CHAIN, self._directory / KEY)
        self.context.sni_callback = self._show

    async def follow(self) -> None:
        """Reads the files again as they change, until it is cancelled."""
        while True:
            await self._watch.changed()
            self._watch = self._new_watch()
            try:
                self._shown, self.expires = self._read()
            except CertificateUnusable as error:
                self._log(f"{error}; the former certificate is shown on")
            else:
                self._log(f"{self._directory / CHAIN}: another certificate is shown")

    def why_not(self) -> str:
        """Why no client can take it; empty while all is well."""
        return "" if self._clock() < self.expires else f"{self._directory / CHAIN}: expired; put another one there"

    def _show(self, sock: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        sock.context = self._shown

    def _new_watch(self) -> Watch:
        return Watch([str(self._directory / name) for name in (CHAIN, KEY)])

    def _read(self) -> tuple[ssl.SSLContext, float]:
        """Raises CertificateUnusable."""
        from cryptography import x509

        made, chain = _context(), self._directory / CHAIN
        try:
            made.load_cert_chain(chain, self._directory / KEY)
            expires = x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc.timestamp()
        except ssl.SSLError as error:
            raise CertificateUnusable(f"{chain}: no pair with {KEY}, or not PEM; put both there") from error
        except OSError as error:
            raise CertificateUnusable(f"{error.filename or chain}: {error.strerror or error}") from error
        except ValueError as error:
            raise CertificateUnusable(f"{chain}: not a certificate in PEM") from error
        return made, expires


def _context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])  # an API server speaks HTTP/2 where it may
    return made
