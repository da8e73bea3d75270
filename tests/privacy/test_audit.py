"""The audit: never above the truth beyond its confidence, large where there is no privacy."""

import math

import pytest
import torch
from scipy.stats import binom

from bora_fl.adapters.layer import BoraAdapter
from bora_fl.client.dpsgd import train_privately
from bora_fl.privacy.accounting import epsilon
from bora_fl.privacy.audit import audit, draw_inclusion, lower_bound, p_value
from bora_fl.privacy.gaussian import SeededRandomness


def perfect(canaries):
    included = draw_inclusion(canaries, SeededRandomness(1))
    return included.float(), included


def test_perfect_guesses_give_the_bound_of_a_fair_coin():
    """All k right has probability q^k: ε = log(q / (1 - q)) with q = error^(1/k)."""
    q = 0.05 ** (1 / 50)
    assert lower_bound(100, 50, 50, 0.0, 0.05) == pytest.approx(math.log(q / (1 - q)), abs=1e-3)


def test_p_value_without_delta_is_the_binomial_tail():
    assert p_value(100, 40, 30, 0.7, 0.0) == pytest.approx(binom.sf(29, 40, 1 / (1 + math.exp(-0.7))))


def test_delta_adds_the_worst_slope_of_the_tail():
    tail = [binom.sf(v - 1, 40, 1 / (1 + math.exp(-0.7))) for v in range(31)]
    worst = max((tail[30 - i] - tail[30]) / i for i in range(1, 31))
    assert p_value(100, 40, 30, 0.7, 1e-3) == pytest.approx(tail[30] + 2 * 100 * 1e-3 * worst)


def test_more_right_guesses_more_epsilon_and_delta_less():
    bounds = [lower_bound(200, 100, v, 0.0, 0.05) for v in (50, 70, 90, 100)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    assert lower_bound(200, 100, 90, 1e-3, 0.05) < bounds[2]


def test_scores_without_information_find_nothing():
    included = draw_inclusion(1000, SeededRandomness(0))
    scores = SeededRandomness(9).normal(1000)
    assert audit(scores, included, 1e-5).epsilon < 0.3


def test_no_privacy_is_seen():
    scores, included = perfect(1000)
    result = audit(scores, included, 1e-5)
    assert result.epsilon > 4
    assert (result.canaries, result.correct) == (1000, result.guesses)


def test_what_only_the_lowest_scores_tell_is_found():
    """A third of what was not trained on scores as high as what was: of random classes one in three is guessed."""
    included = draw_inclusion(1000, SeededRandomness(0))
    scores = torch.where(included, 1.0, (SeededRandomness(1).uniform(1000) < 1 / 3).float())
    result = audit(scores, included, 1e-5)
    assert (result.guesses, result.correct) == (250, 250)
    assert result.epsilon > 3.5


@pytest.mark.parametrize("guesses", [None, [300]])
@pytest.mark.parametrize("true_epsilon", [0.5, 1.0, 3.0])
def test_known_mechanism_is_overestimated_no_more_often_than_stated(true_epsilon, guesses):
    """Randomized response answers truly with probability e^ε / (1 + e^ε): exactly ε, and no mechanism tells more."""
    trials, confidence = 150, 0.9
    randomness = SeededRandomness(3)
    bounds = []
    for _ in range(trials):
        included = draw_inclusion(600, randomness)
        truthful = randomness.uniform(600) < 1 / (1 + math.exp(-true_epsilon))
        answers = torch.where(truthful, included, ~included)
        scores = answers + 0.01 * randomness.uniform(600)
        bounds.append(audit(scores, included, 0.0, confidence=confidence, guesses=guesses).epsilon)
    above = sum(bound > true_epsilon for bound in bounds)
    assert above <= binom.ppf(0.999, trials, 1 - confidence)
    # Five tries share the error where none is named, which costs most where there is little to find.
    assert sorted(bounds)[trials // 2] > (0.6 if guesses or true_epsilon >= 1 else 0.2) * true_epsilon


def test_gaussian_mechanism_stays_below_its_epsilon():
    """Each canary's presence released with noise of standard deviation z is one step of an accountant."""
    noise, delta = 1.2, 1e-5
    claimed = epsilon([(noise, 1.0, 1)], delta)
    randomness = SeededRandomness(4)
    for _ in range(20):
        included = draw_inclusion(2000, randomness)
        found = audit(included + noise * randomness.normal(2000), included, delta, confidence=0.999)
        assert 0 < found.epsilon <= claimed


def trained_scores(noise_multiplier, steps=20):
    """Train an adapter privately on the included canaries; score each by how far its loss fell."""
    torch.manual_seed(0)
    canaries, tokens, n, m = 300, 1, 160, 160
    adapter = BoraAdapter(n, m, 8, 4, 1.0)
    adapter.reset_parameters(init_weights=False)
    x, target = torch.randn(canaries, tokens, n), torch.randn(canaries, tokens, m)

    def losses(model, batch):
        return -(model(x[batch]) * target[batch]).sum(dim=(1, 2))

    included = draw_inclusion(canaries, SeededRandomness(1))
    records = included.nonzero().flatten().tolist()
    with torch.no_grad():
        before = losses(adapter, torch.arange(canaries))
    result = train_privately(
        adapter,
        losses,
        records,
        torch.tensor,
        torch.optim.SGD(adapter.parameters(), lr=1e-2),
        clip_norm=1.0,
        noise_multiplier=noise_multiplier,
        expected_batch_size=len(records) / 2,
        physical_batch_size=200,
        steps=steps,
        spend=None,
        randomness=SeededRandomness(2),
    )
    with torch.no_grad():
        scores = before - losses(adapter, torch.arange(canaries))
    return scores, included, result


def test_training_without_noise_is_caught():
    scores, included, _ = trained_scores(0.0)
    assert audit(scores, included, 1e-5).epsilon > 1.5


def test_private_training_is_not_accused():
    scores, included, result = trained_scores(noise_multiplier=4.0)
    claimed = epsilon([(result.noise_multiplier, result.sample_rate, result.steps)], 1e-5)
    assert audit(scores, included, 1e-5, confidence=0.999).epsilon <= claimed < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3)}, "one score and one"),
        ({"included": torch.zeros(4)}, "one score and one"),
        ({"scores": torch.tensor([0.0, 1.0, math.nan, 2.0])}, "not finite"),
        ({"delta": 1.0}, "delta = 1"),
        ({"confidence": 1.0}, "confidence = 1"),
        ({"guesses": [6]}, "guesses = 6 with 4 canaries"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    settings = {"scores": torch.zeros(4), "included": torch.zeros(4, dtype=torch.bool), "delta": 0.0} | changes
    with pytest.raises(ValueError, match=message):
        audit(**settings)
