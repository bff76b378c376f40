"""Request paths, read once and strictly, and the patterns that admit or deny them. It forwards and repairs nothing.

A spelling that two servers may read differently is malformed: the gate never judges one path while the origin serves
another. An allow compares exactly; a deny compares generously, because an origin may be generous too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PCHAR = r"[A-Za-z0-9._~!$&'()*+,;=:@\-]"  # RFC 3986 3.3, without %
# Paths with nothing to decode and nothing to refuse, as nearly every path is. Each character is looked at once.
_PLAIN = re.compile(rf"(?:/(?!;|\.\.?(?:[/;]|\Z)){_PCHAR}++)*+/?+")
_FOREIGN = re.compile(r"[^\x21-\x7e]")
_BAD_TRIPLET = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRIPLET = re.compile(r"%[0-9A-Fa-f]{2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPACE_OR_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]*")  # every registered method, and less than a token (RFC 9110): GET|POST is one
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

ANY = "*"  # one segment in a pattern, any method in an entry
REST = "**"

_NEVER_MATCHES = "a request with one is always refused"
_NOT_IN_PATTERNS = {
    "%": "write the decoded character: paths are compared decoded",
    "?": "leave the query out: it takes no part",
    "#": "leave the fragment out: no request carries one",
    "\\": _NEVER_MATCHES,
}


class MalformedPath(ValueError):
    """A target that the gate does not judge, and so never forwards. `str()` says what is wrong with it."""


class MalformedPattern(ValueError):
    """An `allow` or `deny` entry that cannot be read. `message` says why, `repair` what to write instead."""

    def __init__(self, message: str, repair: str | None = None) -> None:
        self.message = message
        self.repair = repair
        super().__init__(f"{message}; {repair}" if repair else message)


@dataclass(frozen=True, slots=True)
class Path:
    """The path of a request: `original` as received, without its query, and its segments decoded once.

    A final `/` is an empty last segment; the path `/` has that one alone.
    """

    original: str
    segments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path with `*` for one segment and a final `**` for any rest. `segments` is without that `**`."""

    text: str
    segments: tuple[str, ...]
    rest: bool
    _folded: tuple[str, ...] = field(init=False, repr=False, compare=False)  # as `denies` compares

    def __post_init__(self) -> None:
        object.__setattr__(self, "_folded", tuple(_fold(segment) for segment in self.segments if segment))

    def admits(self, path: Path) -> bool:
        """Whether an allow entry means `path`: exactly, with case and `;parameters` as written."""
        mine = self.segments
        theirs = path.segments[: len(mine)] if self.rest else path.segments
        return len(theirs) == len(mine) and all(map(_is_exactly, mine, theirs))

    def denies(self, path: Path) -> bool:
        """Whether a deny entry means `path` in any reading an origin may have: folded case, without `;parameters`, with
        or without a final slash, with %2F taken for a slash."""
        return any(self._covers(reading) for reading in _readings(path))

    def _covers(self, theirs: tuple[str, ...]) -> bool:
        mine = self._folded
        if self.rest:
            theirs = theirs[: len(mine)]
        return len(theirs) == len(mine) and all(map(_is_nearly, mine, theirs))

    def __str__(self) -> str:
        return self.text


def parse_path(target: str, *, encoded_slash: bool = False) -> Path:
    """The path of a request target in origin form, cut at its first `?`.

    Raises MalformedPath for every spelling that two servers may read differently. With `encoded_slash` a %2F is a plain
    character of its segment.
    """
    original = target.partition("?")[0]
    if not original.startswith("/"):
        raise MalformedPath(f"{_shown(target)} does not begin with /")
    if _FOREIGN.search(target):  # in the query too: what ends a request line ends it anywhere
        raise MalformedPath(f"{_shown(target)} holds a raw byte outside 0x21 to 0x7E")
    if "#" in target:
        raise MalformedPath(f"{_shown(target)} holds a #")
    if _PLAIN.fullmatch(original):
        return Path(original, tuple(original[1:].split("/")))
    segments = original[1:].split("/")
    if "" in segments[:-1]:
        raise MalformedPath(f"{_shown(original)} has an empty segment")
    return Path(original, tuple(_decode(segment, encoded_slash) for segment in segments))


def parse_path_pattern(text: str) -> PathPattern:
    """The PATH of an `allow` or `deny` entry. Raises MalformedPattern with the repair."""
    if not text.startswith("/"):
        raise MalformedPattern(f"path {_shown(text)} does not begin with /", _slash_repair(text))
    for character, repair in _NOT_IN_PATTERNS.items():
        if character in text:
            raise MalformedPattern(f"path {_shown(text)} has a {character}", repair)
    if _SPACE_OR_CONTROL.search(text):
        raise MalformedPattern(f"path {_shown(text)} has a space or control character", "a segment with a space is a *")
    segments = text[1:].split("/")
    rest = segments[-1] == REST
    if rest:
        segments.pop()
    if "" in (segments if rest else segments[:-1]):
        raise MalformedPattern(f"path {_shown(text)} has an empty segment", _NEVER_MATCHES)
    for segment in segments:
        _refuse_segment(segment, text)
    return PathPattern(text, tuple(segments), rest)


def parse_entry(text: str) -> tuple[frozenset[str], PathPattern | None]:
    """An `allow` or `deny` entry: `METHOD[,METHOD] PATH`, `* PATH` or `all`.

    Gives the methods (empty: any) and the path (None: `all`). Raises MalformedPattern with the repair.
    """
    if text == "all":
        return frozenset(), None
    words = text.split()
    if len(words) != 2:
        raise MalformedPattern(f"entry {_shown(text)} is not METHOD[,METHOD] PATH", _entry_repair(words))
    methods, path = words
    pattern = parse_path_pattern(path)
    return _parse_methods(methods, path), pattern


def _is_exactly(pattern: str, segment: str) -> bool:
    return pattern == segment or (pattern == ANY and segment != "")


def _is_nearly(pattern: str, segment: str) -> bool:
    return pattern in (segment, ANY) or pattern == _without_parameters(segment)


def _readings(path: Path) -> list[tuple[str, ...]]:
    """The segments as sent, and as an origin sees them that takes %2F for a slash; folded, and no empty ones."""
    segments = [_fold(segment) for segment in path.segments]
    joined = "/".join(segments)
    readings = [tuple(filter(None, segments))]
    if joined.count("/") >= len(segments):
        readings.append(_split(joined))
        readings.append(_split("/".join(map(_without_parameters, segments))))  # parameters cut before %2F is decoded
    return readings


def _split(joined: str) -> tuple[str, ...]:
    return tuple(filter(None, joined.split("/")))


def _fold(segment: str) -> str:
    """Lower case in ASCII alone, as origins fold: str.lower() would turn a Kelvin sign into k."""
    return segment.lower() if segment.isascii() else segment.translate(_LOWER)


def _without_parameters(segment: str) -> str:
    return segment.partition(";")[0]


def _decode(segment: str, encoded_slash: bool) -> str:
    """One segment, decoded once. Raises MalformedPath."""
    decoded = _decode_triplets(segment) if "%" in segment else segment
    if "/" in decoded and not encoded_slash:
        raise MalformedPath(f"{_shown(segment)} holds an encoded slash; the rule may say encodedSlash: literal")
    if "\\" in decoded:
        raise MalformedPath(f"{_shown(segment)} holds a backslash")
    for part in decoded.split("/"):  # the parts of an encoded slash too: an origin may walk up through a%2F..%2Fb
        name = _without_parameters(part)
        if name in (".", ".."):
            raise MalformedPath(f"{_shown(segment)} is a dot segment")
        if part and not name:  # an origin that drops parameters reads /a/;x/b as /a//b
            raise MalformedPath(f"{_shown(segment)} is an empty segment with parameters")
    return decoded


def _decode_triplets(segment: str) -> str:
    if _BAD_TRIPLET.search(segment):
        raise MalformedPath(f"{_shown(segment)} has a % without two hex digits")
    first, *rest = segment.split("%")
    octets = b"".join(bytes.fromhex(part[:2]) + part[2:].encode("ascii") for part in rest)
    try:
        decoded = first + octets.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedPath(f"{_shown(segment)} is not valid UTF-8") from error
    if _TRIPLET.search(decoded):
        raise MalformedPath(f"{_shown(segment)} is encoded twice")
    if _CONTROL.search(decoded):
        raise MalformedPath(f"{_shown(segment)} holds a control character")
    return decoded


def _refuse_segment(segment: str, text: str) -> None:
    if segment == REST:
        raise MalformedPattern(f"path {_shown(text)} has a ** before its end", "one segment is *")
    if ANY in segment and segment != ANY:
        raise MalformedPattern(f"path {_shown(text)} has a * that is part of a segment", "a * is a whole segment")
    name = _without_parameters(segment)
    if name in (".", "..") or (segment and not name):
        raise MalformedPattern(f"path {_shown(text)} has the segment {_shown(segment)}", _NEVER_MATCHES)


def _parse_methods(text: str, path: str) -> frozenset[str]:
    if text == ANY:
        return frozenset()
    methods = text.split(",")
    if ANY in methods or text.lower() == "all":
        raise MalformedPattern(f"{_shown(text)} is not a list of methods", f'any method is "* {path}"')
    for method in methods:
        if _METHOD.fullmatch(method):
            continue
        if _METHOD.fullmatch(method.upper()):
            raise MalformedPattern(f"method {_shown(method)} is not upper case", f"did you mean {method.upper()}?")
        raise MalformedPattern(f"{_shown(text)} is not a list of methods", "several are written GET,POST")
    return frozenset(methods)


def _entry_repair(words: list[str]) -> str:
    match words:
        case [word] if word.lower() == "all":
            return 'did you mean "all"?'
        case [word] if word.startswith("/"):
            return f'did you mean "GET {word}" or "* {word}"?'
        case [word] if word == ANY or _METHOD.fullmatch(word):
            return f'did you mean "{word} /**"?'
        case [*methods, path] if path.startswith("/") and not any("/" in method for method in methods):
            return f'did you mean "{",".join(",".join(methods).replace(",", " ").split())} {path}"?'
    return 'such as "GET /search/**"'


def _slash_repair(text: str) -> str:
    if text in (ANY, REST, "all"):
        return 'every path is "/**"'
    if "://" in text:
        return f'the rule names the host; did you mean "/{text.partition("://")[2].partition("/")[2]}"?'
    return f'did you mean "/{text}"?'


def _shown(text: str) -> str:
    """Quoted for a message: short, and in ASCII."""
    return f'"{ascii(text if len(text) <= 80 else text[:77] + "...")[1:-1]}"'
