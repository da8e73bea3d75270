"""The algebra of block-diversified low-rank updates: pure functions on factors, nothing of the weight's size."""

from bora_fl.blocks.block_cores import BlockCores
from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.gauge import fix_gauge
from bora_fl.blocks.merging import factor_mean, merge
from bora_fl.blocks.metrics import distance, effective_rank, relative_error
from bora_fl.blocks.normalization import at_rank, normalize_sigma
from bora_fl.blocks.refactorization import Refactorization, refactorize
from bora_fl.blocks.residual import residual
from bora_fl.blocks.resizing import padded, truncate
from bora_fl.blocks.streaming import StreamingMerge

__all__ = [
    "BlockCores",
    "BlockFactors",
    "Refactorization",
    "StreamingMerge",
    "at_rank",
    "distance",
    "effective_rank",
    "factor_mean",
    "fix_gauge",
    "merge",
    "normalize_sigma",
    "padded",
    "refactorize",
    "relative_error",
    "residual",
    "truncate",
]
