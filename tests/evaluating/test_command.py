"""Tasks of lm-evaluation-harness on a finished run: local data, no hub."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bora_fl
from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.models.generating import complete
from bora_fl.predicting.opening import open_run
from bora_fl.simulations.engine import simulate

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and its libraries
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
QUESTIONS = [("was the film good", "good", "bad"), ("was the book sad", "sad", "fine"), ("it was", "awful", "great")]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(40):
            question, right, _ = QUESTIONS[number % 3]
            file.write(json.dumps({"prompt": question, "response": right}) + "\n")
    config = {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "run.threads": 1,
        "data.name": str(folder / "texts.jsonl"),
        "data.partition": "iid",
        "adapter.target-modules": "q_proj,v_proj",
        "adapter.num-blocks": 4,
        "train.learning-rate": 0.05,
        "run.num-rounds": 2,
        "train.precision": "fp32",
        "train.local-steps": 10,
        "train.batch-size": 4,
        "run.keep-best": False,
        "run.output-dir": str(folder / "run"),
    }
    return simulate(config, 2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "rows.json").open("w") as file:
        for question, right, wrong in QUESTIONS:
            file.write(json.dumps({"question": question, "choices": [wrong, right], "answer": 1}) + "\n")
    (folder / "choices.yaml").write_text(f"""
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|user|> {{{{question}}}} <|end|> <|assistant|>"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    return folder


def test_a_run_and_its_base_model_on_a_local_task(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = call(
        "evaluate", str(run), "--tasks", "tiny_choices", "--task-folder", str(tasks), "--rounds", "base,2,last"
    )
    assert "tiny_choices" in shown
    rows = {row["model"]: row for row in map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())}
    assert {name: row["round"] for name, row in rows.items()} == {"base": 0, "2": 2, "last": 2}
    assert rows["last"]["tasks"] == rows["2"]["tasks"]
    model, tokenizer = bora_fl.load(run)

    def accuracy() -> float:
        right = 0
        for question, answer, wrong in QUESTIONS:
            head = tokenizer(f"<|user|> {question} <|end|> <|assistant|>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=head).logits[0, -1]
            ids = tokenizer([answer, wrong])["input_ids"]
            right += int(logits[ids[0][0]] > logits[ids[1][0]])
        return right / len(QUESTIONS)

    assert rows["last"]["tasks"]["tiny_choices"]["acc"] == accuracy() == 1.0
    with model.disable_adapter():
        assert rows["base"]["tasks"]["tiny_choices"]["acc"] == accuracy() < 1.0


def test_an_earlier_round_is_the_checkpoints(run: Path) -> None:
    first, tokenizer = open_run(run, "", 1)
    last, _ = open_run(run, "", 2)
    end, _ = open_run(run, "", None)
    names = [name for name, _ in end.named_parameters() if "bora" in name]
    tensors = [dict(model.named_parameters()) for model in (first, last, end)]
    same = [torch.allclose(tensors[1][name], tensors[2][name], atol=1e-6) for name in names]
    assert names
    assert all(same)
    assert not all(torch.allclose(tensors[0][name], tensors[2][name]) for name in names)
    prompt = tokenizer("<|user|> it was <|end|> <|assistant|>")["input_ids"]
    expected = next(complete(first, tokenizer, [prompt], max_new_tokens=3))
    result = CliRunner().invoke(cli, ["chat", str(run), "--round", "1", "--max-new-tokens", "3"], input="it was\n")
    assert json.loads(result.stdout) == expected
    with pytest.raises(ConfigError, match="rounds 1, 2"):
        open_run(run, "", 7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "no_such_task"], "no such task"),
        (["--tasks", ""], "name at least one"),
        (["--tasks", "tiny_choices", "--task-folder", "/nowhere"], "no such folder"),
        (["--tasks", "broken", "--task-folder", "TASKS"], "nowhere.json"),
        (["--tasks", "tiny_choices", "--task-folder", "TASKS", "--rounds", "9"], "rounds 1, 2"),
    ],
)
def test_what_cannot_be_evaluated_is_said(arguments: list[str], words: str, run: Path, tasks: Path) -> None:
    text = (tasks / "choices.yaml").read_text()
    (tasks / "broken.yaml").write_text(text.replace("tiny_choices", "broken").replace("rows.json", "nowhere.json"))
    given = [str(tasks) if word == "TASKS" else word for word in arguments]
    with pytest.raises(ConfigError, match=words):
        call("evaluate", str(run), *given)


def test_a_missing_harness_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install .*evaluation"):
        call("evaluate", str(run), "--tasks", "hellaswag")
