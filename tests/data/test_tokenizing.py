"""What goes in, what is cut, and which tokens the loss covers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import Encoded, load_dataset
from bora_fl.data.tokenizing import tokenize

CAUSAL = ModelSettings(task="causal-lm", max_length=12)


def settings(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> DataSettings:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return DataSettings(name=str(path), test_split="", **fields)


def tokenized(data: DataSettings, model: ModelSettings, tokenizer: Any) -> Encoded:
    raw = load_dataset(data)
    return tokenize(raw.train, raw.settings, model, tokenizer, raw.label_names)


def shown(encoded: Encoded, tokenizer: Any) -> list[tuple[str, str]]:
    """Of each example all tokens, and those that are targets."""
    batch = encoded.batch(np.arange(len(encoded)))
    inputs, masks, labels = (batch[key].numpy() for key in ("input_ids", "attention_mask", "labels"))
    return [
        (tokenizer.decode(ids[mask == 1]), tokenizer.decode(ids[targets != -100]))
        for ids, mask, targets in zip(inputs, masks, labels, strict=True)
    ]


def test_classification_equals_the_tokenizer_alone(minilm: Any, shop: DataSettings) -> None:
    model = ModelSettings(max_length=16)
    raw = load_dataset(shop).train
    batch = tokenized(shop, model, minilm).batch(np.arange(300))
    alone = minilm(raw["text"][:], truncation=True, max_length=16, padding="max_length", return_tensors="pt")
    assert batch["input_ids"].tolist() == alone["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == alone["attention_mask"].tolist()
    assert batch["labels"].tolist() == raw["label"][:]


def test_plain_text_begins_with_bos_and_ends_with_eos_where_it_fits(words: Any, tmp_path: Path) -> None:
    data = settings(tmp_path, [{"text": "sun moon"}, {"text": "sea " * 20}])
    encoded = tokenized(data, CAUSAL, words)
    sea = " ".join(["sea"] * 11)
    assert shown(encoded, words) == [("<bos> sun moon <eos>", "sun moon <eos>"), (f"<bos> {sea}", sea)]


def test_without_a_chat_template_the_response_follows_a_newline(words: Any, tmp_path: Path) -> None:
    data = settings(tmp_path, [{"q": "sun moon", "a": "sea"}], text_column="q", response_column="a")
    assert shown(tokenized(data, CAUSAL, words), words) == [("<bos> sun moon sea <eos>", "sea <eos>")]


def test_the_chat_template_frames_prompt_and_response(chat: Any, tmp_path: Path) -> None:
    data = settings(tmp_path, [{"q": "sun moon", "a": " sea tree "}], text_column="q", response_column="a")
    whole = "<user> sun moon <end> <assistant> sea tree <end>"
    assert shown(tokenized(data, CAUSAL, chat), chat) == [(whole, "sea tree <end>")]


def test_a_generation_prompt_that_training_lacks_is_left_out_of_the_targets(chat: Any, tmp_path: Path) -> None:
    thinking = type(chat)(tokenizer_object=chat.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    thinking.chat_template = chat.chat_template.replace("<assistant> {% endif", "<assistant> <unk> {% endif")
    data = settings(tmp_path, [{"q": "sun", "a": "sea"}], text_column="q", response_column="a")
    whole = "<user> sun <end> <assistant> <unk> sea <end>"
    assert shown(tokenized(data, CAUSAL, thinking), thinking) == [(whole, "sea <end>")]


@pytest.mark.parametrize(("prompt", "response"), [(3, 3), (30, 3), (3, 30), (30, 30), (8, 8), (30, 1), (1, 1)])
def test_what_is_too_long_loses_the_prompts_beginning_then_the_responses_end(
    prompt: int, response: int, words: Any, tmp_path: Path
) -> None:
    vocabulary = sorted(words.get_vocab().values())[-10:]
    names = words.convert_ids_to_tokens(vocabulary)
    asked, answered = ([names[i % 10] for i in range(n)] for n in (prompt, response))
    row = {"q": " ".join(asked), "a": " ".join(answered)}
    encoded = tokenized(settings(tmp_path, [row], text_column="q", response_column="a"), CAUSAL, words)
    answered.append("<eos>")
    room = max(12 - len(answered), 6)
    kept = asked if len(asked) + 1 <= room else asked[len(asked) + 1 - room :]
    answer = answered[: 12 - 1 - len(kept)]
    assert shown(encoded, words) == [(" ".join(["<bos>", *kept, *answer]), " ".join(answer))]
    assert answer


def test_batches_of_rows_do_not_show(words: Any, shop: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenized(shop, CAUSAL, words)
    monkeypatch.setattr("bora_fl.data.loading._ROWS", 7)
    parts = tokenized(shop, CAUSAL, words)
    assert all(np.array_equal(getattr(whole, k), getattr(parts, k)) for k in ("tokens", "begin", "lengths", "prompts"))


def test_data_that_cannot_serve_the_task_is_refused(words: Any, tmp_path: Path) -> None:
    rows = [{"q": "sun", "a": "sea", "kind": "x"}, {"q": "sun", "a": "sea", "kind": "y"}]
    with pytest.raises(ConfigError, match=r"data.label-column = 'label'.*columns are q, a, kind; name the column"):
        tokenized(settings(tmp_path, rows, text_column="q"), ModelSettings(), words)
    data = settings(tmp_path, rows, text_column="q", response_column="a")
    with pytest.raises(ConfigError, match=r"data.response-column = 'a' with model.task = 'classification'"):
        tokenized(data, ModelSettings(), words)
