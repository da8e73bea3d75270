"""How much one client may say where no check of its reply can tell: as much as a few median clients."""

import statistics
from collections.abc import Collection, Mapping, Sequence

MEDIANS = 10.0
"""How many median clients one counts for at most, in the scale of its features and in how its losses differ."""


def of_another_scale(squares: Mapping[int, float], of: str = "features", times: float = MEDIANS) -> dict[int, str]:
    """Whose features have a mean square of more than so many times the median's, and that in words."""
    median = _median(squares.values())
    return {
        who: f"the mean square of its {of} is {square:.3g}, more than {times:g} times the median client's {median:.3g}"
        for who, square in squares.items()
        if square > times * median
    }


def tempered(differences: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """What clients say of how losses differ, with none of them counting for more than `MEDIANS` times the median.

    Args:
        differences: Client to its differences, all of the same losses.

    Returns:
        The same, scaled down where the largest of a client's is that much larger than the median client's largest.
    """
    sizes = {who: max(map(abs, found), default=0.0) for who, found in differences.items()}
    most = MEDIANS * _median(sizes.values())
    return {
        who: [value * most / sizes[who] for value in found] if sizes[who] > most else list(found)
        for who, found in differences.items()
    }


def _median(sizes: Collection[float]) -> float:
    """The lower median of those that are not 0: who says nothing does not silence the others."""
    return statistics.median_low([size for size in sizes if size] or [0.0])
