"""Conversations as a language model is trained on them: by its chat template, with the assistant's turns as targets."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bora_fl.config import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ue000turn\ue000"  # of Unicode's private use area: in nobody's text
_SHARE_GPT = {"human": "user", "gpt": "assistant", "bing": "assistant", "function_call": "assistant"}


_FIELDS = ({"role"}, {"from", "value"})
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def is_message(fields: Collection[str]) -> bool:
    """Whether an object with such fields is a message: ``role, content``, or ``from, value``."""
    return any(wanted <= set(fields) for wanted in _FIELDS)


def from_json(text: str) -> list[dict[str, Any]] | None:
    """Messages that are written as a JSON list of them; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # half a character, which no tokenizer takes
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(part, dict) and is_message(part) for part in found) else None


def clean(messages: str | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, without the empty fields that a table gives to rows that lack them.

    Args:
        messages: A list of them, or its JSON text. A content of several parts is the text of all of them.

    Raises:
        ConfigError: If a text is no such list, or a part of a content is no text.
    """
    if isinstance(messages, str):
        given = from_json(messages) if messages.strip() else []
        if given is None:
            raise ConfigError(
                f"messages {messages[:40]!r}: no JSON list of messages with role and content; mend the row, or set "
                "data.format to text to train on texts as they are"
            )
        messages = given
    found = []
    for message in messages or ():
        kept = _without_nulls(message)
        if isinstance(kept.get("content"), list):
            kept["content"] = "".join(map(_text_of, kept["content"]))
        if "role" not in kept and "from" in kept:
            who = str(kept.pop("from"))
            kept = {"role": _SHARE_GPT.get(who, who), "content": kept.pop("value", ""), **kept}
        found.append(kept)
    return found


def answers(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is an assistant's turn to learn, and every message has a role."""
    learned = any(m.get("role") == "assistant" and (_says(m) or m.get("tool_calls")) for m in messages)
    return learned and all("role" in m for m in messages)


def _says(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def _text_of(part: Any) -> str:
    """A part of a content that is a list of them."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ConfigError(
            f"messages: a content holds a part of type {kind!r}; models are trained on texts alone here: leave such "
            "rows out, or write their content as text"
        )
    return str(part["text"])


def read_tools(value: Any) -> list[Any] | None:
    """The functions that a conversation may call: a list of JSON schemas, or its JSON text; None if there are none.

    Raises:
        ConfigError: If a text is no JSON.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"column tools: {value[:40]!r} is no JSON ({error}); write a list of JSON schemas") from None
    return _without_nulls(tools) if tools and (not isinstance(tools, str) or tools.strip()) else None


def require_template(tokenizer: Any, key: str, column: str) -> None:
    """Refuse messages where nothing says how the model writes them.

    Args:
        tokenizer: The model's.
        key: The setting that names the column.
        column: The column of the messages.

    Raises:
        ConfigError: If the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"model.name = {tokenizer.name_or_path!r} with {key} = {column!r}: the column holds messages, "
            "and the tokenizer has no chat template to write them by; use a model with one (usually called instruct or "
            "chat), or columns of prompts and responses (data.format = prompt)"
        )


def by_template(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """What the chat template makes of a conversation, or of several.

    Args:
        tokenizer: With a chat template.
        messages: A list of messages, or a list of such lists.
        **options: Of ``apply_chat_template``.

    Raises:
        ConfigError: If the template refuses a conversation.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:
        raise ConfigError(
            f"model.name = {tokenizer.name_or_path!r}: its chat template refuses a conversation ({error}); write the "
            "messages as it takes them, such as without a system prompt, or with turns that alternate"
        ) from error


def encode(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and which of them are the assistant's.

    A template that marks what the assistant generates (``{% generation %}``) decides; for others, a turn is what the
    template writes between the conversation so far with its generation prompt and the conversation with the turn.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: From `clean`.
        tools: From `read_tools`.

    Returns:
        Token ids, and for each whether it is a target.
    """
    if _GENERATION.search(str(tokenizer.chat_template)):
        found = by_template(
            tokenizer, messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["input_ids"], [bool(part) for part in found["assistant_masks"]]
    whole, turns = _turns(tokenizer, messages, tools)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token at a turn's edge belongs to it, as in transformers' own masks.
    learned = [any(start < to and end > since for since, to in turns) for start, end in found["offset_mapping"]]
    return found["input_ids"], learned


def _turns(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and where in it the assistant's turns are, header excluded and closing included."""

    def text(part: list[dict[str, Any]], prompt: bool = False) -> str:
        written: str = by_template(tokenizer, part, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return written

    whole, turns = text(messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = text(messages[: number + 1])
        if whole.startswith(after):
            head = text(messages[:number], prompt=True) if number else ""
            turns.append((shared_length(head, after), len(after)))
            continue
        # The template writes a turn in another way once others follow it, such as without its reasoning: what stands
        # where a mark would stand is what it wrote.
        marked = text([*messages[:number], {**message, "content": _MARK}, *messages[number + 1 :]])
        before, _, rest = marked.partition(_MARK)
        if rest and whole.startswith(before) and whole.endswith(rest):
            turns.append((len(before), len(whole) - len(rest) + len(_closing(tokenizer, rest))))
    return whole, turns


def shared_length(head: str, whole: str) -> int:
    """Characters that two texts begin with alike: generation prompts may hold more than the turn's header."""
    return next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))


def _closing(tokenizer: Any, rest: str) -> str:
    """The special token that ends a turn, if the rest of the text begins with one."""
    marks = [token for token in tokenizer.all_special_tokens if rest.lstrip().startswith(token)]
    marks += [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and rest.lstrip().startswith(str(t))]
    longest = max(marks, key=len, default="")
    return rest[: len(rest) - len(rest.lstrip()) + len(longest)] if longest else ""


def turn_end(tokenizer: Any) -> int | None:
    """The special token that ends an assistant's turn by the chat template; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = [{"role": role, "content": _MARK} for role in ("user", "assistant")]
    try:
        written: str = by_template(tokenizer, asked, tokenize=False)
    except ConfigError:  # of a template for other conversations
        return None
    closing = _closing(tokenizer, written.rpartition(_MARK)[2]).strip()
    return int(tokenizer.convert_tokens_to_ids(closing)) if closing else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    return value
