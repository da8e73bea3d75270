"""From text to tokens: texts and words with classes, plain text, prompts with responses, conversations, and pairs."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import labels, messages, preferences
from bora_fl.data.columns import TOOLS
from bora_fl.data.encoded import IGNORE, Encoded
from bora_fl.data.flat import Flat
from bora_fl.data.loading import column, parts, prompts
from bora_fl.data.pairs import Pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


def tokenize(
    raw: "Dataset", data: DataSettings, model: ModelSettings, tokenizer: Any, names: Sequence[str] | None = None
) -> Encoded:
    """Tokenize one split.

    Texts with classes and plain text are cut at `max_length` on the right; plain text begins with the tokenizer's BOS
    token, if it adds one, and ends with EOS where that still fits. Instruction data goes through the tokenizer's chat
    template (user, then assistant), or, without one, is the prompt, a newline, the response and EOS. Messages go
    through the chat template as a whole; the assistant's turns are the targets. When an example is too long, what
    stands before its first target loses its beginning, down to half of `max_length`, and then the example its end, so
    that it keeps targets. The responses of a preference pair follow the same tokens, and are the targets.

    Args:
        raw: A split as `load_dataset` returns it.
        data: What a row is and the names of the columns, as `RawData.settings` has them.
        model: Task and `max_length`.
        tokenizer: A Hugging Face tokenizer.
        names: The class names, as `RawData.label_names` has them.

    Raises:
        ConfigError: If the data cannot serve the model's task, no example has a target, or no pair two responses.
    """
    labels.require(raw, data, model, names)
    pairs = data.format == "preference"
    if data.format == "messages":
        messages.require_template(tokenizer, "data.text-column", data.text_column)
    tokens, targets, tags = Flat[np.int32](np.int32), Flat[np.bool_](bool), Flat[np.int64](np.int64)
    counted, before, cut, empty = Flat[np.int64](np.int64), Flat[np.int64](np.int64), 0, 0
    for rows in parts(raw):
        examples = list(_examples(rows, data, model, tokenizer))
        tokens.extend(chain.from_iterable(example.ids for example in examples))
        targets.extend(chain.from_iterable(example.targets for example in examples))
        tags.extend(chain.from_iterable(example.tags for example in examples))
        counted.extend(len(example.ids) for example in examples)
        before.extend(example.prompt for example in examples)
        cut += sum(example.cut > 0 for example in examples)
        empty += sum(example.is_empty() for example in examples)
    lengths = counted.array()
    if not model.kind.pooled:
        _report(len(lengths), cut, empty, model.max_length)
    ends = np.cumsum(lengths, dtype=np.int64)
    encoded = Encoded(
        tokens=tokens.array(),
        begin=ends - lengths,
        lengths=lengths,
        prompts=before.array(),
        classes=_classes(raw, data.label_column, model, names or ()) if model.kind.pooled else None,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        max_length=model.max_length,
        targets=targets.array() if data.format == "messages" else None,
        tags=tags.array() if data.format == "words" else None,
        cut=cut,
    )
    if not pairs:
        return encoded
    both = Pairs.of(encoded)
    _report_alike(len(both), both.num_alike(), model.max_length)
    return both


class _Example(NamedTuple):
    """Tokens, how many of them stand before the first target, which are targets, how many tokens, or words, were cut
    off, and the class of each token.
    """

    ids: list[int]
    prompt: int = 0
    targets: Sequence[bool] = ()
    cut: int = 0
    tags: Sequence[int] = ()

    def is_empty(self) -> bool:
        """Whether there is nothing to learn; the first token is predicted by nothing."""
        if self.tags:
            return max(self.tags) < 0
        return not any(self.targets[1:]) if self.targets else len(self.ids) <= max(self.prompt, 1)


def _examples(rows: "Dataset", data: DataSettings, model: ModelSettings, tokenizer: Any) -> Iterator[_Example]:
    longest, bos = model.max_length, tokenizer.bos_token_id
    if data.format == "preference":
        for pair in _pairs(rows, data, tokenizer):
            prompt, *responses = pair
            room = max(map(len, responses))
            yield from (_fit(prompt + response, len(prompt), longest, bos, room=room) for response in responses)
        return
    texts = prompts(rows, data)
    if data.format == "words":
        yield from _tagged(texts, column(rows, data.label_column).to_pylist(), longest, tokenizer)
    elif model.kind.pooled:
        yield from (_Example(ids) for ids in token_ids(tokenizer, texts, truncation=True, max_length=longest))
    elif data.format == "messages":
        tools = column(rows, TOOLS).to_pylist() if TOOLS in rows.column_names else [None] * len(texts)
        for row, known in zip(texts, tools, strict=True):
            ids, targets = messages.encode(tokenizer, messages.clean(row), messages.read_tools(known))
            first = targets.index(True) if True in targets else len(ids)
            yield _fit(ids, first, longest, bos, targets)
    elif data.format == "prompt":
        answers = column(rows, data.response_column).to_pylist()
        for prompt, response in _dialogs(tokenizer, texts, answers):
            yield _fit(prompt + response, len(prompt), longest, bos)
    else:
        opening, ending = opening_ids(tokenizer), ending_ids(tokenizer)
        for piece in token_ids(tokenizer, texts, add_special_tokens=False):
            ids = opening + piece + ending
            yield _Example(ids[:longest], 0, (), len(ids) - longest)


def _report(examples: int, cut: int, empty: int, max_length: int) -> None:
    """Say how many examples are cut, and how many are left without a target.

    Raises:
        ConfigError: If all are.
    """
    if empty == examples:
        raise ConfigError(
            f"model.max-length = {max_length}: none of {examples} examples has a token to learn; raise it, or look at "
            "the responses and at the chat template"
        )
    if cut:
        log.info("%d of %d examples are longer than model.max-length = %d and are cut", cut, examples, max_length)
    if empty:
        log.warning("%d of %d examples have no token to learn", empty, examples)


def _report_alike(pairs: int, alike: int, max_length: int) -> None:
    """Say how many pairs are cut before their responses differ.

    Raises:
        ConfigError: If all are.
    """
    if alike == pairs:
        raise ConfigError(
            f"model.max-length = {max_length}: the responses of none of {pairs} pairs differ within it; raise it"
        )
    if alike:
        log.warning("the responses of %d of %d pairs do not differ within model.max-length", alike, pairs)


def _classes(
    raw: "Dataset", name: str, model: ModelSettings, names: Sequence[str]
) -> "NDArray[np.int64] | NDArray[np.float32]":
    """Each row's class, or number, or for each row a number for every class, 1 for those that it has."""
    found = column(raw, name)
    if model.kind.number:
        return labels.numbers(found, names, name)
    if labels.is_list(found.type):
        return np.asarray(pc.list_flatten(found), dtype=np.float32).reshape(len(raw), -1)
    return np.asarray(found, dtype=np.int64)


def _tagged(
    rows: Sequence[list[str]], classes: Sequence[Sequence[int | None]], longest: int, tokenizer: Any
) -> Iterator[_Example]:
    """Words' tokens; the first token of each word has its class."""
    for ids, firsts, of_words in zip(*word_ids(tokenizer, rows, longest), classes, strict=True):
        tags = [IGNORE] * len(ids)
        for word, place in firsts.items():
            found = of_words[word]
            tags[place] = IGNORE if found is None else found
        yield _Example(ids, cut=len(of_words) - len(firsts), tags=tags)


def word_ids(
    tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int
) -> tuple[list[list[int]], list[dict[int, int]]]:
    """Lists of words as tokens, cut at `max_length`.

    Args:
        tokenizer: A fast tokenizer; those that tell words by a space before them have ``add_prefix_space``.
        rows: The words of each text.
        max_length: In tokens.

    Returns:
        For each text its token ids, and word to the place of its first token. Words without tokens, and those that are
        cut off, are not in it.

    Raises:
        ConfigError: If the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.name = {tokenizer.name_or_path!r} with model.task = 'token-classification': its tokenizer "
            f"({type(tokenizer).__name__}) does not say which tokens are of which word; use a model with a fast one"
        )
    found = tokenizer(
        [list(words) for words in rows],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    firsts: list[dict[int, int]] = []
    for row in range(len(rows)):
        places: dict[int, int] = {}
        for place, word in enumerate(found.word_ids(row)):
            if word is not None:
                places.setdefault(word, place)
        firsts.append(places)
    return found["input_ids"], firsts


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """The tokens of each text, by the tokenizer's own options."""
    ids: list[list[int]] = tokenizer(
        texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
    )["input_ids"]
    return ids


def opening_ids(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before a text."""
    ids = token_ids(tokenizer, ["a"])[0]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def ending_ids(tokenizer: Any) -> list[int]:
    """EOS, if there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def prompt_heads(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each prompt as it stands before a response, and the tokens before it."""
    if getattr(tokenizer, "chat_template", None):
        users = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return messages.by_template(tokenizer, users, tokenize=False, add_generation_prompt=True), []
    return [f"{prompt}\n" for prompt in prompts], opening_ids(tokenizer)


def _dialogs(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    # Prompt and response are tokenized apart: in use the prompt is tokenized alone, before there is a response.
    heads, opening = prompt_heads(tokenizer, prompts)
    if getattr(tokenizer, "chat_template", None):
        both = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        wholes = messages.by_template(tokenizer, both, tokenize=False)
        tails = [_after(head, whole, response) for head, whole, response in zip(heads, wholes, responses, strict=True)]
        ending = []
    else:
        tails, ending = list(responses), ending_ids(tokenizer)
    head_ids = token_ids(tokenizer, heads, add_special_tokens=False)
    tail_ids = token_ids(tokenizer, tails, add_special_tokens=False)
    for head, tail in zip(head_ids, tail_ids, strict=True):
        yield opening + head, tail + ending


def _pairs(rows: "Dataset", data: DataSettings, tokenizer: Any) -> Iterator[list[list[int]]]:
    """Tokens of each pair's prompt, of the response that was chosen and of the one that was rejected."""
    table = rows.with_format("arrow")[:].to_pydict()
    pairs = preferences.rows_of(table, data.text_column, data.response_column, data.rejected_column)
    templated = bool(getattr(tokenizer, "chat_template", None))
    texts: list[str] = []
    marks: list[tuple[list[int], list[int]]] = []
    for pair, tools in zip(pairs, table.get(TOOLS, [None] * len(pairs)), strict=True):
        if not isinstance(pair.chosen, str):
            messages.require_template(tokenizer, "data.response-column", data.response_column)
        by_template = templated and not pair.written
        marks.append(([], []) if by_template else (opening_ids(tokenizer), ending_ids(tokenizer)))
        if by_template:
            texts += preferences.written(tokenizer, pair, messages.read_tools(tools))
        else:
            texts += [str(pair.prompt) if pair.written else f"{pair.prompt}\n", str(pair.chosen), str(pair.rejected)]
    ids = token_ids(tokenizer, texts, add_special_tokens=False)
    for number, (opening, ending) in enumerate(marks):
        prompt, chosen, rejected = ids[3 * number : 3 * number + 3]
        yield [opening + prompt, chosen + ending, rejected + ending]


def _after(head: str, whole: str, response: str) -> str:
    """What the template writes after the generation prompt: the response and whatever closes the turn."""
    if whole.startswith(head):
        return whole[len(head) :]
    # Some templates' generation prompt holds more than the turn's header, and some trim the response.
    _, found, closing = whole.rpartition(response.strip())
    return response.strip() + closing if found else response


def _fit(
    ids: list[int], prompt: int, max_length: int, bos: int | None, targets: Sequence[bool] = (), room: int = 0
) -> _Example:
    """Cut an example to `max_length`; `prompt` tokens stand before its first target, and `room` or more follow."""
    room = max(max_length - max(len(ids) - prompt, room), max_length // 2)
    drop = max(prompt - room, 0)
    first = ids[:1] if drop and ids[0] == bos and room > 1 else []
    kept = first + ids[drop + len(first) :]
    marks = list(targets[drop + len(first) :])
    cut = len(ids) - max_length
    return _Example(kept[:max_length], prompt - drop, ([False] * len(first) + marks)[:max_length] if marks else (), cut)
