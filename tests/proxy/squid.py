"""A real squid as a site's proxy, set up as sites do: credentials wanted, CONNECT only to the ports of TLS."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.proxy.gates import PATIENCE_S

SQUID = shutil.which("squid")

needs_squid = pytest.mark.skipif(SQUID is None, reason="squid is not installed")

SECRET = "gate:s3cret and more"
_CONFIGURATION = """
http_port 127.0.0.1:{port}
hosts_file {directory}/hosts
auth_param basic program {directory}/verify
acl known proxy_auth REQUIRED
acl tls port {tls_port}
acl CONNECT method CONNECT
http_access deny CONNECT !tls
http_access allow known
http_access deny all
pid_filename none
cache_log /dev/null
access_log none
cache_store_log none
netdb_filename none
cache deny all
pinger_enable off
dns_nameservers 127.0.0.1
visible_hostname site
"""
_VERIFY = """#!/bin/sh
while read -r line; do
    if [ "$line" = "gate s3cret%20and%20more" ]; then echo OK; else echo ERR; fi
done
"""


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def squid(
    tls_port: int, hosts: Mapping[str, str] | None = None, *, port: int | None = None, origin_port: int | None = None
) -> Iterator[tuple[str, int]]:
    """A squid that knows `hosts` and opens tunnels to `tls_port` alone. `origin_port` is that of every plain origin."""
    assert SQUID is not None
    port = port or free_port()
    with tempfile.TemporaryDirectory() as text:  # not pytest's: squid gives up root, and reads this afterwards
        directory = Path(text)
        directory.chmod(0o755)
        (directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in (hosts or {}).items()))
        (directory / "verify").write_text(_VERIFY)
        (directory / "verify").chmod(0o755)
        settings = _CONFIGURATION.format(port=port, directory=directory, tls_port=tls_port)
        if origin_port is not None:  # so that no test needs ports 80 and 443
            settings += f"cache_peer 127.0.0.1 parent {origin_port} 0 no-query originserver\nnever_direct allow all\n"
        (directory / "squid.conf").write_text(settings)
        process = subprocess.Popen([SQUID, "-N", "-f", directory / "squid.conf"])
        try:
            _await_port(port, process)
            yield "127.0.0.1", port
        finally:
            process.kill()  # its orderly end takes two seconds
            process.wait(PATIENCE_S)


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None, "squid ended"
            assert time.monotonic() < deadline, "squid did not start"
            time.sleep(0.02)


def credentials_file(directory: Path, text: str) -> str:
    path = directory / "site-credentials"
    path.write_text(text)
    path.chmod(0o600)
    return str(path)
