import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bora_fl
from bora_fl import data, exporting
from bora_fl.cli import cli
from bora_fl.config import ConfigError, parse
from bora_fl.evaluate import evaluate
from bora_fl.exporting import export_lora, export_merged, export_sentence_transformers
from bora_fl.models import load_base, load_tokenizer
from bora_fl.report import training_rows
from bora_fl.server.checkpoint import load_newest, save
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.best import Best


def central(model: torch.nn.Module, config) -> float:
    settings = parse(config)
    test = data.test_data(settings.data, settings.model, load_tokenizer(settings.model))
    return evaluate(model, test, 64).loss


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained GPT-2, whose weights lie transposed, and the tiny BERT's tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    marks = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, **marks)
    GPT2Model(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's, for LoRA on GPT-2
@pytest.mark.parametrize("method", ["bora", "lora"])
@pytest.mark.parametrize(("model", "strategy"), [("bert", "fedavg"), ("bert", "fedex"), ("gpt2", "fedex")])
def test_a_merged_model_needs_nothing_of_ours_and_predicts_as_the_run_did(
    model: str, strategy: str, method: str, tiny_config, tiny_gpt2: Path, tmp_path: Path
):
    from transformers import AutoModelForSequenceClassification

    tiny_config |= {"strategy.name": strategy, "adapter.method": method}
    if model == "gpt2":
        tiny_config |= {"model.name": str(tiny_gpt2), "adapter.target-modules": "c_attn,c_proj,c_fc"}
    folder = simulate(tiny_config, 3)
    export_merged(folder, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged, "peft_config")
    last = training_rows(folder / "metrics.jsonl")[-1]
    assert central(merged, tiny_config) == pytest.approx(last["loss"], abs=1e-4)


def test_a_model_with_pooling_is_exported_with_its_class_and_for_sentence_transformers(tiny_config, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    folder = simulate(tiny_config | {"model.pooling": "mean", "run.num-rounds": 1}, 3)
    export_merged(folder, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    last = training_rows(folder / "metrics.jsonl")[-1]
    assert central(model, tiny_config) == pytest.approx(last["loss"], abs=1e-4)
    export_sentence_transformers(folder, tmp_path / "sentences")
    dense = load_file(tmp_path / "sentences" / "2_Dense" / "model.safetensors")
    torch.testing.assert_close(dense["linear.weight"], model.classifier.weight.detach())
    about = json.loads((tmp_path / "sentences" / "sentence_bert_config.json").read_text())
    assert about["max_seq_length"] == tiny_config["model.max-length"]  # texts are cut where training cut them


def test_a_head_of_its_own_is_not_for_sentence_transformers(tiny_config, tmp_path: Path):
    folder = simulate(tiny_config | {"run.num-rounds": 1}, 3)
    with pytest.raises(ConfigError, match=r"model\.pooling = mean"):
        export_sentence_transformers(folder, tmp_path / "sentences")


def test_a_lora_export_predicts_as_the_run_did(tiny_config, tmp_path: Path):
    from peft import PeftModel

    folder = simulate(tiny_config, 3)
    with pytest.warns(UserWarning, match="beside its factors"):
        export_lora(folder, tmp_path / "lora")
    settings = parse(tiny_config)
    base = load_base(settings.model, data.load_dataset(settings.data).label_names, 0)
    model = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    last = training_rows(folder / "metrics.jsonl")[-1]
    assert central(model, tiny_config) == pytest.approx(last["loss"], abs=1e-4)


def test_an_export_needs_no_data_and_truncates_to_a_rank(tiny_config, tiny_data: Path, tmp_path: Path):
    from peft import PeftModel
    from safetensors.torch import load_file

    moved = tmp_path / "data.parquet"
    moved.write_bytes(tiny_data.read_bytes())
    folder = simulate(tiny_config | {"data.name": str(moved)}, 3)
    moved.unlink()
    model = bora_fl.load(folder)[0]
    inputs = {"input_ids": torch.tensor([[2, 7, 16, 12, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**inputs).logits
        for rank in (0, 8, 3):
            target = tmp_path / f"lora{rank}"
            result = CliRunner().invoke(cli, ["export", str(folder), str(target), "--as", "lora", "--rank", str(rank)])
            assert result.exit_code == 0, result.output
            assert ("relative error" in result.output) == bool(rank)
            assert ("vLLM's --max-lora-rank" in result.output) == (rank == 3)
            names = json.loads((target / "labels.json").read_text())
            base = load_base(parse(tiny_config).model, names, 0)
            logits = PeftModel.from_pretrained(base, target).eval()(**inputs).logits
            if rank != 3:
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            else:
                assert not torch.equal(logits, expected)
    export_merged(folder, tmp_path / "merged", dtype="bfloat16")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}


def test_of_a_run_that_goes_on_the_newest_checkpoint_is_exported(tiny_config, tmp_path: Path):
    from safetensors.torch import load_file

    folder = simulate(tiny_config | {"run.num-rounds": 1}, 3)
    export_merged(folder, tmp_path / "first")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    simulate(tiny_config | {"run.num-rounds": 2, "run.resume": True}, 3)
    export_merged(folder, tmp_path / "second")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(tmp_path / "adapter", folder / "adapter")  # as if it had not come to its end
    export_merged(folder, tmp_path / "newest")
    first, second, newest = (
        load_file(tmp_path / name / "model.safetensors")["classifier.weight"] for name in ("first", "second", "newest")
    )
    assert torch.equal(newest, second)
    assert not torch.equal(newest, first)


@pytest.mark.parametrize("fold_version", [0, 1])
def test_of_a_run_that_was_stopped_the_best_adapter_is_exported(
    fold_version: int, tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Unless it stands on other frozen weights than the newest."""
    from safetensors.torch import load_file

    folder = simulate(tiny_config | {"run.num-rounds": 1}, 3)
    config = json.loads((folder / "config.json").read_text())
    found = load_newest(folder / "checkpoints", config)
    assert found is not None
    newest = found.state.current
    better = replace(newest, tensors={name: tensor + 1 for name, tensor in newest.tensors.items()})
    state = replace(found.state, best=Best(0, better, {0: (0.1, 1.0, 5)}, fold_version))
    save(folder / "checkpoints", replace(found, round=2, state=state), config, {}, 2)
    shutil.rmtree(folder / "adapter")
    monkeypatch.setattr(exporting.forms, "load_dataset", lambda _: pytest.fail("the data are asked for"))
    export_merged(folder, tmp_path / "merged")
    exported = load_file(tmp_path / "merged" / "model.safetensors")["classifier.bias"]
    wanted = newest if fold_version else better
    assert torch.equal(exported, next(t for name, t in wanted.tensors.items() if name.endswith("classifier.bias")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "gguff"], "--as gguff: use one of merged, lora"),
        (["--dtype", "int8"], "--dtype int8: use one of float32, float16, bfloat16"),
        (["--as", "merged", "--rank", "8"], "--rank 8 with --as merged"),
        (["--as", "lora", "--rank", "-1"], "--rank -1"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, tmp_path: Path):
    result = CliRunner().invoke(cli, ["export", str(tmp_path), str(tmp_path / "target"), *options])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_folded_into_the_weights_cannot_be_a_lora(stopped: bool, tiny_config, tmp_path: Path):
    folder = simulate(tiny_config | {"strategy.name": "fedex"}, 3)
    if stopped:
        shutil.rmtree(folder / "adapter")
    with pytest.raises(ConfigError, match="merged model"):
        export_lora(folder, tmp_path / "lora")


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        export_merged(tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("form", ["merged", "lora", "sentence-transformers", "gguf"])
def test_nothing_is_written_over_a_run_or_a_file(form: str, tiny_config, tmp_path: Path):
    if form == "gguf":
        pytest.importorskip("gguf")
    for name, holds in (("run", "metrics.jsonl"), ("adapter", "bora_fl.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / holds).write_text("{}")
        with pytest.raises(ConfigError, match="it holds a run, which would be written over"):
            bora_fl.export(tmp_path / "run", tmp_path / name, form)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="it is a file; name a folder"):
        bora_fl.export(tmp_path / "run", tmp_path / "file", form)
