import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.client.site import Site
from bora_fl.config import ConfigError, parse
from bora_fl.privacy import central, gaussian
from bora_fl.privacy.audit import audit, draw_inclusion
from bora_fl.privacy.gaussian import SeededRandomness
from bora_fl.simulations.audit.canaries import concatenate, losses, make_canaries, run_audit
from bora_fl.simulations.audit.command import BASE
from bora_fl.simulations.audit.timing import auc, run_time_audit
from bora_fl.simulations.audit.updates import run_update_audit


@pytest.fixture
def config(tiny_config):
    keep = {
        key: value for key, value in tiny_config.items() if key.startswith(("model.", "adapter.", "data.name", "run."))
    }
    return BASE | keep | {
        "run.num-rounds": 1,
        "data.max-train-examples": 30,
        "train.batch-size": 16,
        "train.learning-rate": 0.05,
        "train.local-steps": 60,
        "train.precision": "fp32",
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
    }  # fmt: skip


def test_canaries_are_examples_of_their_own_beside_the_data(config):
    site = Site(parse(config))
    data = site.data(0, 1).train
    canaries = make_canaries(data, 40, 20, seed=0)
    both = concatenate(data, canaries)
    assert len(both) == len(data) + 40
    for i in (0, 39):
        alone, joined = canaries.batch(np.array([i])), both.batch(np.array([len(data) + i]))
        assert all(torch.equal(alone[name], joined[name]) for name in alone)
    assert torch.equal(both.batch(np.array([3]))["input_ids"], data.batch(np.array([3]))["input_ids"])
    assert len({tuple(canaries.batch(np.array([i]))["input_ids"][0].tolist()) for i in range(40)}) == 40
    assert losses(site.model(), both).shape == (len(both),)


def test_the_claim_of_private_training_is_the_ledgers_and_is_not_refuted(config):
    found = run_audit(parse(config | {"privacy.epsilon": 2.0}), 64, inclusion=SeededRandomness(0))
    assert 1.7 < found.claimed <= 2.0
    assert found.found.epsilon <= found.claimed
    assert found.found.unit == found.unit == "record"
    assert found.noise_multiplier > 0


def test_without_noise_canaries_that_were_trained_on_stand_out(config):
    found = run_audit(parse(config | {"privacy.mode": "none"}), 64, inclusion=SeededRandomness(0))
    assert math.isinf(found.claimed)
    assert found.fell[0] > found.fell[1]
    private = run_audit(parse(config | {"privacy.epsilon": 0.5}), 64, inclusion=SeededRandomness(0))
    assert found.fell[0] - found.fell[1] > private.fell[0] - private.fell[1]


@pytest.mark.parametrize("mode", ["client", "local"])
def test_clients_are_told_apart_as_far_as_the_noise_allows_and_no_further(mode: str, config, monkeypatch):
    """The mean score is C a round where the canary was included; a hundredth of the claimed noise is found out."""
    private = {"privacy.mode": mode, "privacy.epsilon": 1.0, "privacy.delta": 1e-5}
    settings = parse(config | private | {"run.num-rounds": 2, "strategy.name": "ffa"})
    honest = run_update_audit(settings, 256, inclusion=SeededRandomness(0))
    assert (honest.unit, honest.found.unit) == ("client", "client")
    assert 0.95 < honest.claimed <= 1.0
    assert honest.found.epsilon <= honest.claimed
    noise = 2 * settings.privacy.clip_norm * honest.noise_multiplier
    assert honest.fell[0] - honest.fell[1] == pytest.approx(2 * settings.privacy.clip_norm, abs=noise)
    add = gaussian.add_noise
    for module in (gaussian, central):
        monkeypatch.setattr(module, "add_noise", lambda t, std, randomness: add(t, std / 100, randomness))
    assert run_update_audit(settings, 256, inclusion=SeededRandomness(0)).refuted


def test_the_time_of_a_round_tells_of_a_long_record_unless_it_is_on_a_schedule(config):
    rng = np.random.default_rng(0)
    scores, members = rng.normal(size=60), rng.random(60) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a in scores[members] for b in scores[~members]]
    assert auc(scores, members) == pytest.approx(np.mean(wins))
    assert auc(np.round(scores), members) != auc(scores, members)
    found = run_time_audit(parse(config | {"privacy.epsilon": 1.0, "train.local-steps": 2}), 2)
    assert found.allowed == pytest.approx(math.e / (1 + math.e))
    assert found.scheduled == 0.5
    assert 0 <= found.at_once <= 1


def test_a_claim_that_is_too_small_is_refuted(config):
    """Canaries that are told apart perfectly refute any small ε, whatever was claimed."""
    included = draw_inclusion(256, SeededRandomness(1))
    honest = run_audit(parse(config | {"privacy.epsilon": 0.5, "train.local-steps": 2}), 64)
    caught = replace(honest, found=audit(included.float(), included, 1e-5))
    assert caught.found.epsilon > 2
    assert caught.refuted


def test_mistakes_name_the_setting(config):
    with pytest.raises(ConfigError, match=r"privacy\.mode = 'client'"):
        run_audit(parse(config | {"privacy.mode": "client", "strategy.weighting": "uniform"}), 64)
    with pytest.raises(ConfigError, match="--canaries 8"):
        run_update_audit(parse(config | {"privacy.mode": "local"}), 8)
    with pytest.raises(ConfigError, match="--canaries 8"):
        run_audit(parse(config), 8)


def test_the_command_prints_claim_bound_and_unit(config):
    options = [part for key, value in config.items() for part in ("-c", f"{key}={value}")]
    result = CliRunner().invoke(cli, ["audit", "--canaries", "32", *options])
    assert result.exit_code == 0, result.output
    assert "per record at delta" in result.output
    assert "lower bound" in result.output
    assert "--no-noise" in CliRunner().invoke(cli, ["audit", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
