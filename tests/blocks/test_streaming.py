"""Streaming merges: exact while they can be, bounded beyond, the same for every tree."""

from __future__ import annotations

import pytest
import torch

from bora_fl.blocks import BlockCores, BlockFactors, StreamingMerge, factor_mean, merge, refactorize, relative_error
from bora_fl.blocks.planted import drifting_clients, random_factors


def streamed(clients: list[BlockFactors], weights: list[float], capacity: int | None) -> StreamingMerge:
    stream = StreamingMerge(capacity)
    for f, w in zip(clients, weights, strict=True):
        stream.add(f, w)
    return stream


def exact(clients: list[BlockFactors], weights: list[float]) -> torch.Tensor:
    return sum((w * f.dense() for f, w in zip(clients, weights, strict=True)), torch.zeros(clients[0].shape))


def test_few_clients_are_stacked_exactly() -> None:
    clients, weights = drifting_clients(0, 3), [0.5, 1.5, 2.0]
    result = streamed(clients, weights, 12).result()
    assert isinstance(result, BlockFactors)
    torch.testing.assert_close(result.dense(), merge(clients, weights).dense())


def test_blocks_no_larger_than_the_capacity_lose_nothing_however_many_clients_come() -> None:
    clients = [random_factors(k, r=1 + k % 3) for k in range(30)]
    weights = [1.0 + k for k in range(30)]
    stream = streamed(clients, weights, 8)  # blocks of 6 × 8
    result = stream.result()
    assert isinstance(result, BlockCores)
    torch.testing.assert_close(result.dense(), exact(clients, weights), rtol=1e-11, atol=1e-10)
    assert stream.discarded < 1e-6 * result.norm()
    torch.testing.assert_close(stream.mean().dense(), exact(clients, weights) / sum(weights), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("capacity", [4, 8, 12])
def test_what_is_lost_is_within_the_stated_bound(capacity: int) -> None:
    clients = drifting_clients(1, 20)
    stream = streamed(clients, [0.05] * 20, capacity)
    result, truth = stream.result(), exact(clients, [0.05] * 20)
    lost = float((result.dense() - truth).norm())
    assert 0 < lost <= stream.discarded
    assert lost < 0.1 * float(truth.norm())


def test_every_order_and_every_tree_gives_the_same_within_the_bounds() -> None:
    clients, weights = drifting_clients(2, 24), [1.0 + (k % 5) for k in range(24)]
    sequence = streamed(clients, weights, 8)
    backward = streamed(clients[::-1], weights[::-1], 8)
    tree = StreamingMerge(8)
    for part in range(0, 24, 6):
        tree.combine(streamed(clients[part : part + 6], weights[part : part + 6], 8))
    assert tree.count == 24
    assert tree.total_weight == sum(weights)
    truth = exact(clients, weights)
    for other in (backward, tree):
        apart = float((sequence.result().dense() - other.result().dense()).norm())
        assert apart <= sequence.discarded + other.discarded
        assert apart < 0.05 * float(truth.norm())


def test_combining_leaves_the_other_merge_as_it_was() -> None:
    first, second = drifting_clients(3, 6), drifting_clients(4, 6)
    one, other = streamed(first, [1.0] * 6, 8), streamed(second, [1.0] * 6, 8)
    before = other.result().dense()
    one.combine(other)
    one.add(first[0], 3.0)
    torch.testing.assert_close(other.result().dense(), before, rtol=0, atol=0)
    assert other.count == 6


def test_state_does_not_grow_with_the_number_of_clients() -> None:
    def largest_state(count: int) -> int:
        stream, largest = StreamingMerge(8), 0
        for k in range(count):
            stream.add(random_factors(k, 48, 64, r=4), 1.0)
            held = [stream._cores] if stream._cores is not None else []
            tensors = [t for c in held for t in (c.rows, c.cores, c.columns)]
            tensors += [t for f in stream._stacked for t in (f.B, f.sigma, f.A)]
            largest = max(largest, sum(t.numel() for t in tensors))
        return largest

    assert largest_state(200) == largest_state(20)


def test_a_refactorized_stream_is_almost_as_good_as_one_of_the_exact_stack() -> None:
    clients, weights = drifting_clients(5, 40), [1 / 40] * 40
    merged, mean = merge(clients, weights), factor_mean(clients, weights)
    direct = refactorize(merged, 4, start=mean)
    via_stream = refactorize(streamed(clients, weights, 12).result(), 4, start=mean)
    assert relative_error(via_stream.factors, merged) < 1.01 * direct.relative_error


def test_wrong_layers_weights_and_capacities_are_refused() -> None:
    stream = StreamingMerge()
    with pytest.raises(ValueError, match="nothing was merged"):
        stream.result()
    with pytest.raises(ValueError, match="capacity is 0"):
        StreamingMerge(0)
    stream.add(random_factors(0), 1.0)
    with pytest.raises(ValueError, match="one merge a layer"):
        stream.add(random_factors(0, b=2), 1.0)
    with pytest.raises(ValueError, match="finite"):
        stream.add(random_factors(0), float("inf"))
    stream.add(random_factors(1), -1.0)
    with pytest.raises(ValueError, match="sum to 0"):
        stream.mean()
