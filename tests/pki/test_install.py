"""The machine's own store, in a mount namespace whose /etc, /usr/local and /var/lib are layers over the real ones."""

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pki.authority import certificate_id, certificates_pem, create_authority, create_root
from pki.install import InstallError, install, mechanism_of, uninstall
from tests.pki.clients import PYTHON, program, serving
from tests.sandbox_user import as_user

AUTHORITY = create_authority(datetime.now(UTC))
ROOT = AUTHORITY.roots[0].certificate
OURS = certificates_pem(ROOT)
NAME = f"outgate-{certificate_id(ROOT)}"
NEXT = create_root(datetime.now(UTC), name="Next").certificate
NEXT_NAME = f"outgate-{certificate_id(NEXT)}"

DEBIAN_ANCHORS = "/usr/local/share/ca-certificates"
DEBIAN_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

LAYERS = """
mount -t tmpfs tmpfs "$0"
for place in etc usr/local usr/sbin var/lib; do
    mkdir -p "$0/$place" "$0/work/$place"
    mount -t overlay overlay -o "lowerdir=/$place,upperdir=$0/$place,workdir=$0/work/$place" "/$place"
done
echo ready
exec cat
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change what a machine trusts")


@dataclass(frozen=True, slots=True)
class Machine:
    """A mount namespace: what is written below its layers is gone with it."""

    pid: int

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        within = ["nsenter", "--mount", "--target", str(self.pid), "--wd=/", *command]
        return subprocess.run(within, capture_output=True, text=True, timeout=120)

    def sh(self, script: str, *arguments: str) -> str:
        done = self.run("sh", "-euc", script, "sh", *arguments)
        assert done.returncode == 0, done
        return done.stdout

    def outgate(self, *words: str) -> subprocess.CompletedProcess[str]:
        checkout = Path(__file__).parents[2]
        return self.run("env", f"PYTHONPATH={checkout}", PYTHON, "-m", "proxy", "trust", *words)

    def write(self, path: str, content: str, mode: str = "644") -> None:
        self.sh('mkdir -p "$(dirname "$1")"; printf %s "$2" > "$1"; chmod "$3" "$1"', path, content, mode)

    def trusts(self, port: int) -> dict[str, bool]:
        """Which clients trust the server at `port`, none of them with a variable."""
        url = f"https://localhost:{port}/"
        commands = {
            "curl": ["curl", "-sS", url],
            "openssl": ["openssl", "s_client", "-verify_return_error", "-connect", f"localhost:{port}"],
            "python": [PYTHON, "-c", f"import urllib.request; urllib.request.urlopen({url!r})"],
            "git": ["git", "ls-remote", url],
        }
        home = ["env", "-i", f"PATH={os.environ['PATH']}", "HOME=/nowhere"]
        done = {name: self.run(*home, *command) for name, command in commands.items()}
        trusted = {name: one.returncode == 0 for name, one in done.items()}
        return trusted | {"git": "not found" in done["git"].stderr}  # it is told 404, past TLS


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """This machine, as a copy to be changed."""
    if os.geteuid() != 0:
        pytest.skip("only root may change what a machine trusts")
    (tmp_path / "layers").mkdir()
    command = ["unshare", "--mount", "sh", "-euc", LAYERS, str(tmp_path / "layers")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as held:
        assert held.stdin is not None
        assert held.stdout is not None
        assert held.stderr is not None
        if held.stdout.readline() != b"ready\n":
            pytest.skip(f"no layers over this machine's directories: {held.stderr.read().decode().strip()}")
        yield Machine(held.pid)
        held.stdin.close()


@pytest.fixture
def debian(machine: Machine) -> Machine:
    if not Path("/usr/sbin/update-ca-certificates").exists() or not Path("/etc/debian_version").exists():
        pytest.skip("no Debian with ca-certificates")
    # A few roots and no hook for Java, which takes seconds; and made once, so that only what we do makes a difference.
    machine.sh(
        "sed -i '6,$d' /etc/ca-certificates.conf; rm -f /etc/ca-certificates/update.d/*;"
        "find /etc/ssl/certs -type l -delete; update-ca-certificates"
    )
    return machine


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "ca.crt").write_bytes(OURS)
    return str(tmp_path / "ca.crt")


def store_of(machine: Machine) -> str:
    """The bundle's digest, and every link in its directory with where it leads."""
    return machine.sh(f"sha256sum {DEBIAN_BUNDLE}; cd /etc/ssl/certs; find . -type l -printf '%p %l\\n' | sort")


# Debian


@pytest.mark.kernel
def test_after_install_programs_trust_without_any_variable_and_after_uninstall_no_more(
    debian: Machine, root: str
) -> None:
    before = store_of(debian)
    with serving(AUTHORITY.issuer) as port:
        assert not any(debian.trusts(port).values())
        installed = debian.outgate("install", "--root", root)
        assert installed.returncode == 0, installed
        assert f"installed: {DEBIAN_ANCHORS}/{NAME}.crt" in installed.stdout
        assert "outgate trust doctor" in installed.stdout
        assert all(debian.trusts(port).values())
        removed = debian.outgate("uninstall")
        assert removed.stdout == f"removed: {DEBIAN_ANCHORS}/{NAME}.crt\n", removed
        assert not any(debian.trusts(port).values())
    assert store_of(debian) == before


@pytest.mark.kernel
def test_debians_java_follows_both_ways(machine: Machine, root: str) -> None:
    if not Path("/etc/ca-certificates/update.d/jks-keystore").exists():
        pytest.skip("no ca-certificates-java")
    listing = [program("keytool"), "-list", "-cacerts", "-storepass", "changeit", "-alias", f"debian:{NAME}.pem"]
    machine.outgate("install", "--root", root)
    assert machine.run(*listing).returncode == 0
    machine.outgate("uninstall")
    assert machine.run(*listing).returncode != 0


@pytest.mark.kernel
def test_a_second_install_changes_nothing_and_runs_nothing(debian: Machine, root: str) -> None:
    debian.outgate("install", "--root", root)
    when = debian.sh(f"stat -c %y {DEBIAN_BUNDLE} {DEBIAN_ANCHORS}/{NAME}.crt")
    again = debian.outgate("install", "--root", root, "--json")
    assert json.loads(again.stdout) == {
        "anchors": DEBIAN_ANCHORS,
        "bundle": DEBIAN_BUNDLE,
        "added": [],
        "kept": [f"{NAME}.crt"],
        "removed": [],
    }
    assert debian.sh(f"stat -c %y {DEBIAN_BUNDLE} {DEBIAN_ANCHORS}/{NAME}.crt") == when


@pytest.mark.kernel
def test_a_bundle_that_lost_our_root_gets_it_again(debian: Machine, root: str) -> None:
    debian.outgate("install", "--root", root)
    debian.write(DEBIAN_BUNDLE, "")
    assert "installed already" in debian.outgate("install", "--root", root).stdout
    assert OURS.decode() in debian.sh(f"cat {DEBIAN_BUNDLE}")


@pytest.mark.kernel
def test_after_a_rotation_the_former_root_goes_and_its_links_with_it(debian: Machine, tmp_path: Path) -> None:
    for name, roots in {"before": [ROOT], "during": [ROOT, NEXT], "after": [NEXT]}.items():
        (tmp_path / name).write_bytes(certificates_pem(*roots))
    debian.outgate("install", "--root", str(tmp_path / "before"))
    during = json.loads(debian.outgate("install", "--root", str(tmp_path / "during"), "--json").stdout)
    assert (during["added"], during["kept"], during["removed"]) == ([f"{NEXT_NAME}.crt"], [f"{NAME}.crt"], [])
    after = json.loads(debian.outgate("install", "--root", str(tmp_path / "after"), "--json").stdout)
    assert (after["added"], after["kept"], after["removed"]) == ([], [f"{NEXT_NAME}.crt"], [f"{NAME}.crt"])
    bundle = debian.sh(f"cat {DEBIAN_BUNDLE}")
    assert OURS.decode() not in bundle
    assert certificates_pem(NEXT).decode() in bundle
    assert NAME not in debian.sh("cd /etc/ssl/certs; find . -type l -printf '%p %l\\n'")


@pytest.mark.kernel
def test_what_others_put_there_stays(debian: Machine, root: str) -> None:
    other = certificates_pem(NEXT).decode()
    theirs = {
        f"{DEBIAN_ANCHORS}/corp.crt": other,
        f"{DEBIAN_ANCHORS}/{NAME}.pem": "no certificate",  # our name, not our content
        f"{DEBIAN_ANCHORS}/outgate-{'0' * 16}.crt": other,
    }
    for path, content in theirs.items():
        debian.write(path, content)
    debian.sh(f"ln -s corp.crt {DEBIAN_ANCHORS}/{NEXT_NAME}.crt")
    debian.outgate("install", "--root", root)
    removed = debian.outgate("uninstall")
    assert removed.stdout == f"removed: {DEBIAN_ANCHORS}/{NAME}.crt\n", removed
    for path, content in theirs.items():
        assert debian.sh('cat "$1"', path) == content
    debian.sh(f"test -L {DEBIAN_ANCHORS}/{NEXT_NAME}.crt")


@pytest.mark.kernel
def test_a_former_root_that_another_file_holds_too_is_named_and_nothing_changes(debian: Machine, root: str) -> None:
    debian.outgate("install", "--root", root)
    debian.write(f"{DEBIAN_ANCHORS}/corp.crt", OURS.decode())
    refused = debian.outgate("uninstall")
    assert refused.returncode == 3
    assert f"root {certificate_id(ROOT)} is put there by another file too; remove that one first" in refused.stderr
    assert debian.sh(f"cat {DEBIAN_ANCHORS}/{NAME}.crt") == OURS.decode()


TOOLS = [
    pytest.param("echo broken >&2; exit 3", "exit status 3: broken; run it to see why", id="fails"),
    pytest.param("exit 0", f"without root {certificate_id(ROOT)} although it was made anew", id="does nothing"),
]


@pytest.mark.kernel
@pytest.mark.parametrize(("body", "message"), TOOLS)
def test_when_the_distributions_program_fails_our_files_are_as_before(
    body: str, message: str, debian: Machine, root: str
) -> None:
    debian.write("/usr/sbin/update-ca-certificates", f"#!/bin/sh\n{body}\n", "755")
    before = debian.sh(f"ls -A {DEBIAN_ANCHORS}")
    failed = debian.outgate("install", "--root", root)
    assert failed.returncode == 3
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert debian.sh(f"ls -A {DEBIAN_ANCHORS}") == before


@pytest.mark.kernel
def test_a_full_disk_leaves_nothing_behind(debian: Machine, root: str) -> None:
    debian.sh(
        f"mount -t tmpfs -o size=4k,nr_inodes=10 tmpfs {DEBIAN_ANCHORS}; head -c 4096 /dev/zero > {DEBIAN_ANCHORS}/x"
    )
    failed = debian.outgate("install", "--root", root)
    assert failed.returncode == 3
    assert "No space left on device; make room there" in failed.stderr
    assert debian.sh(f"ls -A {DEBIAN_ANCHORS}") == "x\n"


@pytest.mark.kernel
def test_a_read_only_system_is_named(debian: Machine, root: str) -> None:
    debian.sh(f"mount -t tmpfs -o ro tmpfs {DEBIAN_ANCHORS}")
    failed = debian.outgate("install", "--root", root)
    assert failed.returncode == 3
    assert "Read-only file system; make it writable for root" in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.kernel
def test_an_image_at_a_prefix_is_changed_by_its_own_program_and_this_machine_is_not(debian: Machine, root: str) -> None:
    """The image is the machine's own layers, seen at another path."""
    image = str(Path(root).with_name("image"))
    debian.sh('mkdir "$1"; mount --rbind / "$1"; mount -t tmpfs tmpfs /usr/local/share', image)
    installed = debian.outgate("install", "--root", root, "--prefix", image)
    assert f"installed: {image}{DEBIAN_ANCHORS}/{NAME}.crt" in installed.stdout, installed
    assert OURS.decode() in debian.sh(f'cat "$1"{DEBIAN_BUNDLE}', image)
    debian.sh(f"test ! -e {DEBIAN_ANCHORS}")
    assert debian.outgate("uninstall", "--prefix", image).returncode == 0
    assert OURS.decode() not in debian.sh(f'cat "$1"{DEBIAN_BUNDLE}', image)


# RHEL and SUSE


@pytest.mark.kernel
def test_rhels_mechanism_takes_and_returns_the_root(machine: Machine, root: str) -> None:
    """With p11-kit's own extraction, as update-ca-trust runs it; the script around it is not in Debian."""
    extracted = "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"
    anchors = "/etc/pki/ca-trust/source/anchors"
    module = f"module: {_trust_module()}\nx-init-reserved: paths='/etc/pki/ca-trust/source'\ntrust-policy: yes\n"
    words = "extract --format=pem-bundle --filter=ca-anchors --overwrite --purpose server-auth"
    machine.write("/etc/pkcs11/modules/p11-kit-trust.module", module)  # goes over Debian's, which reads elsewhere
    machine.write(
        "/usr/sbin/update-ca-trust",
        f'#!/bin/sh -e\n[ "$*" = extract ]\n{program("trust")} {words} {extracted}\n',
        "755",
    )
    machine.write(f"{anchors}/corp.pem", certificates_pem(NEXT).decode())
    machine.sh(f"mkdir -p {anchors} $(dirname {extracted}); update-ca-trust extract")
    before = machine.sh(f"cat {extracted}")
    assert certificates_pem(NEXT).decode() in before
    installed = machine.outgate("install", "--root", root)
    assert f"installed: {anchors}/{NAME}.pem" in installed.stdout, installed
    assert OURS.decode() in machine.sh(f"cat {extracted}")
    assert machine.outgate("uninstall").stdout == f"removed: {anchors}/{NAME}.pem\n"
    assert machine.sh(f"cat {extracted}") == before


@pytest.mark.kernel
def test_suses_mechanism_takes_and_returns_the_root(machine: Machine, root: str) -> None:
    """With a program that stands for SUSE's, and takes no option that is not SUSE's."""
    bundle, anchors = "/var/lib/ca-certificates/ca-bundle.pem", "/etc/pki/trust/anchors"
    machine.write(
        "/usr/sbin/update-ca-certificates",
        f"#!/bin/sh -e\n[ $# = 0 ]\nfind {anchors} -type f -exec cat '{{}}' + > {bundle}\n",
        "755",
    )
    machine.sh(f"mkdir -p {anchors} $(dirname {bundle}); update-ca-certificates")
    assert f"installed: {anchors}/{NAME}.pem" in machine.outgate("install", "--root", root).stdout
    assert machine.sh(f"cat {bundle}") == OURS.decode()
    assert machine.outgate("uninstall").stdout == f"removed: {anchors}/{NAME}.pem\n"
    assert machine.sh(f"cat {bundle}") == ""


def _trust_module() -> str:
    """p11-kit's trust module, wherever its package stands."""
    found = [str(path) for path in Path("/usr").glob("lib*/**/pkcs11/p11-kit-trust.so")]
    if not found:
        pytest.skip("p11-kit is not installed with its trust module")
    return found[0]


# What is there decides, and what cannot be done is one line


def image(directory: Path, *places: str) -> Path:
    for place in places:
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if place.endswith("/") else path.write_bytes(b"")
    return directory


MACHINES = [
    pytest.param(["usr/share/ca-certificates/", "usr/sbin/update-ca-certificates"], "usr/local/share", id="debian"),
    pytest.param(["etc/pki/ca-trust/source/", "usr/bin/update-ca-trust"], "etc/pki/ca-trust", id="rhel"),
    pytest.param(["etc/pki/trust/", "usr/sbin/update-ca-certificates"], "etc/pki/trust", id="suse"),
    pytest.param(
        ["etc/pki/ca-trust/source/", "usr/share/ca-certificates/", "usr/sbin/update-ca-certificates"],
        "usr/local/share",
        id="a directory of another distribution without its program",
    ),
]


@pytest.mark.parametrize(("places", "anchors"), MACHINES)
def test_the_mechanism_is_the_one_that_is_there(places: list[str], anchors: str, tmp_path: Path) -> None:
    assert mechanism_of(image(tmp_path, *places)).anchors.startswith(anchors)


@pytest.mark.parametrize("places", [[], ["usr/share/ca-certificates/"], ["usr/sbin/update-ca-certificates"]])
def test_without_a_mechanism_the_repair_is_named(places: list[str], tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="install ca-certificates"):
        mechanism_of(image(tmp_path, *places))


@needs_root
@pytest.mark.kernel
@pytest.mark.parametrize("link", ["usr/local/share/ca-certificates", "etc/ssl"])
def test_a_link_that_leads_out_of_an_image_is_refused(link: str, tmp_path: Path) -> None:
    prefix = image(tmp_path / "image", "usr/share/ca-certificates/", "usr/sbin/update-ca-certificates")
    outside = tmp_path / "outside"
    outside.mkdir()
    (prefix / link).parent.mkdir(parents=True, exist_ok=True)
    (prefix / link).symlink_to(outside)
    with pytest.raises(InstallError, match="a link leads out of"):
        install(OURS, prefix)
    with pytest.raises(InstallError, match="a link leads out of"):
        uninstall(prefix)
    assert list(outside.iterdir()) == []


@needs_root
@pytest.mark.kernel
def test_an_image_whose_program_cannot_run_is_left_as_it_was(tmp_path: Path) -> None:
    prefix = image(tmp_path, "usr/share/ca-certificates/", "usr/sbin/update-ca-certificates")
    with pytest.raises(
        InstallError, match=rf"chroot {shlex.quote(str(prefix))} update-ca-certificates: exit status 12"
    ):
        install(OURS, prefix)
    assert list((prefix / "usr/local/share/ca-certificates").iterdir()) == []


def test_no_root_is_nothing_to_install() -> None:
    with pytest.raises(InstallError, match="no certificate in it; nothing to install"):
        install(b"")


@pytest.mark.kernel
@needs_root
@pytest.mark.parametrize("words", [["install", "--root"], ["uninstall"]])
def test_an_ordinary_user_is_told_who_may(words: list[str]) -> None:
    with tempfile.NamedTemporaryFile() as file:  # where every user may go, as a test's own directory is not
        file.write(OURS)
        file.flush()
        Path(file.name).chmod(0o644)
        command = [PYTHON, "-m", "proxy", "trust", *words, *([file.name] if "--root" in words else [])]
        done = subprocess.run(as_user(command), capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 3
    assert done.stderr == "outgate: only root may change what a machine trusts; run the same command with sudo\n"
