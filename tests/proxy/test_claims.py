"""For whom what is open: claims that come, end with their time, and are dropped, beside a naive twin."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hostnames import Hostname
from proxy.elements import Element
from proxy.opener import claims as module
from proxy.opener.claims import Claim, Claims
from proxy.opener.messages import NONSENSE, Close, Open, from_bytes, read_claims, to_bytes, write_claims
from tests.proxy.dns_gate import Clock


def element(number: int, source: int = 1) -> Element:
    return Element(ip_address(f"10.1.0.{source}"), ip_address(f"93.184.216.{number}"), "tcp", 22)


def claim(workload: str, name: str, number: int = 1, source: int = 1) -> Claim:
    return Claim(workload, Hostname(name), element(number, source))


CLAIMS = st.builds(
    claim, st.sampled_from(["app", "other"]), st.sampled_from(["a.example", "b.example"]),
    st.integers(1, 3), st.integers(1, 2),
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), CLAIMS, st.floats(1, 100)),
        st.tuples(st.just("drop"), CLAIMS),
        st.tuples(st.just("wait"), st.floats(0, 60)),
        st.tuples(st.just("forget"), st.sets(st.integers(1, 3).map(element))),
    ),
    max_size=40,
)


@given(STEPS)
def test_claims_are_what_a_plain_list_of_them_would_be(steps: list[tuple[object, ...]]) -> None:
    clock = Clock()
    claims, twin = Claims(clock), dict[Claim, float]()
    for step in steps:
        match step:
            case ("add", Claim() as one, float(time_s)):
                claims.add(one, time_s)
                twin[one] = max(clock.now + time_s, twin.get(one, 0.0))
            case ("drop", Claim() as one):
                was_there = twin.pop(one, None) is not None
                assert claims.drop(one) is (was_there and all(other.element != one.element for other in twin))
            case ("wait", float(time_s)):
                clock.now += time_s
            case ("forget", set(living)):
                claims.forget_ended(living)
                twin = {one: until for one, until in twin.items() if until > clock.now or one.element in living}
        assert set(claims) == set(twin)
        assert set(claims.open()) == {one.element for one, until in twin.items() if until > clock.now}
        for one in twin:
            assert one.element in claims


def test_a_second_name_of_one_element_never_shortens_its_time() -> None:
    clock = Clock()
    claims = Claims(clock)
    claims.add(claim("app", "a.example"), 600)
    clock.now += 100
    assert claims.times([(claim("app", "b.example"), 60)]) == {element(1): 500}
    assert claims.times([(claim("app", "b.example"), 900)]) == {element(1): 900}


def test_an_element_stays_while_another_name_claims_it() -> None:
    claims = Claims(Clock())
    claims.add(claim("app", "a.example"), 60)
    claims.add(claim("app", "b.example"), 60)
    assert claims.drop(claim("app", "a.example")) is False
    assert claims.drop(claim("app", "a.example")) is False
    assert claims.drop(claim("app", "b.example")) is True
    assert element(1) not in claims


def test_neither_a_source_nor_a_workload_takes_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OF_SOURCE", 2)
    monkeypatch.setattr(module, "MAX_OF_WORKLOAD", 3)
    claims = Claims(Clock())
    for number, source in ((1, 1), (2, 1), (1, 2)):
        claims.add(claim("app", "a.example", number, source), 60)
    assert claims.times([(claim("app", "a.example", 3, 1), 60)]) is None
    assert claims.times([(claim("app", "a.example", 3, 3), 60)]) is None
    assert claims.times([(claim("app", "a.example", 1, 1), 60)]) is not None  # one that is known
    assert claims.times([(claim("other", "a.example", 3, 3), 60)]) is not None
    claims.drop(claim("app", "a.example", 2, 1))
    assert claims.times([(claim("app", "a.example", 3, 1), 60)]) is not None


# --- what workers say ---


@given(st.lists(CLAIMS, max_size=5))
def test_claims_go_through_a_message_unchanged(some: list[Claim]) -> None:
    message = from_bytes(to_bytes(Close(3, write_claims(some), True)))
    assert isinstance(message, Close)
    assert read_claims(message.claims) == some


@given(st.binary() | st.sampled_from([b"{}", b'{"Open": {}}', b'{"Open": 1}', b'[["Open", {}]]', b'{"Exit": {}}']))
def test_nonsense_is_told_as_such(text: bytes) -> None:
    with pytest.raises(NONSENSE):
        from_bytes(text)


@pytest.mark.parametrize(
    ("source", "target", "time_s"),
    [
        ("10.1.0.1", ["93.184.216.34 . tcp . 22 }\nflush ruleset", "tcp", 22], 60.0),
        ("10.1.0.1", ["93.184.216.34", "tcp . 22 }\nflush ruleset", 22], 60.0),
        ("10.1.0.1", ["93.184.216.34", "tcp", "22"], 60.0),
        ("10.1.0.1", ["93.184.216.34", "tcp", 0], 60.0),
        ("10.1.0.1", ["93.184.216.34", "tcp", 65536], 60.0),
        ("10.1.0.1", ["93.184.216.34", "sctp", 22], 60.0),
        ("10.1.0.1", ["2606:2800:220:1::34", "tcp", 22], 60.0),
        ("fe80::1%br0", ["2606:2800:220:1::34", "tcp", 22], 60.0),
        ("10.1.0.1", ["169.254.169.254", "tcp", 80], 60.0),
        ("10.1.0.1", ["93.184.216.34", "tcp", 22], 0.0),
        ("10.1.0.1", ["93.184.216.34", "tcp", 22], 1e9),
    ],
    ids=["text behind an address", "text behind a protocol", "port as text", "port 0", "port too great", "protocol",
         "two families", "a zone", "metadata", "no time", "too long"],
)  # fmt: skip
def test_what_is_no_element_never_becomes_text(source: str, target: list[object], time_s: float) -> None:
    with pytest.raises((ValueError, TypeError)):
        Open(1, "app", "git.example", source, time_s, [target]).claims()
