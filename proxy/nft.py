"""Hands nft's text to the kernel: by libnftables, or by the program `nft`. What it says is `ruleset.py`'s work."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from enum import IntFlag
from ipaddress import ip_address
from typing import Any, Protocol

from proxy.elements import Element, Opening, Transport
from proxy.ruleset import SET4, SET6, TABLE

_KEY = ("source", "address", "protocol", "port")
_LIBRARY = "libnftables.so.1"
_BY_NUMBER: dict[object, Transport] = {6: "tcp", 17: "udp"}  # as nft writes them where /etc/protocols is missing
_PATIENCE_S = 30  # for the program; a set of 65,536 elements is read within a second


class NftMissing(Exception):
    """Neither the library nor the program is there."""


class NftRefused(Exception):
    """nft or the kernel does not take it. `str()` is nft's own text; nothing of the transaction is in force."""


class Shown(IntFlag):
    """How a listing is written (nftables/libnftables.h)."""

    PLAIN = 0
    STATELESS = 1 << 2
    JSON = 1 << 4
    TERSE = 1 << 11


_OPTIONS = {Shown.STATELESS: "-s", Shown.JSON: "-j", Shown.TERSE: "-t"}


class Nft(Protocol):
    def run(self, text: str, *, shown: Shown = Shown.PLAIN, is_check: bool = False) -> str:
        """Run commands as one transaction, and give what they print. `is_check`: change nothing. Raises NftRefused."""


class Library:
    """libnftables in this process. Raises NftMissing where it cannot be loaded."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise NftMissing(str(error)) from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).restype = ctypes.c_char_p
        self._library = library
        self._context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, text: str, *, shown: Shown = Shown.PLAIN, is_check: bool = False) -> str:
        library, context = self._library, self._context
        library.nft_ctx_output_set_flags(context, ctypes.c_uint(shown))
        library.nft_ctx_set_dry_run(context, ctypes.c_bool(is_check))
        status = library.nft_run_cmd_from_buffer(context, text.encode())
        said: bytes = library.nft_ctx_get_output_buffer(context)
        wrong: bytes = library.nft_ctx_get_error_buffer(context)
        if status:
            raise NftRefused(wrong.decode(errors="replace").strip())
        return said.decode()

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)


class Program:
    """The program `nft`, started for every run. Raises NftMissing where it is not on PATH."""

    def run(self, text: str, *, shown: Shown = Shown.PLAIN, is_check: bool = False) -> str:
        options = [option for flag, option in _OPTIONS.items() if flag in shown] + ["-c"] * is_check
        words = [text] if shown else ["-f", "-"]  # with -j it would read JSON from a file
        try:
            done = subprocess.run(
                ["nft", *options, *words],
                input=text,
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                env=os.environ | {"LC_ALL": "C"},
                check=False,
            )
        except FileNotFoundError as error:
            raise NftMissing("nft: not on PATH") from error
        except subprocess.TimeoutExpired as error:
            raise NftRefused(f"nft: did not end within {_PATIENCE_S} s") from error
        if done.returncode:
            raise NftRefused(done.stderr.strip())
        return done.stdout


def open_nft() -> Nft:
    """The library, else the program. Raises NftMissing."""
    try:
        return Library()
    except NftMissing:
        program = Program()
        program.run("", is_check=True)
        return program


def ask(nft: Nft, command: str) -> list[dict[str, Any]]:  # Any: nft's JSON, libnftables-json(5)
    """The objects that a `list` command names, each as {kind: what it is}. Raises NftRefused."""
    found: list[dict[str, Any]] = json.loads(nft.run(command, shown=Shown.JSON))["nftables"]
    return [each for each in found if "metainfo" not in each]


# --- what is let past the gate ---


def read_openings(nft: Nft) -> list[Opening]:
    """What is open now. Raises NftRefused."""
    found = []
    for name in (SET4, SET6):
        [listed] = [each["set"] for each in ask(nft, f"list set inet {TABLE} {name}") if "set" in each]
        for element in (each["elem"] for each in listed.get("elem", ())):
            if len(element["val"]["concat"]) != len(_KEY):  # of an older version: it says not for whom
                continue
            source, address, protocol, port = element["val"]["concat"]
            known_as = _BY_NUMBER.get(protocol, protocol)
            one = Element(ip_address(source), ip_address(address), known_as, port)
            found.append(Opening(one, element["timeout"], element["expires"]))
    return found
