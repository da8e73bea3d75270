import json

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from bora_fl.client.job import perform
from bora_fl.client.losses import not_true_divergence
from bora_fl.client.optimizers import make_optimizer
from bora_fl.client.site import Site
from bora_fl.client.site import site as site_of
from bora_fl.client.training import train
from bora_fl.config import ConfigError, TrainSettings, parse
from bora_fl.state import flatten
from bora_fl.wire.records import Instruction, to_arrays
from bora_fl.wire.schema import INSTRUCTION, STATE

ALL = frozenset({"A", "sigma", "B", "tensors"})


@pytest.fixture
def site(tiny_config) -> Site:
    return Site(parse(tiny_config))


def run(site: Site, settings: TrainSettings, trains: frozenset[str] = ALL, seed: int = 5):
    """Train from the site's initial adapter, as received over the wire; the state before and after."""
    model = site.model()
    start = site.__dict__.setdefault("start", model.read())
    model.write(start)
    before = flatten(model.read())
    model.train_only(trains)
    result = train(model, site.data(0, 3).train, settings, seed=seed)
    return result, before, flatten(model.read())


def test_only_what_the_strategy_trains_moves(site: Site):
    _, before, after = run(site, site.settings.train, frozenset({"B"}))
    moved = {name.rpartition("/")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"B"}


def test_the_same_seed_gives_the_same_adapter(site: Site):
    once, twice = run(site, site.settings.train)[2], run(site, site.settings.train)[2]
    assert all(torch.equal(once[name], twice[name]) for name in once)
    other = run(site, site.settings.train, seed=6)[2]
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_accumulation_is_one_step_on_the_larger_batch(site: Site):
    once = site.settings.train.model_copy(update={"local_steps": 1, "length_bucket": 1})
    small = once.model_copy(update={"batch_size": 4, "accumulation": 4})
    large = once.model_copy(update={"batch_size": 16, "accumulation": 1})
    a, b = run(site, small)[2], run(site, large)[2]
    # the first 16 examples of a pass are the same however they are cut; Adam's first step is the gradient's sign
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-4


def test_accumulation_weighs_every_target_token_alike(tiny_causal, tmp_path):
    """Against one batch under the model's own loss, the mean over all target tokens of the batch."""
    lines = [
        {"prompt": "the film was", "response": " ".join(["very"] * n + ["good"])} for n in (0, 7, 1, 4, 2, 3, 0, 9)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    given = {"model.name": str(tiny_causal), "model.task": "causal-lm", "adapter.target-modules": "q_proj,v_proj"}
    given |= {"adapter.num-blocks": 4, "adapter.rank": 2, "data.name": str(tmp_path / "pairs.jsonl")}
    given |= {"data.partition": "iid", "data.evaluation-fraction": 0.0, "data.test-split": "", "model.max-length": 24}
    sgd = {"train.optimizer": "sgd", "train.learning-rate": 1.0, "train.max-grad-norm": 0.0, "train.local-steps": 1}
    site = Site(parse(given | sgd | {"train.batch-size": 2, "train.accumulation": 4, "train.precision": "fp32"}))
    model, data = site.model(), site.data(0, 1).train
    assert len(data) == len(lines)
    model.train_only(ALL)
    model.model.eval()
    model.model(**data.batch(np.arange(len(data)))).loss.backward()
    before = flatten(model.read())
    wanted = {name: before[name] - p.grad for name, p in _named(model).items()}
    train(model, data, site.settings.train, seed=3)
    after = flatten(model.read())
    for name, value in wanted.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(after[name], before[name]) for name in wanted)


def _named(model):
    """The trained factors by the names that they have in a flattened state; without sigma, which is transformed."""
    return {n: p for n, p in model.named_trained().items() if not n.endswith("sigma")}


def test_half_precision_with_a_scaled_loss_trains_as_single_precision_does(site: Site):
    settings = site.settings.train.model_copy(update={"optimizer": "sgd", "learning_rate": 0.1})
    single, before, wanted = run(site, settings)
    half, _, found = run(site, settings.model_copy(update={"precision": "fp16"}))
    assert half.loss == pytest.approx(single.loss, rel=1e-2)
    moved = sum(float((wanted[n] - before[n]).square().sum()) for n in wanted) ** 0.5
    apart = sum(float((wanted[n] - found[n]).square().sum()) for n in wanted) ** 0.5
    assert 0 < apart < 0.03 * moved


def test_a_step_that_overflows_is_taken_again_at_half_the_scale(site: Site, monkeypatch):
    """With a loss scale that float16 cannot hold at first: no step is lost."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: scaler(device, 2.0**60, enabled=enabled))
    half = site.settings.train.model_copy(update={"precision": "fp16"})
    taken = []
    optimizer = make_optimizer(site.model(), half)
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    site.model().train_only(ALL)
    result = train(site.model(), site.data(0, 3).train, half, optimizer=optimizer, seed=5)
    assert len(taken) == result.steps == half.local_steps


def test_a_strong_proximal_term_holds_the_adapter_back(site: Site):
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "local_steps": 8}
    free = site.settings.train.model_copy(update=sgd)
    held = free.model_copy(update={"proximal_mu": 5.0})

    def moved(settings: TrainSettings) -> float:
        _, before, after = run(site, settings)
        return sum(float((after[n] - before[n]).square().sum()) for n in before if "tensors" in n)

    assert 0 < moved(held) < 0.8 * moved(free)


def test_b_and_the_head_have_learning_rates_of_their_own(site: Site):
    """Adam's first step is the learning rate times the gradient's sign."""
    rates = {"local_steps": 1, "learning_rate": 1e-3, "b_learning_rate_ratio": 5.0, "head_learning_rate": 2e-3}
    _, before, after = run(site, site.settings.train.model_copy(update=rates))
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert max(v for name, v in moved.items() if name.endswith("/B")) == pytest.approx(5e-3, rel=1e-3)
    assert max(v for name, v in moved.items() if "tensors" in name) == pytest.approx(2e-3, rel=1e-3)


def test_distillation_holds_the_odds_of_the_other_classes(tiny_config):
    site = Site(parse(tiny_config | {"data.label-column": "domain", "data.partition": "iid"}))  # three classes
    data = site.data(0, 3).train
    batch = data.batch(np.arange(len(data)))
    labels = batch.pop("labels")

    def moved(strength: float) -> float:
        model = site.model()
        model.write(site.__dict__.setdefault("start", model.read()))
        model.train_only(ALL)
        model.model.eval()
        with torch.no_grad():
            received = model.model(**batch).logits
        settings = {"local_steps": 20, "learning_rate": 0.02, "not_true_distillation": strength}
        train(model, data, site.settings.train.model_copy(update=settings), seed=1)
        model.model.eval()
        with torch.no_grad():
            return float(not_true_divergence(model.model(**batch).logits, received, labels).mean())

    assert moved(20.0) < 0.5 * moved(0.0)


def test_a_client_of_one_class_holds_the_received_predictions(site: Site):
    """From one head: the mean prediction of its class rises less, and the more so the stronger it is held."""
    data = site.data(0, 3).train
    data = data.select(np.flatnonzero(data.classes == 0))
    batch = data.batch(np.arange(len(data)))
    batch.pop("labels")
    start = site.model().read()

    def risen(hold: float) -> float:
        model = site.model()
        model.write(start)
        model.train_only(ALL)
        settings = site.settings.train.model_copy(update={"local_steps": 20, "learning_rate": 0.02})
        with torch.no_grad():
            before = model.model.eval()(**batch).logits.softmax(-1)[:, 0].mean()
        train(model, data, settings, seed=1, hold=hold)
        with torch.no_grad():
            return float(model.model.eval()(**batch).logits.softmax(-1)[:, 0].mean() - before)

    free, held, tight = risen(0.0), risen(1.0), risen(20.0)
    assert free > 0.3
    assert tight < 0.5 * held < 0.5 * free


@pytest.mark.parametrize("shares", [(), (0.25, 0.75)])
def test_a_client_holds_predictions_only_where_the_head_was_solved(shares, tiny_config, monkeypatch):
    """What tells a client so are the class shares, which the head's sums count."""
    config = tiny_config | {"train.distillation": 0.5, "head.init": "closed-form"}
    state, seen = site_of(parse(config)).model(parse(config).adapter.rank).read(), []

    def spy(*arguments, **keywords):
        seen.append(keywords["hold"])
        return train(*arguments, **keywords)

    monkeypatch.setattr("bora_fl.client.round.train", spy)
    asked = Instruction(1, "run", ALL, ALL, False, class_shares=shares)
    content = RecordDict({STATE: to_arrays(flatten(state)), INSTRUCTION: asked.record()})
    perform("train", content, Context(1, 2, {"partition-id": 0, "num-partitions": 3}, RecordDict(), config))
    assert seen == [0.5 if shares else 0.0]


@pytest.mark.parametrize(
    "changes", [{"head.init": "random"}, {"privacy.mode": "record", "strategy.weighting": "uniform"}]
)
def test_holding_predictions_that_nobody_solved_is_refused(changes, tiny_config):
    with pytest.raises(ConfigError, match=r"train\.distillation = 2 .*set train\.distillation to"):
        parse(tiny_config | changes | {"train.distillation": 2.0})


def test_training_lowers_the_loss(site: Site):
    model, data = site.model(), site.data(0, 3).train
    settings = site.settings.train.model_copy(update={"local_steps": 40, "learning_rate": 0.02})
    model.train_only(ALL)
    losses = [train(model, data, settings, seed=seed).loss for seed in range(3)]
    assert losses[2] < 0.7 * losses[0]


def test_a_loss_that_is_not_finite_names_the_setting(site: Site):
    wild = site.settings.train.model_copy(update={"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 0.0})
    with pytest.raises(FloatingPointError, match=r"train\.learning-rate"):
        run(site, wild)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo's and Inductor's own code
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_compiled_model_trains_to_the_same_adapter(backend: str, tiny_config):
    """Batches of several lengths, the head and every part of the factors trained."""
    plain, compiled = Site(parse(tiny_config)), Site(parse(tiny_config))
    compiled.model().compile(backend)
    assert compiled.model().forward is not compiled.model().model
    (found, _, mine), (expected, _, theirs) = (run(s, s.settings.train) for s in (compiled, plain))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    worst = max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)
    assert worst < (1e-6 if backend == "eager" else 1e-3)  # Adam takes the sign of a gradient of nearly nothing


def test_the_setting_compiles_and_says_what_is_missing(tiny_config, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "torch.compile", lambda model, backend: asked.append(backend) or (lambda **batch: model(**batch))
    )
    settings = parse(tiny_config | {"train.compile": True})
    model = Site(settings).model()
    assert asked == ["inductor"]
    assert model.forward is not model.model
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"train.compile = true: torch.compile needs a C\+\+ compiler.*set train.compile"
    ):
        Site(settings).model()
