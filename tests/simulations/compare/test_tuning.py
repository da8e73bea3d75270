import math
from dataclasses import replace

import pytest

from bora_fl.config import ConfigError
from bora_fl.simulations import grid
from bora_fl.simulations.compare import tuning
from bora_fl.simulations.compare.plan import Variant

from .made_up import finish, lay_out

FEDAVG, REFACTOR = Variant("bora", "fedavg"), Variant("bora", "refactor")


def test_every_variant_is_tried_at_every_rate_on_seeds_that_are_not_reported(tmp_path):
    found = lay_out(
        tmp_path, {"train.learning-rate": 2e-3, "train.head-learning-rate": 1e-2}, scenarios=["natural", "iid"]
    )
    runs = tuning.tuning_runs(found, [0.5, 2.0], 3)
    assert len(runs) == 2 * 2 * 3 * 2
    assert {run.seed for run in runs} == {1000, 1001, 1002}
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in found.runs)
    assert {(run.settings.train.learning_rate, run.settings.train.head_learning_rate) for run in runs} == {
        (1e-3, 5e-3),
        (4e-3, 2e-2),
    }
    assert all(run.settings.run.seed == run.seed for run in runs)
    folders = {run.folder for run in [*runs, *found.runs]}
    assert len(folders) == len(runs) + len(found.runs)
    for one in runs:  # what else decides the result is as in the comparison
        like = next(run for run in found.runs if (run.scenario, run.variant) == (one.scenario, one.variant))
        differ = {key for key, value in one.settings.flat().items() if value != like.settings.flat()[key]}
        assert differ <= {"train.learning-rate", "train.head-learning-rate", "run.seed"}


def tried(root, losses: dict[float, tuple[float | None, ...]], variant=FEDAVG):
    """Tuning runs of a variant whose held-out losses are given by factor; None is a run that failed."""
    runs = [r for r in tuning.tuning_runs(lay_out(root), sorted(losses), 2) if r.variant == variant]
    rate = lay_out(root).runs[0].settings.train.learning_rate
    for run in runs:
        loss = losses[round(run.settings.train.learning_rate / rate, 6)][run.seed - 1000]
        if loss is not None:
            finish(run, accuracy=1 - loss / 10, client_loss=loss)
    return [(run, grid.outcome(run)) for run in runs], rate


def test_the_rate_of_least_held_out_loss_over_seeds_is_chosen(tmp_path):
    ends, rate = tried(tmp_path, {0.3: (2.0, 2.0), 1.0: (1.0, 1.6), 3.0: (0.9, 2.0)})
    chosen = tuning.choose(ends)
    assert chosen == {("dirichlet-1", FEDAVG): pytest.approx(rate)}
    assert not tuning.doubts(ends, chosen)


def test_a_rate_that_fails_on_a_seed_is_not_chosen(tmp_path):
    ends, rate = tried(tmp_path, {0.3: (2.0, 2.0), 1.0: (2.1, 2.1), 3.0: (0.1, None)})
    chosen = tuning.choose(ends)
    assert chosen["dirichlet-1", FEDAVG] == pytest.approx(0.3 * rate)
    (line,) = tuning.doubts(ends, chosen)
    assert "bora/fedavg in dirichlet-1" in line
    assert "edge" in line


def test_between_equals_the_smallest_rate_is_chosen(tmp_path):
    ends, rate = tried(tmp_path, {0.3: (1.0, 1.0), 1.0: (1.0, 1.0)})
    assert tuning.choose(ends)["dirichlet-1", FEDAVG] == pytest.approx(0.3 * rate)


def test_a_variant_that_fails_everywhere_is_named_and_stays_at_its_own_rate(tmp_path):
    ends, rate = tried(tmp_path, {0.3: (None, 1.0), 1.0: (None, None)})
    chosen = tuning.choose(ends)
    assert not chosen
    (line,) = tuning.doubts(ends, chosen)
    assert "bora/fedavg in dirichlet-1: failed at every rate of" in line
    found = lay_out(tmp_path)
    after = tuning.tuned(found, {("dirichlet-1", REFACTOR): 1e-2})
    assert {(run.variant, run.settings.train.learning_rate) for run in after.runs} == {(FEDAVG, rate), (REFACTOR, 1e-2)}
    assert [run.folder for run in after.runs if run.variant == FEDAVG] == [
        run.folder for run in found.runs if run.variant == FEDAVG
    ]


def test_the_comparison_runs_at_the_chosen_rates_alone(tmp_path):
    found = lay_out(tmp_path)
    rates = {("dirichlet-1", FEDAVG): 1e-4, ("dirichlet-1", REFACTOR): 1e-2}
    after = tuning.tuned(found, rates)
    assert [run.seed for run in after.runs] == [run.seed for run in found.runs]
    assert {(run.variant, run.settings.train.learning_rate) for run in after.runs} == {(FEDAVG, 1e-4), (REFACTOR, 1e-2)}


@pytest.mark.parametrize("text", ["", "1,fast", "0,1", "-1", "inf"])
def test_rates_are_multiples_above_zero(text):
    with pytest.raises(ConfigError, match="--rates"):
        tuning.factors_of(text)


def test_tuning_needs_a_seed(tmp_path):
    assert tuning.factors_of("3,0.3,1,1") == [0.3, 1.0, 3.0]
    with pytest.raises(ConfigError, match="--tune-seeds 0"):
        tuning.tuning_runs(lay_out(tmp_path), [1.0], 0)


def test_no_seed_is_both_tuned_on_and_reported(tmp_path):
    found = lay_out(tmp_path)
    runs = [replace(run, seed=run.seed + 1001) for run in found.runs]
    assert tuning.tuning_runs(replace(found, runs=runs), [1.0], 1)
    with pytest.raises(ConfigError, match=r"--first-seed 1001 with --tune: .* seed 1001.*outside 1000 to 1001"):
        tuning.tuning_runs(replace(found, runs=runs), [1.0], 2)


def test_a_loss_that_is_no_number_is_never_the_least(tmp_path):
    ends, rate = tried(tmp_path, {0.3: (math.nan, 0.1), 1.0: (1.0, 1.6)})
    assert tuning.choose(ends)["dirichlet-1", FEDAVG] == pytest.approx(rate)
