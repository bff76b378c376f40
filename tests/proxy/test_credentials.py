"""The credentials file: what stands in it, who may read it, how it is changed, and the command that does it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from hashlib import scrypt
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from proxy.commands.credentials import credentials
from proxy.explicit.credentials import (
    CredentialsError,
    MalformedCredential,
    PasswordHash,
    hash_password,
    parse_name,
    read_credentials,
    remove_credential,
    store_credential,
)

CHEAP = PasswordHash(bytes(16), scrypt(b"secret", salt=bytes(16), n=2, r=1, p=1, dklen=32), 2, 1, 1)
LINE = f"ann:{CHEAP}\n"
# RFC 7914 12, the third vector: of "pleaseletmein".
VECTOR = (
    "$scrypt$n=16384,r=8,p=1$U29kaXVtQ2hsb3JpZGU"
    "$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofLVQylVYT8Pz2LUlwUkKpr55h6F3A1lHkDfzwF7RVdYhw"
)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_password_that_was_stored_is_the_only_right_one(tmp_path: Path) -> None:
    path = tmp_path / "users"
    assert store_credential(path, "ann", hash_password("na\u00efve")) is False
    (name, hash), *others = read_credentials(path).items()
    assert (name, others) == ("ann", [])
    assert [hash.is_of(password) for password in ("na\u00efve", "naive", "")] == [True, False, False]
    assert "na\u00efve" not in path.read_text()


def test_two_hashes_of_one_password_are_different() -> None:
    assert hash_password("secret").salt != hash_password("secret").salt


def test_password_in_another_unicode_form_is_the_same() -> None:
    assert hash_password("nai\u0308ve").is_of("na\u00efve")


def test_hash_is_plain_scrypt_with_the_parameters_of_its_line(tmp_path: Path) -> None:
    hash = read_credentials(write(tmp_path / "users", f"vector:{VECTOR}\n"))["vector"]
    assert hash.is_of("pleaseletmein")
    assert str(hash) == VECTOR


def test_comments_and_empty_lines_mean_nothing_and_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "users", f"# the builders\n\n{LINE}")
    store_credential(path, "bob", CHEAP)
    store_credential(path, "ann", hash_password("other"))
    remove_credential(path, "bob")
    first, second, third = path.read_text().splitlines()
    assert (first, second, third[:12]) == ("# the builders", "", "ann:$scrypt$")
    assert list(read_credentials(path)) == ["ann"]


MISTAKES = {
    "no hash": ("ann\n", "1: not NAME:HASH"),
    "a password": ("ann:secret\n", "1: not a hash this version knows"),
    "another scheme": ("ann:$2y$05$abc\n", "1: not a hash this version knows"),
    "a name twice": (f"{LINE}# and\n{LINE}", '3: "ann" stands in line 1 already'),
    "no name": (LINE.replace("ann", ""), "1: a name has 1 to 128 bytes"),
    "space around a name": (LINE.replace("ann", " ann"), "1: a name holds no colon"),
    "a name in another form": (LINE.replace("ann", "Jose\u0301"), "1: not NAME:HASH"),
    "n no power of two": (LINE.replace("n=2,", "n=3,"), "1: n=3,r=1,p=1: n is a power of two"),
    "n 1": (LINE.replace("n=2,", "n=1,"), "1: n=1,r=1,p=1: n is a power of two"),
    "r 0": (LINE.replace("r=1,", "r=0,"), "1: n=2,r=0,p=1: n is a power of two"),
    "all the memory there is": (LINE.replace("n=2,r=1", "n=67108864,r=999"), "would take more than 64 MiB"),
    "all the time there is": (LINE.replace("p=1", "p=999"), "or 16 lanes"),
    "salt that is no base64": (
        LINE.replace("AAAAAAAAAAAAAAAAAAAAAA", "A" * 21),
        "1: the salt or the key is not base64",
    ),
}


@pytest.mark.parametrize(("text", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_by_its_line_and_hides_what_stands_there(text: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "users", text)
    with pytest.raises(CredentialsError) as caught:
        read_credentials(path)
    assert str(caught.value).startswith(f"{path}:")
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o777])
def test_file_that_others_may_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = write(tmp_path / "the users", LINE, mode)
    with pytest.raises(CredentialsError, match=f"mode {mode:04o} shows it to others; run: chmod 600 '{path}'"):
        read_credentials(path)
    with pytest.raises(CredentialsError, match="chmod 600"):
        store_credential(path, "bob", CHEAP)


def test_file_that_is_not_there_or_not_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="users: No such file or directory"):
        read_credentials(tmp_path / "users")
    (tmp_path / "bytes").write_bytes(b"ann:\xff")
    (tmp_path / "bytes").chmod(0o600)
    with pytest.raises(CredentialsError, match="bytes: not UTF-8 text"):
        read_credentials(tmp_path / "bytes")
    with pytest.raises(CredentialsError, match="larger than 1 MiB"):
        read_credentials(write(tmp_path / "large", "#" * (1 << 20) + "\n"))
    with pytest.raises(CredentialsError, match=r"No such file or directory"):
        store_credential(tmp_path / "nowhere" / "users", "ann", CHEAP)


def test_file_is_private_whatever_the_umask_and_a_link_to_it_stays_one(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store_credential(tmp_path / "users", "ann", CHEAP)
    finally:
        os.umask(before)
    (tmp_path / "link").symlink_to("users")
    store_credential(tmp_path / "link", "bob", CHEAP)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "users").stat().st_mode) == 0o600
    assert list(read_credentials(tmp_path / "users")) == ["ann", "bob"]
    assert {path.name for path in tmp_path.iterdir()} == {"users", "link"}


@pytest.mark.kernel
def test_root_that_adds_a_name_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can write another user's file")
    path = write(tmp_path / "users", LINE)
    os.chown(path, 65534, 65534)
    store_credential(path, "bob", CHEAP)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "users"
    threads = [threading.Thread(target=store_credential, args=(path, f"user-{n}", CHEAP)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_credentials(path)) == {f"user-{n}" for n in range(16)}


@given(st.text(max_size=20))
def test_every_name_is_refused_or_survives_the_file(text: str) -> None:
    try:
        name = parse_name(text)
    except MalformedCredential:
        return
    assert parse_name(name) == name
    assert ":" not in name
    assert len(f"{name}:x".splitlines()) == 1


# --- the command ---


def invoke(*arguments: object, given: str | bytes | None = None) -> Result:
    return CliRunner().invoke(
        credentials, [str(one) for one in arguments], input=given, prog_name="outgate credentials"
    )


def test_password_of_standard_input_is_added_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "users"
    added = invoke("add", path, "ann", given="secret\n")
    assert (added.exit_code, added.stdout, added.stderr) == (0, "", f'{path}: added "ann"\n')
    assert invoke("check", path, "ann", given="secret").exit_code == 0
    assert invoke("check", path, "ann", given="other").exit_code == 1
    assert invoke("check", path, "bob", given="secret").exit_code == 1


def test_generated_password_is_all_that_is_printed_and_works(tmp_path: Path) -> None:
    path = tmp_path / "users"
    password = invoke("add", path, "ann", "--generate").stdout
    assert len(password) > 30
    assert invoke("check", path, "ann", given=password).exit_code == 0
    assert invoke("add", path, "ann", "--generate").stdout != password
    assert invoke("check", path, "ann", given=password).exit_code == 1


def test_names_are_listed_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "users"
    for name in ("bob", "ann"):
        invoke("add", path, name, "--generate")
    assert invoke("list", path).stdout == "ann\nbob\n"
    assert json.loads(invoke("list", path, "--json").stdout) == ["ann", "bob"]
    assert invoke("check", path).stdout == f"{path}: 2 names\n"
    assert invoke("remove", path, "bob").exit_code == 0
    again = invoke("remove", path, "bob")
    assert (again.exit_code, "outgate credentials list" in again.stderr) == (1, True)
    assert invoke("list", path).stdout == "ann\n"


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("a:b", "secret\n", "a name holds no colon"),
        ("", "secret\n", "a name has 1 to 128 bytes"),
        ("ann", "\n", "a password has 1 to 512 bytes"),
        ("ann", "", "a password has 1 to 512 bytes"),
        ("ann", "se\tcret\n", "holds a control character"),
        ("ann", "x" * 513, "a password has 1 to 512 bytes"),
        ("\u00e9" * 65, "secret", "a name has 1 to 128 bytes"),
        ("\udce9", "secret", "a name holds no colon and no control character"),
        ("ann", b"\xff\n", "the password on standard input is not UTF-8"),
    ],
)
def test_name_or_password_that_no_client_could_send_is_usage(
    name: str, given: str | bytes, says: str, tmp_path: Path
) -> None:
    result = invoke("add", tmp_path / "users", name, given=given)
    assert (result.exit_code, says in result.stderr) == (2, True)
    assert not (tmp_path / "users").exists()


@pytest.mark.parametrize("arguments", [["list"], ["remove", "ann"], ["add", "ann", "--generate"]], ids=lambda a: a[0])
def test_file_that_is_open_to_others_is_exit_3(arguments: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "users", LINE, 0o644)
    result = invoke(arguments[0], path, *arguments[1:])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "chmod 600" in result.stderr
    assert invoke("check", path).exit_code == 1


def test_password_is_asked_for_twice_and_never_shown(tmp_path: Path) -> None:
    """On a terminal of its own, as a person has one."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "proxy", "credentials", "add", str(tmp_path / "users"), "ann"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        shown = b""
        for asked in (b"Password: ", b"Repeat for confirmation: "):
            while not shown.endswith(asked):
                shown += os.read(ours, 4096)
            os.write(ours, b"secret\n")
        while b"added" not in shown:
            shown += os.read(ours, 4096)
        assert process.wait(20) == 0
    os.close(ours)
    assert b"secret" not in shown
    assert read_credentials(tmp_path / "users")["ann"].is_of("secret")
