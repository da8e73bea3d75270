import itertools

import pytest
import torch

from bora_fl.kernels.bench import cost
from bora_fl.kernels.launch_plan import LayerShape, backward_plan, forward_plan
from bora_fl.kernels.reference import Needs

H100 = LayerShape(8192, 4096, 4096, 8, 16, torch.bfloat16, torch.bfloat16, 4096)


def test_the_fused_path_keeps_to_its_budget_on_paper() -> None:
    forward, backward = cost.fused(H100)
    assert len(forward) <= 4
    assert len(backward) <= 6
    assert cost.floor_share(H100) < cost.extra_share((forward, backward), H100) <= 0.22
    assert cost.extra_share(cost.eager_lora(H100, 16), H100) > 0.5


def test_frozen_products_alone_cost_nothing_extra() -> None:
    product = cost.gemm(H100, accumulate=False)
    assert cost.extra_share(([product], [product]), H100) == 0


def test_a_launch_of_few_programs_takes_longer_and_one_that_fills_the_gpu_does_not() -> None:
    few = LayerShape(1024, 4096, 4096, 4, 16, torch.bfloat16, torch.bfloat16, 4096)
    (dy,) = (launch for launch in backward_plan(few, Needs()) if launch.kernel == "dy_kernel")
    work = cost.launch_work(dy, few)
    assert work.programs == 8 * 4  # tiles of 128 tokens, blocks
    assert work.seconds == pytest.approx(132 / 32 * max(work.bytes / cost.BANDWIDTH, work.flops / cost.PEAK))
    full = cost.launch_work(next(launch for launch in forward_plan(H100)), H100)
    assert full.seconds == max(full.bytes / cost.BANDWIDTH, full.flops / cost.PEAK)


def test_every_launch_of_every_subset_of_gradients_is_counted() -> None:
    for wanted in itertools.product([True, False], repeat=4):
        works = [cost.launch_work(launch, H100) for launch in backward_plan(H100, Needs(*wanted))]
        assert all(work.bytes > 0 for work in works)
        assert bool(works) == any(wanted)


def test_the_grid_covers_every_token_and_every_column() -> None:
    for tokens, width, b, rank in itertools.product((1, 65, 8192, 70001), (64, 4096, 14336), (1, 8, 32), (4, 128)):
        shape = LayerShape(tokens, width, width, b, rank, torch.bfloat16, torch.bfloat16, width)
        for launch in (*forward_plan(shape), *backward_plan(shape, Needs())):
            if launch.kernel != "reduce_kernel":
                per_program = launch.integers.get("tiles", 1) * int(launch.constants["BT"])
                assert tokens <= launch.grid[0] * per_program < tokens + per_program
                assert launch.grid[1] == b
            if launch.kernel == "up_kernel":
                assert launch.grid[2] * int(launch.constants["BC"]) >= width // b


def test_the_command_prints_every_path(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main(["--tokens", "1024", "--factors", "fp32"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("fused", "PEFT LoRA, rank 16", "PEFT LoRA, rank 128", "floor"))
