"""From texts and conversations to what a language model goes on from."""

from collections.abc import Sequence
from typing import Any

from bora_fl.config import DataSettings
from bora_fl.data.prompts import before_answer, conversation_ids, prompt_ids
from bora_fl.predicting.texts import Conversation


def to_continue(
    tokenizer: Any, given: Sequence[Any], data: DataSettings
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What is asked, as rows for the output, and its tokens.

    A conversation that ends with the assistant's turn is asked for that turn again, which becomes its ``reference``.

    Args:
        tokenizer: The model's.
        given: Texts, lists of messages, and a `Conversation` where there are functions to call.
        data: What the model was trained on.
    """
    texts = [value for value in given if isinstance(value, str)]
    of_texts = iter(prompt_ids(tokenizer, texts, data.dialog) if texts else [])
    rows: list[dict[str, Any]] = []
    ids = []
    for value in given:
        if isinstance(value, str):
            rows.append({"text": value})
            ids.append(next(of_texts))
            continue
        messages, tools = value if isinstance(value, Conversation) else (value, None)
        asked, reference = before_answer(messages)
        rows.append({"messages": asked} | ({"reference": reference} if reference else {}))
        ids.append(conversation_ids(tokenizer, asked, tools))
    return rows, ids
