"""Predictions of a finished run's model for texts, in the order of the texts, cut as in training."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bora_fl.config import Settings
from bora_fl.device import settle


def rows(
    model: Any, tokenizer: Any, texts: Sequence[Any], settings: Settings, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Each text with what a finished run's model makes of it: a label and its probability, or a response."""
    if settings.model.task == "classification":
        for text, (label, probability) in zip(
            texts, classify(model, tokenizer, texts, settings.model.max_length), strict=True
        ):
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
    device, names = settle(model), model.config.id2label
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            truncation=True,
            max_length=max_length,
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            likely = model(**batch).logits.float().softmax(-1).max(-1)
        for index, probability in zip(likely.indices.tolist(), likely.values.tolist(), strict=True):
            yield names[index], probability
