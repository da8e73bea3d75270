"""Several examples in one row, so that little of a batch is padding; each is trained as if it were alone."""

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np

from bora_fl.data.encoded import Encoded


def pack(data: Encoded) -> Encoded:
    """Rows of several examples, none longer than `max_length`.

    Longest first, each example goes where it leaves the least room (best-fit decreasing). A token's position counts
    from its own example's beginning, and an example's first token is no target: what stands before it is another's.

    Args:
        data: Examples of a language model, one a row.

    Returns:
        The same targets in fewer rows, with tokens of their own.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in a row and the row, in ascending order
    for example in np.argsort(-data.lengths, kind="stable").tolist():
        length = int(data.lengths[example])
        if length == 0:
            continue
        place = bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (data.max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(room, (left - length, row))
    order = np.array([example for row in rows for example in row], dtype=np.int64)
    lengths = data.lengths[order]
    places = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]) if len(order) else np.empty(0, np.int32)
    flat = np.repeat(data.begin[order], lengths) + places
    targets = places >= np.repeat(np.maximum(data.prompts[order], 1), lengths)
    if data.targets is not None:
        targets &= data.targets[flat]
    ends = np.cumsum([sum(int(data.lengths[example]) for example in row) for row in rows], dtype=np.int64)
    begin = np.concatenate([[0], ends[:-1]]).astype(np.int64) if rows else ends
    return replace(
        data,
        tokens=data.tokens[flat],
        begin=begin,
        lengths=ends - begin,
        prompts=np.zeros(len(rows), np.int64),
        targets=targets,
        places=places,
    )
