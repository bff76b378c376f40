import hashlib
import json
import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pki.authority import certificates_pem, create_authority
from pki.distribution import (
    ADDING,
    CONSTANT,
    JAVA,
    PHP_SCAN,
    REPLACING,
    MalformedBundle,
    UnusableDirectory,
    environment,
    shell_script,
    trust_files,
)
from pki.trust import MAX_BUNDLE, TrustError, public_roots, system_bundle_path, write_trust
from tests.pki.clients import PYTHON, Outcome, program, run, serving

NOW = datetime(2026, 11, 22, tzinfo=UTC)
OURS = certificates_pem(create_authority(NOW).roots[0].certificate)
OTHER = certificates_pem(create_authority(NOW).roots[0].certificate)
DIRECTORY = "/etc/outgate/trust"
HOSTILE = '/it\'s a "trust" directory/$(touch owned)`x`;*'
OPTIONS = (
    f"-Djavax.net.ssl.trustStore={DIRECTORY}/truststore.jks "
    "-Djavax.net.ssl.trustStoreType=jks -Djavax.net.ssl.trustStorePassword=changeit"
)


# The files


def test_a_trust_directory_holds_ours_alone_and_ours_with_the_public_roots() -> None:
    files = trust_files(DIRECTORY, OURS, OTHER)
    assert list(files) == ["ca.crt", "bundle.pem", "truststore.jks", "wgetrc", "outgate.ini", "env.sh", "manifest.json"]
    assert files["ca.crt"] == OURS
    assert files["bundle.pem"] == OURS + OTHER
    assert files["wgetrc"] == b"ca_certificate = /etc/outgate/trust/bundle.pem\n"


def test_the_same_roots_give_the_same_bytes() -> None:
    assert trust_files(DIRECTORY, OURS, OTHER) == trust_files(DIRECTORY, OURS, OTHER)


def test_the_manifest_has_the_digest_of_every_other_file() -> None:
    files = trust_files(DIRECTORY, OURS, OTHER)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert manifest["certificates"] == 2
    assert len(manifest["roots"]) == 1


def test_a_root_that_is_public_already_stands_once() -> None:
    assert trust_files(DIRECTORY, OURS, OTHER + OURS)["bundle.pem"] == OURS + OTHER


def test_comments_and_line_ends_of_the_public_bundle_are_left_behind() -> None:
    messy = b"# caf\xe9, in Latin-1\r\n" + OTHER.replace(b"\n", b"\r\n") + b"trailing words"
    assert trust_files(DIRECTORY, OURS, messy)["bundle.pem"] == OURS + OTHER


def test_a_public_root_that_a_strict_parser_refuses_is_carried_all_the_same() -> None:
    negative_serial = b"-----BEGIN CERTIFICATE-----\nMAcwBQIB/wIA\n-----END CERTIFICATE-----\n"
    assert trust_files(DIRECTORY, OURS, negative_serial)["bundle.pem"] == OURS + negative_serial


def test_a_root_with_trust_settings_is_left_behind_for_they_may_say_distrust() -> None:
    settings = OTHER.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE")
    assert trust_files(DIRECTORY, OURS, settings + OTHER)["bundle.pem"] == OURS + OTHER
    assert trust_files(DIRECTORY, OURS, settings)["bundle.pem"] == OURS


def test_no_public_roots_leave_ours_alone() -> None:
    assert trust_files(DIRECTORY, OURS, b"")["bundle.pem"] == OURS


@pytest.mark.parametrize(
    ("roots", "public", "message"),
    [
        pytest.param(b"", OTHER, "our roots: no certificate in it", id="no root"),
        pytest.param(b"not PEM at all", OTHER, "our roots: no certificate in it", id="root not PEM"),
        pytest.param(OURS, OTHER[:300], "public roots: a certificate has no end", id="file cut off"),
        pytest.param(OURS, OTHER[:300] + OTHER, "public roots: a certificate has no end", id="first one cut off"),
        pytest.param(
            OURS, OTHER.replace(b"MII", b"M!I", 1), "public roots: certificate 1 is not base64", id="not base64"
        ),
        pytest.param(
            OURS,
            OTHER + b"-----BEGIN CERTIFICATE-----\nMAg=\n-----END CERTIFICATE-----\n",
            "public roots: certificate 2 is cut off or no certificate",
            id="not a whole DER sequence",
        ),
    ],
)
def test_a_broken_bundle_is_refused(roots: bytes, public: bytes, message: str) -> None:
    with pytest.raises(MalformedBundle, match=message):
        trust_files(DIRECTORY, roots, public)


@pytest.mark.parametrize("directory", ["trust", "", "/a\nb", "/a\0b", "/a\udcff", "/a:b"])
def test_a_directory_that_variables_cannot_carry_is_refused(directory: str) -> None:
    with pytest.raises(UnusableDirectory):
        trust_files(directory, OURS, OTHER)
    with pytest.raises(UnusableDirectory):
        environment(directory, {})


# The variables


def test_replacing_variables_name_the_bundle_and_adding_ones_our_root() -> None:
    variables = environment(DIRECTORY, {}).variables
    assert {variables[name] for name in REPLACING} == {f"{DIRECTORY}/bundle.pem"}
    assert {variables[name] for name in ADDING} == {f"{DIRECTORY}/ca.crt"}
    assert variables.items() >= CONSTANT.items()
    assert variables["WGETRC"] == f"{DIRECTORY}/wgetrc"
    assert variables[JAVA] == OPTIONS


def test_inside_run_existing_values_are_replaced_and_reported() -> None:
    existing = {
        "SSL_CERT_FILE": "/corp.pem",
        "SSL_CERT_DIR": "/etc/ssl/certs",
        "PATH": "/bin",
        "NODE_USE_SYSTEM_CA": "1",
    }
    found = environment(DIRECTORY, existing)
    assert found.replaced == ("SSL_CERT_FILE", "SSL_CERT_DIR")
    assert found.removed == ("SSL_CERT_DIR",)
    child = found.over(existing)
    assert child["SSL_CERT_FILE"] == f"{DIRECTORY}/bundle.pem"
    assert child["PATH"] == "/bin"
    assert "SSL_CERT_DIR" not in child


def test_every_spelling_of_an_npm_variable_gives_way() -> None:
    existing = {"NPM_CONFIG_CAFILE": "/corp.pem"}
    child = environment(DIRECTORY, existing).over(existing)
    assert "NPM_CONFIG_CAFILE" not in child
    assert child["npm_config_cafile"] == f"{DIRECTORY}/bundle.pem"


def test_kept_values_are_never_touched_and_are_reported() -> None:
    existing = {
        "SSL_CERT_FILE": "/corp.pem",
        "SSL_CERT_DIR": "/certs",
        "NPM_CONFIG_CAFILE": "/npm.pem",
        "NODE_USE_SYSTEM_CA": "1",
    }
    found = environment(DIRECTORY, existing, keep_existing=True)
    assert set(found.kept) == {"SSL_CERT_FILE", "SSL_CERT_DIR", "NPM_CONFIG_CAFILE"}
    child = found.over(existing)
    assert child.items() >= existing.items()
    assert "npm_config_cafile" not in child
    assert child["CURL_CA_BUNDLE"] == f"{DIRECTORY}/bundle.pem"


@pytest.mark.parametrize("keep_existing", [False, True])
def test_applied_to_its_own_result_nothing_changes(keep_existing: bool) -> None:
    existing = {JAVA: "-Xmx1g", PHP_SCAN: "/etc/php"}
    once = environment(DIRECTORY, existing, keep_existing=keep_existing).over(existing)
    found = environment(DIRECTORY, once, keep_existing=keep_existing)
    assert (found.over(once), found.replaced, found.kept) == (once, (), ())


JAVA_ROWS = [
    pytest.param({}, False, {JAVA: OPTIONS}, id="none yet"),
    pytest.param({JAVA: "-Xmx1g"}, False, {JAVA: f"-Xmx1g {OPTIONS}"}, id="other options stay"),
    pytest.param({JAVA: "-Xmx1g"}, True, {JAVA: f"-Xmx1g {OPTIONS}"}, id="kept, and ours added"),
    pytest.param(
        {JAVA: "-Djavax.net.ssl.trustStore=/corp.jks"},
        False,
        {JAVA: f"-Djavax.net.ssl.trustStore=/corp.jks {OPTIONS}"},
        id="another store: ours comes last",
    ),
    pytest.param({JAVA: "-Djavax.net.ssl.trustStore=/corp.jks"}, True, {}, id="another store is kept"),
    pytest.param(
        {"_JAVA_OPTIONS": "-Djavax.net.ssl.trustStore=/corp.jks"},
        False,
        {JAVA: OPTIONS, "_JAVA_OPTIONS": f"-Djavax.net.ssl.trustStore=/corp.jks {OPTIONS}"},
        id="a store in the stronger variable",
    ),
    pytest.param({"JDK_JAVA_OPTIONS": "-Xmx1g"}, False, {JAVA: OPTIONS}, id="a stronger variable about other things"),
    pytest.param({JAVA: f"{OPTIONS} -Xmx1g"}, False, {JAVA: f"-Xmx1g {OPTIONS}"}, id="others came after ours"),
    pytest.param({JAVA: f"{OPTIONS} -Xmx1g"}, True, {JAVA: f"-Xmx1g {OPTIONS}"}, id="kept, others came after ours"),
    pytest.param({JAVA: f"{OPTIONS} {OPTIONS}"}, False, {JAVA: OPTIONS}, id="doubled by somebody"),
    pytest.param(
        {JAVA: f"{OPTIONS} -Djavax.net.ssl.trustStore=/corp.jks"},
        False,
        {JAVA: f"-Djavax.net.ssl.trustStore=/corp.jks {OPTIONS}"},
        id="another store after ours",
    ),
    pytest.param({JAVA: f"{OPTIONS} -Djavax.net.ssl.trustStore=/corp.jks"}, True, {}, id="another after ours is kept"),
    pytest.param(
        {JAVA: """-Da="b  c" -De='"'"""}, False, {JAVA: f"""-Da="b  c" -De='"' {OPTIONS}"""}, id="quotes stay"
    ),
]


@pytest.mark.parametrize(("existing", "keep_existing", "expected"), JAVA_ROWS)
def test_java_options_are_merged(existing: dict[str, str], keep_existing: bool, expected: dict[str, str]) -> None:
    variables = environment(DIRECTORY, existing, keep_existing=keep_existing).variables
    assert {name: value for name, value in variables.items() if "JAVA" in name} == expected


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        pytest.param({}, f":{DIRECTORY}", id="none: those it was built with, and ours"),
        pytest.param({PHP_SCAN: "/etc/php"}, f"/etc/php:{DIRECTORY}", id="another"),
        pytest.param({PHP_SCAN: ""}, DIRECTORY, id="none was wanted"),
        pytest.param({PHP_SCAN: f"{DIRECTORY}:/etc/php"}, f"{DIRECTORY}:/etc/php", id="ours already"),
        pytest.param({PHP_SCAN: f"{DIRECTORY}/d"}, f"{DIRECTORY}/d:{DIRECTORY}", id="below ours"),
    ],
)
@pytest.mark.parametrize("keep_existing", [False, True])
def test_php_scans_our_directory_too(existing: dict[str, str], expected: str, keep_existing: bool) -> None:
    found = environment(DIRECTORY, existing, keep_existing=keep_existing)
    assert found.variables[PHP_SCAN] == expected
    assert PHP_SCAN not in (*found.replaced, *found.kept)


# env.sh, in real shells

EXISTING = [
    pytest.param({}, id="nothing"),
    pytest.param({JAVA: "-Xmx1g '-Da=b c'", PHP_SCAN: "/etc/php"}, id="java options"),
    pytest.param({JAVA: f"-Xmx1g {OPTIONS} -Xms1g", PHP_SCAN: ""}, id="java options around ours"),
    pytest.param({JAVA: "*", PHP_SCAN: f"{DIRECTORY}:/etc/php"}, id="a star, and ours"),
]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("directory", [DIRECTORY, HOSTILE], ids=["plain", "hostile"])
@pytest.mark.parametrize("existing", EXISTING)
def test_sourcing_env_sh_gives_the_same_environment(
    shell: str, directory: str, existing: dict[str, str], tmp_path: Path
) -> None:
    existing = {"SSL_CERT_DIR": "/etc/ssl/certs", "SSL_CERT_FILE": "/corp.pem"} | existing
    (tmp_path / "env.sh").write_text(shell_script(directory))
    show = shlex.join([PYTHON, "-c", "import os, json; print(json.dumps(dict(os.environ)))"])
    script = f". ./env.sh && . ./env.sh && exec {show}"
    done = subprocess.run([program(shell), "-euc", script], env=existing, cwd=tmp_path, capture_output=True, check=True)
    sourced = json.loads(done.stdout)
    for noise in ("PWD", "OLDPWD", "_", "SHLVL", "LC_CTYPE"):
        sourced.pop(noise, None)
    expected = environment(directory, existing).over(existing)
    assert sourced.pop(JAVA).split() == expected.pop(JAVA).split()
    assert sourced == expected
    assert os.listdir(tmp_path) == ["env.sh"]


# On disk


def test_write_trust_writes_only_what_differs(tmp_path: Path) -> None:
    files = trust_files(DIRECTORY, OURS, OTHER)
    assert write_trust(tmp_path / "a" / "trust", files) == tuple(files)
    assert write_trust(tmp_path / "a" / "trust", files) == ()
    changed = trust_files(DIRECTORY, OURS, b"")
    assert write_trust(tmp_path / "a" / "trust", changed) == ("bundle.pem", "truststore.jks", "manifest.json")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a" / "trust").iterdir()} == changed


def test_trust_files_can_be_read_by_every_user_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_trust(tmp_path, {"ca.crt": OURS})
    finally:
        os.umask(before)
    assert (tmp_path / "ca.crt").stat().st_mode & 0o777 == 0o644


def test_a_trust_directory_that_cannot_be_written_names_the_repair(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrustError, match="choose a directory you may write"):
        write_trust(tmp_path / "file" / "trust", {"ca.crt": OURS})


def test_a_new_trust_directory_can_be_entered_by_every_user_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_trust(tmp_path / "trust", {"ca.crt": OURS})
    finally:
        os.umask(before)
    assert (tmp_path / "trust").stat().st_mode & 0o777 == 0o755


def test_a_trust_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "trust").symlink_to("real")
    write_trust(tmp_path / "trust", {"ca.crt": OURS})
    assert (tmp_path / "real" / "ca.crt").read_bytes() == OURS


def in_its_place_a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def in_its_place_a_link_to_the_same(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(OURS)
    path.symlink_to(path.with_name("elsewhere"))


def in_its_place_an_endless_file(path: Path) -> None:
    path.symlink_to("/dev/zero")


def in_its_place_a_pipe(path: Path) -> None:
    os.mkfifo(path)


def in_its_place_a_secret(path: Path) -> None:
    path.write_bytes(OURS)
    path.chmod(0o600)


def in_its_place_what_others_may_write(path: Path) -> None:
    path.write_bytes(OURS)
    path.chmod(0o666)


PLANTED = [
    pytest.param(plant, id=plant.__name__.removeprefix("in_its_place_"))
    for plant in (
        in_its_place_a_link,
        in_its_place_a_link_to_the_same,
        in_its_place_an_endless_file,
        in_its_place_a_pipe,
        in_its_place_a_secret,
        in_its_place_what_others_may_write,
    )
]


@pytest.mark.parametrize("plant", PLANTED)
def test_what_was_planted_in_a_trust_directory_gives_way_and_is_not_followed(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    plant(tmp_path / "ca.crt")
    assert write_trust(tmp_path, {"ca.crt": OURS}) == ("ca.crt",)
    found = (tmp_path / "ca.crt").lstat()
    assert (stat.S_ISREG(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o644)
    assert (tmp_path / "ca.crt").read_bytes() == OURS
    if (tmp_path / "elsewhere").exists():
        assert (tmp_path / "elsewhere").read_bytes() == OURS


@pytest.mark.kernel
def test_a_full_disk_leaves_whole_files_and_one_line(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    script = (
        "import sys; from pathlib import Path; from pki.trust import TrustError, write_trust\n"
        "small = Path(sys.argv[1]); write_trust(small, {'ca.crt': b'old'})\n"
        "try: write_trust(small, {'ca.crt': b'new', 'bundle.pem': bytes(1 << 20)})\n"
        "except TrustError as error: print(error)\n"
        "print(sorted(path.name for path in small.iterdir()), (small / 'ca.crt').read_text())\n"
    )
    small = tmp_path / "small"
    small.mkdir()
    inside = 'mount -t tmpfs -o size=64k,mode=755 tmpfs "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside, "sh", str(small), PYTHON, script], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"{small}: No space left on device; make room there", "['ca.crt'] new"], done


def test_the_first_bundle_that_exists_is_the_systems(tmp_path: Path) -> None:
    (tmp_path / "second.pem").write_bytes(OTHER)
    (tmp_path / "third.pem").write_bytes(OTHER)
    candidates = [str(tmp_path / name) for name in ("first.pem", "second.pem", "third.pem")]
    assert system_bundle_path(candidates) == tmp_path / "second.pem"


def test_public_roots_are_those_the_program_trusts_today(tmp_path: Path) -> None:
    (tmp_path / "corp.pem").write_bytes(OTHER)
    assert public_roots({"SSL_CERT_FILE": str(tmp_path / "corp.pem")}) == OTHER
    with pytest.raises(TrustError, match=r"gone\.pem: No such file .*; name a readable PEM bundle in SSL_CERT_FILE"):
        public_roots({"SSL_CERT_FILE": str(tmp_path / "gone.pem")})


def test_the_bundle_that_is_to_be_written_is_no_choice_of_public_roots(tmp_path: Path) -> None:
    system = system_bundle_path()
    if system is None:
        pytest.skip("this machine has no bundle of public roots")
    write_trust(tmp_path / "trust", trust_files(DIRECTORY, OURS, OTHER))
    (tmp_path / "link").symlink_to("trust")
    sourced = {"SSL_CERT_FILE": str(tmp_path / "link" / "bundle.pem")}
    assert public_roots(sourced, tmp_path / "trust") == system.read_bytes()
    assert public_roots(sourced, tmp_path / "another") == OURS + OTHER


UNUSABLE = [
    pytest.param(bytes(range(256)) * 4096, "no CERTIFICATE in it", id="binary"),
    pytest.param(b"", "no CERTIFICATE in it", id="empty"),
    pytest.param(b"# roots\r\n", "no CERTIFICATE in it", id="comments alone"),
    pytest.param(OTHER.replace(b"CERT", b"TRUSTED CERT"), "no CERTIFICATE in it", id="trust settings alone"),
    pytest.param(OTHER[:300], "a certificate has no end", id="cut off"),
    pytest.param(OTHER * (MAX_BUNDLE // len(OTHER) + 1), "File too large", id="huge"),
]


@pytest.mark.parametrize(("content", "message"), UNUSABLE)
def test_a_choice_that_holds_no_roots_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "corp.pem").write_bytes(content)
    with pytest.raises(TrustError, match=rf"corp\.pem: {message}; name a readable PEM bundle in SSL_CERT_FILE"):
        public_roots({"SSL_CERT_FILE": str(tmp_path / "corp.pem")})


def test_a_choice_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(TrustError, match=r"not a file|Is a directory"):
            public_roots({"SSL_CERT_FILE": str(path)})


def test_public_roots_without_a_choice_are_the_systems() -> None:
    system = system_bundle_path()
    if system is None:
        pytest.skip("this machine has no bundle of public roots")
    assert public_roots({}) == system.read_bytes()


# Real clients: with these variables each trusts the gate, without them each refuses it


@dataclass(frozen=True, slots=True)
class Gate:
    port: int
    directory: str

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/"


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    directory = tmp_path_factory.mktemp("trust") / "it's a directory"
    authority = create_authority(datetime.now(UTC))
    system = system_bundle_path()
    public = system.read_bytes() if system else b""
    write_trust(directory, trust_files(str(directory), certificates_pem(authority.roots[0].certificate), public))
    with serving(authority.issuer) as port:
        yield Gate(port, str(directory))


def curl(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    return run([program("curl"), "-sS", gate.url], variables, home)


def wget(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    return run([program("wget"), "-nv", "-t1", "-O-", gate.url], variables, home)


def openssl(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    command = [program("openssl"), "s_client", "-verify_return_error", "-connect", f"localhost:{gate.port}"]
    return run(command, variables, home, trusted=lambda said: "Verify return code: 0 (ok)" in said)


def git(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    # Past TLS it is told 404, and says so: that is what trust looks like here.
    command = [program("git"), "ls-remote", gate.url]
    return run(command, variables, home, trusted=lambda said: "not found" in said)


def node_fetch(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    script = f"fetch({gate.url!r}).then(r => r.text()).then(console.log)"
    return run([program("node"), "-e", script], variables, home)


def npm(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    command = [program("npm"), "ping", "--fetch-retries=0", f"--registry={gate.url}"]
    return run(command, variables, home, trusted=lambda said: "PONG" in said)


def uv(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    # Past TLS the answer is no index, and it says so.
    command = [program("uv"), "pip", "install", "--no-cache", "--target", "t", "--index-url", gate.url, "nothing"]
    return run(command, variables, home, trusted=lambda said: "Content-Type" in said)


def php_curl(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    script = (
        "$c = curl_init($argv[1]); curl_setopt($c, CURLOPT_RETURNTRANSFER, 1); echo curl_exec($c) ?: curl_error($c);"
    )
    has_curl = run([program("php"), "-m"], {}, home, trusted=lambda said: "\ncurl\n" in said)
    if not has_curl.trusted:
        pytest.skip("PHP here has no curl")
    return run([program("php"), "-r", script, gate.url], variables, home)


def php_streams(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    return run([program("php"), "-r", "echo file_get_contents($argv[1]);", gate.url], variables, home)


def java(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    (home / "Fetch.java").write_text(
        "import java.net.URI; import java.net.http.*;\n"
        "class Fetch { public static void main(String[] a) throws Exception {\n"
        "  var request = HttpRequest.newBuilder(URI.create(a[0])).build();\n"
        "  System.out.println(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body());\n"
        "}}\n"
    )
    program("javac")  # a source file is launched by compiling it
    return run([program("java"), "Fetch.java", gate.url], variables, home)


def python_urllib(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    script = f"import urllib.request; print(urllib.request.urlopen({gate.url!r}).read())"
    return run([PYTHON, "-c", script], variables, home)


def python_requests(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    return run([PYTHON, "-c", f"import requests; print(requests.get({gate.url!r}).text)"], variables, home)


def python_aiohttp(gate: Gate, variables: Mapping[str, str], home: Path) -> Outcome:
    script = (
        "import asyncio, aiohttp\n"
        "async def main():\n"
        f"    async with aiohttp.request('GET', {gate.url!r}) as answer: print(await answer.text())\n"
        "asyncio.run(main())\n"
    )
    return run([PYTHON, "-c", script], variables, home)


type Client = Callable[[Gate, Mapping[str, str], Path], Outcome]
CLIENTS = [
    pytest.param(client, id=client.__name__)
    for client in (
        curl,
        wget,
        openssl,
        git,
        node_fetch,
        npm,
        uv,
        php_curl,
        php_streams,
        java,
        python_urllib,
        python_requests,
        python_aiohttp,
    )
]


# Every one of them names roots that do not sign our leaves.
ELSEWHERE = {
    "SSL_CERT_FILE": "other.pem",
    "SSL_CERT_DIR": ".",
    "CURL_CA_BUNDLE": "other.pem",
    "REQUESTS_CA_BUNDLE": "other.pem",
    "GIT_SSL_CAINFO": "other.pem",
    "NODE_EXTRA_CA_CERTS": "other.pem",
    "NPM_CONFIG_CAFILE": "other.pem",
    "WGETRC": "other.rc",
    "PHP_INI_SCAN_DIR": ":.",  # beside the directory that has the extensions
    "JAVA_TOOL_OPTIONS": "-Djavax.net.ssl.trustStore=other.jks -Djavax.net.ssl.trustStoreType=pkcs12",
    "JDK_JAVA_OPTIONS": "-Djavax.net.ssl.trustStore=other.jks",
}


@pytest.mark.client
@pytest.mark.parametrize("existing", [{}, ELSEWHERE], ids=["alone", "over other choices"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_with_the_variables_trusts_the_gate(
    client: Client, existing: Mapping[str, str], gate: Gate, tmp_path: Path
) -> None:
    (tmp_path / "other.pem").write_bytes(OTHER)
    (tmp_path / "other.rc").write_text("ca_certificate = other.pem\n")
    (tmp_path / "other.ini").write_text('curl.cainfo = "other.pem"\nopenssl.cafile = "other.pem"\n')
    outcome = client(gate, environment(gate.directory, existing).over(existing), tmp_path)
    assert outcome.trusted, outcome.said


@pytest.mark.client
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_without_the_variables_refuses_the_gate(client: Client, gate: Gate, tmp_path: Path) -> None:
    outcome = client(gate, {}, tmp_path)
    assert not outcome.trusted, outcome.said
    assert "certificat" in outcome.said.lower() or "PKIX" in outcome.said, outcome.said
