from pathlib import Path

import pytest
import torch

from bora_fl import data
from bora_fl.config import ConfigError, parse
from bora_fl.evaluate import evaluate
from bora_fl.export import export_lora, export_merged
from bora_fl.models import load_base, load_tokenizer
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate


def central(model: torch.nn.Module, config) -> float:
    settings = parse(config)
    test = data.test_data(settings.data, settings.model, load_tokenizer(settings.model))
    return evaluate(model, test, 64).loss


@pytest.mark.parametrize("strategy", ["fedavg", "fedex"])
def test_a_merged_model_needs_nothing_of_ours_and_predicts_as_the_run_did(strategy: str, tiny_config, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    folder = simulate(tiny_config | {"strategy.name": strategy}, 3)
    export_merged(folder, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not hasattr(model, "peft_config")
    last = read_rows(folder / "metrics.jsonl")[-1]
    assert central(model, tiny_config) == pytest.approx(last["loss"], abs=1e-4)


def test_a_lora_export_predicts_as_the_run_did(tiny_config, tmp_path: Path):
    from peft import PeftModel

    folder = simulate(tiny_config, 3)
    with pytest.warns(UserWarning, match="beside its factors"):
        export_lora(folder, tmp_path / "lora")
    settings = parse(tiny_config)
    base = load_base(settings.model, data.load_dataset(settings.data).label_names, 0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    last = read_rows(folder / "metrics.jsonl")[-1]
    assert central(model, tiny_config) == pytest.approx(last["loss"], abs=1e-4)


def test_what_was_folded_into_the_weights_cannot_be_a_lora(tiny_config, tmp_path: Path):
    folder = simulate(tiny_config | {"strategy.name": "fedex"}, 3)
    with pytest.raises(ConfigError, match="merged model"):
        export_lora(folder, tmp_path / "lora")


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        export_merged(tmp_path, tmp_path / "merged")
