"""Sketches of data sets: exact for small ones, estimates for large ones, and of no use without the key."""

import stat
from pathlib import Path

import numpy as np
import pytest

from bora_fl.privacy.overlap import KEY, common_share, make_sketch, note

KEY_BYTES = b"k" * 32


def records(first: int, last: int) -> list[str]:
    return [f"record {number}" for number in range(first, last)]


@pytest.mark.parametrize(
    ("a", "b", "share"), [((0, 100), (0, 100), 1.0), ((0, 100), (100, 200), 0), ((0, 90), (60, 200), 1 / 3)]
)
def test_small_sets_are_compared_exactly(a, b, share: float):
    assert common_share(make_sketch(records(*a), KEY_BYTES), make_sketch(records(*b), KEY_BYTES)) == pytest.approx(
        share
    )


@pytest.mark.parametrize(("a", "b"), [((0, 40_000), (30_000, 90_000)), ((0, 2_000), (1_000, 90_000))])
def test_large_sets_are_compared_nearly(a, b):
    size = 4096
    first, second = (make_sketch(records(*span), KEY_BYTES, size) for span in (a, b))
    true = len(set(range(*a)) & set(range(*b)))
    assert common_share(first, second, size) == pytest.approx(true / (a[1] - a[0]), abs=0.1)
    assert common_share(second, first, size) == pytest.approx(true / (b[1] - b[0]), abs=0.03)


def test_order_white_space_and_repetition_do_not_count():
    assert np.array_equal(make_sketch(["a", "b ", "a"], KEY_BYTES), make_sketch(["b", "a"], KEY_BYTES))
    assert common_share(make_sketch([], KEY_BYTES), make_sketch(["a"], KEY_BYTES)) == 0.0


def test_without_the_key_a_sketch_tells_nothing_of_a_record():
    assert common_share(make_sketch(["a"], KEY_BYTES), make_sketch(["a"], b"other")) == 0.0


def test_a_renamed_data_set_with_one_row_more_is_noticed(tmp_path: Path):
    assert note(tmp_path, "set-a", records(0, 50)) == {}
    assert note(tmp_path, "set-a", records(0, 50)) == {}
    assert note(tmp_path, "set-b", records(0, 51)) == {"set-a": pytest.approx(50 / 51)}
    assert note(tmp_path, "set-c", records(60, 80)) == {}
    assert {path.name for path in tmp_path.iterdir()} == {KEY, "set-a.sketch", "set-b.sketch", "set-c.sketch"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


def test_records_that_were_removed_are_remembered(tmp_path: Path):
    note(tmp_path, "set-a", records(0, 50))
    note(tmp_path, "set-a", records(40, 60))
    assert note(tmp_path, "set-b", records(0, 10)) == {"set-a": 1.0}
