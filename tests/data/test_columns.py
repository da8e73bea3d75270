"""What a row is, found by the columns and never against what is named."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data import load_dataset
from bora_fl.data.columns import left_out, require_response, resolved

TEXT = pa.string()
CHAT = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
SHARED = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        ({"text": TEXT, "label": TEXT}, {}, ("text", "text", "")),
        ({"sentence": TEXT, "label": TEXT}, {}, ("text", "sentence", "")),
        ({"text": TEXT, "answer": TEXT}, {}, ("text", "text", "")),
        ({"id": TEXT, "body": TEXT}, {}, ("text", "body", "")),
        ({"id": pa.int64(), "lines": TEXT}, {}, ("text", "lines", "")),
        ({"Prompt": TEXT, "Completion": TEXT}, {}, ("prompt", "Prompt", "Completion")),
        ({"question": TEXT, "answer": TEXT}, {}, ("prompt", "question", "answer")),
        ({"q": TEXT, "a": TEXT}, {"text_column": "q", "response_column": "a"}, ("prompt", "q", "a")),
        ({"messages": CHAT, "prompt": TEXT, "response": TEXT}, {}, ("messages", "messages", "")),
        ({"text": TEXT, "messages": CHAT}, {}, ("messages", "messages", "")),
        ({"text": TEXT, "messages": CHAT, "label": TEXT}, {}, ("text", "text", "")),
        ({"conversations": SHARED}, {}, ("messages", "conversations", "")),
        ({"turns": CHAT}, {"text_column": "turns"}, ("messages", "turns", "")),
        ({"messages": CHAT, "text": TEXT}, {"format": "text"}, ("text", "text", "")),
        ({"prompt": TEXT, "response": TEXT, "messages": CHAT}, {"format": "prompt"}, ("prompt", "prompt", "response")),
        ({"messages": CHAT, "t": TEXT}, {"text_column": "t"}, ("text", "t", "")),
        ({"messages": CHAT}, {"text_column": "absent"}, ("text", "absent", "")),
        ({"a": TEXT, "b": TEXT}, {}, ("text", "text", "")),
    ],
)
def test_what_a_row_is(columns: dict[str, Any], given: dict[str, Any], expected: tuple[str, str, str]) -> None:
    found = resolved(DataSettings(**given), columns)
    assert (found.format, found.text_column, found.response_column) == expected
    assert resolved(found, columns) == found


def test_a_format_without_columns_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data.format = 'messages': none of the columns text fits; .*text-column, or"
    ):
        resolved(DataSettings(format="messages"), {"text": TEXT})
    with pytest.raises(ConfigError, match=r"data.format = 'prompt'.*data.response-column"):
        resolved(DataSettings(format="prompt"), {"text": TEXT})


@pytest.mark.parametrize(
    ("columns", "odd", "alone"),
    [
        ({"prompt": TEXT, "completion": pa.int64()}, "completion", "prompt"),
        ({"Question": TEXT, "Answer": pa.bool_(), "id": TEXT}, "Answer", "Question"),
        ({"prompt": pa.int64(), "completion": TEXT}, "prompt", "completion"),
        ({"prompt": TEXT, "completion": pa.null()}, "completion", "prompt"),
        ({"prompt": TEXT, "chosen": pa.float64(), "rejected": pa.float64()}, "chosen", "prompt"),
    ],
)
def test_a_prompt_is_not_trained_alone_because_its_response_is_no_text(
    columns: dict[str, Any], odd: str, alone: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"column '{odd}' holds .*, not text, and '{alone}' would be trained without"
    ):
        resolved(DataSettings(), columns)
    labelled = DataSettings(label_column=odd, text_column=alone)
    assert resolved(labelled, columns).format == "text"


def test_a_language_model_is_not_trained_on_prompts_alone_because_the_rows_have_labels() -> None:
    columns = {"question": TEXT, "answer": TEXT, "label": TEXT}
    for given in ({"format": "text"}, {"text_column": "question"}, {"label_column": ""}, {"label_column": "answer"}):
        settings = DataSettings(**given)
        require_response(settings, resolved(settings, columns), list(columns))
    with pytest.raises(ConfigError, match=r"'question' would be trained without 'answer'; leave"):
        require_response(DataSettings(), resolved(DataSettings(), columns), list(columns))


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        (("instruction", "input", "output"), {}, ("instruction", "output", "input")),
        (("instruction", "context", "response", "category"), {}, ("instruction", "response", "context")),
        (("input", "output"), {}, ("input", "output", "")),
        (("prompt", "completion"), {}, ("prompt", "completion", "")),
        (("instruction", "input", "output"), {"text_column": "instruction", "response_column": "output"},
         ("instruction", "output", "")),
        (("q", "about", "a"), {"text_column": "q", "response_column": "a", "context_column": "about"},
         ("q", "a", "about")),
    ],
)  # fmt: skip
def test_what_a_prompt_is_about(
    columns: tuple[str, ...], given: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    kinds = dict.fromkeys(columns, TEXT)
    found = resolved(DataSettings(**given), kinds)
    assert (found.text_column, found.response_column, found.context_column) == expected
    assert resolved(found, kinds) == found


@pytest.mark.parametrize(
    ("columns", "given", "expected"),
    [
        (("system_prompt", "question", "response"), {}, "system_prompt"),
        (("System", "instruction", "output"), {}, "System"),
        (("system", "instruction", "output"), {"context_column": "system"}, ""),
        (("instruction", "output"), {}, ""),
        (("system", "text"), {}, ""),
    ],
)
def test_a_column_of_system_prompts_is_named(columns: tuple[str, ...], given: dict[str, Any], expected: str) -> None:
    assert left_out(resolved(DataSettings(**given), dict.fromkeys(columns, TEXT)), columns) == expected


def test_loading_says_that_system_prompts_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"system": ["s", "t"], "instruction": ["a", "b"], "output": ["x", "y"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    load_dataset(DataSettings(name=str(tmp_path / "rows.parquet"), test_split=""))
    assert "column 'system' is not trained on" in caplog.text


def test_a_context_goes_with_a_prompt() -> None:
    with pytest.raises(ConfigError, match=r"data.context-column = 'input' with data.format = 'text'"):
        resolved(DataSettings(context_column="input"), {"text": TEXT, "input": TEXT})
