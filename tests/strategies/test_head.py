"""The clients' sums for the closed-form head, added up: in any order the same bits, in memory that does not grow."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from bora_fl.heads import ClassSums, lda, release, ridge
from bora_fl.privacy.gaussian import SeededRandomness
from bora_fl.simulations.engine import identify
from bora_fl.strategies.head import best, total
from bora_fl.wire.records import to_arrays
from bora_fl.wire.release import HeadLossesRelease
from bora_fl.wire.schema import HEADS, REPLY, SCHEMA


def reply(node: int, sums: ClassSums) -> Message:
    identify()
    asked = Message(RecordDict(), dst_node_id=node, message_type="query.head_statistics")
    record = ConfigRecord({"schema": SCHEMA, "round": 0})
    return Message(RecordDict({REPLY: record, HEADS: to_arrays(sums.to_tensors())}), reply_to=asked)


def sums_of(client: int, dim: int = 8, examples: int = 40) -> ClassSums:
    g = torch.Generator().manual_seed(client)
    x = torch.randn(examples, dim, generator=g) * 1.7**client
    return ClassSums.of(x, torch.arange(examples) % 2, 2)


def place(node: int) -> int:
    return {11: 2, 5: 0, 8: 1, 2: 3}[node]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_every_order_of_arrival_gives_the_same_bits(noise: float):
    def made(node: int) -> Message:
        sums = sums_of(place(node))
        # A release has features of a norm of at most 1.
        scaled = ClassSums.of(torch.eye(8).repeat(place(node) + 1, 1), torch.arange(8 * (place(node) + 1)) % 2, 2)
        return reply(node, release(scaled, noise, SeededRandomness(node)) if noise else sums)

    replies = {node: made(node) for node in (2, 5, 8, 11)}
    found = [
        total([replies[node] for node in order], (2, 8), 0, place, noise_multiplier=noise)
        for order in itertools.permutations(replies)
    ]
    for sums, clients, rejected in found:
        assert (clients, rejected) == (4, {})
        assert torch.equal(sums.to_vector(), found[0][0].to_vector())
    in_order = [ClassSums.from_tensors(sums_of(k).to_tensors(), 2, 8).to_vector() for k in range(4)]
    if not noise:  # sums whose order matters, or the test would prove nothing
        assert torch.equal(found[0][0].to_vector(), ((in_order[0] + in_order[1]) + in_order[2]) + in_order[3])
        assert not torch.equal(found[0][0].to_vector(), ((in_order[3] + in_order[2]) + in_order[1]) + in_order[0])


def test_a_heavy_client_counts_for_ten_medians_at_most_or_not_at_all():
    replies = [reply(k, sums_of(0, examples=40)) for k in range(4)] + [reply(4, sums_of(1, examples=4000))]
    sums, clients, rejected = total(replies, (2, 8), 0, max_ratio=50.0)
    assert (clients, float(sums.counts.sum()), list(rejected)) == (4, 160.0, ["4"])
    noised = ClassSums.of(torch.eye(8), torch.arange(8) % 2, 2)
    honest = [reply(k, release(noised.times(1000.0), 1.0, SeededRandomness(k))) for k in range(4)]
    lie = noised.times(1e9)
    sums, clients, _ = total([*honest, reply(4, lie)], (2, 8), 0, noise_multiplier=1.0)
    assert clients == 5
    assert float(sums.counts.sum()) == pytest.approx(14 * 8000, rel=1e-2)
    assert float(sums.gram[0, 0]) == pytest.approx(14 * 1000, rel=2e-2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize(("feature", "gram"), [(1e154, 0.0), (0.0, 1e308)])
def test_numbers_at_the_end_of_the_range_take_no_part(feature: float, gram: float, noise: float):
    """Their squares are infinite, and so would the total be."""
    sums = torch.zeros(2, 8, dtype=torch.float64)
    sums[:, 0] = feature
    lie = ClassSums(torch.full((2,), 1e200, dtype=torch.float64), sums, torch.zeros(8, 8, dtype=torch.float64))
    tensors = lie.to_tensors(torch.float64) | {"gram": torch.full((36,), gram, dtype=torch.float64)}
    message = reply(7, lie)
    message.content[HEADS] = to_arrays(tensors)
    honest = ClassSums.of(torch.eye(8), torch.arange(8) % 2, 2)
    others = [reply(k, release(honest, noise, SeededRandomness(k)) if noise else honest) for k in range(3)]
    total_sums, clients, rejected = total([message, *others], (2, 8), 0, noise_multiplier=noise)
    assert total_sums is not None
    assert bool(total_sums.gram.isfinite().all())
    assert (clients, list(rejected)) == (3, ["7"])


def test_memory_does_not_grow_with_the_clients():
    alive: list[int] = []

    def arriving():
        for client in range(20):
            yield reply(client, sums_of(0, dim=31))
            alive.append(sum(type(o) is torch.Tensor and o.shape == (31 * 32 // 2,) for o in gc.get_objects()))

    _, clients, _ = total(arriving(), (2, 31), 0)
    assert clients == 20
    assert max(alive) <= 2


def labelled(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (100,), generator=g)
    x = torch.randn(100, 8, generator=g).double() + 2 * torch.nn.functional.one_hot(y, 8)
    return x * scale, y


@pytest.mark.parametrize("scale", [10.0, 100.0, 1e6, 1e15])
def test_a_client_with_features_of_another_scale_does_not_take_the_head_over(scale: float):
    honest = [labelled(k) for k in range(4)]
    x, y = labelled(4, scale)
    replies = [reply(k, ClassSums.of(*data, 3)) for k, data in enumerate([*honest, (x, y)])]
    sums, clients, rejected = total(replies, (3, 8), 0)
    assert sums is not None
    assert clients == 4
    assert "times the median client's" in rejected["4"]
    features, labels = (torch.cat(parts) for parts in zip(*honest, strict=True))
    assert float((lda(sums)(features).argmax(1) == labels).double().mean()) > 0.8


def test_features_of_nearly_the_same_scale_count():
    replies = [reply(k, ClassSums.of(*labelled(k, scale), 3)) for k, scale in enumerate([1.0, 0.2, 1.0, 3.0])]
    assert total(replies, (3, 8), 0)[1:] == (4, {})


def losses(node: int, values: list[float], examples: int) -> Message:
    message = reply(node, ClassSums.of(*labelled(0), 3))
    message.content = HeadLossesRelease(values, node, examples).content()
    return message


@pytest.mark.parametrize("lie", [1e30, 1e3])
def test_one_client_s_losses_do_not_choose_the_head(lie: float):
    heads = dict.fromkeys(["trained", "x1", "x0.5"], lda(ClassSums.of(*labelled(0), 3)))
    honest = [losses(k, [1.0, 0.8, 0.9], 50) for k in range(12)]
    assert best(heads, honest)[0] == "x1"
    assert best(heads, [*honest, losses(12, [0.0, lie, lie], 50)])[0] == "x1"
    assert (
        best(heads, [losses(k, [1.0, 0.8, 0.9], 50) for k in range(2)] + [losses(2, [0.0, 3.0, 3.0], 50)])[0]
        == "trained"
    )
    assert "least 0" in best(heads, [losses(0, [1.0, 1e40, 0.9], 50)])[1]["0"]


def numbered(seed: int, scale: float = 1.0) -> ClassSums:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(100, 8, generator=g).double()
    return ClassSums.of(x, scale * (x[:, 0] + torch.randn(100, generator=g)), 1)


@pytest.mark.parametrize("scale", [30.0, 1e6])
def test_a_client_with_numbers_of_another_scale_does_not_take_the_head_over(scale: float):
    replies = [reply(k, numbered(k)) for k in range(4)] + [reply(4, numbered(4, scale))]
    sums, clients, rejected = total(replies, (1, 9), 0, number=True)
    assert (clients, list(rejected)) == (4, ["4"])
    assert "the mean square of its numbers" in rejected["4"]
    assert float(ridge(sums).weight[0, 0]) == pytest.approx(1, abs=0.2)


def test_numbers_may_differ_between_clients_as_skew_has_it():
    replies = [reply(k, numbered(k, scale)) for k, scale in enumerate([1.0, 0.01, 1.0, 9.0])]
    assert total(replies, (1, 9), 0, number=True)[1:] == (4, {})


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_products_that_no_numbers_have_are_rejected_in_any_unit(scale: float):
    lie = numbered(4, scale)
    gram = lie.gram.clone()
    gram[-1, :-1] += 100 * 2 * scale
    gram[:-1, -1] += 100 * 2 * scale
    replies = [reply(k, numbered(k, scale)) for k in range(4)] + [reply(4, replace(lie, gram=gram))]
    sums, clients, rejected = total(replies, (1, 9), 0, number=True)
    assert (clients, list(rejected)) == (4, ["4"])
    assert float(ridge(sums).weight[0, 0]) == pytest.approx(scale, rel=0.2)
