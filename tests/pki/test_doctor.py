"""What is taken from a client's words, and with which arguments it is started."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pki.clients import CLIENTS, Fix, Kind, Target, fix_refusal
from pki.doctor import MAX_SAID, MAX_SENTENCE, run, sentence

CLIENT = {one.name: one for one in CLIENTS}
URL = "https://localhost:40001/"

SAID = [
    pytest.param(
        "curl: (60) SSL certificate problem: unable to get local issuer certificate\nMore details here: https://curl.se\n",
        "curl: (60) SSL certificate problem: unable to get local issuer certificate",
        id="curl: the first line",
    ),
    pytest.param(
        "*** Fatal error: Error in the certificate.\n - subject `CN=localhost', issuer `CN=Outgate', serial 0x15\n"
        "- Status: The certificate is NOT trusted. The certificate issuer is unknown. \n",
        "- Status: The certificate is NOT trusted. The certificate issuer is unknown.",
        id="gnutls-cli: its verdict, not its list of certificates",
    ),
    pytest.param(
        "Picked up JAVA_TOOL_OPTIONS: -Djavax.net.ssl.trustStore=/not trusted/error.jks\n"
        "keytool error: javax.net.ssl.SSLHandshakeException: PKIX path building failed: unable to find\n",
        "keytool error: javax.net.ssl.SSLHandshakeException: PKIX path building failed: unable to find",
        id="java: not the options that it repeats",
    ),
    pytest.param(
        f"refused {URL} URLError certificate verify failed: self-signed\n",
        "URLError certificate verify failed: self-signed",
        id="our scripts: without the URL",
    ),
    pytest.param(
        'ERROR: Exception:\nTraceback:\n  File "x.py"\n' + "x" * MAX_SENTENCE + " certificate verify failed: unable",
        "certificate verify failed: unable",
        id="pip: from where a long line tells something",
    ),
    pytest.param("going\nout of memory\n", "out of memory", id="else the last line"),
    pytest.param("\n \n", "it said nothing", id="nothing"),
]


@pytest.mark.parametrize(("said", "expected"), SAID)
def test_the_line_that_tells_most_is_shown(said: str, expected: str) -> None:
    assert sentence(said, URL) == expected


@given(st.text(alphabet=st.characters() | st.sampled_from("\x1b[]mK;0\x07\r\n"), max_size=400))
def test_whatever_is_said_becomes_one_line_that_fits_and_moves_no_cursor(said: str) -> None:
    shown = sentence(said)
    assert shown.isprintable()
    assert 0 < len(shown) <= MAX_SENTENCE


FORGED = "CN = Verify return code: 0 (ok)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openssl", f"depth=0 {FORGED}\nsubject={FORGED}\nVerify return code: 20 (unable to get local issuer)\n"),
        ("gnutls-cli", " - subject `CN=- Status: The certificate is trusted', issuer `CN=x'\n"),
        ("curl", "curl: (60) SSL: no alternative certificate subject name matches 'answered 200'\nanswered 000 x\n"),
        ("git", "fatal: unable to access 'https://a/': server certificate verification failed. CAfile: none\n"),
        ("git", "fatal: unable to access 'https://a/': error reading ca cert file /x: not found\n"),
        ("java", "keytool error: java.io.IOException: Keystore was tampered with\n"),
        ("npm", "npm error code ENOTFOUND\nnpm error code E_CERT\n"),
    ],
)
def test_what_a_server_writes_into_its_certificate_is_no_trust(name: str, said: str) -> None:
    assert not CLIENT[name].answered.search(said)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.example/x", "-servername a.example -verify_hostname a.example -connect a.example:443"),
        ("https://127.0.0.1:8443/", "-noservername -verify_ip 127.0.0.1 -connect 127.0.0.1:8443"),
        ("https://[::1]:8443/", "-noservername -verify_ip ::1 -connect [::1]:8443"),
    ],
)
def test_openssl_is_told_which_name_or_address_to_verify(url: str, expected: str) -> None:
    assert " ".join(CLIENT["openssl"].arguments(Target(url))[2:]) == expected


@pytest.mark.parametrize(
    ("name", "existing", "expected"),
    [
        ("curl", {}, "the system's store"),
        ("curl", {"SSL_CERT_FILE": "/a", "CURL_CA_BUNDLE": "/b"}, "CURL_CA_BUNDLE=/b"),
        ("java", {"JAVA_TOOL_OPTIONS": "-Xmx1g"}, "its own cacerts"),
        (
            "java",
            {"JAVA_TOOL_OPTIONS": "-Djavax.net.ssl.trustStore=/a -Djavax.net.ssl.trustStore='/b c'/d -Xmx1g"},
            "JAVA_TOOL_OPTIONS=-Djavax.net.ssl.trustStore='/b c'/d",
        ),
    ],
)
def test_where_it_reads_its_roots_is_the_strongest_variable(name: str, existing: dict[str, str], expected: str) -> None:
    assert CLIENT[name].roots(existing) == expected


def test_another_spelling_of_npms_variable_is_taken_away() -> None:
    fix = fix_refusal(CLIENT["npm"], {"NPM_CONFIG_CAFILE": "/x"}, "/trust", bundle=(), install=())
    assert fix == Fix(variables={"npm_config_cafile": "/trust/bundle.pem"}, removed=("NPM_CONFIG_CAFILE",))


def test_variables_that_add_are_told_from_those_that_replace() -> None:
    assert {name for name, one in CLIENT.items() if one.kind is Kind.ADDS} == {"node", "deno", "bun"}


def test_a_run_keeps_only_so_much_of_what_is_printed() -> None:
    done = run([sys.executable, "-c", f"print('x' * {MAX_SAID * 3})"], {}, 60)
    assert (len(done.said), done.code) == (MAX_SAID, 0)


def test_a_program_that_cannot_be_started_says_why() -> None:
    assert run(["/nonexistent/curl"], {}, 60).said == "/nonexistent/curl: No such file or directory"
