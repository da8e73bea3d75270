import math

import pytest
import torch

from bora_fl.heads import ClassSums, check_release, lda, most_weight, release, solve_private
from bora_fl.heads.features import clip
from bora_fl.heads.private import SHARES, noise_stds
from bora_fl.privacy.gaussian import SeededRandomness
from tests.heads.problems import problem


def clipped_sums(x: torch.Tensor, y: torch.Tensor, clip_norm: float) -> ClassSums:
    return ClassSums.of(clip(x, clip_norm), y, 3)


def difference(first: ClassSums, second: ClassSums) -> float:
    """Their distance in units of each part's noise at noise multiplier 1, the triangle read off entry by entry."""
    gram = first.gram - second.gram
    off = torch.triu(gram, 1) * math.sqrt(2)
    parts = [first.counts - second.counts, first.sums - second.sums, off + torch.diag(gram.diagonal())]
    return math.sqrt(sum(f * float(part.square().sum()) for f, part in zip(SHARES, parts, strict=True)))


@pytest.mark.parametrize("clip_norm", [0.5, 3.0, 100.0])
def test_no_neighbour_moves_the_sums_by_more_than_the_noise_is_for(clip_norm: float):
    x, y = problem(60)
    x[0] *= 1e8
    whole = clipped_sums(x, y, clip_norm)
    distances = []
    for left_out in range(60):
        kept = torch.arange(60) != left_out
        distances.append(difference(whole, clipped_sums(x[kept], y[kept], clip_norm)))
    assert max(distances) <= 1 + 1e-12
    if clip_norm < 1:
        assert max(distances) > 0.999  # the bound is reached


def test_a_record_that_is_not_finite_counts_as_zero():
    x, _ = problem(4)
    x[1], x[2, 0] = math.nan, math.inf
    assert clip(x, 2.0)[1:3].abs().sum() == 0
    assert clip(x, 2.0)[[0, 3]].norm(dim=1).max() <= 1 + 1e-12


def test_the_noise_has_the_stated_deviations():
    zero = ClassSums.zeros(100, 60)
    noised = release(zero, 2.0, SeededRandomness(0))
    counts, sums, gram = noise_stds(2.0)
    assert [counts, sums, gram] == pytest.approx([2 / math.sqrt(share) for share in SHARES])
    assert sum(1 / std**2 for std in (counts, sums, gram)) == pytest.approx(1 / 2.0**2)
    assert float(noised.counts.std()) == pytest.approx(counts, rel=0.25)
    assert float(noised.sums.std()) == pytest.approx(sums, rel=0.05)
    above = noised.gram[torch.triu_indices(60, 60, 1).unbind()]
    assert float(above.std()) == pytest.approx(gram / math.sqrt(2), rel=0.08)
    assert float(noised.gram.diagonal().std()) == pytest.approx(gram, rel=0.35)
    assert torch.equal(noised.gram, noised.gram.T)
    total = zero
    for client in range(50):
        total = total + release(ClassSums.zeros(100, 60), 2.0, SeededRandomness(client))
    assert float(total.sums.std()) == pytest.approx(noise_stds(2.0, 50)[1], rel=0.05)


def test_the_spectral_norm_that_the_penalty_is_a_share_of():
    noise = release(ClassSums.zeros(2, 200), 1.0, SeededRandomness(0)).gram
    assert float(torch.linalg.matrix_norm(noise, 2)) == pytest.approx(math.sqrt(2 * 200) * noise_stds(1.0)[2], rel=0.1)


def test_little_noise_leaves_the_head_as_it_is():
    x, y = problem(2000)
    sums = clipped_sums(x, y, 50.0)
    head = solve_private(release(sums, 1e-6, SeededRandomness(0)), 1e-6, 1, 50.0)
    plain = lda(ClassSums.of(x, y, 3), 1e-9)
    torch.testing.assert_close(head(x), plain(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("noise", [1.0, 1e4])
@pytest.mark.parametrize("bias", [True, False])
def test_much_noise_gives_a_finite_head(noise: float, bias: bool):
    x, y = problem(50)
    head = solve_private(release(clipped_sums(x, y, 5.0), noise, SeededRandomness(0)), noise, 1, 5.0, bias=bias)
    assert torch.isfinite(head(x)).all()
    assert (head.bias is None) is not bias


@pytest.mark.parametrize("noise", [0.5, 30.0])
@pytest.mark.parametrize("examples", [1, 400])
def test_honest_releases_pass(noise: float, examples: int):
    x, y = problem(400)
    sums = clipped_sums(x[:examples], y[:examples], 0.5)
    for seed in range(50):
        sent = release(sums, noise, SeededRandomness(seed)).to_tensors()
        check_release(ClassSums.from_tensors(sent, 3, x.shape[1]), noise)


def test_releases_of_no_examples_are_rejected():
    x, y = problem(400)
    honest = release(clipped_sums(x, y, 5.0), 1.0, SeededRandomness(0))
    lies = {
        "below 0": ClassSums(honest.counts - 1000, honest.sums, honest.gram),
        "longer": ClassSums(honest.counts, honest.sums * 1000, honest.gram),
        "Gram": ClassSums(honest.counts, honest.sums, honest.gram * 1000),
        "no such": ClassSums(honest.counts, honest.sums, honest.gram - 1000 * torch.eye(len(honest.gram))),
    }
    for words, lie in lies.items():
        with pytest.raises(ValueError, match=words):
            check_release(lie, 1.0)


def test_no_release_counts_for_more_than_ten_medians():
    assert most_weight([90.0, 110.0, 1e6], 3, 1.0) == 1100.0
    floor = 10 * 3**0.5 * noise_stds(2.0)[0]
    assert most_weight([1e-3, -4.0], 3, 2.0) == pytest.approx(floor)
    assert most_weight([], 3, 2.0) == pytest.approx(floor)


def test_without_noise_there_is_nothing_to_repair():
    with pytest.raises(ValueError, match="noise_multiplier = 0"):
        solve_private(ClassSums.of(*problem(), 3), 0.0, 1, 1.0)
