"""Counter-based dropout: one keep mask, whichever kernel draws it.

The mask is a pure function of `(seed, token, column)`: no state is kept between forward and backward, and the
reference, the CPU path and the Triton kernels agree bit for bit. It is Philox4x32 with seven rounds, the fewest that
pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, table 2), on the counter
`(column // 8, token, 0, 0)` and the two halves of the seed as key. Its four words give eight elements: element
`4·h + w` of a group takes half h (0 is the low one) of word w. An element is kept when its 16 bits are at least
`k = round(p · 2¹⁶)`, and kept elements are multiplied by `2¹⁶ / (2¹⁶ - k)`, so that the mean is exact.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
GROUP = 8  # elements of one counter
_MASK16, _MASK32 = 0xFFFF, 0xFFFFFFFF
_KEY = (0x9E3779B9, 0xBB67AE85)
_ROUND = (0xD2511F53, 0xCD9E8D57)
_ROWS_AT_ONCE = 32  # the working set of ten int64 arrays stays in the second-level cache


def drop_threshold(dropout_p: float) -> int:
    """Return the smallest 16-bit number that keeps an element: `round(p · 2¹⁶)`."""
    return min(round(dropout_p * 2**16), _MASK16)


def keep_scale(dropout_p: float) -> float:
    """Return the factor of kept elements: one over the exact probability of keeping."""
    return 2**16 / (2**16 - drop_threshold(dropout_p))


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed `[]` (int64) from torch's default generator, which `torch.manual_seed` and checkpointing govern."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _philox(key: Tensor, column_group: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words (held in int64) of the counters `(column_group, token, 0, 0)`, broadcast together.

    Args:
        key: the seed, `[]`, int64.
        column_group: `column // 8`, int64.
        token: row of x, int64, broadcastable with `column_group`.
    """
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1 = column_group.expand(len(token), -1), token
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=key.device)
    for _ in range(PHILOX_ROUNDS):
        # A product of two 32-bit numbers fits 64 bits; int64 holds those bits, and the mask undoes the sign extension.
        low, high = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1 = ((high >> 32) & _MASK32) ^ c1 ^ k0, high & _MASK32
        c2, c3 = ((low >> 32) & _MASK32) ^ c3 ^ k1, low & _MASK32
        k0, k1 = (k0 + _KEY[0]) & _MASK32, (k1 + _KEY[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(tokens: int, columns: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the keep mask `[tokens, columns]` (bool, on the seed's device).

    Args:
        tokens: rows of x.
        columns: in_features.
        dropout_p: probability of dropping an element, in [0, 1).
        seed: `[]`, int64.
    """
    device = seed.device
    threshold = drop_threshold(dropout_p)
    groups = torch.arange((columns + GROUP - 1) // GROUP, device=device)[None, :]
    keep = torch.empty(tokens, columns, dtype=torch.bool, device=device)
    for start in range(0, tokens, _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, tokens), device=device)[:, None]
        words = _philox(seed, groups, rows)
        kept = [(word & _MASK16) >= threshold for word in words] + [(word >> 16) >= threshold for word in words]
        keep[start : start + len(rows)] = torch.stack(kept, dim=-1).flatten(1)[:, :columns]
    return keep
