"""Let a causal language model write."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bora_fl.device import settle


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
    choice = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            batch = [list(row) for row in prompts[start : start + batch_size]]
            width = max(len(row) for row in batch)
            tokens = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
            with torch.inference_mode():
                written = model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    use_cache=True,
                    pad_token_id=pad,
                    **choice,
                )
            yield from tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    finally:
        model.train(was_training)
