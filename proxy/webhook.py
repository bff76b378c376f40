"""`outgate webhook`: the parts of it put together, from its options to its exit code."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass

from proxy.child import leave_no_core
from proxy.config import SocketAddress
from proxy.injection.model import Settings
from proxy.options import say
from proxy.record import show_peer
from proxy.reviewing import CannotListen, open_webhook
from proxy.serving_certificate import Certificate, CertificateUnusable

NOT_STARTED = 3
GRACE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookOptions:
    listen: SocketAddress
    tls_dir: str
    settings: Settings


def webhook(options: WebhookOptions) -> int:
    """Answers until SIGINT or SIGTERM. Returns the exit code."""
    leave_no_core()
    try:
        asyncio.run(_serve(options))
    except (CannotListen, CertificateUnusable) as error:
        say(str(error))
        return NOT_STARTED
    return 0


async def _serve(options: WebhookOptions) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    certificate = Certificate(options.tls_dir, say)
    server = await open_webhook(options.listen, certificate, options.settings, say)
    say(f"answering admission reviews on {show_peer(server.address)}")
    following = asyncio.create_task(certificate.follow())
    try:
        await ended.wait()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.close(GRACE_S)
