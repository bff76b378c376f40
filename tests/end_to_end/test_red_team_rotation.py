"""Attackers on a rotation: writers are killed, a store is shaken or spoiled under a gate, a command inside wants in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pki.authority import certificate_id
from pki.store import load
from tests.end_to_end.inspected_origin import options_of_a_service
from tests.end_to_end.service import Service
from tests.end_to_end.test_rotation_live import (
    HEAD,
    INSPECTED,
    TOKEN,
    Load,
    newest,
    shown_by,
    shows_the_newest,
)
from tests.end_to_end.world import CHECKOUT, Ran, World
from tests.proxy.rotating import key_of, new_store, renew_issuing

KILLS = 60

# Forks, for which a process without threads is needed. Every process says on standard error what it could not read.
KILLED = r"""
import os, random, signal, sys, time
from datetime import UTC, datetime
from pathlib import Path
from pki.authority import certificate_id, create_authority
from pki.chains import is_signed_by
from pki.rotation import NotNow, stage_root, unstage
from pki.store import StoreError, changing, load, load_issuers, load_trusted, save, survey
from tests.pki.store_writer import NOW, rotated

store, kills = Path(sys.argv[1]), int(sys.argv[2])
save(create_authority(NOW), store)

def start(work):
    if pid := os.fork():
        return pid
    try:
        random.seed(os.getpid())
        for turn in range(1, 1_000_000):
            work(turn)
    except BaseException as error:
        os.write(2, f"{work.__name__}: {error!r}\n".encode())
    os._exit(1)

def write(turn):
    with changing(store) as change:
        try:
            change.authority = rotated(change.authority, turn) if turn % 3 else stage_root(change.authority, NOW)
        except NotNow:
            change.authority = unstage(change.authority)

def read(_):
    try:
        (issuer,) = load_issuers(store)  # never none; the store sees that keys and certificates are pairs
        found, whole = survey(store), load(store)
        assert found.roots and all(one.chain for one in whole.issuing)
        roots = [root.certificate for root in whole.roots]
        assert all(any(is_signed_by(link, root) for link in one.chain for root in roots) for one in whole.issuing)
    except StoreError as error:
        assert "while it was read" in str(error), error

readers = [start(read), start(read)]
for number in range(kills):
    writer = start(write)
    time.sleep(random.random() * 0.05)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    (issuer,) = load_issuers(store)
    assert any(is_signed_by(link, root) for link in issuer.chain for root in load_trusted(store))
for reader in readers:
    assert os.waitpid(reader, os.WNOHANG) == (0, 0), "a reader failed"
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
for _ in range(2):
    write(3)  # settles what the last one left
left = load(store)
known = sorted(certificate_id(ca.certificate) for ca in (*left.roots, *left.issuing) if ca.key)
assert sorted(path.parent.name for path in store.glob("*/*/ca.key")) == known, "a key that nothing names"
over = [path for path in store.rglob(".*") if path.name != ".lock"]
assert not over, over
print("whole")
"""


def test_writers_killed_anywhere_never_show_a_reader_a_wrong_pair_or_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "pki"), str(KILLS)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("whole\n", "")


@pytest.fixture
def options(tmp_path: Path) -> Iterator[list[str]]:
    yield from options_of_a_service(tmp_path, TOKEN)


def test_a_store_that_is_shaken_and_swapped_for_another_authoritys_cuts_nobody(
    tmp_path: Path, options: list[str]
) -> None:
    store = Path(new_store(tmp_path))
    (tmp_path / "other").mkdir()
    other = Path(new_store(tmp_path / "other"))
    roots = [root.certificate for place in (store, other) for root in load(place).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options) as it, Load(it, lambda: roots) as clients:
        over = threading.Event()

        def shake() -> None:
            for _ in range(1000):
                with suppress(FileNotFoundError):  # it is being swapped
                    os.utime(store / "state.json")
                over.wait(0.001)

        shaking = threading.Thread(target=shake)
        shaking.start()
        for _ in range(6):
            (tmp_path / "pki").rename(tmp_path / "away")
            other.rename(tmp_path / "pki")
            (tmp_path / "away").rename(other)
            assert it.reload(TOKEN)[0] in (200, 422)
        over.set()
        shaking.join()
        shows_the_newest(it, store, roots)
        assert clients.faults == []
        assert min(clients.counts) > 0
    assert not [line for line in it.said if "Traceback" in line]


def test_a_ca_that_no_parser_reads_leaves_the_former_one_in_force(tmp_path: Path, options: list[str]) -> None:
    store = Path(new_store(tmp_path))
    roots = [root.certificate for root in load(store).roots]
    with Service(tmp_path, HEAD + INSPECTED, *options) as it:
        former = newest(store)
        renew_issuing(store)
        unparsed(store)
        status, page = it.reload(TOKEN)
        assert (status, page["result"]) == (422, "refused")
        assert "ca.crt: no PEM certificate; restore it from a copy" in page["problems"][0]
        assert shown_by(it, roots) == former
        assert not [line for line in it.said if "Traceback" in line]


def unparsed(store: Path) -> None:
    """The active issuing CA becomes one that says that it is of X.509 version 4, under its own true id."""
    certificate = load(store).issuer.certificate
    der = certificate.public_bytes(Encoding.DER)
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    place_ca(store, certificate_id(certificate), der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x04"))


def place_ca(store: Path, former: str, der: bytes) -> None:
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    name = hashlib.sha256(der).hexdigest()[:16]
    shutil.copytree(store / "issuing" / former, store / "issuing" / name)
    for file in ("ca.crt", "chain.pem"):
        (store / "issuing" / name / file).write_bytes(pem)
    state = (store / "state.json").read_text().replace(former, name)
    (store / "state.json").write_text(state)


# --- inside -----------------------------------------------------------------------------------------------------------

POLICY = HEAD + "      - {host: api.example, tls: inspect}\n"

ATTACK = r"""
import json, os, pathlib, shutil, ssl, socket, subprocess, sys, time
store, outgate, forged, link = map(pathlib.Path, sys.argv[1:5])
names = sys.argv[5:]
said = {}

def attempt(name, look):
    try:
        found = look()
    except Exception as error:
        found = type(error).__name__
    said[name] = str(found)

def elsewhere():
    # every other way to the same files: other processes' roots, directories and descriptors
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        for way in ("root", "cwd"):
            for name in names:
                try:
                    text = (process / way / str(store / name).lstrip("/")).read_bytes()
                except OSError:
                    continue
                if b"PRIVATE KEY" in text:
                    found.append(f"{process}/{way}")
        try:
            for descriptor in (process / "fd").iterdir():
                if os.path.isfile(descriptor) and b"PRIVATE KEY" in open(descriptor, "rb").read():
                    found.append(str(descriptor))
        except OSError:
            continue
    return found

attempt("list", lambda: sorted(os.listdir(store)))
attempt("keys", lambda: [open(store / name).read() for name in names])
attempt("variable", lambda: os.environ["OUTGATE_PKI"])
done = subprocess.run([outgate, "pki", "status", "--pki", store], capture_output=True, text=True)
said["status"] = f"{done.returncode} {done.stderr.strip()}"
done = subprocess.run([outgate, "pki", "rotate", "issuing", "--pki", store], capture_output=True, text=True)
said["rotate"] = f"{done.returncode}"
attempt("swap the store", lambda: os.rename(store, str(store) + ".away"))
attempt("elsewhere", elsewhere)
attempt("write", lambda: (store / "state.json").write_text("{}"))
attempt("swap what is above it", lambda: os.rename(store.parent, str(store.parent) + ".away"))
def forge():
    for place in (store, link):
        if not place.is_symlink():
            os.makedirs(place.parent, exist_ok=True)
            shutil.copytree(forged, place)
    link.unlink()
    link.symlink_to(forged)

attempt("forge a store there", forge)
attempt("keys after that", lambda: [open(str(store.parent) + ".away/pki/" + name).read() for name in names])

def issuer():
    with socket.create_connection(("api.example", 443)) as sock:
        with ssl.create_default_context().wrap_socket(sock, server_hostname="api.example") as stream:
            return stream.getpeercert()["issuer"][-1][0][1]

attempt("first issuer", issuer)
time.sleep(2.5)  # the gate looks once a second, and twice
attempt("last issuer", issuer)
print(json.dumps(said))
"""


@dataclass(frozen=True, slots=True)
class Attacked:
    ran: Ran
    said: dict[str, str]


@pytest.fixture(scope="module", params=["its path", "a link to it"])
def attacked(request: pytest.FixtureRequest, world: World) -> Attacked:
    """A command that looks for the keys of its gate, and puts a store of its own where the gate looks for the next
    issuing CA: one whose key is in a "token", so that the gate would load a library of the command's choice."""
    above = world.directory / f"project-{request.param.partition(' ')[0]}"
    above.mkdir()
    store, link = Path(new_store(above)), above / "link"
    link.symlink_to("pki")
    (world.directory / above.name / "elsewhere").mkdir()
    forged = Path(new_store(world.directory / above.name / "elsewhere"))
    library = world.file("library.so", b"not one, but loaded")
    key_of(forged).write_text(f"pkcs11:token=x;object=y?module-path={library}\n")
    shutil.move(forged, world.directory / f"{above.name}-forged")
    names = [str(path.relative_to(store)) for path in store.rglob("ca.key")]
    script = world.file("attack-keys.py", ATTACK)
    outgate = Path(sys.prefix) / "bin" / "outgate"
    given = store if request.param == "its path" else link
    ran = world.run(
        [sys.executable, str(script), str(store), str(outgate), f"{above}-forged", str(link), *names],
        policy=POLICY,
        options=["--pki", str(given)],
        env={"OUTGATE_PKI": str(given)},
    )
    assert ran.status == 0, ran.stderr
    return Attacked(ran, json.loads(ran.stdout))


@pytest.mark.kernel
def test_a_command_inside_finds_no_key_by_any_way(attacked: Attacked) -> None:
    said = attacked.said
    assert said["list"] == said["elsewhere"] == "[]"
    assert said["keys"] == said["keys after that"] == "FileNotFoundError"
    assert said["status"].startswith("3 ")
    assert said["rotate"] == "3"


@pytest.mark.kernel
def test_a_command_inside_cannot_have_its_gate_load_another_store(attacked: Attacked) -> None:
    assert attacked.said["swap the store"] == attacked.said["swap what is above it"] == "OSError"  # EBUSY
    assert "library.so" not in attacked.ran.stderr
    assert "issuing CA is not replaced" not in attacked.ran.stderr
    assert attacked.said["first issuer"] == attacked.said["last issuer"]


TAKE = r"""
import os, sys
pin, library = sys.argv[1:]
print(repr(open(pin).read()))
for change in (lambda: open(library, "ab"), lambda: os.rename(library, library + ".old")):
    try:
        change()
        print("done")
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.kernel
def test_a_command_inside_reads_no_pin_and_changes_no_library_of_its_gates_token(world: World) -> None:
    above = world.directory / "token"
    above.mkdir()
    store = Path(new_store(above))
    pin, library = above / "pin", above / "library.so"
    pin.write_text("73112")
    pin.chmod(0o600)
    library.write_bytes(b"")
    key_of(store).write_text(f"pkcs11:token=x;object=y?module-path={library}&pin-source=file:{pin}\n")
    script = world.file("attack-token.py", TAKE)
    plain = HEAD + "      - {host: web.example, ports: 80}\n"
    ran = world.run([sys.executable, str(script), str(pin), str(library)], policy=plain, options=["--pki", str(store)])
    assert ran.stdout == b"''\nRead-only file system\nDevice or resource busy\n", ran
