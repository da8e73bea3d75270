"""From a file of messages to a model that talks."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import bora_fl
from bora_fl.cli import cli
from bora_fl.config import ConfigError, ModelSettings, parse
from bora_fl.data.general import EMBEDDED, general_text
from bora_fl.data.prompts import conversation_ids
from bora_fl.evaluate import has_form
from bora_fl.exporting import export_merged
from bora_fl.models.generating import complete
from bora_fl.page.run_page import run_page
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
    (folder / "general.txt").write_text("the film was a very sad book and it is nice\n" * 40)
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
        "run.generate-format": "it( \\w+)*",
        "data.general-text": str(folder / "general.txt"),
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
        valid = sum(one["response"].split()[:1] == ["it"] for one in sample["samples"]) / 4
        means = {"exact_match": sample["exact_match"], "rouge_l": mean, "valid": valid, "examples": 4}
        assert row["generation"] == means
    first = samples[0]["samples"][0]
    assert [message["role"] for message in first["prompt"]] == ["user"]
    assert first["reference"] in ("it was", "very happy", "bad wrong")


def test_what_is_forgotten_is_the_loss_on_a_general_text(run: Path) -> None:
    """Of the finished model, over whole pieces of the text, by transformers' own loss."""
    rows = read_rows(run / "metrics.jsonl")
    model, tokenizer = bora_fl.load(run)
    ids = tokenizer((run.parent / "general.txt").read_text(), return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        losses = [
            (model(input_ids=p[None], labels=p[None]).loss.item(), len(p) - 1) for p in ids.split(24) if len(p) > 1
        ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert rows[-1]["general_loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["general_loss"] != rows[-1]["general_loss"]
    page = run_page(run)
    assert "loss, general text, first and last" in page
    assert "Samples" in page
    assert "user: was it good" in page


@pytest.mark.parametrize("name", ["no/such/file.txt", "embedded:nothing", "{folder}/empty.txt", "{folder}/bytes.txt"])
def test_a_general_text_that_is_none_is_refused(name: str, tiny_causal: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    with pytest.raises(ConfigError, match=r"data\.general-text"):
        general_text(name.format(folder=tmp_path), ModelSettings(task="causal-lm"), tokenizer)


def test_the_embedded_text_is_many_pieces(tiny_causal: Path) -> None:
    found = general_text(EMBEDDED, ModelSettings(task="causal-lm"), AutoTokenizer.from_pretrained(tiny_causal))
    assert len(found) == 64
    assert set(found.lengths[:-1].tolist()) == {48}


@pytest.mark.parametrize(
    ("response", "form", "expected"),
    [('{"a": 1}', "json", 1), ("{'a': 1}", "json", 0), ("yes", "yes|no", 1), ("yes, of course", "yes|no", 0)],
)
def test_a_response_has_a_form_or_not(response: str, form: str, expected: float) -> None:
    assert has_form(response, form) == expected


@pytest.mark.parametrize(
    "change", [{"data.general-text": "x.txt", "model.task": "classification"}, {"run.generate-format": "("}]
)
def test_settings_that_cannot_be_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        parse(change)


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


def test_what_no_longer_fits_is_forgotten_oldest_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [QUESTIONS[i % 3] for i in range(6)]
    told = call("chat", str(run), "--system", "nice", "--max-new-tokens", "4", given="\n".join(questions))
    monkeypatch.setattr("bora_fl.models.generating.context_length", lambda _: 24)
    said = call("chat", str(run), "--system", "nice", "--max-new-tokens", "4", given="\n".join(questions))
    assert said[0] == told[0]
    model, tokenizer = bora_fl.load(run)
    turns = [{"role": "system", "content": "nice"}]
    for question, answer in zip(questions, said, strict=True):
        turns.append({"role": "user", "content": question})
        while len(ids := conversation_ids(tokenizer, turns)) > 20:
            turns[1:3] = []
        assert answer == next(complete(model, tokenizer, [ids], max_new_tokens=4))
        turns.append({"role": "assistant", "content": answer})
    assert len(turns) < 7


def test_an_export_ends_a_turn_as_the_run_does(run: Path, tmp_path: Path) -> None:
    merged = GenerationConfig.from_pretrained(export_merged(run, tmp_path / "merged"))
    assert merged.eos_token_id == [1, 6]  # the tokenizer's, and the base model's


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
