"""Request paths, read once and strictly, and the patterns that admit or deny them. It forwards and repairs nothing.

A spelling that two servers may read differently is malformed: the gate never decides about one path while the origin
serves another. An allow compares exactly; a deny compares generously, because an origin may be generous too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SAFE = r"A-Za-z0-9._~!$&'()*+,;=:@\-"  # RFC 3986 pchar without %
# Paths with nothing to decode and nothing to refuse, which is nearly every path. Each character is looked at once.
_PLAIN = re.compile(rf"(?:/(?!;|\.\.?(?:[/;]|\Z))[{_SAFE}]++)*+/?+")
_FOREIGN = re.compile(r"[^\x21-\x7e]")
_BAD_TRIPLET = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TRIPLET = re.compile(r"%[0-9A-Fa-f]{2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TOKEN = re.compile(r"[A-Z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110 9.1, upper case only

ANY = "*"
REST = "**"


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

    `/` has one segment, the empty one; a final `/` is an empty last segment.
    """

    original: str
    segments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path with `*` for one segment and a final `**` for any rest. `segments` is without that `**`."""

    text: str
    segments: tuple[str, ...]
    rest: bool

    def admits(self, path: Path) -> bool:
        """Whether an allow entry means `path`: exactly, with case and `;parameters` as written."""
        theirs = path.segments
        if self.rest:
            theirs = theirs[: len(self.segments)]
        return len(theirs) == len(self.segments) and all(
            mine == one or (mine == ANY and one != "") for mine, one in zip(self.segments, theirs, strict=True)
        )

    def denies(self, path: Path) -> bool:
        """Whether a deny entry means `path`, in any spelling an origin may take for it."""
        mine = _folded(tuple(segment for segment in self.segments if segment))
        return any(self._covers(mine, reading) for reading in _readings(path))

    def _covers(self, mine: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
        if len(theirs) < len(mine) or (len(theirs) > len(mine) and not self.rest):
            return False
        return all(
            pattern in (ANY, one) or pattern == _without_parameters(one)
            for pattern, one in zip(mine, theirs, strict=False)
        )

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
    if _FOREIGN.search(target):  # the query too: what would end the request line ends it anywhere
        raise MalformedPath("a byte outside 0x21 to 0x7E stands unencoded")
    if "#" in target:
        raise MalformedPath("a # is never part of a request")
    if _PLAIN.fullmatch(original):
        return Path(original, tuple(original[1:].split("/")))
    *inner, final = original[1:].split("/")
    segments = [_decode(segment, encoded_slash) for segment in inner]
    if "" in segments:
        raise MalformedPath("an empty segment (//)")
    segments.append(_decode(final, encoded_slash))
    return Path(original, tuple(segments))


def parse_path_pattern(text: str) -> PathPattern:
    """The PATH of an `allow` or `deny` entry. Raises MalformedPattern with the repair."""
    if not text.startswith("/"):
        raise MalformedPattern(f"path {_shown(text)} does not begin with /", _slash_repair(text))
    for character, repair in _NOT_IN_PATTERNS.items():
        if character in text:
            raise MalformedPattern(f"path {_shown(text)} has a {character}", repair)
    if _CONTROL.search(text) or re.search(r"\s", text):
        raise MalformedPattern(
            f"path {_shown(text)} has a space or control character", "a * stands for any one segment"
        )
    segments = text[1:].split("/")
    rest = segments[-1] == REST
    if rest:
        segments.pop()
    for index, segment in enumerate(segments):
        _refuse_segment(text, segment, final=index == len(segments) - 1 and not rest)
    return PathPattern(text, tuple(segments), rest)


def parse_entry(text: str) -> tuple[frozenset[str], PathPattern | None]:
    """An `allow` or `deny` entry: `METHOD[,METHOD] PATH`, `* PATH` or `all`.

    Gives the methods (empty: any) and the path (None: `all`). Raises MalformedPattern with the repair.
    """
    if text == "all":
        return frozenset(), None
    words = text.split()
    if len(words) == 1:
        raise _lone_word(words[0])
    if len(words) != 2:
        raise MalformedPattern(f"entry {_shown(text)} is not METHOD[,METHOD] PATH", _spaces_repair(words))
    methods, path = words
    return _parse_methods(methods, path), parse_path_pattern(path)


def _decode(segment: str, encoded_slash: bool) -> str:
    """One segment, decoded once. Raises MalformedPath."""
    decoded = segment
    if "%" in segment:
        if _BAD_TRIPLET.search(segment):
            raise MalformedPath(f"{_shown(segment)} has a % without two hex digits")
        decoded = _decode_triplets(segment)
        if _TRIPLET.search(decoded):
            raise MalformedPath(f"{_shown(segment)} is encoded twice")
        if _CONTROL.search(decoded):
            raise MalformedPath(f"{_shown(segment)} holds a control character")
        if "/" in decoded and not encoded_slash:
            raise MalformedPath(f"{_shown(segment)} holds an encoded slash; encodedSlash: literal would admit it")
    if "\\" in decoded:
        raise MalformedPath(f"{_shown(segment)} holds a backslash")
    for part in decoded.split("/"):  # an origin that decodes first would walk up through a%2F..%2Fb
        name = _without_parameters(part)
        if name in (".", ".."):
            raise MalformedPath(f"{_shown(segment)} is a dot segment")
        if name == "" and part:  # an origin that cuts parameters first reads /a/;x/b as /a//b
            raise MalformedPath(f"{_shown(segment)} is parameters without a name")
    return decoded


def _decode_triplets(segment: str) -> str:
    first, *rest = segment.split("%")
    octets = b"".join(bytes.fromhex(part[:2]) + part[2:].encode("ascii") for part in rest)
    try:
        return first + octets.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedPath(f"{_shown(segment)} is not valid UTF-8") from error


def _readings(path: Path) -> list[tuple[str, ...]]:
    """The segments an origin may see, folded, without empty ones: as sent, and with %2F taken for a separator."""
    folded = _folded(path.segments)
    readings = [_named(folded)]
    if any("/" in segment for segment in folded):
        readings.append(_named("/".join(folded).split("/")))
        readings.append(_named("/".join(map(_without_parameters, folded)).split("/")))
    return readings


def _named(segments: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(segment for segment in segments if segment)


def _folded(segments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(segment.translate(_LOWER) for segment in segments)


def _without_parameters(segment: str) -> str:
    return segment.partition(";")[0]


_LOWER = {ord(upper): ord(upper) + 32 for upper in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}  # ASCII only, as origins fold
_NOT_IN_PATTERNS = {
    "%": "write the decoded character; paths are compared decoded",
    "?": "query strings take no part; leave it out",
    "#": "a request carries no fragment; leave it out",
    "\\": "a request with one is always refused",
}


def _refuse_segment(text: str, segment: str, *, final: bool) -> None:
    if segment == "" and not final:
        raise MalformedPattern(f"path {_shown(text)} has an empty segment", "a request with one is always refused")
    if segment == REST:
        raise MalformedPattern(f"path {_shown(text)}: ** stands only at the end", "one segment is *")
    if ANY in segment and segment != ANY:
        raise MalformedPattern(f"path {_shown(text)}: * stands for a whole segment", "not for a part of one")
    name = _without_parameters(segment)
    if name in (".", "..") or (segment and not name):
        raise MalformedPattern(
            f"path {_shown(text)} has the segment {_shown(segment)}", "a request with one is always refused"
        )


def _parse_methods(text: str, path: str) -> frozenset[str]:
    if text == ANY:
        return frozenset()
    if text.lower() == "all":
        raise MalformedPattern(f"{_shown(text)} stands alone", f'any method is "* {path}"')
    methods = text.split(",")
    for method in methods:
        if method == ANY:
            raise MalformedPattern(f"methods {_shown(text)}: * is any method already", f'did you mean "* {path}"?')
        if _TOKEN.fullmatch(method):
            continue
        if _TOKEN.fullmatch(method.upper()):
            raise MalformedPattern(f"method {_shown(method)} is not upper case", f"did you mean {method.upper()}?")
        raise MalformedPattern(
            f"method {_shown(method)} is no HTTP method", "methods are written GET,POST without spaces"
        )
    return frozenset(methods)


def _lone_word(word: str) -> MalformedPattern:
    if word.lower() == "all":
        return MalformedPattern(f"{_shown(word)} is not an entry", 'did you mean "all"?')
    if word.startswith("/"):
        return MalformedPattern(f"entry {_shown(word)} has no method", f'did you mean "GET {word}" or "* {word}"?')
    return MalformedPattern(f"entry {_shown(word)} has no path", f'did you mean "{word} /**"?')


def _spaces_repair(words: list[str]) -> str:
    if not words:
        return 'such as "GET /search/**"'
    *methods, path = words
    joined = "".join(methods)
    if path.startswith("/") and "," in joined and not any("/" in method for method in methods):
        return f'did you mean "{joined} {path}"?'
    return "one entry is one path"


def _slash_repair(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if separator and scheme:
        return f'the rule names the host; did you mean "/{rest.partition("/")[2]}"?'
    return 'every path is "/**"' if text in (ANY, REST) else f'did you mean "/{text}"?'


def _shown(text: str) -> str:
    """Quoted for a message: short, and in ASCII."""
    return ascii(text if len(text) <= 80 else text[:77] + "...").replace("'", '"')
