"""An origin at https://api.test, and the options of a service that inspects what goes to it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import trustme

from tests.proxy import inspecting


def options_of_a_service(directory: Path, token: str) -> Iterator[list[str]]:
    """For the store `pki` and a service in `directory`, while the origin runs. `token` opens its admin port."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "origin.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.test").configure_cert(context)
    upstream = inspecting.Origin(context, lambda _head, _sock: inspecting.response())
    (directory / "token").write_text(token)
    (directory / "token").chmod(0o600)
    yield [
        "--pki", "pki", "--upstream-ca", "origin.pem", "--host", f"api.test=127.0.0.1:{upstream.port}",
        "--admin-token", "token",
    ]  # fmt: skip
    upstream.close()
