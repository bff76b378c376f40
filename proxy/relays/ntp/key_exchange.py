"""One key exchange of Network Time Security: a TLS connection, proved by certificate and name (RFC 8915 3 and 4).

It judges no address and keeps nothing. The TLS is pyOpenSSL's, for `ssl` cannot export keys.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity import CertificateError, VerificationError
from service_identity.pyopenssl import verify_hostname

from policies.hostnames import Hostname
from proxy.record import Peer
from proxy.relays.ntp.exchange import NoKeys
from proxy.wire import nts

TIMEOUT_S = 10.0  # for all of it

_CHUNK = 16 * 1024
_FAULTS = {  # X509_V_ERR_…, openssl-verification-options(1)
    9: "is not valid yet",
    10: "has expired",
    18: "is of no root that is trusted",
    19: "is of no root that is trusted",
    20: "is of no root that is trusted",
    21: "is of no root that is trusted",
    26: "is not for servers",
    47: "is for a name that its issuer may not sign",
}


@dataclass(frozen=True, slots=True)
class Granted:
    """What a server gave."""

    agreed: nts.Agreed = field(repr=False)
    to_server: bytes = field(repr=False)
    to_client: bytes = field(repr=False)


async def exchange_keys(at: Peer, name: Hostname, *, roots: str | None) -> Granted:
    """Keys and cookies for queries to `name`, from its key exchange at `at`.

    roots  path of the PEM file that its certificate is verified by; None: the system's

    Raises NoKeys.
    """
    fault = ""

    def look(_: SSL.Connection, __: X509, number: int, ___: int, is_right: int) -> bool:
        nonlocal fault
        if not is_right and not fault:
            fault = f"its certificate {_FAULTS.get(number, f'cannot be verified (error {number})')}"
        return bool(is_right)

    try:
        async with asyncio.timeout(TIMEOUT_S):
            context = await asyncio.to_thread(_context, roots, look)  # it reads a hundred certificates
            return await _converse(at, name, context)
    except TimeoutError as error:
        raise NoKeys(f"no key exchange within {TIMEOUT_S:g} s") from error
    except SSL.ZeroReturnError as error:
        raise NoKeys("it ended the key exchange") from error
    except SSL.Error as error:
        raise NoKeys(fault or _reason(error)) from error
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else str(error)  # asyncio words its own
        raise NoKeys(f"no key exchange: {what.lower()}") from error
    except (CertificateError, VerificationError) as error:
        raise NoKeys("its certificate is for another name") from error
    except (nts.MalformedExchange, nts.RefusedExchange) as error:
        raise NoKeys(f"no key exchange: {error}") from error


def _context(roots: str | None, look: Callable[[SSL.Connection, X509, int, int, int], bool]) -> SSL.Context:
    """Raises OSError, SSL.Error."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_alpn_protos([nts.ALPN])
    context.set_verify(SSL.VERIFY_PEER, look)
    if roots:
        context.load_verify_locations(roots)
        return context
    paths = ssl.get_default_verify_paths()
    if not (paths.cafile or paths.capath):
        raise OSError("this machine has no public roots; install ca-certificates, or name roots in --upstream-ca")
    context.load_verify_locations(paths.cafile, paths.capath)
    return context


async def _converse(at: Peer, name: Hostname, context: SSL.Context) -> Granted:
    reader, writer = await asyncio.open_connection(*at)
    try:
        tls = SSL.Connection(context, None)
        tls.set_connect_state()
        tls.set_tlsext_host_name(name.encode("ascii"))
        await _step(tls, reader, writer, tls.do_handshake)
        verify_hostname(tls, name)
        if tls.get_alpn_proto_negotiated() != nts.ALPN:
            raise nts.MalformedExchange("another protocol")
        request = nts.build_request()
        await _step(tls, reader, writer, lambda: tls.send(request))
        stream = b""
        while (agreed := nts.parse_response(stream)) is None:
            stream += await _step(tls, reader, writer, lambda: tls.recv(_CHUNK))
        to_server, to_client = (
            tls.export_keying_material(nts.EXPORTER, nts.KEY_SIZE, context)
            for context in (nts.TO_SERVER, nts.TO_CLIENT)
        )
        return Granted(agreed, to_server, to_client)
    finally:
        writer.transport.abort()  # nothing is left to say


async def _step[T](
    tls: SSL.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, act: Callable[[], T]
) -> T:
    """What `act` gives once bytes of the other side suffice for it. Raises SSL.Error, OSError."""
    while True:
        try:
            done = act()
        except SSL.WantReadError:
            await _flush(tls, writer)
        else:
            await _flush(tls, writer)
            return done
        received = await reader.read(_CHUNK)
        if not received:
            raise SSL.ZeroReturnError
        tls.bio_write(received)


async def _flush(tls: SSL.Connection, writer: asyncio.StreamWriter) -> None:
    while True:
        try:
            writer.write(tls.bio_read(_CHUNK))
        except SSL.WantReadError:
            await writer.drain()
            return


def _reason(error: SSL.Error) -> str:
    """In OpenSSL's words, of which the other side chooses none but the number of its alert."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    words = entries[-1][-1] if entries else ""
    return f"no key exchange: TLS failed{f' ({words})' if words else ''}"
