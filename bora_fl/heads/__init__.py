"""The closed-form head: solved from sums over all clients' examples, which no partition changes."""

from bora_fl.heads.features import collect, head_metrics
from bora_fl.heads.private import (
    check_release,
    most_weight,
    public_clip_norm,
    public_features,
    release,
    release_noise,
    solve_private,
    solve_private_number,
    typical_norm,
)
from bora_fl.heads.projection import narrow, narrowed, widen
from bora_fl.heads.solve import Head, choose, gcv_penalty, interpolate, lda, ridge, scaled
from bora_fl.heads.sums import ClassSums

__all__ = [
    "ClassSums",
    "Head",
    "check_release",
    "choose",
    "collect",
    "gcv_penalty",
    "head_metrics",
    "interpolate",
    "lda",
    "most_weight",
    "narrow",
    "narrowed",
    "public_clip_norm",
    "public_features",
    "release",
    "release_noise",
    "ridge",
    "scaled",
    "solve_private",
    "solve_private_number",
    "typical_norm",
    "widen",
]
