"""Predictions of a model for texts, in the order of the texts, cut and prompted as in training."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bora_fl.config import Settings
from bora_fl.data.tokenizing import prompt_ids
from bora_fl.device import settle


def rows(
    model: Any, tokenizer: Any, texts: Sequence[str], settings: Settings, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Each text with what a finished run's model makes of it: a label and its probability, or a response."""
    if settings.model.task == "classification":
        for text, (label, probability) in zip(
            texts, classify(model, tokenizer, texts, settings.model.max_length), strict=True
        ):
            yield {"text": text, "label": label, "probability": round(probability, 6)}
        return
    dialog = settings.data.format == "messages" or bool(settings.data.response_column)
    responses = generate(model, tokenizer, texts, dialog=dialog, max_new_tokens=max_new_tokens)
    for text, response in zip(texts, responses, strict=True):
        yield {"text": text, "response": response}


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


def generate(
    model: Any, tokenizer: Any, texts: Sequence[str], *, dialog: bool, max_new_tokens: int, batch_size: int = 8
) -> Iterator[str]:
    """What a causal language model writes after each text, the most likely token at each step.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Prompts, or the beginnings of texts.
        dialog: Whether the model was trained on prompts with responses.
        max_new_tokens: Tokens to write at most.
        batch_size: Texts at once.
    """
    device = settle(model)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    for start in range(0, len(texts), batch_size):
        ids = prompt_ids(tokenizer, texts[start : start + batch_size], dialog)
        width = max(len(row) for row in ids)
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
            )
        yield from tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
