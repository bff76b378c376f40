"""Inspected requests through the site's proxy: TLS in a tunnel, verified to the origin; plain ones in absolute form."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from proxy.inspector import Bounds, Configuration
from tests.proxy.inspecting import HOST, Rig, get, response
from tests.proxy.site_proxies import ESTABLISHED, Reply, SiteProxy, site_proxy
from tests.proxy.squid import SECRET, credentials_file, free_port, needs_squid, squid

BASIC = "Basic " + b64encode(b"gate:s3cret").decode()


def obey(_head: bytes) -> None:
    return None


@dataclass
class SiteRig(Rig):
    """Every name but `direct` ones leads to the site's proxy, and no nameserver is there to ask."""

    through: tuple[str, int] = ("127.0.0.1", 1)
    credentials: Path | None = None
    direct: tuple[str, ...] = ()

    def configuration(self) -> Configuration:
        made = super().configuration()
        hosts = tuple(entry for entry in made.hosts if entry[0] == "metadata.test")
        credentials = str(self.credentials) if self.credentials else None
        return replace(made, hosts=hosts, upstream_proxy=(*self.through, credentials, self.direct))


@contextmanager
def scene(directory: Path, reply: Reply = obey, **options: object) -> Iterator[tuple[SiteRig, SiteProxy]]:
    origins: dict[str, tuple[str, int]] = {}
    with (
        site_proxy(origins, reply) as site,
        SiteRig(directory, through=site.address, **options) as rig,  # type: ignore[arg-type]  # the rig's own fields
    ):
        origins[HOST] = ("127.0.0.1", rig.origin.port)
        yield rig, site


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "site-credentials"
    path.write_text("gate:s3cret\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("in_process", [False, True], ids=["core", "inspector process"])
def test_request_goes_through_a_tunnel_by_name_and_the_origin_sees_no_proxy(
    tmp_path: Path, secret: Path, in_process: bool
) -> None:
    with scene(tmp_path, credentials=secret, in_process=in_process) as (rig, site):
        reply = rig.send(get())
        assert (reply.status, reply.body) == (200, b"sunny")
        (record,) = rig.wait_for_records(1)
        assert (record["verdict"], record["upstream.address"], record["upstream.port"]) == ("allow", *site.address)
        expected = f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\nProxy-Authorization: {BASIC}\r\n\r\n"
        assert site.heads == [expected.encode()]
        assert rig.origin.requests == [get()]
        assert "s3cret" not in str(record)


def test_denied_request_never_reaches_the_site_proxy(tmp_path: Path) -> None:
    with scene(tmp_path) as (rig, site):
        assert rig.send(get("/forecasts")).reason == "no_allow_entry"
        assert site.heads == []


def test_origin_behind_the_site_proxy_is_verified_for_the_judged_name(tmp_path: Path) -> None:
    for options in ({"origin_names": ("other.test",)}, {"trusted": False}):
        with scene(tmp_path, **options) as (rig, site):
            reply = rig.send(get())
            assert (reply.status, reply.reason) == (502, "upstream_certificate")
            assert site.targets == [f"{HOST}:443"]
            assert rig.origin.requests == []


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "upstream_refused", "answered 403"),
        (b"HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic\r\n\r\n", "upstream_refused", "answered 407: it wants"),
        (b"SSH-2.0-x\r\n", "upstream_failed", "did not answer in HTTP/1"),
        (b"", "upstream_timeout", "through the site's proxy: no connection within"),
    ],
    ids=["403", "407", "garbage", "silence"],
)
def test_site_proxy_that_gives_no_tunnel_is_said_to_client_and_log(
    tmp_path: Path, answer: bytes, reason: str, detail: str
) -> None:
    bounds = Bounds(dial_s=0.5 if reason == "upstream_timeout" else 30.0)
    with scene(tmp_path, lambda _: answer, bounds=bounds) as (rig, site):
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, reason)
        assert detail in reply.problem["detail"]
        (record,) = rig.wait_for_records(1)
        assert detail in str(record["error.message"])
        assert site.closed.acquire(timeout=20)


def test_bytes_of_the_origin_beside_the_answer_are_not_lost(tmp_path: Path) -> None:
    """They are no TLS, so the handshake must fail on them; a gate that swallowed them would wait for the deadline."""
    with scene(tmp_path, lambda _: ESTABLISHED + b"220 not TLS\r\n", bounds=Bounds(dial_s=30.0)) as (rig, _):
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "upstream_failed")
        assert "no TLS" in reply.problem["detail"]


def test_site_proxy_that_is_down_is_not_passed_by(tmp_path: Path) -> None:
    with SiteRig(tmp_path, through=("127.0.0.3", 1)) as rig:
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "upstream_refused")
        assert "through the site's proxy: connection refused" in reply.problem["detail"]
        assert rig.origin.connections == 0


def test_name_that_the_operator_gave_an_address_is_checked_and_not_sent(tmp_path: Path) -> None:
    with scene(tmp_path) as (rig, site):
        assert rig.send(get("/", host="metadata.test"), host="metadata.test").reason == "never_reached"
        assert site.heads == []


def test_direct_name_is_looked_up_by_the_gate(tmp_path: Path) -> None:
    with scene(tmp_path, direct=("*.test",)) as (rig, site):
        assert rig.send(get()).reason == "resolver_failed"  # there is no nameserver
        assert site.heads == []


# --- plain requests


def test_plain_request_is_sent_to_the_site_proxy_in_absolute_form(tmp_path: Path, secret: Path) -> None:
    fields = "Proxy-Authorization: Basic dGhlaXI6b3du\r\nProxy-Connection: keep-alive\r\n"
    with scene(tmp_path, plain=True, credentials=secret) as (rig, site):
        reply = rig.send(get("/search?q=1", fields=fields))
        assert (reply.status, reply.body) == (200, b"sunny")
        (head,) = site.heads
        assert head.startswith(f"GET http://{HOST}/search?q=1 HTTP/1.1\r\nHost: {HOST}\r\n".encode())
        assert re.findall(rb"(?i)proxy-[a-z]+: .*", head) == [f"Proxy-Authorization: {BASIC}\r".encode()]
        (record,) = rig.wait_for_records(1)
        assert str(record["url.full"]).startswith(f"http://{HOST}/search?q=~")


def test_challenge_of_the_site_proxy_is_not_the_workloads_to_answer(tmp_path: Path) -> None:
    challenge = response(b"who", status="407 Who", fields='Proxy-Authenticate: Basic realm="site"\r\n')
    with scene(tmp_path, lambda _: challenge, plain=True) as (rig, _):
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "upstream_refused")
        assert "proxy-authenticate" not in reply.fields
        assert "wants credentials" in reply.problem["detail"]
        (record,) = rig.wait_for_records(1)
        assert (record["verdict"], record["reason"]) == ("deny", "upstream_refused")


def test_other_answers_of_the_site_proxy_are_passed_on(tmp_path: Path) -> None:
    with scene(tmp_path, lambda _: response(b"no", status="403 Forbidden"), plain=True) as (rig, _):
        reply = rig.send(get())
        assert (reply.status, reply.body) == (403, b"no")


def test_unreadable_credentials_let_no_plain_request_pass(tmp_path: Path, secret: Path) -> None:
    secret.chmod(0o644)
    with scene(tmp_path, plain=True, credentials=secret) as (rig, site):
        reply = rig.send(get())
        assert (reply.status, reply.reason) == (502, "gate_failed")
        assert str(tmp_path) not in reply.body.decode()
        assert site.heads == []


@pytest.mark.client
@needs_squid
def test_plain_request_is_carried_through_squid(tmp_path: Path) -> None:
    """Which opens no tunnel to its port, as sites set it up."""
    credentials, port = Path(credentials_file(tmp_path, SECRET)), free_port()
    with SiteRig(tmp_path, plain=True, through=("127.0.0.1", port), credentials=credentials) as rig:
        with squid(443, port=port, origin_port=rig.origin.port):
            reply = rig.send(get("/search?q=1"))
        assert (reply.status, reply.body) == (200, b"sunny")
        assert b"proxy-authorization" not in rig.origin.requests[0].lower()
