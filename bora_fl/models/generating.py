"""Let a causal language model write."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bora_fl.data.messages import turn_end
from bora_fl.device import settle

log = logging.getLogger(__name__)

# A model's own settings may ask for these too; then what it writes is not what is most likely.
_MOST_LIKELY = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.0,
) -> Iterator[str]:
    """What a model writes after each prompt, in their order, until it ends its turn.

    A turn ends with what the model, its tokenizer or the chat template ends it with. A prompt that leaves no room in
    the model's context loses its beginning, down to half of the context.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        max_new_tokens: Tokens to write at most.
        batch_size: Prompts at once.
        temperature: Of what is drawn at each step; 0 takes the most likely token.
    """
    device = settle(model)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    choice = {"do_sample": True, "temperature": temperature} if temperature else _MOST_LIKELY
    ends, context = stop_ids(model, tokenizer), context_length(model)
    fitting = [_fitting(list(row), max_new_tokens, context, tokenizer.bos_token_id) for row in prompts]
    if cut := sum(len(kept) < len(row) for kept, row in zip(fitting, prompts, strict=True)):
        log.warning("%d of %d prompts are too long for the model's context and lose their beginning", cut, len(prompts))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = fitting[start : start + batch_size]
            width = max(len(row) for row in batch)
            tokens = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
            with torch.inference_mode():
                written = model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    max_new_tokens=min(max_new_tokens, context - width) if context else max_new_tokens,
                    use_cache=True,
                    pad_token_id=pad,
                    eos_token_id=ends or None,
                    **choice,
                )
            for row in written[:, width:].tolist():
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                yield tokenizer.decode(row[:end], skip_special_tokens=True)
    finally:
        model.train(was_training)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end what a model writes."""
    found = {tokenizer.eos_token_id, turn_end(tokenizer)}
    known = getattr(model.generation_config, "eos_token_id", None)
    found |= set(known) if isinstance(known, list) else {known}
    return sorted(found - {None})


def context_length(model: Any) -> int | None:
    """Tokens that a model can read and write in all; None if its positions have no end."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def _fitting(row: list[int], max_new_tokens: int, context: int | None, bos: int | None) -> list[int]:
    """A prompt's tokens, of which the first give way where the context is too short; BOS stays."""
    room = len(row) if context is None else max(context - max_new_tokens, context // 2)
    if len(row) <= room:
        return row
    opening = row[:1] if row[0] == bos and room > 1 else []
    return opening + row[len(row) - room + len(opening) :]
