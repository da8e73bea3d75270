"""What the host launches for one layer: grids, tile sizes, compile-time numbers. No Triton, no tensors.

The host (`triton_launch.py`), the ahead-of-time check (`aot.py`) and the paper model (`cost.py`) all read this plan, so
what is checked and counted is what runs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from bora_fl.kernels.dropout import PHILOX_ROUNDS
from bora_fl.kernels.reference import Needs

_PLANS = 4096  # kept: a model has few kinds of layers, and batches differ in their tokens


@dataclass(frozen=True)
class LayerShape:
    """One call of a layer, as far as the kernels can tell calls apart.

    Attributes:
        tokens, in_features, out_features, num_blocks, rank: T, n, m, b, r.
        x_dtype: dtype of x, y, W and their gradients.
        factor_dtype: dtype of A and B (Sigma may have another).
        row_stride: elements from one row of x to the next.
        bias: whether the up-projection adds one.
        dropout: whether x goes through dropout.
        backend: "cuda" or "hip".
        interpreted: whether Triton's interpreter runs the kernels.
    """

    tokens: int
    in_features: int
    out_features: int
    num_blocks: int
    rank: int
    x_dtype: torch.dtype
    factor_dtype: torch.dtype
    row_stride: int
    bias: bool = False
    dropout: bool = False
    backend: str = "cuda"
    interpreted: bool = False

    @property
    def padded_rank(self) -> int:
        """The rank as the matrix instructions want it: a power of two, at least 16."""
        return max(16, 1 << (self.rank - 1).bit_length())

    @property
    def precision(self) -> str:
        """`tl.dot`'s treatment of float32 operands.

        Float32 factors over a half-precision x need no more than TF32, whose 10 bits already exceed bfloat16's 7 and
        equal float16's; float32 throughout takes three TF32 products, which keeps float32's accuracy.
        """
        if self.backend == "hip":
            return "ieee"
        return "tf32" if self.x_dtype != torch.float32 else "tf32x3"


class Launch(NamedTuple):
    """One kernel launch: its name, grid, run-time integers, compile-time numbers and options."""

    kernel: str
    grid: tuple[int, int, int]
    integers: dict[str, int]
    constants: dict[str, int | bool | str]
    num_warps: int
    num_stages: int

    @property
    def compiled_as(self) -> tuple[int | bool | str, ...]:
        """What tells apart the machine code of two launches of one kernel on tensors alike."""
        return self.kernel, *self.constants.values(), self.num_warps, self.num_stages


class _Tile(NamedTuple):
    BT: int
    BC: int
    num_warps: int
    num_stages: int


def _tile(kernel: str, shape: LayerShape) -> _Tile:
    """Return tile sizes under which nothing spills; `aot.py` holds this for every rank and architecture."""
    rank, half = shape.padded_rank, shape.factor_dtype != torch.float32
    if kernel == "down":
        return _Tile(64, 64, 4, 3) if half else _Tile(64, 32, 4, 2)
    if kernel == "up":
        if half or rank <= 32:
            return _Tile(64, 128, 4, 1) if half else _Tile(64, 64, 4, 1)
        return _Tile(64, 32, 4, 1) if rank == 64 else _Tile(32, 64, 8, 1)
    if half and rank <= 32:
        return _Tile(128, 64, 8, 2)
    if half:
        return _Tile(64, 32, 8, 1) if shape.backend == "cuda" else _Tile(32, 32, 4, 1)
    if rank <= 32:
        return _Tile(64, 32, 8 if shape.backend == "cuda" else 4, 1)
    if rank == 64:
        return _Tile(32, 32, 8, 1)
    # Three TF32 products keep more operands in registers than one does.
    return _Tile(16, 16, 4, 1) if shape.precision == "tf32x3" else _Tile(32, 16, 8, 1)


def _mix_rows(shape: LayerShape) -> int:
    return max(16, 1024 // shape.padded_rank)


def _splits(shape: LayerShape, rows: int) -> tuple[int, int]:
    """Split the tokens into (slices, tiles per slice): about 256 programs over all blocks, 8 to 128 slices."""
    tiles = math.ceil(shape.tokens / rows)
    per_slice = math.ceil(tiles / min(128, max(8, 256 // shape.num_blocks)))
    return math.ceil(tiles / per_slice), per_slice


def _constants(shape: LayerShape, tile: _Tile, **more: int | bool | str) -> dict[str, int | bool | str]:
    common: dict[str, int | bool | str] = {"NB": shape.num_blocks, "R": shape.rank, "RP": shape.padded_rank}
    dots: dict[str, int | bool | str] = {
        "BT": tile.BT,
        "BC": tile.BC,
        "PRECISION": shape.precision,
        "UPCAST": shape.interpreted,
    }
    return {**common, **dots, **more}


def _of_x(shape: LayerShape) -> dict[str, int | bool | str]:
    return {
        "N": shape.in_features,
        "STRIDE_X": shape.row_stride,
        "DROPOUT": shape.dropout,
        "PHILOX_ROUNDS": PHILOX_ROUNDS,
    }


def mix_launch(shape: LayerShape) -> Launch:
    """Plan the mixing z = Sigma · u."""
    rows = _mix_rows(shape)
    constants: dict[str, int | bool | str] = {
        "NB": shape.num_blocks,
        "R": shape.rank,
        "RP": shape.padded_rank,
        "BT": rows,
    }
    grid = (math.ceil(shape.tokens / rows), shape.num_blocks, 1)
    return Launch("mix_kernel", grid, {"T": shape.tokens}, constants, 4, 2)


@lru_cache(_PLANS)
def forward_plan(shape: LayerShape) -> tuple[Launch, ...]:
    """Plan the branch's forward pass: down, mix, up."""
    T, b = shape.tokens, shape.num_blocks
    tile = _tile("down", shape)
    down = Launch(
        "down_kernel",
        (math.ceil(T / tile.BT), b, 1),
        {"T": T},
        _constants(shape, tile, **_of_x(shape)),
        tile.num_warps,
        tile.num_stages,
    )
    tile = _tile("up", shape)
    up = Launch(
        "up_kernel",
        (math.ceil(T / tile.BT), b, math.ceil(shape.out_features // b / tile.BC)),
        {"T": T},
        _constants(shape, tile, M=shape.out_features, BIAS=shape.bias),
        tile.num_warps,
        tile.num_stages,
    )
    return down, mix_launch(shape), up


@lru_cache(_PLANS)
def backward_plan(shape: LayerShape, needs: Needs) -> tuple[Launch, ...]:
    """Plan the branch's backward pass: mix (z again), over dY, mix back, over x, add the slices."""
    b, r, n, m = shape.num_blocks, shape.rank, shape.in_features, shape.out_features
    launches = []
    need_u, need_z = needs.x or needs.A, needs.x or needs.A or needs.Sigma
    if needs.B:
        launches.append(mix_launch(shape))
    tile = _tile("dy", shape)
    slices, tiles = _splits(shape, tile.BT)
    integers = {"T": shape.tokens, "tiles": tiles}
    if needs.B or need_z:
        constants = _constants(shape, tile, M=m, NEED_Z=need_z, NEED_B=needs.B)
        launches.append(Launch("dy_kernel", (slices, b, 1), integers, constants, tile.num_warps, tile.num_stages))
    rows = _mix_rows(shape)
    mix_slices, mix_tiles = _splits(shape, rows)
    if need_z:
        constants = {"NB": b, "R": r, "RP": shape.padded_rank, "BT": rows, "NEED_U": need_u, "NEED_SIGMA": needs.Sigma}
        mix_integers = {"T": shape.tokens, "tiles": mix_tiles}
        # Found by compiling: the other choice spills somewhere, and AMD's warps are twice as wide.
        wide = shape.backend == "cuda" and not 16 < shape.padded_rank < 128
        num_warps = 8 if wide else 4
        launches.append(Launch("mix_back_kernel", (mix_slices, b, 1), mix_integers, constants, num_warps, 1))
    if need_u:
        constants = _constants(shape, tile, NEED_X=needs.x, NEED_A=needs.A, **_of_x(shape))
        launches.append(Launch("x_kernel", (slices, b, 1), integers, constants, tile.num_warps, tile.num_stages))
    if needs.A or needs.Sigma or needs.B:
        sizes = {"SIZE_A": r * n * needs.A, "SIZE_SIGMA": b * b * r * needs.Sigma, "SIZE_B": m * r * needs.B}
        counts = {"slices_A": slices, "slices_Sigma": mix_slices, "slices_B": slices}
        grid = sum(math.ceil(size / 1024) for size in sizes.values())
        launches.append(Launch("reduce_kernel", (grid, 1, 1), counts, {**sizes, "BC": 1024}, 4, 1))
    return tuple(launches)
