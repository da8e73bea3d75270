"""The table of strategies: what each is, where it comes from, and how it is composed."""

from dataclasses import dataclass
from typing import Literal

from bora_fl.state import ALL
from bora_fl.strategies.alignment import fedrot
from bora_fl.strategies.averaging import average, hetlora, lora_fair, share_right
from bora_fl.strategies.layer_merge import LayerRule, RestRule, Trains
from bora_fl.strategies.refactoring import flexlora, florist, keep_rest, refactor
from bora_fl.strategies.regmean import regmean
from bora_fl.strategies.robust_pca import fedrpca
from bora_fl.strategies.single_factor import core_only, mean_of_trained, orthonormal_frozen_side, singular_rows
from bora_fl.strategies.stacking import flora, fold_rest

_B: Trains = frozenset({"B", "tensors"})
_SIGMA: Trains = frozenset({"sigma", "tensors"})
_A: Trains = frozenset({"A", "tensors"})

_ANY_BLOCKS = "any b"
_ENTRYWISE = "factors are averaged entry by entry, so all must have one rank; use hetlora, flora, flexlora or refactor"
_FROZEN = "the frozen factor must be the same for all, at one rank; use hetlora, flora, flexlora or refactor"
_REWRITTEN = "the factors are written in new coordinates before every round, where last round's moments mean nothing"
_NO_FACTORS = "it merges block factors, and this method has none"


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
        name: What `strategy.name` takes.
        summary: One line for lists.
        source: Paper: title, authors, where.
        equation: The merge.
        differs: What differs here from the source.
        merge: The rule that merges a layer.
        prepare: The rule that readies a layer before a round, if there is one.
        schedule: The parts that train, round by round, over and over.
        shares: The parts that leave the clients (of those that were trained).
        linear: The merge depends on the updates through their weighted mean alone.
        exact: Adapter plus base delta reproduce the mean of the products.
        folds: Part of the merge goes into the clients' frozen weights.
        rest: What becomes of what the merge misses; `keep_rest` where `strategy.residual` says.
        sparse: What clients send only the share `strategy.upload-fraction` of; empty where they send all.
        gram: Clients send the Gram matrices of their layers' inputs too; `privacy.mode = none` alone allows it.
        same_rank: Why clients of different ranks cannot take part; empty where they can.
        no_server_optimizer: Why a server optimizer cannot act on it; empty where it can.
        no_generic: Why it cannot merge PEFT methods without block factors; empty where it can.
        no_lora: Why it cannot run on plain LoRA; empty where it can.
        blocks: What it needs of b, or what differs with it.
    """

    name: str
    summary: str
    source: str
    equation: str
    differs: str
    merge: LayerRule
    prepare: LayerRule | None = None
    schedule: tuple[Trains, ...] = (ALL,)
    shares: Trains = ALL
    linear: bool = False
    exact: bool = False
    folds: bool = False
    rest: RestRule | None = None
    sparse: Literal["", "entries", "components"] = ""
    gram: bool = False
    same_rank: str = ""
    no_server_optimizer: str = ""
    no_generic: str = _NO_FACTORS
    no_lora: str = ""
    blocks: str = _ANY_BLOCKS

    @property
    def fits(self) -> bool:
        """Whether it leaves a residual that `strategy.residual` applies to."""
        return self.rest is keep_rest


_ROWS = (
    Preset(
        "fedavg",
        "average every factor separately",
        "FedIT: Towards Building the Federated GPT: Federated Instruction Tuning; Zhang et al.; ICASSP 2024, "
        "arXiv:2305.05644",
        "B = Σ w_k B^k, Sigma = Σ w_k Sigma^k, A = Σ w_k A^k",
        "BoRA's Sigma is averaged in effective form and normalized without changing the product",
        average,
        linear=True,
        same_rank=_ENTRYWISE,
        no_generic="",
    ),
    Preset(
        "ffa",
        "freeze A, train and average B",
        "FFA-LoRA: Improving LoRA in Privacy-preserving Federated Learning; Sun, Li, Li, Ding; ICLR 2024, "
        "arXiv:2403.12313",
        "B = Σ w_k B^k with A (and Sigma) as drawn at the start",
        "for BoRA, Sigma is frozen with A: training both would make the mean inexact",
        mean_of_trained,
        schedule=(_B,),
        shares=_B,
        linear=True,
        exact=True,
        same_rank=_FROZEN,
    ),
    Preset(
        "fedsvd",
        "train and average B, then make A's rows orthonormal by the product's SVD",
        "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA; Lee et al.; NeurIPS "
        "2025, arXiv:2505.12805",
        "(Σ w_k B^k) A = U S Vᵀ, B ← U S, A ← Vᵀ",
        "for b > 1 rows of A_j cannot be rotated: they are made orthonormal once, while B = 0, and stay so",
        mean_of_trained,
        prepare=singular_rows,
        schedule=(_B,),
        shares=_B,
        linear=True,
        exact=True,
        same_rank=_FROZEN,
        no_server_optimizer=_REWRITTEN,
        blocks="b = 1 is the paper's method; for b > 1 it is ffa from an orthonormal A",
    ),
    Preset(
        "flora",
        "stack all clients into the frozen weights and restart",
        "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations; Wang et "
        "al.; NeurIPS 2024, arXiv:2409.05976",
        "W ← W + Σ w_k delta_W^k, sent as a stack of rank Σ r_k; new A, B = 0",
        "stacking keeps each client's Sigma, so it is exact for any b",
        flora,
        exact=True,
        folds=True,
        no_server_optimizer="the merged update goes into the frozen weights and the factors restart",
    ),
    Preset(
        "flexlora",
        "truncated SVD of the mean product",
        "FlexLoRA: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources; Bai et al.; NeurIPS 2024, arXiv:2402.11505",
        "Σ w_k delta_W^k ≈ U_r S_r V_rᵀ, B = U_r S_r, A = V_rᵀ, Sigma = 1 before it is normalized",
        "the product is never formed; smaller clients receive the components of most energy",
        flexlora,
        rest=keep_rest,
        blocks="for b > 1 the merged update is of rank r, not b·r: Sigma restarts alike in all block pairs",
    ),
    Preset(
        "hetlora",
        "zero-pad to the largest rank, weight by the product's norm",
        "HetLoRA: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models; Cho et al.; "
        "EMNLP 2024, arXiv:2401.06432",
        "B = Σ p_k pad(B^k), A = Σ p_k pad(A^k), p_k ∝ w_k ‖delta_W^k‖_F",
        "the number of examples counts too; a client trains the components of most energy as they are, at a fixed rank",
        hetlora,
    ),
    Preset(
        "fedex",
        "average the factors, merge the exact residual into the frozen weights",
        "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models; "
        "Singhal, Ponkshe, Vepakomma; ACL 2025, arXiv:2410.09432",
        "W ← W + Σ w_k delta_W^k - B̄ Ā",
        "the residual is sent in factored form, of rank Σ r_k + r",
        average,
        rest=fold_rest,
        exact=True,
        folds=True,
        same_rank=_ENTRYWISE,
    ),
    Preset(
        "lora-fair",
        "correct the mean B towards the mean product",
        "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement; Bian et al.; "
        "ICCV 2025, arXiv:2411.14961",
        "B = argmin ‖Σ w_k delta_W^k - B Ā‖² + λ ‖B - B̄‖²",
        "solved in closed form for the distance, where the paper maximizes a cosine by gradient steps",
        lora_fair,
        same_rank=_ENTRYWISE,
    ),
    Preset(
        "rolora",
        "train B and A in turn",
        "RoLoRA: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA; Chen et al.; "
        "NeurIPS 2025, arXiv:2502.01755",
        "odd rounds B = Σ w_k B^k, even rounds A = Σ w_k A^k",
        "for BoRA, Sigma stays frozen; cyclic trains it in a round of its own",
        mean_of_trained,
        schedule=(_B, _A),
        linear=True,
        exact=True,
        same_rank=_FROZEN,
    ),
    Preset(
        "fedsa",
        "share A, keep B on the client",
        "FedSA-LoRA: Selective Aggregation for Low-Rank Adaptation in Federated Learning; Guo et al.; ICLR "
        "2025, arXiv:2410.01463",
        "A = Σ w_k A^k; every client keeps its B",
        "for BoRA, Sigma stays on the client with B; the server's own adapter has no update and cannot be "
        "evaluated alone",
        share_right,
        shares=_A,
        linear=True,
        same_rank=_ENTRYWISE,
    ),
    Preset(
        "fed-sb",
        "train only the core between two frozen factors",
        "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated "
        "LoRA Fine-Tuning; Singhal et al.; 2025, arXiv:2502.15436",
        "Sigma = Σ w_k Sigma^k with A and B frozen",
        "the core is BoRA's Sigma; A and B are random and orthonormal, not singular vectors of a gradient",
        mean_of_trained,
        prepare=core_only,
        schedule=(_SIGMA,),
        shares=_SIGMA,
        linear=True,
        exact=True,
        folds=True,
        same_rank=_FROZEN,
        no_lora="plain LoRA has no core between A and B to train; set adapter.method to bora",
        blocks="any b; the core holds b² r numbers",
    ),
    Preset(
        "fedrot",
        "rotate every client to the received factors, then average",
        "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA; Zhang, Kim, Cha, Vikalo; ICML "
        "2026, arXiv:2602.23638",
        "B = Σ w_k B^k Q_k, A = Σ w_k Q_kᵀ A^k, Q_k orthogonal, closest to the received factors",
        "rotated on the server, both factors in one Procrustes problem, without softening",
        fedrot,
        same_rank=_ENTRYWISE,
        blocks="for b > 1 the freedom is a signed permutation of the components",
    ),
    Preset(
        "florist",
        "keep the components that hold a share of the merged energy",
        "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large "
        "Language Models; Ramesh, Dass; MLSys 2026, arXiv:2506.09199",
        "smallest p ≤ r with Σ_{k≤p} s_k² ≥ threshold · Σ s_k² over the spectrum of Σ w_k delta_W^k",
        "the rank is at most the adapter's; for b > 1 the energies are those of the block fit's components",
        florist,
        rest=keep_rest,
        no_server_optimizer="the rank changes from round to round, and the moments with it",
    ),
    Preset(
        "cellm",
        "clients send the entries that moved most; average",
        "CELLM: An Efficient Communication in Large Language Models Training for Federated Learning; "
        "Vavekanand, Sam; 2024, arXiv:2407.20557",
        "Σ w_k (received + top_fraction(trained^k - received)), factor by factor",
        "top-k in each tensor on its own, at strategy.upload-fraction",
        average,
        linear=True,
        sparse="entries",
        same_rank=_ENTRYWISE,
        no_generic="",
    ),
    Preset(
        "lora-a2",
        "train B and A in turn; clients send the components that moved most",
        "LoRA-A²: Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients; Koo, Jang, "
        "Ok; ACL 2025, arXiv:2410.22815",
        "odd rounds B, even rounds A = Σ_k w_k (received + mask^k ∘ change^k), mask^k: the components of all layers "
        "with the largest ‖change of delta_W^k‖_F",
        "one budget, strategy.upload-fraction, for all clients; one learning rate for A and B; for BoRA, Sigma stays "
        "frozen",
        mean_of_trained,
        schedule=(_B, _A),
        linear=True,
        exact=True,
        sparse="components",
        same_rank=_FROZEN,
    ),
    Preset(
        "fedrpca",
        "average the low-rank part of the updates, and the sparse part times a factor",
        "FedRPCA: Enhancing Federated LoRA Aggregation Using Robust PCA; Jhunjhunwala et al.; 2025, arXiv:2506.01194",
        "the updates of B, and of A, as columns = L + S (robust PCA); update = Σ w_k L_k + β Σ w_k S_k",
        "weights enter the split; clients that agree, or one alone, are averaged; Sigma is averaged",
        fedrpca,
        same_rank=_ENTRYWISE,
    ),
    Preset(
        "refactor",
        "best block factors for the mean product (default)",
        "this project; for b = 1 the truncated SVD of the mean product",
        "min Σ_ij ‖Σ w_k B_i^k diag(Sigma_ij^k) A_j^k - B_i diag(Sigma_ij) A_j‖² over B, Sigma, A of rank r",
        "the residual is dropped, carried to the next merge or added to the clients' frozen weights",
        refactor,
        rest=keep_rest,
    ),
    Preset(
        "regmean",
        "best block factors for the mean product, weighed by the layers' inputs",
        "RegMean: Dataless Knowledge Fusion by Merging Weights of Language Models; Jin, Ren, Preotiuc-Pietro, Cheng; "
        "ICLR 2023, arXiv:2212.09849",
        "M = (Σ w_k delta_W^k G_k)(Σ w_k G_k)⁻¹, then min tr (M - fit) Ḡ (M - fit)ᵀ over B, Sigma, A of rank r; "
        "G_k = E[x xᵀ] at client k",
        "adapters are merged round by round and refactorized, where the paper merges whole layers once; for b > 1 G_k "
        "is its diagonal blocks",
        regmean,
        gram=True,
        blocks="b = 1 takes G whole; for b > 1 only block-diagonal G keeps the block form",
    ),
    Preset(
        "cyclic",
        "train B, Sigma and A in turn, the frozen side re-orthonormalized",
        "this project; alternation as in RoLoRA (arXiv:2502.01755), orthonormal frozen side as in FedSVD "
        "(arXiv:2505.12805)",
        "round by round B, Sigma or A = Σ w_k of it; before it the frozen side is orthonormalized, the "
        "product unchanged",
        "the frozen side adapts, and Sigma trains; both sources keep it fixed",
        mean_of_trained,
        prepare=orthonormal_frozen_side,
        schedule=(_B, _SIGMA, _A),
        linear=True,
        exact=True,
        same_rank=_FROZEN,
        no_server_optimizer=_REWRITTEN,
        blocks="b = 1 alternates B and A; for b > 1 the frozen side's rows are brought to norm, not to right angles",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}
