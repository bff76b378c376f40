"""The client programs of a machine as data: how each is found, told to fetch a URL, and made to trust us.

It starts nothing and reads nothing; `doctor` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address
from urllib.parse import urlsplit

from pki import scripts
from pki.distribution import ADDING, JAVA, PHP_SCAN, environment

SYSTEM = "the system's store"
CERTIFI = "certifi"
COMPILED_IN = "roots compiled in"
OPENSSL = ("SSL_CERT_FILE", "SSL_CERT_DIR")

_JAVA_STORE = re.compile(r"-Djavax\.net\.ssl\.trustStore=(?:'[^']*'|\S)+")

type Arguments = tuple[str, ...]


class Kind(StrEnum):
    """What its variable does to the roots that a client trusts without."""

    ADDS = "adds"
    REPLACES = "replaces"


@dataclass(frozen=True, slots=True)
class Target:
    """What a client is to fetch.

    via  the port of a proxy at 127.0.0.1 that leads any name to the server; None: the name leads there itself
    """

    url: str
    via: int | None = None

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 443

    @property
    def peer(self) -> str:
        """Where a client connects that reads no proxy variable."""
        return self.host if self.via is None else "127.0.0.1"

    @property
    def is_here(self) -> bool:
        return self.via is not None or self.host in ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Client:
    """A program that speaks TLS.

    program    what it is called on PATH
    arguments  with which it fetches a target and writes no file
    answered   what it prints, at the start of a line, once it has verified the server; a server that it has not
               verified cannot make it print that
    variables  that choose its roots, the strongest first; none: it reads the system's store and nothing else
    otherwise  where it finds roots while none of them is set
    settings   of its own that may win over the variables, or switch verification off
    sets       the variables that repair it; None: the strongest
    switches   variables that switch verification off
    version    arguments with which it prints its version; they fail where it cannot be used
    every      it is looked for in all of PATH, not only where a shell finds it: each may have roots of its own
    """

    name: str
    program: str
    arguments: Callable[[Target], Arguments]
    answered: re.Pattern[str]
    variables: tuple[str, ...]
    otherwise: str
    settings: str
    sets: tuple[str, ...] | None = None
    switches: tuple[str, ...] = ()
    version: Arguments = ("--version",)
    every: bool = False
    timeout_s: float = 10

    @property
    def kind(self) -> Kind:
        return Kind.ADDS if self.variables and self.variables[0] in ADDING else Kind.REPLACES

    def roots(self, existing: Mapping[str, str]) -> str:
        """Where it reads its roots when started with `existing`."""
        for name in self.variables:
            value = existing.get(name, "")
            if "JAVA" in name:  # options, of which the last counts
                value = (_JAVA_STORE.findall(value) or [""])[-1]
            if value:
                return f"{name}={value}"
        return self.otherwise


@dataclass(frozen=True, slots=True)
class Fix:
    """What makes a client trust us, or verify at all. Everything in it that is not empty is to be done.

    command    to run
    variables  to set
    removed    to unset
    change     what a person has to look into
    """

    command: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    change: str = ""

    def over(self, existing: Mapping[str, str]) -> dict[str, str]:
        """`existing` as it must become."""
        left = {name: value for name, value in existing.items() if name not in self.removed}
        return left | dict(self.variables)


def fix_refusal(
    client: Client, existing: Mapping[str, str], directory: str, *, bundle: tuple[str, ...], install: tuple[str, ...]
) -> Fix:
    """What makes a client that refuses us with `existing` trust the roots at `directory`, a trust directory.

    bundle   the command that puts our roots there; empty where they are there
    install  the command that adds them to the system's store

    Raises UnusableDirectory.
    """
    if not client.variables:
        return Fix(install)
    wanted = environment(directory, existing)
    sets = client.variables[:1] if client.sets is None else client.sets
    variables = {
        name: value for name, value in wanted.variables.items() if name in sets and existing.get(name) != value
    }
    # npm reads its variables in any case, so another spelling may win.
    spellings = {name.lower() for name in sets}
    removed = tuple(name for name in wanted.removed if name.lower() in spellings)
    if variables or removed or bundle:
        return Fix(bundle, variables, removed)
    return Fix(change=f"{sets[0]} is right, so something stronger chooses its roots: {client.settings}")


def fix_switched_off(client: Client, existing: Mapping[str, str]) -> Fix:
    """What makes a client verify that accepts every server when started with `existing`."""
    switches = {switch.lower() for switch in client.switches}
    if found := tuple(name for name in existing if name.lower() in switches):
        return Fix(removed=found)
    return Fix(change=f"take out what switches verification off: {client.settings}")


def _said(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:{pattern})", re.MULTILINE)


_ANSWERED = _said(r"answered [1-5]\d\d\b")  # what curl is told to print, and our own scripts for each URL


def _script(*before: str) -> Callable[[Target], Arguments]:
    return lambda target: (*before, target.url)


def _curl(target: Target) -> Arguments:
    return ("-sS", "-o", "/dev/null", "-w", "answered %{http_code} %{url_effective}\\n", target.url)


def _wget(target: Target) -> Arguments:
    return ("-S", "-nv", "-t1", "--max-redirect=0", "-O", "/dev/null", target.url)


def _openssl(target: Target) -> Arguments:
    server = f"[{target.peer}]:{target.port}" if ":" in target.peer else f"{target.peer}:{target.port}"
    name = ("-noservername", "-verify_ip") if _is_address(target.host) else ("-verify_hostname",)
    sni = () if _is_address(target.host) else ("-servername", target.host)
    return ("s_client", "-verify_return_error", *sni, *name, target.host, "-connect", server)


def _gnutls(target: Target) -> Arguments:
    names = () if target.via is None else (f"--sni-hostname={target.host}", f"--verify-hostname={target.host}")
    return (*names, "-p", str(target.port), target.peer)


def _git(target: Target) -> Arguments:
    return ("-c", "http.followRedirects=false", "ls-remote", target.url)


def _pip(target: Target) -> Arguments:
    # The URL of a file, so that no index is asked for anything; a file that is never there.
    quiet = ("--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries=0", "--no-deps", "--dry-run")
    return ("install", *quiet, f"{target.url.rstrip('/')}/outgate-0-py3-none-any.whl")


def _node(target: Target) -> Arguments:
    return ("-e", scripts.NODE, "there" if target.via is None else "here", target.url)


def _npm(target: Target) -> Arguments:
    return ("ping", "--fetch-retries=0", "--update-notifier=false", "--logs-max=0", f"--registry={target.url}")


def _java(target: Target) -> Arguments:
    """Every JRE has keytool, which fetches a revocation list from a URL, verifying the server as any program does."""
    via = () if target.via is None else ("-Dhttps.proxyHost=127.0.0.1", f"-Dhttps.proxyPort={target.via}")
    return (*via, "sun.security.tools.keytool.Main", "-printcrl", "-file", target.url)


def _cargo(target: Target) -> Arguments:
    return ("--config", "net.retry=0", "search", "--index", f"sparse+{target.url.rstrip('/')}/", "outgate")


def _kubectl(target: Target) -> Arguments:
    alone = ("--kubeconfig=/dev/null", "--username=none", "--password=none")  # no cluster's credentials go out
    return ("-v=6", *alone, f"--server={target.url}", "get", "--raw", "/")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _python(name: str, script: str, variables: tuple[str, ...], otherwise: str) -> Client:
    version = "platform.python_version()" if name == "python" else f"importlib.metadata.version({name!r})"
    # The prefix tells one Python from another.
    show = f"import importlib.metadata, platform, ssl, sys; print({version}, sys.prefix)"
    code = "verify=False, ssl=False or an unverified context in the code"
    arguments = _script("-c", script)
    return Client(
        name, "python3", arguments, _ANSWERED, variables, otherwise, code, version=("-c", show), every=True
    )  # fmt: skip


CLIENTS = (
    Client(
        "curl", "curl", _curl, _ANSWERED,
        ("CURL_CA_BUNDLE", *OPENSSL), SYSTEM, "cacert, capath and insecure in ~/.curlrc",
    ),
    Client(
        "wget", "wget", _wget, _said(r"\s+HTTP/\d"),
        ("WGETRC",), SYSTEM, "ca_certificate and check_certificate in wgetrc",
    ),
    Client(
        "openssl", "openssl", _openssl, _said(r"\s*Verify return code: 0 \(ok\)"),
        OPENSSL, SYSTEM, "openssl.cnf", version=("version",),
    ),
    Client(
        "gnutls-cli", "gnutls-cli", _gnutls, _said(r"- Status: The certificate is trusted"),
        (), SYSTEM, "GNUTLS_SYSTEM_PRIORITY_FILE",
    ),
    Client(
        "git", "git", _git,
        _said(
            r"fatal: (?:repository '\S+' not found|\S+/info/refs not valid: is this a git repository"
            r"|could not read Username|unable to access '\S+': The requested URL returned error: \d{3})|[0-9a-f]{40}\t"
        ),
        ("GIT_SSL_CAINFO",), SYSTEM, "http.sslCAInfo and http.sslVerify in git's configuration",
        switches=("GIT_SSL_NO_VERIFY",),
    ),
    _python("python", scripts.URLLIB, OPENSSL, SYSTEM),
    _python("requests", scripts.REQUESTS, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), CERTIFI),
    _python("aiohttp", scripts.AIOHTTP, OPENSSL, SYSTEM),
    _python("httpx", scripts.HTTPX, OPENSSL, CERTIFI),
    Client(
        "pip", "pip", _pip,
        _said(r"\s*Downloading https|\s*ERROR: HTTP error \d{3}|.*\(Caused by ResponseError\('too many \d{3} error"),
        # The requests inside pip takes its own variables before the choice of pip, be that PIP_CERT or pip.conf.
        ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT"), f"{CERTIFI}; from 24.2 on also {SYSTEM}",
        "trusted-host in pip.conf", switches=("PIP_TRUSTED_HOST",), timeout_s=30,
    ),
    Client(
        "node", "node", _node, _ANSWERED,
        ("NODE_EXTRA_CA_CERTS",), COMPILED_IN, "NODE_OPTIONS, and ca and rejectUnauthorized in the code",
        switches=("NODE_TLS_REJECT_UNAUTHORIZED",),
    ),
    Client(
        "npm", "npm", _npm, _said(r"npm \S+ (?:PONG|code E\d{3}\b)"),
        ("npm_config_cafile", "NODE_EXTRA_CA_CERTS"), COMPILED_IN, "ca, cafile and strict-ssl in npmrc",
        switches=("npm_config_strict_ssl", "NODE_TLS_REJECT_UNAUTHORIZED"), timeout_s=30,
    ),
    Client(
        "deno", "deno", _script("eval", "--no-config", scripts.FETCH % "Deno.args"), _ANSWERED,
        ("DENO_CERT", "NODE_EXTRA_CA_CERTS"), COMPILED_IN, "--unsafely-ignore-certificate-errors",
    ),
    Client(
        "bun", "bun", _script("-e", scripts.FETCH % "process.argv.slice(1)"), _ANSWERED,
        ("NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"), COMPILED_IN, "bunfig.toml, and ca and rejectUnauthorized in the code",
        switches=("NODE_TLS_REJECT_UNAUTHORIZED",),
    ),
    Client(
        "java", "java", _java,
        _said(
            r"X\.509 CRL|keytool error: java\.(?:security\.cert\.CRLException|io\.FileNotFoundException: https"
            r"|io\.IOException: Server returned HTTP)"
        ),
        (JAVA, "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"), "its own cacerts", "java.security, and options of the program",
        sets=(JAVA, "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"), version=("-version",), timeout_s=30,
    ),
    Client(
        "kubectl", "kubectl", _kubectl,
        _said(r'I\d+ .*round_trippers\.go:\d+\] (?:GET \S+ [1-5]\d\d |"Response" .*status="[1-5]\d\d)'),
        OPENSSL, SYSTEM, "certificate-authority and insecure-skip-tls-verify in its configuration",
        version=("version", "--client"),
    ),
    Client(
        "cargo", "cargo", _cargo,
        _said(r"error: (?:expected |missing field|config\.json not found)|  failed to get successful HTTP response"),
        ("CARGO_HTTP_CAINFO", "SSL_CERT_FILE"), SYSTEM, "http.cainfo in cargo's config.toml", timeout_s=30,
    ),
    Client(
        "ruby", "ruby", _script("-rnet/http", "-e", scripts.RUBY), _ANSWERED,
        OPENSSL, SYSTEM, "verify_mode and ca_file in the code",
    ),
    Client(
        "php", "php", _script("-r", scripts.PHP), _ANSWERED,
        OPENSSL, SYSTEM, "openssl.cafile in php.ini, and verify_peer in the code",
        sets=("SSL_CERT_FILE", PHP_SCAN),  # its streams read the one, its curl the other
        version=("-r", "extension_loaded('openssl') or exit(1); echo PHP_VERSION;"),
    ),
    Client(
        "perl", "perl", _script("-MHTTP::Tiny", "-e", scripts.PERL), _ANSWERED,
        OPENSSL, SYSTEM, "verify_SSL in the code", version=("-MIO::Socket::SSL", "-e", "printf '%vd', $^V"),
    ),
)  # fmt: skip
