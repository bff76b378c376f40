"""Policies read from disk: files, the shipped catalogue, public suffixes, and the clouds' own service-tag files.

Everything is judged in `policies`; this module opens files and says which could not be read.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from ipaddress import ip_network
from typing import TYPE_CHECKING

from policies.errors import PolicyError, Problem
from policies.hostnames import Hostname, parents, parse_hostname
from policies.index import Policy
from policies.load import load
from policies.model import Network, Place
from policies.spelling import quote
from policies.tree import MAX_BYTES, Source, decode

if TYPE_CHECKING:
    from publicsuffixlist import PublicSuffixList

_SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class Texts:
    """What the operator wrote for one policy, read once, so that what is compiled is what was hashed.

    tags  path and content of each service-tag file
    """

    sources: tuple[Source, ...]
    tags: tuple[tuple[str, bytes], ...] = ()

    @property
    def generation(self) -> str:
        """Tells one policy from another in the log: twelve hex digits of a SHA-256 over the files, in any order."""
        contents = [b"policy" + source.text.encode() for source in self.sources]
        contents += [b"tags" + content for _, content in self.tags]
        return sha256(b"".join(sorted(sha256(content).digest() for content in contents))).hexdigest()[:12]


def read_policy(paths: Sequence[str], *, tags: Sequence[str] = ()) -> Policy:
    """The policy of all files together; `tags` are service-tag files as Microsoft publishes them.

    Raises PolicyError with every problem found; a file that cannot be read is one of them.
    """
    return load_texts(read_texts(paths, tags=tags))


def read_texts(paths: Sequence[str], *, tags: Sequence[str] = ()) -> Texts:
    """The content of each file. Raises PolicyError with every file that cannot be read."""
    sources = _each(paths, lambda path: decode(path, _read(path)))
    return Texts(tuple(sources), tuple(_each(tags, lambda path: (path, _read(path)))))


def load_texts(texts: Texts) -> Policy:
    """The policy of texts read before, with the shipped catalogue and its generation. Raises PolicyError."""
    imported = ServiceTags()
    _each(texts.tags, lambda tag: imported.add(*tag))
    with _no_collection():
        policy = load(texts.sources, catalogue=Catalogue(), tags=imported, is_public_suffix=is_public_suffix)
    return replace(policy, generation=texts.generation)


def read_sources(paths: Sequence[str]) -> tuple[Source, ...]:
    """The text of each policy file. Raises PolicyError with every file that cannot be read."""
    return read_texts(paths).sources


def load_sources(sources: Sequence[Source]) -> Policy:
    """The policy of texts that need not have been files. Raises PolicyError."""
    return load_texts(Texts(tuple(sources)))


def _each[F, T](files: Sequence[F], read: Callable[[F], T]) -> list[T]:
    """`read` of each file, one named twice once. Raises PolicyError with the problems of all."""
    found: list[T] = []
    problems: list[Problem] = []
    for file in dict.fromkeys(files):
        try:
            found.append(read(file))
        except PolicyError as e:
            problems += e.problems
    if problems:
        raise PolicyError(problems)
    return found


class Catalogue(Mapping[str, Source]):
    """The shipped rule sets: `azure/kubernetes-service` to the file of that name, read when asked for."""

    def __init__(self) -> None:
        self._files = dict(_walk(resources.files("policies") / "catalogue", ""))

    def __getitem__(self, name: str) -> Source:
        return decode(f"catalogue/{name}{_SUFFIX}", self._files[name].read_bytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class ServiceTags(Mapping[str, tuple[Network, ...]]):
    """Prefixes by service tag. A cloud's file has thousands of tags; those that a rule asks for become networks."""

    def __init__(self) -> None:
        self._prefixes: dict[str, tuple[str, ...]] = {}
        self._file: dict[str, str] = {}

    def add(self, file: str, content: bytes) -> None:
        """Takes in one file. Raises PolicyError for another form, and for a tag that an earlier file defines."""
        try:
            values = json.loads(content)["values"]
            found = {value["name"]: tuple(value["properties"]["addressPrefixes"]) for value in values}
            if not all(isinstance(text, str) for name, prefixes in found.items() for text in (name, *prefixes)):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            hint = "give the JSON file that Microsoft publishes as Azure IP Ranges and Service Tags"
            raise _problem(file, "not a service-tag file", hint) from e
        if twice := next((name for name in found if name in self._file), None):
            hint = "give the file of one cloud, and the newest only"
            raise _problem(file, f"service tag {quote(twice)} is in {self._file[twice]} too", hint)
        self._prefixes |= found
        self._file |= dict.fromkeys(found, file)

    def __getitem__(self, name: str) -> tuple[Network, ...]:
        prefixes = self._prefixes[name]
        try:
            return tuple(map(ip_network, prefixes))
        except ValueError as e:
            raise _problem(self._file[name], f"service tag {quote(name)}: {e}", "download the file again") from e

    def __iter__(self) -> Iterator[str]:
        return iter(self._prefixes)

    def __len__(self) -> int:
        return len(self._prefixes)


def is_public_suffix(name: Hostname) -> bool:
    """Whether names directly below `name` are sold to anybody by an ICANN registry (`com`, `co.uk`)."""
    return bool(_icann_suffixes().is_public(name))


def shared_suffix(name: Hostname) -> Hostname | None:
    """The suffix at or below `name` under which a service gives names to anybody (`github.io`), if there is one."""
    return _shared_suffixes().get(name)


@cache
def _icann_suffixes() -> PublicSuffixList:
    from publicsuffixlist import PublicSuffixList  # here: only a policy with a wildcard pays for reading the list

    return PublicSuffixList(accept_unknown=False, only_icann=True)


@cache
def _shared_suffixes() -> Mapping[Hostname, Hostname]:
    """Each suffix of the list's private section, by itself and by every name above it."""
    from publicsuffixlist import PSLFILE

    with open(PSLFILE, encoding="utf-8") as file:
        private = file.read().partition("===BEGIN PRIVATE DOMAINS===")[2]
    entries = [line for line in private.splitlines() if line and not line.startswith(("//", "!"))]
    found: dict[Hostname, Hostname] = {}
    for suffix in (parse_hostname(entry.removeprefix("*.")) for entry in entries):
        for name in (suffix, *parents(suffix)):
            found.setdefault(name, suffix)
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Loading makes many objects and no cycles: looking for cycles among them is a third of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)  # a device has no end
    except OSError as e:
        raise _problem(path, f"cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise _problem(path, f"is no path: {e}") from e


def _walk(directory: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield prefix + entry.name.removesuffix(_SUFFIX), entry


def _problem(file: str, message: str, hint: str | None = None) -> PolicyError:
    return PolicyError([Problem(Place(file, 1), message, hint)])
