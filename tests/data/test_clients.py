"""Who works on what: held-out parts, one tokenization per process, batches drawn in passes."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import bora_fl.data as data
from bora_fl.config import ConfigError, DataSettings, ModelSettings

MODEL = ModelSettings(max_length=24)


def texts(encoded: data.Encoded, tokenizer: Any) -> list[str]:
    ids = encoded.batch(np.arange(len(encoded)))["input_ids"]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def test_clients_share_out_the_training_split(shop: DataSettings, words: Any) -> None:
    clients = [data.client_data(shop, MODEL, words, i, 5, 0) for i in range(5)]
    parts = [part for c in clients for part in (c.train, c.evaluation)]
    raw = data.load_dataset(shop).train
    whole = words(raw["text"][:], truncation=True, max_length=24)["input_ids"]
    expected = zip(words.batch_decode(whole, skip_special_tokens=True), raw["label"][:], strict=True)
    seen = [pair for part in parts for pair in zip(texts(part, words), part.classes, strict=True)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(("fraction", "held"), [(0.0, 0), (0.1, 6), (0.001, 1), (0.999, 59)])
def test_the_held_out_part_has_its_size(fraction: float, held: int, shop: DataSettings, words: Any) -> None:
    settings = shop.model_copy(update={"partition": "iid", "evaluation_fraction": fraction})
    client = data.client_data(settings, MODEL, words, 2, 5, 0)
    assert (len(client.train), len(client.evaluation)) == (60 - held, held)


def test_a_client_with_one_example_trains_on_it(shop: DataSettings, words: Any) -> None:
    settings = shop.model_copy(update={"partition": "iid"})
    client = data.client_data(settings, MODEL, words, 0, 300, 0)
    assert (len(client.train), len(client.evaluation)) == (1, 0)
    assert client.evaluation.batch(np.arange(0))["labels"].shape == (0,)


def test_seed_and_client_decide_what_is_held_out(shop: DataSettings, words: Any) -> None:
    def held(client: int, seed: int) -> tuple[tuple[int, ...], ...]:
        kept = data.client_data(shop, MODEL, words, client, 5, seed).evaluation
        return tuple(sorted(map(tuple, kept.batch(np.arange(len(kept)))["input_ids"].tolist())))

    assert held(0, 0) == held(0, 0)
    assert len({held(0, 0), held(0, 1), held(1, 0), held(1, 1)}) == 4


def test_a_process_tokenizes_once_for_all_clients(shop: DataSettings, words: Any) -> None:
    before = data.loads()
    with ThreadPoolExecutor(4) as pool:
        clients = list(pool.map(lambda i: data.client_data(shop, MODEL, words, i, 5, 0), range(5)))
    assert data.loads() == before + 1
    assert all(c.train.tokens is clients[0].train.tokens for c in clients)
    for seed, kind in ((1, "natural"), (0, "iid")):  # other deals of the same data
        again = data.client_data(shop.model_copy(update={"partition": kind}), MODEL, words, 0, 5, seed)
        assert again.train.tokens is clients[0].train.tokens
    assert data.loads() == before + 1
    shorter = data.client_data(shop, ModelSettings(max_length=5), words, 0, 5, 0)
    assert data.loads() == before + 2
    assert shorter.train.lengths.max() == 5


def test_the_test_set_is_the_test_split(shop: DataSettings, words: Any) -> None:
    encoded = data.test_data(shop, MODEL, words)
    raw = data.load_dataset(shop).test
    assert encoded is not None
    assert raw is not None
    assert encoded.classes is not None
    assert encoded.classes.tolist() == raw["label"][:]
    assert data.test_data(shop.model_copy(update={"test_split": ""}), MODEL, words) is None


@pytest.mark.parametrize("client", [-1, 5])
def test_a_client_out_of_range_is_refused(client: int, shop: DataSettings, words: Any) -> None:
    with pytest.raises(ConfigError, match=f"partition-id = {client} with num-partitions = 5: ids run from 0 to 4"):
        data.client_data(shop, MODEL, words, client, 5, 0)


@pytest.mark.parametrize("bucket", [1, 2, 8])
@pytest.mark.parametrize(("examples", "size"), [(10, 3), (9, 3), (2, 5), (1, 1), (35, 3)])
def test_a_pass_deals_every_example_once(examples: int, size: int, bucket: int) -> None:
    per_pass = -(-examples // size)
    lengths = np.random.default_rng(1).integers(1, 50, examples)
    drawn = list(data.draw_batches(examples, size, 3 * per_pass, np.random.default_rng(0), lengths, bucket))
    assert len(drawn) == 3 * per_pass
    passes = [drawn[i * per_pass : (i + 1) * per_pass] for i in range(3)]
    for batches in passes:
        assert [len(b) for b in batches[:-1]] == [size] * (per_pass - 1)
        assert sorted(np.concatenate(batches).tolist()) == list(range(examples))
    if examples == 10:
        assert len({tuple(np.concatenate(batches)) for batches in passes}) == 3


def test_more_batches_begin_with_fewer() -> None:
    few = list(data.draw_batches(10, 4, 5, np.random.default_rng(7)))
    many = list(data.draw_batches(10, 4, 8, np.random.default_rng(7)))
    assert len(few) == 5
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert list(data.draw_batches(10, 4, 0, np.random.default_rng(7))) == []


def test_buckets_spare_padding_and_keep_who_is_drawn_together_random() -> None:
    lengths = np.random.default_rng(1).integers(1, 50, 640)

    def padded(bucket: int) -> int:
        drawn = data.draw_batches(640, 16, 40, np.random.default_rng(0), lengths, bucket)
        return sum(int(lengths[batch].max()) * len(batch) for batch in drawn)

    assert padded(8) < 0.7 * padded(1)
    means = [lengths[b].mean() for b in data.draw_batches(640, 16, 40, np.random.default_rng(0), lengths, 8)]
    assert 10 < sum(a < b for a, b in itertools.pairwise(means)) < 30  # short and long ones in no order


def test_nothing_to_draw_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="from 0 examples"):
        next(data.draw_batches(0, 4, 1, np.random.default_rng(0)))
