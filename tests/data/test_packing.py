"""Packed examples: nothing is lost, and nothing of the training changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bora_fl.config import ConfigError, parse
from bora_fl.data import Encoded
from bora_fl.data.packing import pack
from bora_fl.evaluate import example_losses
from bora_fl.models.packing import require_packing


def examples(lengths: list[int], seed: int = 0, longest: int = 16) -> Encoded:
    """Examples of a language model with some targets, over a vocabulary of 27 words."""
    rng, sizes = np.random.default_rng(seed), np.array(lengths, dtype=np.int64)
    tokens = rng.integers(1, 27, sizes.sum()).astype(np.int32)
    prompts, targets = rng.integers(0, sizes), rng.random(sizes.sum()) < 0.7
    return Encoded(tokens, np.cumsum(sizes) - sizes, sizes, prompts, None, 0, longest, targets)


def learned(data: Encoded) -> list[tuple[int, ...]]:
    """Each target with what stands before it in its example."""
    batch = data.batch(np.arange(len(data)))
    places = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
    return sorted(
        tuple(ids[at - int(where[at]) : at + 1].tolist())
        for ids, labels, where in zip(batch["input_ids"], batch["labels"], places, strict=True)
        for at in (labels >= 0).nonzero().flatten().tolist()
    )


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=12), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_every_target_keeps_what_stands_before_it(lengths: list[int], seed: int) -> None:
    data = examples(lengths, seed)
    packed = pack(data)
    assert learned(packed) == learned(data)
    assert packed.examples == len(data)
    assert packed.lengths.max() <= 16
    assert len(packed) >= -(-sum(lengths) // 16)


def test_rows_are_filled() -> None:
    assert pack(examples([10, 9, 6, 7, 8, 8])).lengths.tolist() == [16, 16, 16]
    assert len(pack(examples([]))) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_gradient(attention: str, tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, attn_implementation=attention, use_cache=False).double()
    require_packing(model, 4)
    data = examples([5, 3, 8, 2, 7, 4, 1])

    def gradients(of: Encoded) -> list[torch.Tensor]:
        model.zero_grad()
        batch = of.batch(np.arange(len(of)))
        labels = batch.pop("labels")
        losses, targets, _ = example_losses(model(**batch).logits, labels)
        (losses.sum() / targets.sum()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    packed = pack(data)
    assert len(packed) < len(data)
    for alone, together in zip(gradients(data), gradients(packed), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


def test_a_model_that_mixes_the_examples_of_a_row_is_refused(tiny_causal: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, use_cache=True)  # transformers sees no packing then
    with pytest.raises(ConfigError, match=r"data.packing = true: LlamaForCausalLM with attention 'sdpa' does not keep"):
        require_packing(model, 4)


def test_attention_that_keeps_examples_apart_in_one_row_alone_is_for_batches_of_one(
    tiny_causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers calls FlashAttention: of a batch of several rows it does not look at the positions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, use_cache=False)
    forward = model.forward

    def flash(input_ids: torch.Tensor, position_ids: torch.Tensor) -> object:
        many = {"attention_mask": torch.ones_like(input_ids)} if len(input_ids) > 1 else {}  # then none are packed
        return forward(input_ids=input_ids, position_ids=position_ids, **many)

    monkeypatch.setattr(model, "forward", flash)
    require_packing(model, 1)
    with pytest.raises(
        ConfigError, match=r"data.packing = true with train.batch-size = 4: .* set train.batch-size to 1"
    ):
        require_packing(model, 4)


@pytest.mark.parametrize(("key", "value"), [("model.task", "classification"), ("privacy.mode", "record")])
def test_packing_is_for_language_models_without_record_privacy(key: str, value: str) -> None:
    config = {"data.packing": True, "model.task": "causal-lm", "strategy.weighting": "uniform", key: value}
    with pytest.raises(ConfigError, match=rf"data.packing = true with {key} = '{value}'"):
        parse(config)
