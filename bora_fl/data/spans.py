"""Entities in the classes of words: ``B-x`` begins one of the kind x, and ``I-x`` goes on with it.

As conlleval counts (Tjong Kim Sang, Buchholz, CoNLL 2000), an ``I-x`` that goes on with nothing of its kind begins one
too, and a found entity is right if its first word, its last one and its kind are those of a known one.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor


def tells_spans(names: Sequence[str]) -> bool:
    """Whether classes are those of entities: ``O``, and others that begin with ``B-`` or ``I-``."""
    others = [name for name in names if name != "O"]
    return bool(others) and all(name[:2] in ("B-", "I-") for name in others)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities of a text: first word, one past the last, kind."""
    found, begin, kind = set[tuple[int, int, str]](), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, of = tag.partition("-")
        if kind and (mark != "I" or of != kind):
            found.add((begin, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            begin, kind = place, of
    return found


def span_counts(logits: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[int, int, int]:
    """How many entities are found in a batch, how many there are, and how many of those found are right.

    Args:
        logits: ``[N, T, C]``.
        labels: ``[N, T + 1]``, each word's class one position on, -100 elsewhere.
        names: The C classes.
    """
    likely, right = logits.argmax(-1).cpu(), labels[:, 1:].cpu()
    found = known = both = 0
    for guessed, true in _of_words(likely, right, names):
        ours, theirs = spans(guessed), spans(true)
        found, known, both = found + len(ours), known + len(theirs), both + len(ours & theirs)
    return found, known, both


def _of_words(likely: Tensor, right: Tensor, names: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    for row, truth in zip(likely, right, strict=True):
        words = truth >= 0
        yield [names[k] for k in row[words].tolist()], [names[k] for k in truth[words].tolist()]
