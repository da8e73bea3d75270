"""Predictions of a finished run's model for texts, in the order of the texts, cut as in training."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.data.tokenizing import token_ids, word_ids
from bora_fl.device import settle


def rows(
    model: Any, tokenizer: Any, texts: Sequence[Any], settings: Settings, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Each text with what a finished run's model makes of it: labels, a number, its words' labels, or a response."""
    task, longest = settings.model.task, settings.model.max_length
    if task == "token-classification":
        yield from _tag(model, tokenizer, texts, longest)
        return
    if task == "multi-label":
        for text, chances in zip(texts, _chances(model, tokenizer, texts, longest, several=True), strict=True):
            rounded = {name: round(chance, 6) for name, chance in chances.items()}
            labels = [name for name, chance in chances.items() if chance > 0.5]
            yield {"text": text, "labels": labels, "probabilities": rounded}
        return
    if settings.model.kind.number:
        for text, logits in zip(texts, _logits(model, tokenizer, texts, longest), strict=True):
            yield {"text": text, "value": float(logits)}
        return
    if task == "classification":
        for text, (label, probability) in zip(texts, classify(model, tokenizer, texts, longest), strict=True):
            yield {"text": text, "label": label, "probability": round(probability, 6)}
        return
    from bora_fl.models.generating import complete
    from bora_fl.predicting.dialogs import to_continue

    asked, prompts = to_continue(tokenizer, texts, settings.data)
    for row, response in zip(asked, complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens), strict=True):
        yield {**row, "response": response}


def classify(
    model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Iterator[tuple[str, float]]:
    """Each text's most likely label and its probability.

    Args:
        model: A classifier with its label names in its config.
        tokenizer: Its tokenizer.
        texts: The texts.
        max_length: Tokens that a text is cut at.
        batch_size: Texts per forward pass.
    """
    for chances in _chances(model, tokenizer, texts, max_length, batch_size):
        label = max(chances, key=chances.__getitem__)
        yield label, chances[label]


def _chances(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    *,
    several: bool = False,
) -> Iterator[dict[str, float]]:
    """Each text's probability of each label; of one of them, or of each by itself where a text may have several."""
    names = model.config.id2label
    for logits in _logits(model, tokenizer, texts, max_length, batch_size):
        row = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        yield {names[index]: chance for index, chance in enumerate(row)}


def _logits(
    model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Iterator[Tensor]:
    """Each text's logits ``[C]``, float32."""
    device = settle(model)
    for start in range(0, len(texts), batch_size):
        ids = token_ids(tokenizer, list(texts[start : start + batch_size]), truncation=True, max_length=max_length)
        inputs = {name: tensor.to(device) for name, tensor in _padded(ids, tokenizer, max_length).items()}
        with torch.inference_mode():
            yield from model(**inputs).logits.float()


def _tag(
    model: Any, tokenizer: Any, texts: Sequence[str | list[str]], max_length: int, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Each text's words, the likeliest label of each, and its probability; null beyond `max_length`.

    A text is split at white space; a list of words is taken as it is.
    """
    device, names = settle(model), model.config.id2label
    for start in range(0, len(texts), batch_size):
        rows = [text.split() if isinstance(text, str) else text for text in texts[start : start + batch_size]]
        ids, firsts = word_ids(tokenizer, rows, max_length)
        inputs = {name: tensor.to(device) for name, tensor in _padded(ids, tokenizer, max_length).items()}
        with torch.inference_mode():
            likely = model(**inputs).logits.float().softmax(-1).max(-1)
        for row, words in enumerate(rows):
            at = [firsts[row].get(word) for word in range(len(words))]
            labels = [None if place is None else names[int(likely.indices[row, place])] for place in at]
            chances = [None if place is None else round(float(likely.values[row, place]), 6) for place in at]
            yield {"words": words, "labels": labels, "probabilities": chances}


def _padded(ids: Sequence[Sequence[int]], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    """A batch as in training: padded on the right, whatever the tokenizer does, and of one column at least."""
    lengths = np.array([len(row) for row in ids], np.int64)
    none = np.zeros(len(ids), np.int64)
    batch = Encoded(
        tokens=np.array([token for row in ids for token in row], np.int32),
        begin=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompts=none,
        classes=none,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        max_length=max_length,
    ).batch(np.arange(len(ids)))
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
