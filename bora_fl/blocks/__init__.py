"""The algebra of block-diversified low-rank updates: pure functions on factors, nothing of the weight's size."""

from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.gauge import truncate
from bora_fl.blocks.merging import factor_mean, merge
from bora_fl.blocks.metrics import distance, inner, relative_error
from bora_fl.blocks.refactorization import Refactorization, refactorize

__all__ = [
    "BlockFactors",
    "Refactorization",
    "distance",
    "factor_mean",
    "inner",
    "merge",
    "refactorize",
    "relative_error",
    "truncate",
]
