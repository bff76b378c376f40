"""TLS at both ends of the lane: which context shows a host's leaf, and which sessions with origins may be resumed."""

from __future__ import annotations

import errno
import ssl
from collections import OrderedDict

from addons.judge import Unreachable
from policies.hostnames import Hostname
from policies.model import Reason

MAX_SESSIONS = 2048  # some 2 kB each
CONNECTIONS = 64  # to an origin that resumes nothing, until that is tried again: a try costs a fifth of a handshake

type Origin = tuple[str, Hostname, int]  # of a workload: a name and a port


class Sessions:
    """Sessions with origins, the latest of each. A workload's are its own: what one has reached is no other's to know.

    A session stands for a certificate that was verified, for that very name, by the same roots: they never change
    within one process.
    """

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._most = most
        self._kept: OrderedDict[Origin, ssl.SSLSession] = OrderedDict()
        self._without: OrderedDict[Origin, int] = OrderedDict()  # how often that is not tried

    def take(self, origin: Origin) -> ssl.SSLSession | None:
        """RFC 8446 C.4: a ticket that is used twice links two connections, so each is given away once."""
        return self._kept.pop(origin, None)

    def keep(self, origin: Origin, tls: ssl.SSLSocket, *, was_offered: bool) -> None:
        """After the first answer: TLS 1.3 sends its tickets behind the handshake. `was_offered`: it began with one."""
        if skips := self._without.get(origin):
            self._without[origin] = skips - 1
            return
        is_refused = was_offered and not tls.session_reused
        session = None if is_refused else tls.session
        if session is not None and session.has_ticket:
            _put(self._kept, origin, session, self._most)
        else:
            _put(self._without, origin, CONNECTIONS, self._most)


def _put[T](held: OrderedDict[Origin, T], origin: Origin, value: T, most: int) -> None:
    held[origin] = value
    held.move_to_end(origin)
    if len(held) > most:
        held.popitem(last=False)


def explain_client(error: Exception | None) -> tuple[Reason, str]:
    """What of a handshake with a client failed, and what is known of it. RFC 8446 6.2: one that does not know our CA
    says so in an alert; what else fails is no hello of ours."""
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        alert = error.reason or ""
        is_refusal = "ALERT" in alert and ("CERTIFICATE" in alert or "UNKNOWN_CA" in alert)
        return (Reason.CLIENT_CERTIFICATE_REFUSED if is_refusal else Reason.MALFORMED_HELLO), alert
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    return Reason.CLIENT_GONE, errno.errorcode.get(number or 0, "")


def explain_origin(error: Exception | None) -> Unreachable:
    """What of a handshake with an origin failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unreachable(Reason.UPSTREAM_CERTIFICATE, error.verify_message.rstrip(".").lower())
    if isinstance(error, ssl.SSLError):
        return Unreachable(Reason.UPSTREAM_FAILED, f"no TLS ({(error.reason or str(error)).lower()})")
    return Unreachable(Reason.UPSTREAM_FAILED, "it closed in its TLS handshake")
