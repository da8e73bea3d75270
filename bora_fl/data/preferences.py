"""Preference pairs: one prompt with a response that was chosen and one that was rejected, in the forms that TRL reads.

Prompt and responses are texts or messages. Where there is no prompt, it is what both responses begin with.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bora_fl.data.messages import answers, by_template, clean, from_json, shared_length

Words = str | list[dict[str, Any]]


class Pair(NamedTuple):
    """A prompt, the response that was chosen, the one that was rejected: texts, or all three messages.

    Attributes:
        written: Whether prompt and responses, as texts, are written as they are: the prompt is their own beginning.
    """

    prompt: Words
    chosen: Words
    rejected: Words
    written: bool = False

    def is_whole(self) -> bool:
        """Whether there are two different responses, which messages give to a prompt."""
        both = (self.chosen, self.rejected)
        if not isinstance(self.chosen, str) and not self.prompt:
            return False
        return self.chosen != self.rejected and all(
            bool(part.strip()) if isinstance(part, str) else answers(part) for part in both
        )


def read_pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    """A row's pair.

    Args:
        prompt: A text, messages, or None where the responses begin with it. JSON text of messages is messages.
        chosen: A text or messages.
        rejected: Likewise; messages if `chosen` is.
    """
    prompt, chosen, rejected = map(_opened, (prompt, chosen, rejected))
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen is None or rejected is None:
        chosen, rejected = (str(part or "") for part in (chosen, rejected))
        if isinstance(prompt, list | tuple):
            return Pair(clean(prompt), _answer(chosen), _answer(rejected))
        if prompt:
            return Pair(str(prompt), chosen, rejected)
        # The longest beginning that ends between two words.
        cut = chosen[: shared_length(chosen, rejected)].rfind(" ") + 1
        return Pair(chosen[:cut], chosen[cut:], rejected[cut:], written=True)
    chosen, rejected = clean(chosen), clean(rejected)
    if not (prompt and all(part and part[0].get("role") == "assistant" for part in (chosen, rejected))):
        # Where one goes on after the other has ended, both responses begin with the other's last message, as in TRL.
        shorter = max(min(len(chosen), len(rejected)) - 1, 0)
        alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), shorter)
        return Pair(chosen[:alike], chosen[alike:], rejected[alike:])
    return Pair([{"role": "user", "content": prompt}] if isinstance(prompt, str) else clean(prompt), chosen, rejected)


def rows_of(columns: Mapping[str, Sequence[Any]], prompt: str, chosen: str, rejected: str) -> list[Pair]:
    """The pairs of a table.

    Args:
        columns: Values by column.
        prompt: Column of the prompts; empty if there is none.
        chosen: Column of the chosen responses.
        rejected: Column of the rejected ones.
    """
    prompts = columns[prompt] if prompt else [None] * len(columns[chosen])
    return [read_pair(*row) for row in zip(prompts, columns[chosen], columns[rejected], strict=True)]


def written(tokenizer: Any, pair: Pair, tools: list[Any] | None) -> tuple[str, str, str]:
    """What the model reads before a response, and each response with what closes it, by the chat template.

    Where the template writes the end of a prompt in another way once a response follows, the responses begin there, as
    in TRL.
    """

    def messages(words: Words, role: str) -> list[dict[str, Any]]:
        return [{"role": role, "content": words}] if isinstance(words, str) else words

    asked = messages(pair.prompt, "user")
    head: str = by_template(tokenizer, asked, tools=tools, tokenize=False, add_generation_prompt=True)
    wholes: list[str] = [
        by_template(tokenizer, asked + messages(words, "assistant"), tools=tools, tokenize=False)
        for words in (pair.chosen, pair.rejected)
    ]
    same = min(shared_length(head, whole) for whole in wholes)
    return head[:same], wholes[0][same:], wholes[1][same:]


def _opened(words: Any) -> Any:
    return (from_json(words) or words) if isinstance(words, str) else words


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]
