"""On the way out: what was allowed and cannot be carried says why, and an address is admitted before it is dialled."""

from __future__ import annotations

from ipaddress import ip_address
from math import inf

import pytest

from proxy.limits import Limits
from proxy.resolver import Resolution
from proxy.wire.client_hello import Alert, render_alert
from tests.builders import rules
from tests.proxy.gates import at, gate, origin, read_all, read_exactly
from tests.proxy.hellos import hello

A = rules("- host: a.example")
NAME = "a.example"


@pytest.mark.parametrize(
    ("resolution", "reason", "said"),
    [
        (Resolution((ip_address("127.0.0.1"),), inf), "never_reached", Alert.ACCESS_DENIED),
        (Resolution((ip_address("169.254.169.254"),), inf, from_hosts=True), "never_reached", Alert.ACCESS_DENIED),
        (Resolution((ip_address("10.0.0.1"),), inf), "private_address", Alert.ACCESS_DENIED),
        (Resolution((ip_address("::ffff:127.0.0.1"),), inf), "never_reached", Alert.ACCESS_DENIED),
        (Resolution((), inf), "name_not_found", Alert.UNRECOGNIZED_NAME),
        (at(("127.0.0.2", 1)), "upstream_refused", Alert.INTERNAL_ERROR),
        (None, "name_not_found", Alert.UNRECOGNIZED_NAME),
    ],
    ids=["loopback", "metadata", "private", "loopback in disguise", "no address", "refused", "no such name"],
)
def test_allowed_name_that_cannot_be_reached_says_why(resolution: Resolution | None, reason: str, said: Alert) -> None:
    with gate(A, {NAME: resolution} if resolution else {}) as it, it.connect() as client:
        it.names.is_cached = resolution is not None
        client.sendall(hello())
        assert read_all(client) == render_alert(said)
        record = it.record()
        assert (record["verdict"], record["reason"]) == ("deny", reason)
        assert record["rule"] == "p.yaml:5 (app/rules[0])"


def test_one_reachable_address_among_forbidden_ones_is_dialled() -> None:
    with origin() as upstream:
        both = Resolution((ip_address("169.254.169.254"), ip_address("127.0.0.1")), inf, True, upstream.address[1])
        with gate(A, {NAME: both}) as it, it.connect() as client:
            client.sendall(hello())
            assert read_exactly(client, len(hello())) == hello()


def test_silent_resolver_is_given_up() -> None:
    with gate(A, limits=Limits(resolve_s=0.2)) as it, it.connect() as client:
        it.names.is_cached, it.names.is_silent = False, True
        client.sendall(hello())
        assert read_all(client) == render_alert(Alert.INTERNAL_ERROR)
        assert it.record()["reason"] == "resolver_failed"
