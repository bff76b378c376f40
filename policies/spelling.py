"""How a problem is worded: a foreign value in quotes, and the right word nearest to a wrong one. It knows no policy."""

from __future__ import annotations

from collections.abc import Iterable

MAX_PROBLEMS = 100  # of one file; a mistake made by a generator repeats a million times, and the first hundred suffice
_MAX_QUOTED = 60
_MAX_LISTED = 30
_MAX_COMPARED_WORDS = 500
_MAX_COMPARED = 60  # longer words are not a slip of the finger, and comparing them costs length times length


def quote(text: str) -> str:
    """`text` in double quotes on one line, shortened: what a file holds must not forge lines of a report."""
    shown = text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 1] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + '"'


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to `word` by edit distance, or None where all are too far to be what was meant."""
    if len(word) > _MAX_COMPARED:
        return None
    asked = _bare(word)
    words = sorted(known)
    if len(words) > _MAX_COMPARED_WORDS:  # a cloud has thousands of tags; a slip in the first letters is rare
        words = [candidate for candidate in words if _bare(candidate)[:2] == asked[:2]]
    found, best = None, max(len(asked) // 3, min(2, len(asked) // 2)) + 1
    for candidate in words:
        bare = _bare(candidate)
        if abs(len(bare) - len(asked)) < best and (distance := _distance(asked, bare, best)) < best:
            found, best = candidate, distance
    return found


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The repair of an unknown word: the nearest known one, else all of them where they are few."""
    words = sorted(known)
    if found := nearest(word, words):
        return f'did you mean "{found}"?'
    if len(words) > _MAX_LISTED:
        return f"none of the {len(words)} known is near"
    return "there is " + (", ".join(words) if words else "none")


def _bare(word: str) -> str:
    """`service_account` and `service-account` are `serviceAccount`, misspelt by habit."""
    return word.casefold().replace("_", "").replace("-", "")


def _distance(a: str, b: str, enough: int) -> int:
    """Damerau-Levenshtein distance (adjacent letters swapped count one), or `enough` where it is no less."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if last and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > enough:
            return enough
    return row[-1]
