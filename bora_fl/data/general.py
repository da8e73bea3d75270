"""A general text, by whose loss before and after training it is seen what a language model forgets."""

from pathlib import Path
from typing import Any

import numpy as np

from bora_fl.config import ConfigError, ModelSettings
from bora_fl.data.encoded import Encoded
from bora_fl.data.tokenizing import opening_ids, token_ids

EMBEDDED = "embedded:python-docs"
_PIECES = 64  # of model.max-length tokens, at most
_CHARACTERS = 4 << 20  # of a file, at most


def general_text(name: str, model: ModelSettings, tokenizer: Any) -> Encoded:
    """The text as examples of `max_length` tokens, evenly spread over it, the same ones for every seed.

    Args:
        name: A text file, or ``embedded:python-docs``: Python's language reference, English prose that comes with it.
        model: `max_length`.
        tokenizer: The model's.

    Raises:
        ConfigError: If there is no such file, or it holds next to no text.
    """
    text = _read(name)
    opening = opening_ids(tokenizer)
    ids = token_ids(tokenizer, [text], add_special_tokens=False)[0]
    length = model.max_length - len(opening)
    if len(ids) < 2 or length < 2:
        raise ConfigError(f"data.general-text = {name!r}: holds {len(ids)} tokens; name a text of some pages")
    starts = np.arange(0, max(len(ids) - 1, 1), length)
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, min(len(starts), _PIECES)).round().astype(int))]
    pieces = [opening + ids[start : start + length] for start in chosen]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return Encoded(
        tokens=np.concatenate([np.array(piece, np.int32) for piece in pieces]),
        begin=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompts=np.zeros(len(pieces), np.int64),
        classes=None,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        max_length=model.max_length,
    )


def _read(name: str) -> str:
    if name == EMBEDDED:
        from pydoc_data.topics import topics

        return "\n".join(topics[topic] for topic in sorted(topics))
    if name.startswith("embedded:"):
        raise ConfigError(f"data.general-text = {name!r}: there is no such text; use {EMBEDDED}, or name a text file")
    try:
        with Path(name).expanduser().open(encoding="utf8") as file:
            return file.read(_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.general-text = {name!r}: cannot be read ({error}); name a text file in UTF-8, or {EMBEDDED}"
        ) from error
