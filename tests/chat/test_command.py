"""From a file of messages to a model that talks."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import bora_fl
from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.data.prompts import conversation_ids
from bora_fl.models.generating import complete
from bora_fl.report import read_rows, rounds_table
from bora_fl.simulations.engine import simulate

QUESTIONS = ["was it good", "is the book nice", "it is a sad film"]


def call(*arguments: str, given: str = "") -> list:
    result = CliRunner().invoke(cli, list(arguments), input=given)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def run(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    dialogs = [
        [
            {"role": "user", "content": QUESTIONS[i % 3]},
            {"role": "assistant", "content": ["it was", "very happy", "bad wrong"][i % 3]},
            *([{"role": "user", "content": "and it"}] if i % 2 else []),
        ]
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": dialog}) for dialog in dialogs))
    config = {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "model.max-length": 24,
        "run.threads": 1,
        "data.name": str(folder / "chats.jsonl"),
        "data.partition": "iid",
        "data.packing": True,
        "adapter.target-modules": "q_proj,v_proj",
        "adapter.num-blocks": 4,
        "train.learning-rate": 0.02,
        "run.num-rounds": 2,
        "run.generate-every": 2,
        "run.generate-tokens": 3,
        "train.precision": "fp32",
        "train.local-steps": 5,
        "train.batch-size": 4,
        "run.output-dir": str(folder / "run"),
    }
    return simulate(config, 2)


def test_the_report_has_perplexity_and_what_was_written(run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert [row["evaluated"] for row in rows] == ["central"] * 3
    assert all(row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"]) for row in rows)
    assert rows[2]["perplexity"] < rows[0]["perplexity"]
    assert [bool(row["generation"]) for row in rows] == [True, False, True]
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(rounds_table(rows, "rounds"))
    assert "ppl." in narrow.file.getvalue()
    assert "…" not in narrow.file.getvalue()
    samples = read_rows(run / "samples.jsonl")
    assert [sample["round"] for sample in samples] == [0, 2]
    for row, sample in zip((rows[0], rows[2]), samples, strict=True):
        mean = sum(one["rouge_l"] for one in sample["samples"]) / 4
        assert row["generation"] == {"exact_match": sample["exact_match"], "rouge_l": mean, "examples": 4}
    first = samples[0]["samples"][0]
    assert [message["role"] for message in first["prompt"]] == ["user"]
    assert first["reference"] in ("it was", "very happy", "bad wrong")


def test_a_conversation_remembers_and_an_empty_line_forgets(run: Path) -> None:
    said = call("chat", str(run), "--system", "nice", "--max-new-tokens", "4", given="was it good\nand it\n\nand it\n")
    model, tokenizer = bora_fl.load(run)
    turns = [{"role": "system", "content": "nice"}, {"role": "user", "content": "was it good"}]
    expected = []
    for question in ("was it good", "and it"):
        turns[len(turns) - (not expected) :] = [{"role": "user", "content": question}]
        expected += complete(model, tokenizer, [conversation_ids(tokenizer, turns)], max_new_tokens=4)
        turns.append({"role": "assistant", "content": expected[-1]})
    alone = conversation_ids(tokenizer, [turns[0], {"role": "user", "content": "and it"}])
    assert said == [*expected, next(complete(model, tokenizer, [alone], max_new_tokens=4))]


def test_predict_answers_texts_and_conversations_alike(run: Path, tmp_path: Path) -> None:
    asked = {"role": "user", "content": QUESTIONS[0]}
    dialogs = [[asked], [asked, {"role": "assistant", "content": "it was"}]]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"messages": dialog}) for dialog in dialogs))
    rows = call("predict", str(run), str(tmp_path / "new.jsonl"), "--max-new-tokens", "4")
    (alone,) = call("predict", str(run), "-", "--max-new-tokens", "4", given=QUESTIONS[0])
    assert rows[0] == {"messages": [asked], "response": alone["response"]}
    assert rows[1] == rows[0] | {"reference": "it was"}


def test_what_cannot_talk_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finished run"):
        call("chat", str(tmp_path))
    about = run / "adapter" / "bora_fl.json"
    told = about.read_text()
    about.write_text(
        told.replace("causal-lm", "classification").replace('"data.packing": true', '"data.packing": false')
    )
    try:
        with pytest.raises(ConfigError, match=r"a classifier.*bora-fl predict"):
            call("chat", str(run))
    finally:
        about.write_text(told)
