"""DP-SGD: its laws, and the mistakes that published implementations make."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from bora_fl.adapters.layer import BoraAdapter
from bora_fl.client import dpsgd
from bora_fl.client.dpsgd import train_privately
from bora_fl.privacy.accounting import Budget, BudgetExceeded
from bora_fl.privacy.gaussian import SeededRandomness, SystemRandomness, poisson_sample
from bora_fl.privacy.ledger import Ledger, fingerprint
from tests.client.toy_model import Toy, collate, losses, make_records

RECORDS = make_records(12)


def run(model, records=RECORDS, sample_losses=losses, *, make=None, lr=0.5, collate=collate, **settings):
    optimizer = (make or torch.optim.SGD)([p for p in model.parameters() if p.requires_grad], lr=lr)
    defaults = {
        "clip_norm": 1.0,
        "noise_multiplier": 0.0,
        "expected_batch_size": 6,
        "physical_batch_size": 100,
        "steps": 1,
        "spend": None,
        "randomness": SeededRandomness(5),
    }
    return train_privately(model, sample_losses, records, collate, optimizer, **(defaults | settings))


def change(model, before):
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    return torch.cat([(after - start).detach().flatten() for after, start in pairs])


class Scripted(SeededRandomness):
    """Draws the batches it is told to; noise is seeded."""

    def __init__(self, *batches):
        super().__init__(0)
        self.batches = iter(batches)

    def uniform(self, count):
        values = torch.ones(count, dtype=torch.float64)
        values[list(next(self.batches))] = 0.0
        return values


# Laws


def test_no_noise_and_no_clip_is_sgd_bit_for_bit():
    plain, private = Toy(), Toy()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    draws = SeededRandomness(5)
    for _ in range(5):
        batch = collate([RECORDS[i] for i in poisson_sample(12, 0.5, draws)])
        optimizer.zero_grad()
        (losses(plain, batch).sum() / 6).backward()
        optimizer.step()
    run(private, clip_norm=math.inf, steps=5, make=lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), private.parameters(), strict=True))


def test_per_sample_path_without_clipping_is_sgd_bit_for_bit_where_sums_are_exact():
    """On small integers floating-point sums are exact, so the order of summation cannot hide a difference."""
    torch.manual_seed(0)
    adapter = BoraAdapter(8, 8, 2, 2, 1.0, "identity")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    records = list(torch.randint(-3, 4, (8, 3, 8)).float().unbind())
    targets = torch.randint(-2, 3, (8, 3, 8)).float()

    def linear_losses(model, batch):
        return (model(batch) * targets[: len(batch)]).sum(dim=(1, 2))

    plain = copy.deepcopy(adapter)
    linear_losses(plain, torch.stack(records)).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.5 / 8).step()
    run(adapter, records, linear_losses, collate=torch.stack, expected_batch_size=8, clip_norm=1e9)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), adapter.parameters(), strict=True))


def test_one_record_moves_a_bfloat16_gradient_sum_by_no_more_than_the_clip_norm(monkeypatch):
    """What is noised is seen before the noise; a sum in bfloat16 would round a record's part up or down."""
    seen = []
    monkeypatch.setattr(dpsgd, "add_noise", lambda total, *_: seen.append(total.double().flatten()) or total)

    def sums(records):
        torch.manual_seed(0)
        layer = nn.Linear(16, 4).bfloat16()
        seen.clear()
        run(
            layer,
            records,
            lambda model, batch: model(batch).float().sum(dim=1),
            collate=torch.stack,
            expected_batch_size=len(records),
            physical_batch_size=1,
            clip_norm=0.7,
            noise_multiplier=1.0,
        )
        assert all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters())
        return torch.cat(seen)

    records = list((torch.rand(200, 16, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16())
    assert float((sums(records) - sums(records[:-1])).norm()) <= 0.7 * (1 + 1e-4)


def test_per_sample_path_without_clipping_is_sgd():
    plain, private = Toy().double(), Toy().double()
    run(plain, clip_norm=math.inf, steps=4)
    run(private, clip_norm=1e9, steps=4)
    torch.testing.assert_close(change(private, Toy().double()), change(plain, Toy().double()), rtol=1e-10, atol=1e-12)


def test_one_step_is_the_clipped_sum_over_the_expected_batch_size():
    model, start = Toy().double(), Toy().double()
    drawn, clip_norm = [1, 4, 7], 0.3
    run(model, clip_norm=clip_norm, randomness=Scripted(drawn), lr=1.0)
    trained = [p for p in start.parameters() if p.requires_grad]
    expected = torch.zeros(sum(p.numel() for p in start.parameters()), dtype=torch.float64)
    clipped = 0
    for index in drawn:
        start.zero_grad()
        losses(start, collate([RECORDS[index]])).sum().backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
        clipped += norm > clip_norm
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in start.parameters()]
        expected -= torch.cat([g.flatten() for g in grads]) * min(1.0, clip_norm / norm) / 6
    assert clipped, "the test needs a sample that is clipped"
    torch.testing.assert_close(change(model, start), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("physical", [1, 2, 5])
def test_physical_batches_do_not_change_the_step(physical):
    whole, parts = Toy().double(), Toy().double()
    run(whole, noise_multiplier=0.7, steps=3)
    run(parts, noise_multiplier=0.7, steps=3, physical_batch_size=physical)
    torch.testing.assert_close(change(parts, Toy().double()), change(whole, Toy().double()), rtol=1e-9, atol=1e-12)


def test_physical_batches_bound_what_is_in_memory():
    sizes = []

    def watching(rows):
        sizes.append(len(rows))
        return collate(rows)

    result = run(Toy(), collate=watching, physical_batch_size=2, steps=5)
    assert max(sizes) == 2
    assert sum(sizes) == result.diagnostics.samples


def test_one_record_moves_the_update_by_at_most_the_clip_norm():
    """The sensitivity that the noise is calibrated to, over every trained tensor together."""
    with_record, without, start = Toy().double(), Toy().double(), Toy().double()
    run(with_record, clip_norm=0.01, lr=6.0, randomness=Scripted([0, 1, 2]))
    run(without, clip_norm=0.01, lr=6.0, randomness=Scripted([0, 1]))
    difference = change(with_record, start) - change(without, start)
    assert difference.norm() == pytest.approx(0.01, rel=1e-9)


def test_noise_has_the_standard_deviation_that_is_accounted():
    model, start = nn.Linear(400, 100), nn.Linear(400, 100)
    start.load_state_dict(model.state_dict())

    def zero(model, batch):
        return model(batch).sum(dim=1) * 0

    records = [torch.zeros(400)] * 4
    run(
        model,
        records,
        zero,
        collate=torch.stack,
        expected_batch_size=2,
        clip_norm=0.5,
        noise_multiplier=3.0,
        lr=1.0,
        steps=2,
    )
    noise = change(model, start)
    # Two steps of std z·C / L each.
    assert noise.std() == pytest.approx(3.0 * 0.5 / 2 * math.sqrt(2), rel=0.02)
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(noise.numel())


# Mistakes that others make


def test_an_empty_batch_takes_a_noised_step():
    model, start = Toy(), Toy()
    result = run(model, noise_multiplier=1.0, steps=2, randomness=Scripted([], []))
    assert result.steps == result.diagnostics.empty_batches == 2
    moved = change(model, start)
    assert (moved != 0).sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_an_empty_first_batch_needs_no_example_of_a_batch():
    def dict_losses(model, batch):
        return functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

    def dict_collate(rows):
        tokens, labels = collate(rows)
        return {"tokens": tokens, "labels": labels}

    run(Toy(), sample_losses=dict_losses, collate=dict_collate, steps=2, randomness=Scripted([], [3]))


def test_a_momentum_step_on_an_empty_batch_without_noise_is_sgd_on_zero():
    model = Toy()
    make = lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)  # noqa: E731
    first = copy.deepcopy(model)
    run(first, clip_norm=math.inf, randomness=Scripted([1]), make=make)
    run(model, clip_norm=math.inf, steps=2, randomness=Scripted([1], []), make=make)
    torch.testing.assert_close(change(model, first), 0.9 * change(first, Toy()))


def test_batches_are_drawn_record_by_record():
    """Inclusion is independent, with the rate that is accounted: sizes are binomial, and no epoch is walked through."""
    seen, sizes = torch.zeros(200), []
    records = list(range(200))

    def count(rows):
        for row in rows:
            seen[row] += 1
        sizes.append(len(rows))
        return torch.zeros(len(rows), 2)

    def zero(model, batch):
        return model(batch).sum(dim=1) * 0

    steps, rate = 400, 0.1
    settings = {"expected_batch_size": 20, "physical_batch_size": 200}
    result = run(nn.Linear(2, 1), records, zero, collate=count, steps=steps, **settings)
    assert result.sample_rate == rate
    sizes = torch.tensor(sizes, dtype=torch.float64)
    assert sizes.mean() == pytest.approx(20, abs=5 * math.sqrt(18 / steps))
    assert sizes.var() == pytest.approx(18, rel=0.35)
    # Walking through epochs would show every record equally often.
    assert seen.var() == pytest.approx(steps * rate * (1 - rate), rel=0.5)


def test_clipping_is_per_sample_not_per_batch():
    """Two opposite outliers: clipping the batch's gradient would let the larger one through almost whole."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()

    def linear(model, batch):
        return model(batch).squeeze(1)

    records = [torch.tensor([100.0]), torch.tensor([-1000.0])]
    run(model, records, linear, collate=torch.stack, expected_batch_size=2, lr=2.0, clip_norm=1.0)
    # Clipping the batch's gradient instead, -900 to norm 1, would end at 1.
    assert model.weight.item() == pytest.approx(0.0, abs=1e-6)


def test_noise_reaches_every_trained_tensor_and_nothing_else():
    """Noise that is drawn for a gradient which the optimizer never sees protects nobody."""
    model, start = Toy(), Toy()
    run(model, noise_multiplier=1.0, make=lambda p, lr: torch.optim.Adam(p, lr))
    for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert bool((after != before).all()) == after.requires_grad, name


def test_noise_does_not_follow_the_seed_of_the_experiment():
    models = []
    for _ in range(2):
        model = Toy()
        torch.manual_seed(0)
        run(model, noise_multiplier=1.0, randomness=None)
        models.append(model)
    assert not torch.equal(*(change(model, Toy()) for model in models))


def test_seeded_randomness_repeats():
    first, second = Toy(), Toy()
    run(first, noise_multiplier=1.0, steps=2)
    run(second, noise_multiplier=1.0, steps=2)
    assert torch.equal(change(first, Toy()), change(second, Toy()))


def test_a_gradient_that_is_not_finite_counts_as_zero():
    model, start = Toy(), Toy()

    def broken(model, batch):
        return losses(model, batch) * torch.tensor([1.0, math.inf, math.nan])[: len(batch[1])]

    result = run(model, sample_losses=broken, randomness=Scripted([1, 4, 7]))
    assert result.diagnostics.dropped == 2
    clean = Toy()
    run(clean, randomness=Scripted([1]))
    torch.testing.assert_close(change(model, start), change(clean, start))


# Spending


def open_ledger(folder, **budget):
    return Ledger.open(folder, run_id="run", dataset_fingerprint=fingerprint(["a", "b"]), budget=Budget(**budget))


def test_steps_are_spent_before_a_record_is_read(tmp_path):
    ledger = open_ledger(tmp_path, epsilon=100.0, delta=1e-5)

    class Dies:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Toy(), Dies(), noise_multiplier=1.0, steps=3, spend=ledger.spend)
    assert ledger.history() == [(1.0, 0.5, 3)]


def test_beyond_the_budget_nothing_is_trained(tmp_path):
    ledger = open_ledger(tmp_path, epsilon=1.0, delta=1e-5)
    model = Toy()
    with pytest.raises(BudgetExceeded, match="Nothing was trained"):
        run(model, noise_multiplier=1.0, steps=50, spend=ledger.spend)
    assert not change(model, Toy()).any()
    assert ledger.history() == []


def test_training_without_noise_does_not_fit_any_budget(tmp_path):
    ledger = open_ledger(tmp_path, epsilon=1e6, delta=1e-5)
    with pytest.raises(BudgetExceeded, match="would make it inf"):
        run(Toy(), noise_multiplier=0.0, spend=ledger.spend)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm = 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1"),
        ({"noise_multiplier": 1.0, "clip_norm": math.inf}, "finite clip_norm"),
        ({"expected_batch_size": 13}, "expected_batch_size = 13 with 12 records"),
        ({"physical_batch_size": 0}, "physical_batch_size = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"records": []}, "with 0 records"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run(Toy(), **settings)


def test_the_optimizer_must_hold_what_is_trained():
    model = Toy()
    with pytest.raises(ValueError, match="optimizer: it holds 2 trained tensors"):
        run(model, make=lambda p, lr: torch.optim.SGD(model.head.parameters(), lr))


def test_a_batch_loss_is_refused():
    with pytest.raises(RuntimeError, match="one per sample"):
        run(Toy(), sample_losses=lambda model, batch: losses(model, batch).mean())


def test_system_randomness_is_the_default(monkeypatch):
    used = []
    nobody = torch.ones(12, dtype=torch.float64)
    monkeypatch.setattr(SystemRandomness, "uniform", lambda self, count: used.append(count) or nobody)
    run(Toy(), randomness=None)
    assert used == [12]
