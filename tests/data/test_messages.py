"""Which tokens of a conversation are the assistant's, by templates of several kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import load_dataset
from bora_fl.data.messages import encode, read_tools
from bora_fl.data.prompts import held_out_prompts
from bora_fl.data.tokenizing import tokenize
from tests.data.conftest import CHAT

DIALOG = [
    {"role": "system", "content": "stone"},
    {"role": "user", "content": "sun moon"},
    {"role": "assistant", "content": "moon"},
    {"role": "user", "content": "moon"},
    {"role": "assistant", "content": " sea tree "},
]
WHOLE = "<system> stone <end> <user> sun moon <end> <assistant> moon <end> <user> moon <end> <assistant> sea tree <end>"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }} <end>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# The last turn alone keeps what is before a bar, as templates of reasoning models do.
FORGETS = CHAT.replace(
    "{{ m['content'] | trim }}",
    "{{ (m['content'] if loop.last else m['content'].split('|')[-1]) | replace('|', 'fire') | trim }}",
)
OPENS = CHAT.replace("<assistant> {% endif", "<assistant> <unk> {% endif")
CALLS = (
    "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% for m in messages %}<{{ m['role'] }}> "
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] }} {% endfor %}{{ m['content'] or '' }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def written(words: Any, template: str) -> Any:
    tokenizer = type(words)(tokenizer_object=words.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[str, str]:
    ids, targets = encode(tokenizer, messages, tools)
    return tokenizer.decode(ids), tokenizer.decode([i for i, target in zip(ids, targets, strict=True) if target])


@pytest.mark.parametrize("template", [CHAT, MARKED, OPENS])
def test_every_assistants_turn_is_learned_and_nothing_else(template: str, words: Any) -> None:
    whole = WHOLE.replace("<system>", "<unk>")
    assert learned(written(words, template), DIALOG) == (whole, "moon <end> sea tree <end>")


def test_a_turn_that_is_written_differently_later_is_found(words: Any) -> None:
    dialog = [dict(turn) for turn in DIALOG]
    dialog[2]["content"] = "sun | moon"
    assert learned(written(words, FORGETS), dialog)[1] == "moon <end> sea tree <end>"


def test_tools_are_written_and_calls_are_learned(words: Any) -> None:
    dialog = [
        {"role": "user", "content": "wind"},
        {"role": "assistant", "tool_calls": [{"function": "rain"}]},
        {"role": "user", "content": "snow"},
        {"role": "assistant", "content": "fire"},
    ]
    whole, targets = learned(written(words, CALLS), dialog, [{"name": "star"}])
    assert whole.startswith("star <user> wind <end> <assistant> rain <end>")
    assert targets == "rain <end> fire <end>"


def rows(folder: Path, dialogs: list[Any], **more: Any) -> DataSettings:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": dialog, **more}) for dialog in dialogs))
    return DataSettings(name=str(path), test_split="")


def labels(data: DataSettings, tokenizer: Any, max_length: int) -> list[tuple[str, str]]:
    raw = load_dataset(data)
    encoded = tokenize(raw.train, raw.settings, ModelSettings(task="causal-lm", max_length=max_length), tokenizer)
    batch = encoded.batch(np.arange(len(encoded)))
    return [
        (tokenizer.decode(ids[mask == 1]), tokenizer.decode(targets[targets != -100]))
        for ids, mask, targets in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def test_a_file_of_messages_is_read_with_what_other_tools_call_them(words: Any, tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "sun"}, {"from": "gpt", "value": "sea"}, {"from": "human", "value": "snow"}]
    tools = json.dumps([{"name": "star"}])
    found = labels(rows(tmp_path, [shared], tools=tools), written(words, CALLS), 20)
    assert found == [("star <user> sun <end> <assistant> sea <end> <user> snow <end>", "sea <end>")]


def test_a_row_without_an_answer_is_left_out(words: Any, tmp_path: Path) -> None:
    data = rows(tmp_path, [DIALOG, DIALOG[:2], [], [*DIALOG[:2], {"role": "assistant", "content": ""}]])
    assert len(labels(data, written(words, CHAT), 40)) == 1


def test_a_long_conversation_keeps_targets_and_its_cut_is_counted(
    words: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"role": "user", "content": "sun " * 30}, {"role": "assistant", "content": "sea tree"}, *DIALOG[1:]]
    with caplog.at_level("INFO"):
        found = labels(rows(tmp_path, [long, DIALOG]), written(words, CHAT), 22)
    assert found[0][1] == "sea tree <end> moon <end>"
    assert found[1] == (WHOLE.replace("<system>", "<unk>"), "moon <end> sea tree <end>")
    assert caplog.messages == ["1 of 2 examples are longer than model.max-length = 22 and are cut"]


def test_messages_need_a_chat_template(words: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.text-column = 'messages'.*has no chat template.*format = prompt"):
        labels(rows(tmp_path, [DIALOG]), words, 20)


def test_examples_without_a_target_are_counted_and_all_of_them_refused(
    words: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = written(words, CHAT.replace("m['content']", "m['content'] if m['content'] != 'snow' else ''"))
    silent.chat_template = silent.chat_template.replace("<end>", "")
    nothing = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "snow"}]
    labels(rows(tmp_path, [nothing, DIALOG]), silent, 20)
    assert caplog.messages == ["1 of 2 examples have no token to learn"]
    with pytest.raises(ConfigError, match=r"model.max-length = 20: none of 2 examples has a token to learn"):
        labels(rows(tmp_path, [nothing, nothing]), silent, 20)


def test_a_conversation_with_a_message_of_nobody_is_left_out(tmp_path: Path) -> None:
    whole = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "sea"}]
    rows = [{"messages": whole}, {"messages": [{"role": None, "content": "sun"}, whole[1]]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = load_dataset(DataSettings(name=str(tmp_path / "d.jsonl"), test_split="", label_column=""))
    assert raw.train["messages"][:] == [whole]


def test_tools_that_are_no_json_are_named() -> None:
    assert read_tools(" ") is None
    with pytest.raises(ConfigError, match="column tools: 'star' is no JSON"):
        read_tools("star")


def test_an_answer_in_a_column_of_its_own_is_refused(tmp_path: Path) -> None:
    """Learning the prompt's own turns in its stead would go unseen."""
    pq.write_table(pa.table({"prompt": [DIALOG], "completion": [DIALOG[-1:]]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"data.text-column = 'prompt' .*'completion' holds the messages that answer"):
        load_dataset(DataSettings(name=str(tmp_path / "d.parquet"), test_split="", label_column=""))


def test_messages_as_json_text_are_the_messages(words: Any, tmp_path: Path) -> None:
    chat = written(words, CHAT)
    wanted = labels(rows(tmp_path, [DIALOG] * 4), chat, 32)
    text = json.dumps(DIALOG)
    assert labels(rows(tmp_path, [text, None, " ", text, text, text]), chat, 32) == wanted
    shared = json.dumps([{"from": "human", "value": "sun"}, {"from": "gpt", "value": "moon"}])
    (tmp_path / "shared.csv").write_text("conversations\n" + ('"' + shared.replace('"', '""') + '"\n') * 4)
    found = labels(DataSettings(name=str(tmp_path / "shared.csv"), test_split=""), chat, 32)
    assert found == [("<user> sun <end> <assistant> moon <end>", "moon <end>")] * 4


@pytest.mark.parametrize(
    "text", [str(DIALOG), json.dumps({"messages": DIALOG}), '[{"role": "user", "content": "a \\ud800"}]', "[1]", "[{"]
)
def test_a_text_in_the_place_of_messages_that_is_no_json_of_them_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"column 'messages' has .* no JSON list of messages with role and content"):
        load_dataset(rows(tmp_path, [text] * 4))
    with pytest.raises(ConfigError, match=r"messages .*: no JSON list of messages with role and content; mend the row"):
        load_dataset(rows(tmp_path, [json.dumps(DIALOG), text]))


def test_a_content_of_text_parts_is_their_text(words: Any, tmp_path: Path) -> None:
    chat = written(words, CHAT)
    parts = [
        {
            **message,
            "content": [{"type": "text", "text": part} for part in (message["content"][:3], message["content"][3:])],
        }
        for message in DIALOG
    ]
    assert labels(rows(tmp_path, [parts] * 4), chat, 32) == labels(rows(tmp_path, [DIALOG] * 4), chat, 32)
    parts[1]["content"].append({"type": "image", "image": "sun.png"})
    with pytest.raises(ConfigError, match="a content holds a part of type 'image'; models are trained on texts alone"):
        load_dataset(rows(tmp_path, [parts] * 4))


def test_only_what_was_asked_for_is_generated(words: Any, tmp_path: Path) -> None:
    began = [{"role": "assistant", "content": "sun"}, {"role": "user", "content": "moon"}]
    raw = load_dataset(rows(tmp_path, [began, DIALOG, began]))
    (prompt,) = held_out_prompts(raw.train, raw.settings, written(words, CHAT), 3)
    assert prompt.asked == DIALOG[:-1]
    raw = load_dataset(rows(tmp_path, [began] * 4))
    with pytest.raises(ConfigError, match="in none of 3 held-out conversations is an answer asked for"):
        held_out_prompts(raw.train, raw.settings, written(words, CHAT), 3)


def test_a_prompt_goes_on_with_what_it_is_about(words: Any, tmp_path: Path) -> None:
    found = [{"instruction": "sun", "input": about, "output": "moon"} for about in ("sea tree", "", None, " ")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))
    data, chat = DataSettings(name=str(tmp_path / "rows.jsonl"), test_split=""), written(words, CHAT)
    with_it, without = ("<user> sun sea tree <end> <assistant> moon <end>", "<user> sun <end> <assistant> moon <end>")
    assert [whole for whole, _ in labels(data, chat, 32)] == [with_it, without, without, without]
    raw = load_dataset(data)
    assert [prompt.asked for prompt in held_out_prompts(raw.train, raw.settings, chat, 4)] == ["sun\n\nsea tree"] + [
        "sun"
    ] * 3
    missing = data.model_copy(
        update={"text_column": "instruction", "response_column": "output", "context_column": "about"}
    )
    with pytest.raises(ConfigError, match=r"data.context-column = 'about': columns are"):
        load_dataset(missing)


def test_an_answer_of_blanks_is_none(tmp_path: Path) -> None:
    blank = [DIALOG[1], {"role": "assistant", "content": " \n"}]
    assert len(load_dataset(rows(tmp_path, [DIALOG, blank, DIALOG])).train) == 2


def test_what_a_template_refuses_is_said_in_its_words(words: Any, tmp_path: Path) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
    data = rows(tmp_path, [DIALOG] * 4)
    assert labels(data, written(words, CHAT), 32)
    with pytest.raises(ConfigError, match=r"its chat template refuses a conversation \(no system role\)"):
        labels(data, written(words, no_system), 32)
