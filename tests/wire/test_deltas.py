"""What is left out of a message, or sent as positions, comes back bit for bit."""

import pytest
import torch

from bora_fl.wire.deltas import GAPS, VALUES, apply, difference, digest, not_whole


def states(share: float, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"B": (37, 5), "sigma": (3, 3, 5), "A": (5, 21), "scaling": (), "long": (70_000,)}
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    base["scaling"] = torch.tensor(2.0, dtype=torch.float64)
    base["count"] = torch.arange(5)
    after = {}
    for name, tensor in base.items():
        moved = torch.rand(tensor.shape, generator=g) < share
        after[name] = torch.where(moved, tensor + 1, tensor) if tensor.dim() else tensor
    return after, base


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.05, 0.3, 0.9, 1.0])
def test_what_was_sent_and_what_is_held_make_the_state(share: float):
    after, base = states(share)
    sent = difference(after, base)
    whole = base | apply(sent, base)
    assert whole.keys() == after.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in after.items())
    assert digest(not_whole(whole, sent)) == digest(not_whole(after, sent))
    assert sum(t.nbytes for t in sent.values()) <= sum(t.nbytes for t in after.values())
    if share == 0:
        assert not sent
    assert apply(difference(after, base, omit=False), base).keys() == after.keys()


def test_bytes_fall_with_the_share_that_changed():
    sizes = [sum(t.nbytes for t in difference(*states(share)).values()) for share in (1.0, 0.25, 0.05)]
    assert sizes[1] < 0.35 * sizes[0]
    assert sizes[2] < 0.075 * sizes[0]


def test_zeros_of_both_signs_differ_and_a_nan_is_itself():
    base = {"x": torch.tensor([0.0, float("nan"), 1.0, 1.0, 1.0, 1.0])}
    after = {"x": torch.tensor([-0.0, float("nan"), 1.0, 1.0, 1.0, 1.0])}
    whole = apply(difference(after, base), base)["x"]
    assert torch.equal(whole.view(torch.int32), after["x"].view(torch.int32))
    assert digest(after) != digest(base)


def test_an_entry_that_is_new_or_of_another_shape_is_sent_whole():
    base = {"x": torch.zeros(4)}
    after = {"x": torch.zeros(5), "y": torch.zeros(2)}
    assert difference(after, base).keys() == after.keys()


GOOD = {f"x{GAPS}": torch.tensor([0, 2], dtype=torch.uint8), f"x{VALUES}": torch.ones(2)}
BAD = {
    "values alone": {f"x{VALUES}": torch.ones(2)},
    "gaps alone": {f"x{GAPS}": torch.zeros(2, dtype=torch.uint8)},
    "an entry that is not held": {f"y{GAPS}": GOOD[f"x{GAPS}"], f"y{VALUES}": torch.ones(2)},
    "whole as well": GOOD | {"x": torch.zeros(4)},
    "beyond the end": GOOD | {f"x{GAPS}": torch.tensor([0, 3], dtype=torch.uint8)},
    "before the start": GOOD | {f"x{GAPS}": torch.tensor([-1, 2], dtype=torch.int16)},
    "a sum that overflows": GOOD | {f"x{GAPS}": torch.tensor([2**62, 2**62], dtype=torch.int64)},
    "fractions": GOOD | {f"x{GAPS}": torch.tensor([0.0, 1.0])},
    "too few values": GOOD | {f"x{VALUES}": torch.ones(1)},
    "another dtype": GOOD | {f"x{VALUES}": torch.ones(2, dtype=torch.float64)},
    "a table": {f"x{GAPS}": torch.zeros(1, 2, dtype=torch.uint8), f"x{VALUES}": torch.ones(1, 2)},
}


@pytest.mark.parametrize("case", BAD)
def test_positions_that_cannot_be_are_refused(case: str):
    base = {"x": torch.zeros(4)}
    assert torch.equal(apply(GOOD, base)["x"], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"fit nothing|gaps|out of range"):
        apply(BAD[case], base)
