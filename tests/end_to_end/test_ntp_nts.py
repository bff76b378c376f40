"""The relay and a real chronyd that has to prove what it says. To others the same chronyd answers without any proof."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from policies.hostnames import Hostname
from proxy.record import Peer
from proxy.relays.ntp.exchange import ask
from proxy.relays.ntp.keys import Keys
from proxy.relays.ntp.poller import Poller
from proxy.relays.ntp.source import Failure
from tests.end_to_end.chrony import needs_chronyd, server
from tests.end_to_end.service import eventually
from tests.proxy.commands_of import invoke
from tests.proxy.dns_gate import run
from tests.proxy.nameserver import unused_port
from tests.proxy.ntp_servers import PACE, source_of, synchronised, until
from tests.proxy.nts_servers import roots
from tests.proxy.relaying import RelayProcess

pytestmark = [pytest.mark.client, needs_chronyd]

NAME = "time.example"
POLICY = f"version: 1\nworkloads: {{app: {{rules: [{{ntp: {NAME}}}]}}}}\n"


@dataclass(frozen=True)
class Place:
    """Where a chronyd answers, and the roots that its certificate is of."""

    time: int
    exchange: int
    roots: str

    @property
    def options(self) -> Sequence[str]:
        where = ("--host", f"{NAME}=127.0.0.1:{self.time}", "--nts", f"{NAME}:{self.exchange}")
        return ("-w", "app", *where, "--upstream-ca", self.roots)


@contextmanager
def nts_server(
    directory: Path, leaf: trustme.LeafCert, authority: trustme.CA, place: Place | None = None
) -> Iterator[Place]:
    """With a `place`: at the same ports as before, and with keys of its own again."""
    directory.mkdir()
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    key.touch(0o600)
    leaf.private_key_pem.write_to_path(str(key))
    certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    exchange = place.exchange if place else _unused_tcp()
    lines = (f"ntsport {exchange}", f"ntsserverkey {key}", f"ntsservercert {certificate}")
    with server(directory, place.time if place else 0, *lines) as port:
        made = Place(port, exchange, roots(authority, directory))
        eventually(lambda: _is_listening(exchange), "chronyd listens")
        yield made


def _unused_tcp() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _is_listening(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_its_time_is_given_and_status_says_that_it_is_proved(tmp_path: Path) -> None:
    authority = trustme.CA()
    with (
        nts_server(tmp_path / "nts", authority.issue_cert(NAME), authority) as place,
        RelayProcess(tmp_path, *place.options, policy=POLICY) as relay,
    ):
        relay.hears("outgate: synchronised, policy")
        got = eventually(relay.ask, "an answer")
        assert (got.leap, got.stratum) == (0, 3)
        [source] = _sources(relay, "selected")
        assert (source["nts"], source["nts_cookies"], source["failures"]) == (1, 8, {})
        assert source["address"] == f"127.0.0.1:{place.time}"
        assert "8 cookies" in invoke("relay", "status", "--admin", relay.admin).stdout


def _sources(relay: RelayProcess, state: str) -> list[dict[str, object]]:
    page = json.loads(invoke("relay", "status", "--admin", relay.admin, "--json").stdout)
    return [source for source in page["sources"] if source["state"] == state]


OTHER = trustme.CA()
NOW = datetime.now(UTC)
type Issue = Callable[[trustme.CA], trustme.LeafCert]
CERTIFICATES: dict[str, tuple[Issue, str]] = {
    "another name": (lambda authority: authority.issue_cert("other.example"), "its certificate is for another name"),
    "expired": (
        lambda authority: authority.issue_cert(NAME, not_before=NOW - timedelta(2), not_after=NOW - timedelta(1)),
        "its certificate has expired",
    ),
    "another root": (lambda _: OTHER.issue_cert(NAME), "its certificate is of no root that is trusted"),
}


@pytest.mark.parametrize(("issue", "says"), CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_server_that_cannot_prove_who_it_is_is_not_asked_without_proof(
    tmp_path: Path, issue: Issue, says: str
) -> None:
    authority = trustme.CA()
    leaf = issue(authority)
    with (
        nts_server(tmp_path / "nts", leaf, authority) as place,
        RelayProcess(tmp_path, *place.options, policy=POLICY) as relay,
    ):
        eventually(lambda: says in invoke("relay", "status", "--admin", relay.admin).stdout, says)
        run(lambda: _answers_without_proof(place))
        got = relay.ask()
        assert got is not None
        assert (got.leap, got.stratum) == (3, 16)


async def _answers_without_proof(place: Place) -> None:
    assert (await ask(("127.0.0.1", place.time), 10)).stratum == 2


def test_a_server_that_was_started_anew_is_asked_for_new_keys(tmp_path: Path) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert(NAME)

    async def locate(name: Hostname, at: Peer, server: str | None, port: int | None) -> Peer | None:
        return at[0], port or 123

    async def test() -> None:
        with nts_server(tmp_path / "before", leaf, authority) as place:

            async def find(name: Hostname) -> Sequence[Peer]:
                return [("127.0.0.1", place.exchange)]

            poller = Poller(
                PACE, find=find, is_open=lambda name: True, keys=lambda name: Keys(name, locate, roots=place.roots)
            )
            poller.follow({Hostname(NAME)})
            await synchronised(poller)
        with nts_server(tmp_path / "after", leaf, authority, place):
            source = source_of(poller, NAME)
            polls = source.tally.polls
            await until(lambda: source.tally.failures[Failure.KISS_OF_DEATH] >= 2 or source.tally.polls > polls + 200)
            await until(lambda: source.reach & 0b111 == 0b111)
            assert source.asked == ("127.0.0.1", place.time)
        await poller.close()

    run(test)


def test_nobody_listens_where_keys_are_exchanged(tmp_path: Path) -> None:
    with server(tmp_path / "plain") as port:
        options = ("--host", f"{NAME}=127.0.0.1:{port}", "--nts", f"{NAME}:{unused_port()}", "-w", "app")
        with RelayProcess(tmp_path, *options, policy=POLICY) as relay:
            eventually(
                lambda: "no key exchange" in invoke("relay", "status", "--admin", relay.admin).stdout, "the reason"
            )
            got = relay.ask()
            assert got is not None
            assert got.leap == 3
