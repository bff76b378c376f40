import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pytest_benchmark.fixture import BenchmarkFixture

from policies.hostnames import Hostname, MalformedName, Pattern, parents, parse_hostname, parse_pattern

LONGEST = ".".join(["a" * 63] * 3 + ["a" * 61])  # 253 characters

NORMAL = {
    "as-written": ("example.com", "example.com"),
    "upper-case": ("EXAMPLE.Com", "example.com"),
    "trailing-dot": ("example.com.", "example.com"),
    "upper-case-trailing-dot": ("Example.COM.", "example.com"),
    "single-label": ("localhost", "localhost"),
    "single-label-trailing-dot": ("intranet.", "intranet"),
    "one-character": ("a", "a"),
    "underscore": ("_acme-challenge.example.com", "_acme-challenge.example.com"),
    "underscore-inside": ("my_bucket.example.com", "my_bucket.example.com"),
    "digits-before-the-last-label": ("1.2.3.example", "1.2.3.example"),
    "last-label-begins-with-a-digit": ("example.3com", "example.3com"),
    "last-label-is-nearly-hex": ("example.0xg", "example.0xg"),
    "hyphens-in-third-and-fourth-place": ("r3---sn-a5.googlevideo.com", "r3---sn-a5.googlevideo.com"),
    "label-of-63": ("a" * 63 + ".com", "a" * 63 + ".com"),
    "name-of-253": (LONGEST, LONGEST),
    "name-of-253-and-a-dot": (LONGEST + ".", LONGEST),
    "reverse-name": ("4.3.2.1.in-addr.arpa", "4.3.2.1.in-addr.arpa"),
    "umlaut": ("bücher.example", "xn--bcher-kva.example"),
    "umlaut-upper-case": ("BÜCHER.example", "xn--bcher-kva.example"),
    "umlaut-decomposed": ("bu\u0308cher.example", "xn--bcher-kva.example"),
    "a-label": ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    "a-label-upper-case": ("XN--BCHER-KVA.Example.", "xn--bcher-kva.example"),
    "sharp-s-is-not-ss": ("straße.example", "xn--strae-oqa.example"),
    "final-sigma-is-kept": ("βόλος.example", "xn--nxasmm1c.example"),
    "chinese": ("例え.example", "xn--r8jz45g.example"),
    "ideographic-full-stop": ("example\u3002com", "example.com"),
    "fullwidth-full-stop": ("example\uff0ecom", "example.com"),
    "halfwidth-full-stop": ("example\uff61com", "example.com"),
    "ideographic-trailing-dot": ("example.com\u3002", "example.com"),
    "fullwidth-letters": ("ｅｘａｍｐｌｅ.com", "example.com"),
    "fullwidth-a-label": ("ｘｎ－－bcher-kva.example", "xn--bcher-kva.example"),
    "soft-hyphen-is-nothing": ("exam\u00adple.com", "example.com"),
    "word-joiner-is-nothing": ("exam\u2060ple.com", "example.com"),
    "zero-width-space-is-nothing": ("exam\u200bple.com", "example.com"),
    "byte-order-mark-is-nothing": ("\ufeffexample.com", "example.com"),
    "kelvin-sign-is-k": ("\u212aelvin.example", "kelvin.example"),
    "long-s-is-s": ("\u017fearch.example", "search.example"),
    "dotless-i-is-no-i": ("\u0131.example", "xn--cfa.example"),
    "ligature-is-letters": ("\ufb01.example", "fi.example"),
    "cyrillic-a-is-no-a": ("\u0430pple.com", "xn--pple-43d.com"),
    "joiner-after-virama": ("\u0915\u094d\u200d\u0937.example", "xn--11b2ezcw70k.example"),
}

MALFORMED = {
    "empty": ("", "is empty"),
    "dot": (".", "empty label"),
    "two-dots": ("..", "empty label"),
    "leading-dot": (".example.com", "empty label"),
    "inner-two-dots": ("example..com", "empty label"),
    "two-trailing-dots": ("example.com..", "empty label"),
    "ideographic-two-dots": ("example\u3002.com", "empty label"),
    "label-of-soft-hyphens": ("a.\u00ad\u00ad.com", "empty label"),
    "label-of-64": ("a" * 64 + ".com", "longer than 63"),
    "last-label-of-64": ("com." + "a" * 64, "longer than 63"),
    "name-of-254": ("b." + LONGEST[1:], "longer than 253"),
    "name-of-300": ("a." * 150 + "com", "longer than 253"),
    "name-of-a-megabyte": ("a" * 1_000_000, "longer than 253"),
    "long-once-encoded": ((("ü" + "a" * 44 + ".") * 5 + "com"), "longer than 253"),
    "label-long-once-encoded": ("ü" + "a" * 62 + ".com", "invalid label"),
    "leading-hyphen": ("-a.com", "hyphen"),
    "trailing-hyphen": ("a-.com", "hyphen"),
    "last-label-trailing-hyphen": ("example.com-", "hyphen"),
    "hyphen-alone": ("-", "hyphen"),
    "fullwidth-leading-hyphen": ("－a.com", "hyphen"),
    "space": ("exam ple.com", '" "'),
    "leading-space": (" example.com", '" "'),
    "trailing-space": ("example.com ", '" "'),
    "tab": ("example.com\t", r"\t"),
    "newline": ("example.com\n", r"\n"),
    "carriage-return": ("a\r\nb.com", r"\r"),
    "nul": ("example.com\x00.evil.example", r"\x00"),
    "delete": ("a\x7f.com", r"\x7f"),
    "escape": ("\x1b[2J.com", r"\x1b"),
    "percent": ("a%2e.com", '"%"'),
    "encoded-nul": ("example.com%00.evil.example", '"%"'),
    "port": ("example.com:443", "without port"),
    "path": ("example.com/a", "without scheme and path"),
    "url": ("https://example.com", "without port"),
    "user": ("a@example.com", "without user"),
    "backslash": ("example.com\\a", "\\"),
    "query": ("example.com?a", '"?"'),
    "fragment": ("example.com#a", '"#"'),
    "comma": ("a,b.com", '","'),
    "quote": ('a".com', '"""'),
    "apostrophe": ("a'b.com", '"\'"'),
    "bracketed-name": ("[example.com]", '"["'),
    "parenthesis": ("a(b).com", '"("'),
    "wildcard": ("*.example.com", 'one leading "*."'),
    "fullwidth-percent": ("a\uff052e.com", "no internationalised name"),
    "fullwidth-colon": ("example.com\uff1a443", "no internationalised name"),
    "fullwidth-slash": ("example.com\uff0fa", "no internationalised name"),
    "account-of-sign": ("a\u2100b.com", "no internationalised name"),  # maps to a/c
    "one-dot-leader-digits": ("\u2488com", "no internationalised name"),  # maps to 1.
    "right-to-left-override": ("\u202emoc.example", "no internationalised name"),
    "no-break-space": ("a\u00a0b.com", "no internationalised name"),
    "lone-surrogate": ("a\udc80.com", "no internationalised name"),
    "private-use": ("\ue000.com", "no internationalised name"),
    "joiner-without-reason": ("exam\u200dple.com", "invalid label"),
    "non-joiner-without-reason": ("exam\u200cple.com", "invalid label"),
    "leading-combining-mark": ("\u0301a.com", "invalid label"),
    "mixed-directions": ("a\u05d0.com", "invalid label"),
    "symbol": ("\u2603.com", "invalid label"),
    "a-label-empty": ("xn--.com", "hyphen"),
    "a-label-undecodable": ("xn--a.com", "invalid label"),
    "a-label-overflowing": ("xn--99999999.com", "invalid label"),
    "a-label-of-plain-ascii": ("xn--example-.com", "hyphen"),
    "a-label-of-upper-case": ("xn--Bcher-kva-.com", "hyphen"),
    "a-label-of-a-capital": ("xn--cher-fna.com", "invalid label"),
    "a-label-of-a-fullwidth-letter": ("xn--b-yq0i.com", "invalid label"),
    "a-label-of-a-decomposed-letter": ("xn--a-xbb.com", "invalid label"),
    "a-label-of-a-soft-hyphen": ("xn--abc-ifa.com", "invalid label"),
    "a-label-of-a-symbol": ("xn--n3h.com", "invalid label"),
    "a-label-not-canonical": ("xn---bbk.com", "invalid label"),
    "a-label-of-an-a-label": ("xn--xn--bcher-kva-sob.com", "invalid label"),
    "a-label-with-underscore": ("xn--b_cher-kva.com", "invalid label"),
}

ADDRESSES = [
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",
    "0x7f.1",
    "0X7F.0.0.1",
    "0x",
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "256.256.256.256",
    "1.2.3.4.5",
    "example.1",
    "example.0x1f",
    "1",
    "127.0.0.1:80",
    "10.0.0.0/8",
    "[127.0.0.1]",
    "::1",
    "[::1]",
    "[::1]:443",
    "2001:db8::/32",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "1\u30022\u30023\u30024",
    "\uff11\uff12\uff17.0.0.1",
    "\u2460.\u2461.\u2462.\u2463",  # circled digits
    "169\uff0e254\uff0e169\uff0e254",
]


@pytest.mark.parametrize(("text", "normal"), NORMAL.values(), ids=NORMAL)
def test_name_has_one_normal_form(text: str, normal: str) -> None:
    assert parse_hostname(text) == normal
    assert parse_hostname(normal) == normal


@pytest.mark.parametrize(("text", "why"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_name_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(MalformedName) as raised:
        parse_hostname(text)
    assert why in str(raised.value)
    assert not raised.value.is_address
    assert str(raised.value).isascii()
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("text", ADDRESSES, ids=ascii)
def test_address_is_no_name_and_says_so(text: str) -> None:
    with pytest.raises(MalformedName, match="is an address, not a name") as raised:
        parse_hostname(text)
    assert raised.value.is_address


def test_message_stays_short() -> None:
    with pytest.raises(MalformedName) as raised:
        parse_hostname("a" * 100_000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("text", "host", "wildcard"),
    [
        ("example.com", "example.com", False),
        ("*.Example.COM.", "example.com", True),
        ("*.bücher.example", "xn--bcher-kva.example", True),
        ("*.com", "com", True),
    ],
)
def test_pattern_is_a_name_or_one_leading_wildcard(text: str, host: str, wildcard: bool) -> None:
    pattern = parse_pattern(text)
    assert pattern == Pattern(Hostname(host), wildcard)
    assert str(pattern) == ("*." if wildcard else "") + host
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*", '"*" would be every name; name a domain, such as "*.example.com"'),
        ("*.", '"*." would be every name; name a domain, such as "*.example.com"'),
        ("a*.b", '"a*.b": a wildcard is one leading *. and nothing else; did you mean "*.b"?'),
        ("*b.example", '"*b.example": a wildcard is one leading *. and nothing else; did you mean "*.example"?'),
        ("*b", '"*b": a wildcard is one leading *. and nothing else; write it as "*.example.com"'),
        ("*.*.b", '"*.*.b": a wildcard is one leading *. and nothing else; did you mean "*.b"?'),
        ("pypi.*", '"pypi.*": a wildcard is one leading *. and nothing else; write it as "*.example.com"'),
        ("**.a.b", '"**.a.b": a wildcard is one leading *. and nothing else; did you mean "*.a.b"?'),
        ("a.*.b.c", '"a.*.b.c": a wildcard is one leading *. and nothing else; did you mean "*.b.c"?'),
    ],
)
def test_other_wildcards_are_errors_with_a_repair(text: str, message: str) -> None:
    with pytest.raises(MalformedName) as raised:
        parse_pattern(text)
    assert str(raised.value) == message
    assert str(raised.value) == f"{raised.value.message}; {raised.value.repair}"


@pytest.mark.parametrize("text", ["1.2.3.4", "*.2.3.4", "*.0x7f"])
def test_pattern_over_an_address_is_an_address(text: str) -> None:
    with pytest.raises(MalformedName) as raised:
        parse_pattern(text)
    assert raised.value.is_address


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.c.example.com", True),
        ("*.example.com", "notexample.com", False),
        ("*.example.com", "example.com.evil.example", False),
        ("*.example.com", "com", False),
    ],
)
def test_wildcard_matches_at_any_depth_below(pattern: str, name: str, matches: bool) -> None:
    assert parse_pattern(pattern).matches(parse_hostname(name)) is matches


def test_apex_is_not_below_its_wildcard() -> None:
    assert not parse_pattern("*.example.com").matches(Hostname("example.com"))


def test_parents_come_nearest_first() -> None:
    assert list(parents(Hostname("a.b.c"))) == ["b.c", "c"]
    assert list(parents(Hostname("localhost"))) == []


def test_ascii_names_do_not_load_the_idna_tables() -> None:
    code = (
        "import sys; from policies.hostnames import *; parse_hostname('Example.com.'); sys.exit('idna' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


LETTERS = st.sampled_from("ab0-_.*xn:%[]/\u00fc\u3002\uff0e\u200d\u00ad\u0131\u212a\uff21\u0301\u05d0\x00\n ")


@given(st.text() | st.text(LETTERS) | st.from_regex(r"(xn--)?[a-z0-9-]{1,20}(\.xn--[a-z0-9-]{1,20})?", fullmatch=True))
@example("xn--" + "9" * 59)
@example("\u00ad")
def test_garbage_gives_a_normal_name_or_malformed(text: str) -> None:
    try:
        name = parse_hostname(text)
    except MalformedName:
        return
    assert parse_hostname(name) == name
    assert parse_hostname(name.upper() + ".") == name
    assert name.isascii()
    assert name == name.lower()
    assert 0 < len(name) <= 253
    assert all(0 < len(label) <= 63 for label in name.split("."))


@given(st.text(LETTERS))
def test_garbage_gives_a_pattern_or_malformed(text: str) -> None:
    try:
        pattern = parse_pattern(text)
    except MalformedName:
        return
    assert parse_pattern(str(pattern)) == pattern


@given(st.from_regex(r"[a-z0-9_-]{1,4}(\.[a-z0-9_-]{1,4}){0,3}", fullmatch=True))
def test_fast_way_is_the_rule_written_plainly(text: str) -> None:
    labels = text.split(".")
    last = labels[-1]
    is_number = last.isdigit() or (last.startswith("0x") and all(c in "0123456789abcdef" for c in last[2:]))
    hyphens = any(label.startswith("-") or label.endswith("-") for label in labels)
    if any(label.startswith("xn--") for label in labels):
        return
    try:
        accepted = parse_hostname(text) == text
    except MalformedName:
        accepted = False
    assert accepted is not (is_number or hyphens)


@given(st.ip_addresses())
def test_every_address_is_malformed_as_an_address(address: IPv4Address | IPv6Address) -> None:
    for text in (str(address), f"[{address}]", address.exploded):
        with pytest.raises(MalformedName) as raised:
            parse_hostname(text)
        assert raised.value.is_address


def test_normal_name_costs_under_a_microsecond(benchmark: BenchmarkFixture) -> None:
    assert benchmark(parse_hostname, "dataservice.accuweather.com") == "dataservice.accuweather.com"
