"""One probe tried on real sockets, and what it met. Who answered is `proof`'s question, what it means `judging`'s.

A connection that is accepted proves nothing (in `outgate run` every one is), so each probe says something and waits for
what comes back.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from proxy.verify import packets
from proxy.verify.model import Heard, Kind, Manner, Patience, Probe, Proof

NTP_EPOCH_S = 2208988800  # from 1900 to 1970 (RFC 5905 6)
NOBODY = "240.0.0.1"  # RFC 1112 4: reserved, so only the proxy itself can answer for it

_IP_RECVERR, _IPV6_RECVERR = 11, 25  # linux/in.h, in6.h: ICMP errors are told to sockets that are not connected too
_SO_RCVBUFFORCE = 33  # socket(7): takes CAP_NET_ADMIN in the namespace of the socket, and changes nothing outside it
_OPEN = frozenset({"01", "03", "04", "05", "08", "09"})  # net/tcp_states.h: all but those that a port may outlive
_ENOUGH = 4096
_ALERT = 7  # bytes of a TLS alert: no shorter answer to a hello is whole
_ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"

_REFUSED = frozenset(
    {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EACCES, errno.EHOSTDOWN, errno.ENETDOWN}
)
_ABSENT = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EADDRNOTAVAIL})
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR})


def attempt(probe: Probe, patience: Patience, *, hops: int | None = None) -> Heard:
    """Try it. `hops`: its packets live no longer than so many routers. Raises nothing: an unknown error is FAILED."""
    if probe.absent:
        return Heard(Manner.ABSENT, note=probe.absent)
    if time.monotonic() >= patience.end:
        return Heard(Manner.FAILED, note="the time for all probes was over")
    try:
        return _KINDS[probe.kind](probe, patience, hops)
    except TimeoutError:
        return Heard(Manner.NOTHING)
    except OSError as error:
        return _met(probe, error)


def _met(probe: Probe, error: OSError) -> Heard:
    said = error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        return Heard(Manner.REFUSED, note=f"no such name: {said}")
    if error.errno in _ABSENT or (error.errno == errno.ENETUNREACH and ":" in probe.to):
        return Heard(Manner.ABSENT, note=said)
    if error.errno == errno.ECONNREFUSED:
        is_here = probe.kind in (Kind.UNIX, Kind.CONNECT)
        return Heard(Manner.REFUSED if is_here else Manner.REJECTED, note=said)
    if error.errno == errno.ECONNRESET:  # accepted, and reset before connect(2) came back
        return Heard(Manner.CLOSED, note=said)
    if error.errno in (errno.ETIMEDOUT, errno.EAGAIN):
        return Heard(Manner.NOTHING, note=said)
    return Heard(Manner.REFUSED if error.errno in _REFUSED else Manner.FAILED, note=said)


# --- TCP


def connect(to: str, port: int, patience: Patience, hops: int | None = None) -> socket.socket:
    """A connection, whose packets live no longer than `hops`. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(to, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    try:
        _limit(sock, hops)
        # A port of its own: one that connect(2) chose may be another connection's too, and `owner_of_other_end` wrong.
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104 - nothing listens on it
        sock.settimeout(_left_s(patience.reach_s, patience))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _limit(sock: socket.socket, hops: int | None) -> None:
    if hops is None:
        return
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)


def _left_s(most_s: float, patience: Patience) -> float:
    return max(min(most_s, patience.end - time.monotonic()), 0.001)  # zero would mean: do not block


def _tcp(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    with connect(probe.to, probe.port, patience, hops) as sock:
        uid = owner_of_other_end(sock)
        return _say(sock, probe.say[0], _is_whole[probe.kind], patience, uid)


def _dns_tcp(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    query = probe.say[0]
    with connect(probe.to, probe.port, patience, hops) as sock:
        uid = owner_of_other_end(sock)
        heard = _say(sock, len(query).to_bytes(2) + query, lambda data: len(data) > 12, patience, uid)
        return Heard(heard.manner, heard.data[2:], heard.note, uid)


def _say(
    sock: socket.socket, said: bytes, is_whole: Callable[[bytes], bool], patience: Patience, uid: int | None
) -> Heard:
    """What comes back for what is said, up to where it can be judged."""
    data = b""
    try:
        sock.sendall(said)
        end = time.monotonic() + _left_s(patience.answer_s, patience)
        while not is_whole(data) and len(data) < _ENOUGH:
            sock.settimeout(max(end - time.monotonic(), 0.001))
            chunk = sock.recv(_ENOUGH)
            if not chunk:
                break
            data += chunk
    except TimeoutError:
        return Heard(Manner.ANSWERED if data else Manner.SILENT, data, uid=uid)
    except OSError as error:
        return Heard(Manner.ANSWERED if data else Manner.CLOSED, data, error.strerror or "", uid)
    return Heard(Manner.ANSWERED if data else Manner.CLOSED, data, uid=uid)


_is_whole: dict[Kind, Callable[[bytes], bool]] = {
    Kind.HTTP: lambda data: b"\r\n\r\n" in data,
    Kind.TLS: lambda data: len(data) >= _ALERT,
    Kind.SPEAK: bool,
}


def owner_of_other_end(sock: socket.socket) -> int | None:
    """The user whose socket on this machine is the other end of this connection. None: it is not on this machine.

    The kernel's own table of this network namespace says so, whatever the address that was dialled.
    """
    address, port = sock.getsockname()[:2]
    packed = ip_address(address.partition("%")[0]).packed
    remotes = {f"{_hex(packed)}:{port:04X}"}
    if len(packed) == 4:  # as a listener of both families has it
        remotes.add(f"{_hex(bytes(10) + b'\xff\xff' + packed)}:{port:04X}")
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(table) as lines:
            for line in lines:
                fields = line.split()
                if fields[2] in remotes and fields[3] in _OPEN:
                    return int(fields[7])
    return None


def _hex(packed: bytes) -> str:
    """As /proc/net/tcp writes an address: words in the machine's order."""
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words)


# --- TLS that is ended


def _fronting(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whoever ends it is to be met, trusted or not
    with connect(probe.to, probe.port, patience, hops) as sock:
        uid = owner_of_other_end(sock)
        sock.settimeout(_left_s(patience.answer_s, patience))
        try:
            with context.wrap_socket(sock, server_hostname=probe.name) as tls:
                return _say(tls, probe.say[0], _is_whole[Kind.HTTP], patience, uid)
        except ssl.SSLError as error:
            is_denial = error.reason == "TLSV1_ALERT_ACCESS_DENIED"
            return Heard(
                Manner.ANSWERED if is_denial else Manner.CLOSED,
                _ACCESS_DENIED if is_denial else b"",
                error.reason or "",
                uid,
            )
        except TimeoutError:
            return Heard(Manner.SILENT, uid=uid)
        except OSError as error:
            return Heard(Manner.CLOSED, note=error.strerror or "", uid=uid)


def show_certificate(probe: Probe, root: str, patience: Patience, hops: int | None) -> Heard:
    """ANSWERED: whoever ends TLS there has a leaf for `probe.name` below a root of the file `root`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        with connect(probe.to, probe.port, patience, hops) as sock:
            sock.settimeout(_left_s(patience.answer_s, patience))
            with context.wrap_socket(sock, server_hostname=probe.name):
                return Heard(Manner.ANSWERED, note="its chain leads to the root")
    except TimeoutError:
        return Heard(Manner.NOTHING, note="no handshake in time")
    except OSError as error:  # SSLError is one
        return Heard(Manner.CLOSED, note=error.strerror or str(error))


# --- through a proxy


def _through_proxy(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    heard = _tunnelled(probe, probe.say[0], patience)
    if (heard.manner is Manner.ANSWERED and packets.read_denial(heard.data)) or heard.manner is Manner.CLOSED:
        # A proxy that judges what is said in the tunnel does the same where nobody can be.
        port = probe.name.rpartition(":")[2]
        control = _tunnelled(probe, packets.http_connect(f"{NOBODY}:{port}"), patience)
        both_refuse = bool(packets.read_denial(control.data)) == bool(packets.read_denial(heard.data))
        if control.manner is heard.manner and both_refuse:
            return replace(heard, proof=Proof.CONTROL)
    return heard


def _tunnelled(probe: Probe, ask: bytes, patience: Patience) -> Heard:
    """REFUSED unless the proxy grants the tunnel; then what comes back through it."""
    with connect(probe.to, probe.port, patience) as sock:
        granted = _say(sock, ask, _is_whole[Kind.HTTP], patience, None)
        status = granted.data.split(b" ", 2)[1:2]
        if granted.manner is not Manner.ANSWERED or not status or not status[0].startswith(b"2"):
            said = status[0].decode("latin-1") if status else granted.manner.value
            return Heard(Manner.REFUSED, granted.data, f"the proxy says {said}")
        return _say(sock, probe.say[1], lambda data: len(data) >= _ALERT, patience, None)


# --- datagrams


def _udp(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    family = socket.AF_INET6 if ":" in probe.to else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        _limit(sock, hops)
        sock.connect(socket.getaddrinfo(probe.to, probe.port, type=socket.SOCK_DGRAM)[0][4])
        for message in probe.say:
            sock.send(message)
        return _hear(sock, probe, patience)


def _hear(sock: socket.socket, probe: Probe, patience: Patience) -> Heard:
    """The answer; of several, one that is no refusal."""
    end = time.monotonic() + _left_s(patience.reach_s, patience)
    is_dns = probe.kind is Kind.DNS
    answers: list[bytes] = []
    while len(answers) < len(probe.say) and (left_s := end - time.monotonic()) > 0:
        sock.settimeout(left_s)
        try:
            data, _ = sock.recvfrom(_ENOUGH)
        except TimeoutError:
            break
        except OSError:
            if answers:
                break
            raise
        if not is_dns or any(packets.is_answer_to(query, data) for query in probe.say):
            answers.append(data)
    if not answers:
        return Heard(Manner.NOTHING)
    note = f"{len(answers)} of {len(probe.say)} answered" if len(probe.say) > 1 else ""
    worst = next((data for data in answers if not packets.read_denial(data)), answers[0])
    if is_dns and _is_here(probe.to) and packets.is_failure(worst):
        return Heard(Manner.REFUSED, note="this machine's resolver found nobody to ask")
    return Heard(Manner.ANSWERED, worst, note)


def _is_here(to: str) -> bool:
    address: IPv4Address | IPv6Address = ip_address(to.partition("%")[0])
    return address.is_loopback


def _multicast(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    is_v6 = ":" in probe.to
    if is_v6 and probe.name == "0":
        return Heard(Manner.ABSENT, note="no IPv6 here")
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            sock.sendto(probe.say[0], (probe.to, probe.port, 0, int(probe.name)))
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            sock.sendto(probe.say[0], (probe.to, probe.port))
        return _hear(sock, probe, patience)


def _clock(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    heard = _udp(probe, patience, hops)
    if heard.manner is not Manner.ANSWERED or len(heard.data) < 48:
        return heard
    seconds, fraction = struct.unpack_from("!II", heard.data, 40)
    offset_s = seconds - NTP_EPOCH_S + fraction / 2**32 - time.time()
    return Heard(Manner.ANSWERED, heard.data, f"{offset_s:+.3f} s")


# --- below them


def _icmp(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    is_v6 = ":" in probe.to
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if is_v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        _limit(sock, hops)
        sock.connect((probe.to, 0))
        sock.send(probe.say[0])
        return _hear(sock, probe, patience)


def _raw(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, probe.port) as sock:
        try:
            sock.connect((probe.to, 0))
            sock.send(probe.say[0])
            heard = _hear(sock, probe, patience)
        except OSError as error:
            return Heard(Manner.POSSIBLE, note=error.strerror or str(error))
    return heard if heard.manner is Manner.ANSWERED else Heard(Manner.POSSIBLE, note="sent, and nothing came back")


def _packet(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0):
        return Heard(Manner.POSSIBLE)


def _net_admin(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4096)
        return Heard(Manner.POSSIBLE)


def _unix(probe: Probe, patience: Patience, hops: int | None) -> Heard:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_left_s(patience.reach_s, patience))
        try:
            sock.connect(probe.to)
        except OSError as error:
            if error.errno in _NO_FILE:
                return Heard(Manner.ABSENT, note="not here")
            if error.errno == errno.EPROTOTYPE:  # there, and another kind of unix socket
                return Heard(Manner.ANSWERED, note="a service listens")
            raise
    return Heard(Manner.ANSWERED, note="a service listens")


def become(uid: int) -> Heard:
    """Whether this process is that user, or a child of it can become it. No thread of ours may be running."""
    if uid in (os.getuid(), os.geteuid()):
        return Heard(Manner.POSSIBLE, note=f"runs as uid {uid}")
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(uid, uid, uid)
        except OSError:
            os._exit(1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        return Heard(Manner.POSSIBLE, note=f"can become uid {uid}")
    return Heard(Manner.REFUSED, note=f"cannot become uid {uid}")


_KINDS: dict[Kind, Callable[[Probe, Patience, int | None], Heard]] = {
    Kind.HTTP: _tcp,
    Kind.TLS: _tcp,
    Kind.SPEAK: _tcp,
    Kind.DNS_TCP: _dns_tcp,
    Kind.FRONTING: _fronting,
    Kind.CONNECT: _through_proxy,
    Kind.DNS: _udp,
    Kind.UDP: _udp,
    Kind.MULTICAST: _multicast,
    Kind.CLOCK: _clock,
    Kind.ICMP: _icmp,
    Kind.RAW: _raw,
    Kind.PACKET: _packet,
    Kind.NET_ADMIN: _net_admin,
    Kind.UNIX: _unix,
}
