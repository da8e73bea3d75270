import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from bora_fl.client.optimizers import learning_rate_factors, make_optimizer, num_steps
from bora_fl.client.site import Site
from bora_fl.client.training import train
from bora_fl.config import ConfigError, Settings, TrainSettings, parse


def rates(settings: TrainSettings, rounds: int = 10) -> list[float]:
    return [factor for r in range(1, rounds + 1) for factor in learning_rate_factors(settings, r, rounds)]


def test_learning_rates_fall_over_the_rounds_after_a_warm_up():
    linear = rates(TrainSettings())
    assert linear[0] == 1.0
    assert linear[-1] == pytest.approx(0.1)
    values = rates(TrainSettings(schedule="cosine", warmup_rounds=2))
    assert values[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert values[2] == 1.0
    assert values[-1] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert set(rates(TrainSettings(schedule="constant"))) == {1.0}


@pytest.mark.parametrize(
    ("name", "make"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.5])
def test_the_steps_of_all_rounds_follow_one_central_schedule(name: str, make, warmup: float):
    """transformers' schedules, which begin at a rate of 0, from their first step that moves anything."""
    rounds, steps = 3, 4
    settings = TrainSettings(schedule=name, schedule_by="step", warmup_rounds=warmup)
    found = [f for r in range(1, rounds + 1) for f in learning_rate_factors(settings, r, rounds, steps)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=1.0)
    central = make(optimizer, int(warmup * steps) + 1, rounds * steps + 1)
    wanted = []
    for _ in range(rounds * steps):
        optimizer.step()
        central.step()
        wanted.append(central.get_last_lr()[0])
    assert found == pytest.approx(wanted)
    assert len(set(found)) > rounds


def test_local_training_takes_each_step_at_its_own_rate(tiny_config):
    site = Site(parse(tiny_config | {"train.schedule-by": "step", "train.b-learning-rate-ratio": 3.0}))
    settings, model = site.settings.train, site.model()
    model.train_only(frozenset({"A", "B"}))
    factors = learning_rate_factors(settings, 2, 3, settings.local_steps)
    optimizer = make_optimizer(model, settings, factors)
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
    train(model, site.data(0, 3).train, settings, optimizer=optimizer, seed=0)
    rate = settings.learning_rate
    assert seen == [[pytest.approx(rate * f), pytest.approx(3 * rate * f)] for f in factors]
    assert factors[0] == pytest.approx(1 - 4 / 12)
    assert factors[-1] == pytest.approx(1 - 7 / 12)


def test_eight_bit_moments_take_about_the_same_steps(tiny_config):
    pytest.importorskip("bitsandbytes")
    losses = {}
    for name in ("adamw", "adamw-8bit"):
        site = Site(parse(tiny_config | {"train.optimizer": name, "train.local-steps": 30}))
        model = site.model()
        model.train_only(frozenset({"A", "B", "sigma", "tensors"}))
        losses[name] = train(model, site.data(0, 3).train, site.settings.train, seed=0).loss
    assert losses["adamw-8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_a_gpu_s_optimizers_are_taken_from_bitsandbytes_there_and_refused_elsewhere(tiny_config, monkeypatch):
    """There is no GPU here: what would be made on one is a stand-in."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = []

    def paged(groups, **options):
        made.append(options)
        return torch.optim.SGD(groups, lr=options["lr"])

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW", paged)
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", paged)
    for name in ("paged-adamw", "paged-adamw-8bit"):
        site = Site(parse(tiny_config | {"train.optimizer": name, "train.weight-decay": 0.1}))
        with pytest.raises(ConfigError, match=f"train.optimizer = '{name}': there is no CUDA device .* to adamw"):
            make_optimizer(site.model(), site.settings.train)
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr("bora_fl.client.optimizers.pick_device", lambda: torch.device("cuda"))
            make_optimizer(site.model(), site.settings.train)
    assert made == [{"lr": 0.02, "weight_decay": 0.1}] * 2


def test_epochs_count_when_steps_do_not():
    by_epoch = TrainSettings(local_steps=0, local_epochs=2.0, batch_size=8, accumulation=2)
    assert num_steps(by_epoch, 100) == 13
    assert num_steps(Settings().train, 100) == Settings().train.local_steps
