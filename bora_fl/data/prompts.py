"""What a language model is given to go on from, as in training, and what it should say then."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data.columns import TOOLS, with_context
from bora_fl.data.messages import answers, by_template, clean, read_tools, require_template
from bora_fl.data.preferences import read_pair
from bora_fl.data.tokenizing import ending_ids, opening_ids, prompt_heads, token_ids
from bora_fl.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset


class Prompt(NamedTuple):
    """Tokens to go on from, what was asked (a text, or messages), and the response that the data has."""

    ids: list[int]
    asked: Any
    reference: str


def prompt_ids(tokenizer: Any, texts: Sequence[str], dialog: bool) -> list[list[int]]:
    """The tokens before a response.

    Args:
        tokenizer: The model's.
        texts: Prompts, or the beginnings of texts.
        dialog: Whether the model was trained on prompts with responses, or on messages.
    """
    heads, opening = prompt_heads(tokenizer, texts) if dialog else (list(texts), opening_ids(tokenizer))
    ids = [opening + piece for piece in token_ids(tokenizer, heads, add_special_tokens=False)]
    return [row or ending_ids(tokenizer) for row in ids]


def conversation_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None
) -> list[int]:
    """The tokens before the assistant's next turn."""
    text = by_template(tokenizer, messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return token_ids(tokenizer, [text], add_special_tokens=False)[0]


def before_answer(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A conversation up to the assistant's last turn, and that turn; the whole and nothing if the user has the word."""
    found = clean(messages)
    if not found or found[-1].get("role") != "assistant":
        return found, ""
    return found[:-1], str(found[-1].get("content", ""))


def held_out_prompts(raw: "Dataset", data: DataSettings, tokenizer: Any, count: int) -> list[Prompt]:
    """Prompts of a split, the same ones for every seed.

    Args:
        raw: A split as `load_dataset` returns it.
        data: As `RawData.settings` has it.
        tokenizer: The model's.
        count: Prompts at most.

    Raises:
        ConfigError: If rows are texts without a response, or the tokenizer has no chat template for messages.
    """
    if data.format == "text":
        raise ConfigError(
            f"run.generate-every with data.text-column = {data.text_column!r}: its texts have no prompt and response; "
            "name data.response-column, use messages, or set run.generate-every to 0"
        )
    chosen = np.random.default_rng(derive(0, "prompts")).permutation(len(raw))[:count]
    rows = raw.select(np.sort(chosen)).to_list()
    if data.format == "preference":
        return [_of_pair(tokenizer, data, row) for row in rows]
    if data.format == "prompt":
        texts = [with_context(row[data.text_column], row.get(data.context_column)) for row in rows]
        ids = prompt_ids(tokenizer, texts, dialog=True)
        parts = [(text, row[data.response_column]) for text, row in zip(texts, rows, strict=True)]
        return [Prompt(tokens, *part) for tokens, part in zip(ids, parts, strict=True)]
    require_template(tokenizer, "data.text-column", data.text_column)
    found = []
    for row in rows:
        messages = clean(row[data.text_column])
        while not answers(messages[-1:]):  # a user's last word has no answer to compare with
            messages.pop()
        asked, reference = before_answer(messages)
        if not asked:  # the assistant began
            continue
        found.append(Prompt(conversation_ids(tokenizer, asked, read_tools(row.get(TOOLS))), asked, reference))
    if not found:
        raise ConfigError(
            f"run.generate-every with data.text-column = {data.text_column!r}: in none of {len(rows)} held-out "
            "conversations is an answer asked for; set run.generate-every to 0"
        )
    return found


def _of_pair(tokenizer: Any, data: DataSettings, row: Mapping[str, Any]) -> Prompt:
    """The prompt of a preference pair, with the response that was chosen."""
    given = row[data.text_column] if data.text_column else None
    pair = read_pair(given, row[data.response_column], row[data.rejected_column])
    if isinstance(pair.chosen, str):
        dialog = not pair.written
        ids = prompt_ids(tokenizer, [str(pair.prompt)], dialog)[0]
        return Prompt(ids, pair.prompt, pair.chosen)
    require_template(tokenizer, "data.response-column", data.response_column)
    asked: list[Any] = [*pair.prompt, *pair.chosen[:-1]]
    return Prompt(conversation_ids(tokenizer, asked, read_tools(row.get(TOOLS))), asked, before_answer(pair.chosen)[1])
