import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification
from typer.testing import CliRunner

import bora_fl
from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.data.prompts import prompt_ids
from bora_fl.exporting import export_merged
from bora_fl.models.generating import complete
from bora_fl.predicting.opening import open_base, open_run
from bora_fl.predicting.prediction import classify
from bora_fl.simulations.engine import simulate

TEXTS = ["the film is good", "a sad awful wrong poor book it was", "fine"]


def predict(*arguments: str, given: str = "") -> list[dict]:
    result = CliRunner().invoke(cli, ["predict", *arguments], input=given)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_labels_are_those_of_each_text_alone_and_need_no_data(tiny_config, tiny_data: Path, tmp_path: Path):
    data = tmp_path / "data.parquet"
    data.write_bytes(tiny_data.read_bytes())
    config = {"data.name": str(data), "data.label-column": "label_name"}
    folder = simulate(tiny_config | config, 3)
    data.unlink()
    rows = predict(str(folder), "-", given="\n".join(TEXTS))
    with pytest.raises(ConfigError, match=r"--output .*name a file in a folder that exists"):
        predict(str(folder), "-", "--output", str(tmp_path / "no" / "rows.jsonl"), given="a")
    (tmp_path / "texts.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"--output .*texts\.txt: it is the file of the texts"):
        predict(str(folder), str(tmp_path / "texts.txt"), "--output", str(tmp_path / "texts.txt"))
    model, tokenizer = bora_fl.load(folder)
    assert [row["text"] for row in rows] == TEXTS
    for row in rows:
        with torch.no_grad():
            inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)
            likely = model(**inputs).logits[0].softmax(0)
        assert row["label"] == ["bad", "good"][int(likely.argmax())]
        assert row["probability"] == pytest.approx(float(likely.max()), abs=1e-5)
    out = tmp_path / "out.jsonl"
    assert predict(str(folder / "adapter"), "-", "--output", str(out), given="\n".join(TEXTS)) == []
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    small = list(classify(model, tokenizer, TEXTS, 16, batch_size=1))
    assert [label for label, _ in small] == [row["label"] for row in rows]


def test_texts_are_padded_as_in_training_whatever_the_tokenizer_does(tiny_causal: Path):
    """On the right: learned positions, as GPT-2's, would else be other ones. A text without tokens has a class too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal, padding_side="left")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    sizes |= {"bos_token_id": 1, "eos_token_id": 1}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, pad_token_id=tokenizer.pad_token_id))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    together = list(classify(model.eval(), tokenizer, [*TEXTS, ""], 16))
    assert together == [
        (label, pytest.approx(probability, rel=1e-5))
        for text in [*TEXTS, ""]
        for label, probability in classify(model, tokenizer, [text], 16)
    ]
    with torch.no_grad():
        alone = model(**tokenizer(TEXTS[2], return_tensors="pt", return_token_type_ids=False)).logits.softmax(1)
    assert together[2][1] == pytest.approx(float(alone.max()), rel=1e-5)


@pytest.mark.parametrize("response", ["", "label_name"])
def test_a_language_model_writes_the_same_alone_and_beside_others(response: str, tiny_config, tiny_causal: Path):
    causal = {"model.task": "causal-lm", "model.name": str(tiny_causal), "adapter.target-modules": "q_proj,v_proj"}
    run = simulate(tiny_config | causal | {"run.num-rounds": 1, "data.response-column": response}, 3)
    assert not (run / "adapter" / "labels.json").exists()
    rows = predict(str(run), "-", "--max-new-tokens", "5", given="\n".join(TEXTS))
    model, tokenizer = bora_fl.load(run)
    prompts = prompt_ids(tokenizer, TEXTS, dialog=bool(response))
    alone = [next(complete(model, tokenizer, [ids], max_new_tokens=5)) for ids in prompts]
    assert [row["response"] for row in rows] == alone


@pytest.mark.parametrize("init", ["auto", "random"])
def test_a_round_of_a_run_whose_head_does_not_train(init: str, tiny_config):
    """A solved head is in the checkpoint's state, another is not; a copy beside the checkpoints is none."""
    run = simulate(tiny_config | {"adapter.train-head": False, "head.init": init, "run.keep-best": False}, 3)
    (run / "checkpoints" / "round-00003-copy").mkdir()
    by_round, end = (predict(str(run), "-", *options, given="\n".join(TEXTS)) for options in (["--round", "3"], []))
    assert by_round == end
    assert export_merged(run, run / "merged").is_dir()


@pytest.mark.parametrize("config", [{"strategy.name": "fedex"}, {"adapter.method": "full"}], ids=str)
def test_the_base_is_the_model_that_the_run_began_with(config, tiny_config, tiny_causal: Path):
    causal = {"model.task": "causal-lm", "model.name": str(tiny_causal), "adapter.target-modules": "q_proj,v_proj"}
    run = simulate(tiny_config | causal | {"run.num-rounds": 1} | config, 3)
    original = AutoModelForCausalLM.from_pretrained(tiny_causal).state_dict()
    base, finished = (model.state_dict() for model, _ in (open_base(run, ""), open_run(run, "", None)))
    assert base.keys() == original.keys()
    assert all(torch.equal(base[name], original[name]) for name in original)
    name = "model.layers.0.self_attn.q_proj.weight"
    (trained,) = (tensor for key, tensor in finished.items() if key.replace(".base_layer", "").endswith(name))
    assert not torch.equal(trained, original[name])


def test_a_folder_without_a_result_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="finished run"):
        predict(str(tmp_path), "-", given="a")
