"""A tokenizer as a GGUF file carries it: tokens, their kinds, and how text is cut and merged.

llama.cpp knows two kinds of byte pair encoding. Of the byte-level one (GPT-2's) it wants the merges in their order and
the name of the rule that cuts text into words; of SentencePiece's a score for each token, higher for an earlier merge.
"""

import json
from dataclasses import dataclass
from typing import Any

from bora_fl.config import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as `gguf.TokenType` numbers them."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS, _BYTES = "Digits", "ByteLevel"
CUTS: dict[tuple[str, ...], str] = {
    (_BYTES,): "gpt-2",
    (_DIGITS, _BYTES): "smollm",
    (_WORDS.format(digits=r"\p{N}{1,3}"),): "llama-bpe",
    (_WORDS.format(digits=r"\p{N}"),): "qwen2",
}
"""How text is cut into words, step by step, and llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level merges, ``llama`` for SentencePiece's.
        cut: llama.cpp's name for how text is cut into words.
        tokens: By id, one for each row of the embedding.
        kinds: Of the tokens.
        merges: Pairs in their order; empty for ``llama``.
        scores: Of the tokens; empty for ``gpt2``.
        prefix_space: Whether a space is put before the text.
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    prefix_space: bool


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Read a fast tokenizer.

    Args:
        tokenizer: Of transformers.
        rows: Of the model's embedding; tokens without a name are marked as unused.

    Raises:
        ConfigError: If llama.cpp has no such tokenizer, or it has more tokens than the embedding has rows.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "backend_tokenizer", None) else {}
    core, names = said.get("model", {}), {index: token for token, index in tokenizer.get_vocab().items()}
    if core.get("type") != "BPE":
        raise _unknown(core.get("type", type(tokenizer).__name__))
    if names and max(names) >= rows:
        raise ConfigError(f"--as gguf: the tokenizer has {max(names) + 1} tokens and the embedding {rows} rows")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["merges"]]
    pieces = bool(core.get("byte_fallback"))
    kinds = [_kind(token, index, names, tokenizer, pieces) for index, token in enumerate(tokens)]
    if not pieces:
        return Vocabulary("gpt2", _cut(said), tokens, kinds, merges, [], False)
    _require_plain_pieces(said)
    scores = {token: -len(merges) - 1.0 for token in tokens}
    for rank, pair in reversed(list(enumerate(merges))):
        scores[pair.replace(" ", "")] = float(-rank)
    prefixed = tokenizer.tokenize("a")[0].startswith("▁")
    return Vocabulary("llama", "default", tokens, kinds, [], [scores[token] for token in tokens], prefixed)


def _kind(token: str, index: int, names: dict[int, str], tokenizer: Any, pieces: bool) -> int:
    if index not in names:
        return UNUSED
    if pieces and token == tokenizer.unk_token:
        return UNKNOWN
    if added := tokenizer.added_tokens_decoder.get(index):
        return CONTROL if added.special else USER_DEFINED
    return BYTE if pieces and token.startswith("<0x") and token.endswith(">") and len(token) == 6 else NORMAL


def _require_plain_pieces(said: dict[str, Any]) -> None:
    """Refuse what llama.cpp does not do to text before it merges pieces: it only writes spaces as `▁`."""
    normal, first = said.get("normalizer") or {}, said.get("pre_tokenizer") or {}
    for step in normal.get("normalizers", [normal] if normal else []):
        spaces = step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁")
        if not spaces and (step["type"], step.get("prepend")) != ("Prepend", "▁"):
            raise _unknown(f"a BPE of pieces with the normalizer {step['type']}")
    for step in first.get("pretokenizers", [first] if first else []):
        if step["type"] != "Metaspace" or step.get("split") is not False:
            raise _unknown(f"a BPE of pieces with the pre-tokenizer {step['type']}")


def _cut(said: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level tokenizer's cutting."""
    first = said.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    found = tuple(filter(None, map(_step, steps)))
    normal = (said.get("normalizer") or {"type": "NFC"})["type"]
    if found not in CUTS or normal != "NFC":  # llama.cpp leaves NFC out
        raise _unknown(f"a byte-level BPE with the pre-tokenizer {' + '.join(map(str, found)) or first.get('type')}")
    return CUTS[found]


def _step(step: dict[str, Any]) -> str:
    """One step of cutting; empty for one that only spells bytes."""
    kind = step.get("type", "")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", kind))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _BYTES if step.get("use_regex", True) else ""
    if kind == "Digits" and not step.get("individual_digits"):
        return "Digits in groups"
    return _DIGITS if kind == "Digits" else f"{kind} with a space before" if kind == "ByteLevel" else kind


def _unknown(kind: str) -> ConfigError:
    return ConfigError(
        f"--as gguf: the tokenizer is {kind}, which is not converted here; export with --as merged, and run "
        "llama.cpp's convert_hf_to_gguf.py on that folder"
    )
