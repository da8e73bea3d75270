"""What a language model writes for held-out prompts, beside the responses that the data has."""

from collections.abc import Sequence
from typing import Any

from bora_fl.data.prompts import Prompt
from bora_fl.evaluate import exact_match, has_form, rouge_l
from bora_fl.models.generating import complete

SAMPLES = "samples.jsonl"


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, form: str = ""
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generate for each prompt, the most likely token at each step, and compare.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: At least one.
        max_new_tokens: Tokens to write at most.
        form: What a response should be: ``json``, or a regular expression for all of it; empty for anything.

    Returns:
        The means of ``exact_match`` and ``rouge_l``, and of ``valid`` if there is a form, over ``examples`` prompts,
        and each sample.
    """
    written = complete(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=max_new_tokens)
    samples = [
        {
            "prompt": prompt.asked,
            "response": response,
            "reference": prompt.reference,
            "exact_match": exact_match(response, prompt.reference),
            "rouge_l": rouge_l(response, prompt.reference),
            **({"valid": has_form(response, form)} if form else {}),
        }
        for prompt, response in zip(prompts, written, strict=True)
    ]
    means = {
        name: sum(sample[name] for sample in samples) / len(samples)
        for name in ("exact_match", "rouge_l", *(["valid"] if form else []))
    }
    return {**means, "examples": len(samples)}, samples
