"""What a language model writes: where it ends, beside others, and after more than it can read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bora_fl.models.generating import complete, stop_ids

PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [20], [16, 17, 18, 19, 20, 21]]


@pytest.fixture
def tokenizer(tiny_causal: Path) -> Any:
    """With a template that ends a turn by a token which is not the tokenizer's EOS."""
    found = AutoTokenizer.from_pretrained(tiny_causal)
    found.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return found


def small(kind: str, **more: Any) -> Any:
    config = AutoConfig.for_model(kind)
    shape = {"hidden_size": 16, "intermediate_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "vocab_size": 27}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    config.update(shape | ({"word_embed_proj_dim": 16} if kind == "opt" else {}) | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # so that what is most likely depends on all that was read
    return model


@pytest.mark.parametrize("kind", ["gpt2", "opt", "falcon", "gpt_neox", "qwen2"])
def test_what_is_written_depends_on_the_prompt_alone(kind: str, tokenizer: Any) -> None:
    model = small(kind)
    tokenizer.chat_template = None
    together = list(complete(model, tokenizer, PROMPTS, max_new_tokens=6))
    for prompt, response in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 6 and ids[-1] != 1:
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert response == tokenizer.decode(
            [token for token in ids[len(prompt) :] if token != 1], skip_special_tokens=True
        )


def test_a_turn_ends_with_what_the_template_ends_it_with(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    asked: dict[str, Any] = {}

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.update(options)
        return torch.cat([input_ids, torch.tensor([[9, 10, 6, 4, 11]])], 1)

    monkeypatch.setattr(model, "generate", generate)
    assert stop_ids(model, tokenizer) == [1, 6]  # the model's own, and <|end|>
    assert list(complete(model, tokenizer, PROMPTS[:1], max_new_tokens=5)) == [tokenizer.decode([9, 10])]
    assert asked["eos_token_id"] == [1, 6]
    model.generation_config.eos_token_id = [3, 5]
    assert stop_ids(model, tokenizer) == [1, 3, 5, 6]
    tokenizer.chat_template = None
    assert stop_ids(model, tokenizer) == [1, 3, 5]


def test_the_most_likely_token_is_taken_whatever_the_model_recommends(tokenizer: Any) -> None:
    model = small("llama")
    wanted = list(complete(model, tokenizer, PROMPTS, max_new_tokens=8))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert list(complete(model, tokenizer, PROMPTS, max_new_tokens=8)) == wanted


def test_a_prompt_beyond_the_context_loses_its_beginning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = small("gpt2", n_positions=16)
    long = [2 + place % 20 for place in range(40)]
    found = list(complete(model, tokenizer, [long, PROMPTS[0]], max_new_tokens=4))
    assert "1 of 2 prompts are too long for the model's context" in caplog.text
    assert found == list(complete(model, tokenizer, [long[-12:], PROMPTS[0]], max_new_tokens=4))
    half = list(complete(model, tokenizer, [long], max_new_tokens=100))
    assert half == list(complete(model, tokenizer, [long[-8:]], max_new_tokens=8))
