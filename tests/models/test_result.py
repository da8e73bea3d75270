import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bora_fl
from bora_fl import data
from bora_fl.config import ConfigError, parse
from bora_fl.evaluate import evaluate
from bora_fl.models import read_result
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate

RANDOM = {"run.num-rounds": 2}


def central(model: torch.nn.Module, config: dict, tokenizer) -> float:
    settings = parse(config)
    return evaluate(model, data.test_data(settings.data, settings.model, tokenizer), 64).loss


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"strategy.name": "fedex"},
        {"strategy.name": "refactor", "strategy.residual": "fold"},
        {"adapter.method": "lora"},
        {"adapter.method": "full"},
        {"model.pooling": "mean"},
        {"adapter.train-head": False},
    ],
    ids=str,
)
def test_a_run_s_folder_loads_ready_to_predict_as_the_run_did(config: dict, tiny_config, tmp_path: Path):
    config = tiny_config | RANDOM | config
    folder = simulate(config, 3)
    last = training_rows(folder / "metrics.jsonl")[-1]["loss"]
    moved = tmp_path / "moved"
    (folder / "adapter").rename(moved)  # it needs nothing else of the run
    model, tokenizer = bora_fl.load(moved)
    assert not model.training
    assert model.config.id2label == {0: "0", 1: "1"}
    assert central(model, config, tokenizer) == pytest.approx(last, abs=1e-5)


def test_label_names_are_those_of_the_data_and_peft_opens_the_folder_with_them(tiny_config, tiny_model: Path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = simulate(tiny_config | RANDOM | {"data.label-column": "label_name"}, 3)
    model, tokenizer = bora_fl.load(str(folder))
    assert model.config.id2label == {0: "bad", 1: "good"}
    names = json.loads((folder / "adapter" / "labels.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, id2label=dict(enumerate(names)))
    plain = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert plain.config.id2label == model.config.id2label
    inputs = AutoTokenizer.from_pretrained(folder / "adapter")(["the film is good"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits)
    label = model.config.id2label[int(model(**tokenizer("the film is good", return_tensors="pt")).logits.argmax())]
    assert label in ("bad", "good")


def test_the_base_model_may_lie_elsewhere_here(tiny_config, tiny_model: Path, tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_model, there)
    folder = simulate(tiny_config | RANDOM | {"model.name": str(there)}, 3)
    there.rename(here)
    with pytest.raises(ConfigError, match=r"model\.name = .*there"):
        bora_fl.load(folder)
    model, _ = bora_fl.load(folder, base=str(here))
    assert model.config.num_labels == 2


def test_a_folder_without_a_finished_adapter_is_named(tmp_path: Path):
    assert read_result(tmp_path) is None
    with pytest.raises(ConfigError, match="finished run"):
        bora_fl.load(tmp_path)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model.name": str(tiny_model), "data.name": str(tiny_data), "adapter.rank": 2, "adapter.num-blocks": 4}
    config |= {"run.num-rounds": 1, "run.threads": 1, "train.local-steps": 1, "train.precision": "fp32"}
    return simulate(config | {"run.output-dir": str(tmp_path_factory.mktemp("finished") / "run")}, 3)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_a_layer(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("bora_fl.json", _cut, "bora_fl.json or labels.json cannot be used"),
        ("bora_fl.json", lambda path: path.write_text("{}"), "KeyError: 'settings'"),
        ("labels.json", _cut, "bora_fl.json or labels.json cannot be used"),
        ("adapter_model.safetensors", _cut, "the weights cannot be used"),
        ("adapter_model.safetensors", Path.unlink, "there is no adapter_model.safetensors"),
        ("adapter_model.safetensors", _without_a_layer, r"\(1 in all\) are missing"),
        ("tokenizer.json", _cut, "the tokenizer cannot be used"),
    ],
)
def test_a_damaged_adapter_is_named_with_the_remedy(name: str, spoil, words: str, finished: Path, tmp_path: Path):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    bora_fl.load(tmp_path)
    spoil(tmp_path / "adapter" / name)
    with pytest.raises(ConfigError, match=rf"adapter: .*{words}.*resume the run"):
        bora_fl.load(tmp_path)


def test_a_model_without_its_weights_is_not_the_base_model(tiny_config):
    folder = simulate(tiny_config | {"run.num-rounds": 1, "adapter.method": "full"}, 3)
    (folder / "adapter" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"there is no model\.safetensors"):
        bora_fl.load(folder)
