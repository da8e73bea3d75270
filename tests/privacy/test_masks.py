import numpy as np
import pytest
from scipy import stats

from bora_fl.privacy.masks import expand

SHAPES = [(1,), (3, 5), (2, 0), ()]


def test_a_seed_gives_one_stream_and_every_bit_of_it_counts():
    seed = bytes(32)
    first, again = expand(seed, 2**32, SHAPES), expand(seed, 2**32, SHAPES)
    assert [a.shape for a in first] == SHAPES
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    # Flower's generator adds the words of a seed by exclusive or: these two would be the same.
    twin = bytes([1, 0, 0, 0, 1, 0, 0, 0]) + bytes(24)
    assert not np.array_equal(expand(twin, 2**32, [(8,)])[0], expand(seed, 2**32, [(8,)])[0])


@pytest.mark.parametrize("modulus", [2**8, 2**32])
def test_entries_are_uniform_over_the_modulus(modulus: int):
    drawn = expand(b"seed", modulus, [(200, 100)])[0]
    assert drawn.dtype == np.int64
    assert drawn.min() >= 0
    assert drawn.max() < modulus
    assert stats.kstest(drawn.ravel() / modulus, "uniform").pvalue > 1e-3 or modulus < 2**16
    counts = np.bincount((drawn.ravel() * 16) // modulus, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_modulus_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="modulus = 1000"):
        expand(b"seed", 1000, [(1,)])


def test_both_sides_use_these_masks():
    import bora_fl.client.secure_aggregation as client
    import bora_fl.strategies.secure_aggregation as server

    assert client.protocol.pseudo_rand_gen is expand
    assert server.protocol.pseudo_rand_gen is expand
