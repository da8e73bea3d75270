"""Ragged storage and padded batches, against plain loops."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bora_fl.data import Encoded


@st.composite
def encoded(draw: st.DrawFn) -> Encoded:
    lengths = np.array(draw(st.lists(st.integers(1, 21), min_size=1, max_size=9)), dtype=np.int64)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    classes = rng.integers(0, 3, len(lengths)) if draw(st.booleans()) else None
    prompts = np.zeros_like(lengths) if classes is not None else rng.integers(0, lengths)
    tokens = rng.integers(1, 50, lengths.sum()).astype(np.int32)
    return Encoded(tokens, np.cumsum(lengths) - lengths, lengths, prompts, classes, pad_id=0, max_length=22)


def rows(data: Encoded) -> list[list[int]]:
    return [data.tokens[b : b + n].tolist() for b, n in zip(data.begin, data.lengths, strict=True)]


@settings(deadline=None, max_examples=80)
@given(data=encoded(), seed=st.integers(0, 99))
def test_batch_is_the_rows_padded(data: Encoded, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, len(data), 5)
    batch = data.batch(indices)
    texts = [rows(data)[i] for i in indices]
    width = min(-(-max(map(len, texts)) // 8) * 8, data.max_length)
    keys = ("input_ids", "attention_mask", "labels")
    assert {k: (v.dtype, v.shape[0]) for k, v in batch.items()} == dict.fromkeys(keys, (torch.int64, 5))
    assert batch["input_ids"].tolist() == [text + [0] * (width - len(text)) for text in texts]
    assert batch["attention_mask"].tolist() == [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    if data.classes is not None:
        assert batch["labels"].tolist() == [data.classes[i] for i in indices]
    else:
        starts = [max(1, data.prompts[i]) for i in indices]
        expected = [[-100] * s + text[s:] + [-100] * (width - len(text)) for s, text in zip(starts, texts, strict=True)]
        assert batch["labels"].tolist() == expected


@given(data=encoded(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_selection_keeps_rows_and_shares_tokens(data: Encoded, seed: int) -> None:
    indices = np.random.default_rng(seed).permutation(len(data))[: len(data) // 2]
    part = data.select(indices)
    assert len(part) == len(indices)
    assert rows(part) == [rows(data)[i] for i in indices]
    assert part.tokens is data.tokens
    whole, own = data.batch(indices), part.batch(np.arange(len(indices)))
    assert all(torch.equal(whole[k], own[k]) for k in whole)


@given(data=encoded())
@settings(deadline=None, max_examples=20)
def test_empty_batch_has_the_shapes_of_a_full_one(data: Encoded) -> None:
    empty, full = data.batch(np.arange(0)), data.batch(np.arange(1))
    assert {k: (v.dtype, v.dim(), v.shape[0]) for k, v in empty.items()} == {
        k: (v.dtype, v.dim(), 0) for k, v in full.items()
    }
    assert empty["input_ids"].shape[1] > 0
