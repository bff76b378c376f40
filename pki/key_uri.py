"""The name of a key in a token: a URI of RFC 7512. It opens nothing, and shows no PIN."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

SCHEME = "pkcs11:"

_IN_PATH = ("token", "serial", "object", "id", "type")
_IN_QUERY = ("module-path", "pin-source", "pin-value")
_SHOWN = frozenset({*_IN_PATH, *_IN_QUERY}) - {"pin-value"}
_ESCAPED = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")


class MalformedKeyUri(ValueError):
    """Not the name of one private key. `str()` says what is wrong, and has no PIN."""


@dataclass(frozen=True, slots=True)
class KeyUri:
    """What a URI says of a key. Its text has no PIN."""

    text: str
    module: Path
    token: str | None
    serial: bytes | None
    label: str | None
    id: bytes | None
    pin: str | None = field(repr=False)
    pin_source: Path | None

    @property
    def has_pin(self) -> bool:
        return bool(self.pin or self.pin_source)

    def __str__(self) -> str:
        return self.text


def parse_uri(text: str) -> KeyUri:
    """Raises MalformedKeyUri for what names no private key, or has an attribute that would go unheeded."""
    if not text.startswith(SCHEME) or not text.isascii() or not text.isprintable() or " " in text:
        raise MalformedKeyUri(f"not one line of the form {SCHEME}token=…;object=…?module-path=…")
    path, _, query = text.removeprefix(SCHEME).partition("?")
    shown = SCHEME + _without_pin(path, ";") + ("?" + _without_pin(query, "&") if query else "")
    try:
        found = _attributes(path, ";", _IN_PATH) | _attributes(query, "&", _IN_QUERY)
        if found.get("type", b"private") != b"private":
            raise ValueError("type: only a private key signs")
        if "module-path" not in found:
            raise ValueError("no module-path; name the PKCS#11 library of the token")
        if "token" not in found and "serial" not in found:
            raise ValueError("neither token nor serial; name one token")
        if "object" not in found and "id" not in found:
            raise ValueError("neither object nor id; name one key")
        if "pin-value" in found and "pin-source" in found:
            raise ValueError("both pin-value and pin-source; give one of them")
        texts = {name: _text(name, value) for name, value in found.items() if name not in ("id", "serial")}
        module = _absolute("module-path", texts["module-path"])
        pin_source = _pin_source(texts["pin-source"]) if "pin-source" in texts else None
    except ValueError as error:
        raise MalformedKeyUri(f"{shown}: {error}") from None  # whose text may have a PIN
    return KeyUri(
        shown,
        module,
        texts.get("token"),
        found.get("serial"),
        texts.get("object"),
        found.get("id"),
        texts.get("pin-value"),
        pin_source,
    )


def _attributes(text: str, separator: str, known: Sequence[str]) -> dict[str, bytes]:
    """Raises ValueError."""
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if name not in known:  # what is not understood must not be passed over (RFC 7512 2.3)
            raise ValueError(
                f"{name[:40]}: not an attribute that is known there" if equals else "a part without a name"
            )
        if name in found:
            raise ValueError(f"{name}: given twice")
        if not value or not _ESCAPED.fullmatch(value):
            raise ValueError(f"{name}: empty, or % is not followed by two hex digits")
        found[name] = unquote_to_bytes(value)
    return found


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8") from error
    if not text.isprintable():
        raise ValueError(f"{name}: has characters that cannot be printed")
    return text


def _pin_source(text: str) -> Path:
    if not text.startswith("file:"):  # RFC 7512 2.4 has commands too: a key's name must not start programs
        raise ValueError("pin-source: not of the form file:/path")
    return _absolute("pin-source", text.removeprefix("file:"))


def _absolute(name: str, text: str) -> Path:
    if not text.startswith("/"):  # whose meaning hung on where we were started
        raise ValueError(f"{name}: not an absolute path")
    return Path(text)


def _without_pin(text: str, separator: str) -> str:
    return separator.join(_part_without_pin(*part.partition("=")) for part in text.split(separator) if "=" in part)


def _part_without_pin(name: str, equals: str, value: str) -> str:
    hidden = name not in _SHOWN or "pin-value" in value  # one that follows the wrong separator is a value's end
    return f"{name}{equals}{'…' if hidden else value}"
