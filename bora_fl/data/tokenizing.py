"""From text to tokens: classification inputs, plain text, and prompts with responses."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data.encoded import Encoded
from bora_fl.data.loading import column

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 2048  # tokenized at a time: enough for the tokenizer's threads, little memory


def tokenize(raw: "Dataset", data: DataSettings, model: ModelSettings, tokenizer: Any) -> Encoded:
    """Tokenize one split.

    Classification and plain text are cut at `max_length` on the right; plain text begins with the tokenizer's BOS
    token, if it adds one, and ends with EOS where that still fits. Instruction data goes through the tokenizer's chat
    template (user, then assistant), or, without one, is the prompt, a newline, the response and EOS. When it is too
    long the prompt loses its beginning, down to half of `max_length`, and then the response its end, so that every
    example keeps targets.

    Args:
        raw: A split as `load_dataset` returns it.
        data: Names of the columns.
        model: Task and `max_length`.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        ConfigError: If the data cannot serve the model's task.
    """
    classification = model.task == "classification"
    if classification:
        _check_labels(raw, data)
    texts = column(raw, data.text_column)
    responses = column(raw, data.response_column) if data.response_column else None
    tokens, lengths, prompts = [np.empty(0, np.int32)], [], []
    examples: list[tuple[list[int], list[int]]]
    for start in range(0, len(raw), _ROWS):
        batch = texts.slice(start, _ROWS).to_pylist()
        if classification:
            examples = [([], ids) for ids in _ids(tokenizer, batch, truncation=True, max_length=model.max_length)]
        elif responses is None:
            examples = [([], ids) for ids in _plain(tokenizer, batch, model.max_length)]
        else:
            answers = responses.slice(start, _ROWS).to_pylist()
            dialogs = _dialogs(tokenizer, batch, answers)
            examples = [
                _fit(prompt, response, model.max_length, tokenizer.bos_token_id) for prompt, response in dialogs
            ]
        prompts += [len(prompt) for prompt, _ in examples]
        lengths += [len(prompt) + len(rest) for prompt, rest in examples]
        tokens.append(np.fromiter(chain.from_iterable(chain.from_iterable(examples)), np.int32))
    ends = np.cumsum(lengths, dtype=np.int64)
    return Encoded(
        tokens=np.concatenate(tokens),
        begin=ends - np.array(lengths, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        prompts=np.array(prompts, dtype=np.int64),
        classes=column(raw, data.label_column).to_numpy().astype(np.int64) if classification else None,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        max_length=model.max_length,
    )


def prompt_ids(tokenizer: Any, texts: Sequence[str], dialog: bool) -> list[list[int]]:
    """What a language model is given to go on from, as in training.

    Args:
        tokenizer: The model's.
        texts: Prompts, or the beginnings of texts.
        dialog: Whether the model was trained on prompts with responses.
    """
    heads, opening = _heads(tokenizer, texts) if dialog else (list(texts), _opening(tokenizer))
    ids = [opening + piece for piece in _ids(tokenizer, heads, add_special_tokens=False)]
    return [row or _ending(tokenizer) for row in ids]


def _check_labels(raw: "Dataset", data: DataSettings) -> None:
    if data.response_column:
        raise ConfigError(
            f"data.response-column = {data.response_column!r} with model.task = 'classification': responses are for "
            "causal-lm; set model.task to causal-lm or leave data.response-column empty"
        )
    if data.label_column not in raw.column_names:
        raise ConfigError(
            f"data.label-column = {data.label_column!r} with model.task = 'classification': columns are "
            f"{', '.join(raw.column_names)}; name the column of the classes, or set model.task to causal-lm"
        )


def _ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
    )["input_ids"]
    return ids


def _opening(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before a text."""
    ids = _ids(tokenizer, ["a"])[0]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _ending(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _plain(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    opening, ending = _opening(tokenizer), _ending(tokenizer)
    ids = _ids(tokenizer, texts, add_special_tokens=False, truncation=True, max_length=max_length)
    return [(opening + piece + ending)[:max_length] for piece in ids]


def _heads(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each prompt as it stands before a response, and the tokens before it."""
    if getattr(tokenizer, "chat_template", None):
        users = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return tokenizer.apply_chat_template(users, tokenize=False, add_generation_prompt=True), []
    return [f"{prompt}\n" for prompt in prompts], _opening(tokenizer)


def _dialogs(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    # Prompt and response are tokenized apart: in use the prompt is tokenized alone, before there is a response.
    heads, opening = _heads(tokenizer, prompts)
    if getattr(tokenizer, "chat_template", None):
        both = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        wholes = tokenizer.apply_chat_template(both, tokenize=False)
        tails = [_after(head, whole, response) for head, whole, response in zip(heads, wholes, responses, strict=True)]
        ending = []
    else:
        tails, ending = list(responses), _ending(tokenizer)
    head_ids = _ids(tokenizer, heads, add_special_tokens=False)
    tail_ids = _ids(tokenizer, tails, add_special_tokens=False)
    for head, tail in zip(head_ids, tail_ids, strict=True):
        yield opening + head, tail + ending


def _after(head: str, whole: str, response: str) -> str:
    """What the template writes after the generation prompt: the response and whatever closes the turn."""
    if whole.startswith(head):
        return whole[len(head) :]
    # Some templates' generation prompt holds more than the turn's header, and some trim the response.
    _, found, closing = whole.rpartition(response.strip())
    return response.strip() + closing if found else response


def _fit(prompt: list[int], response: list[int], max_length: int, bos: int | None) -> tuple[list[int], list[int]]:
    room = max(max_length - len(response), max_length // 2)
    if len(prompt) > room:
        first = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = first + prompt[len(prompt) - room + len(first) :]
    return prompt, response[: max_length - len(prompt)]
