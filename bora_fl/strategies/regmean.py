"""The merge that minimizes the clients' output errors: RegMean's, refactorized in its own norm."""

from bora_fl.blocks import factor_mean, padded
from bora_fl.blocks.gram import bounded, merge_in_norm, refactorize_in_norm
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound
from bora_fl.strategies.refactoring import refactor


def regmean(layer: LayerRound) -> LayerMerge:
    """Weigh input directions by the clients' inputs (RegMean; Jin et al., ICLR 2023, arXiv:2212.09849).

    `M = (Σ_k w_k M_k G_k)(Σ_k w_k G_k)⁻¹`, and the best block factors in the norm `tr M Ḡ Mᵀ`: `bora_fl.blocks.gram`.
    A Gram matrix is cut to a few times the median client's size, so that no client takes the merge over by it. Updates
    without Gram matrices, as a robust rule may make them, are merged as `refactor` does. What differs: the
    paper merges whole linear layers once, here updates are merged round by round and refactorized to the adapter's
    rank; for more than one block only the diagonal blocks of G count.
    """
    if not layer.grams:
        return refactor(layer)
    target, gram = merge_in_norm(layer.updates, layer.weights, bounded(layer.grams))
    return LayerMerge(
        refactorize_in_norm(
            target,
            layer.rank,
            gram,
            start=padded(factor_mean(layer.updates, layer.weights), layer.rank),
            sigma_transform=layer.sigma_transform,
            only_B=layer.settings.refit == "B" and layer.current.num_blocks > 1,
            sweeps=layer.settings.sweeps,
        )
    )
