"""Policy files merged into one `Policy`. Texts in, values out; reading files is `proxy/policy_files.py`.

The order of files never matters, not even for which rule a verdict cites. A policy is never loaded in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from policies.document import Document, Draft, read_document
from policies.errors import PolicyError, Problem
from policies.hostnames import Hostname
from policies.index import Policy, build
from policies.keys import Scope, Tags, Wrong
from policies.model import UNKNOWN, Match, Mode, Network, Workload
from policies.sets import Shelf, check, unfold
from policies.spelling import did_you_mean
from policies.tree import Source, parse

__all__ = ["Source", "load"]


def load(
    sources: Sequence[Source],
    *,
    catalogue: Mapping[str, Source],
    tags: Mapping[str, tuple[Network, ...]],
    is_public_suffix: Callable[[Hostname], bool],
) -> Policy:
    """The policy of all `sources` together. Raises PolicyError with every problem of every file.

    catalogue         the shipped sets: file name without `.yaml`, and the file
    tags              prefixes by service tag
    is_public_suffix  whether the names below this one belong to many owners
    """
    scope = Scope("", Tags(tags), is_public_suffix)
    documents = _read(sources, scope)
    shelf = Shelf(documents, catalogue, scope)
    problems = list(shelf.problems)
    workloads = {
        name: _merge([(doc, doc.workloads[name]) for doc in documents if name in doc.workloads], shelf, problems)
        for name in sorted({name for doc in documents for name in doc.workloads})
    }
    problems += _unused_sets(documents, shelf)
    problems += _tests_of_nobody(documents, workloads)
    if problems:
        raise PolicyError(dict.fromkeys(problems))
    guard = [rule for document in documents for rule in document.guard]
    return build(workloads, guard, [test for document in documents for test in document.tests])


def _read(sources: Sequence[Source], scope: Scope) -> list[Document]:
    documents: list[Document] = []
    problems: list[Problem] = []
    for source in sorted(sources, key=lambda source: source.file):
        try:
            documents.append(read_document(parse(source), replace(scope, file=source.file)))
        except (PolicyError, Wrong) as e:
            problems += e.problems
    if problems:
        raise PolicyError(problems)
    return documents


def _merge(parts: Sequence[tuple[Document, Draft]], shelf: Shelf, problems: list[Problem]) -> Workload:
    """One workload of everything that the files say of it. What contradicts is added to `problems`."""
    drafts = [draft for _, draft in parts]
    rules = [rule for draft in drafts for rule in draft.rules]
    for use in (use for draft in drafts for use in draft.uses):
        try:
            rules += unfold(use, shelf)
        except (PolicyError, Wrong) as e:
            problems += e.problems
    return Workload(
        name=drafts[0].name,
        place=drafts[0].place,
        rules=tuple(rules),
        match=_merge_match(drafts, problems),
        mode=_merge_mode(parts, problems),
        log_query=bool(_agreed(drafts, "logQuery", [draft.log_query for draft in drafts], problems)),
        ech=bool(_agreed(drafts, "ech", [draft.ech for draft in drafts], problems)),
    )


def _agreed[T](drafts: Sequence[Draft], key: str, values: Sequence[T | None], problems: list[Problem]) -> T | None:
    """What the files that say something say alike; None where none does."""
    said = [(draft, value) for draft, value in zip(drafts, values, strict=True) if value is not None]
    if not said:
        return None
    first, agreed = said[0]
    for draft, value in said[1:]:
        if value != agreed:
            message = f'workload "{draft.name}" has another {key} at {first.place}'
            problems.append(Problem(draft.place, message, "write it in one file, or alike in both"))
    return agreed


def _merge_match(drafts: Sequence[Draft], problems: list[Problem]) -> Match | None:
    sources = [
        draft.match and (draft.match.kubernetes, frozenset(draft.match.address), draft.match.user) for draft in drafts
    ]
    _agreed(drafts, "match", sources, problems)
    return next((draft.match for draft in drafts if draft.match), None)


def _merge_mode(parts: Sequence[tuple[Document, Draft]], problems: list[Problem]) -> Mode:
    """The workload's own mode; else that of its file, if no other file shares in the workload.

    The top of one team's file must not switch off enforcement for what another team wrote.
    """
    mode = _agreed([draft for _, draft in parts], "mode", [draft.mode for _, draft in parts], problems)
    if mode is not None:
        return mode
    if len(parts) == 1:
        return parts[0][0].mode or Mode.ENFORCE
    for document, draft in parts:
        if document.mode is Mode.AUDIT:
            message = f'mode: audit of this file does not reach workload "{draft.name}", which another file defines too'
            problems.append(Problem(draft.place, message, "write mode: audit in the workload"))
    return Mode.ENFORCE


def _unused_sets(documents: Sequence[Document], shelf: Shelf) -> Iterator[Problem]:
    """A set that nobody uses is wrong today already, not on the day it is used."""
    used = {use.name for document in documents for draft in document.workloads.values() for use in draft.uses}
    for rules in (rules for name, rules in shelf.own.items() if name not in used):
        try:
            check(rules)
        except Wrong as e:
            yield from e.problems


def _tests_of_nobody(documents: Sequence[Document], workloads: Mapping[str, Workload]) -> Iterator[Problem]:
    for test in (test for document in documents for test in document.tests):
        if test.workload not in workloads and test.workload != UNKNOWN:
            hint = did_you_mean(test.workload, workloads)
            yield Problem(test.place, f'tests of workload "{test.workload}", which no file defines', hint)
