"""What a plan says, against steps on real tensors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from bora_fl.config import ConfigError, parse
from bora_fl.evaluate import example_losses
from bora_fl.models import FederatedModel
from bora_fl.planning.advice import RUNTIME, advise
from bora_fl.planning.command import rows
from bora_fl.planning.memory import Estimate, _Peak, estimate
from bora_fl.planning.recipes import gigabytes, read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
# Parameters as the models' own pages count them.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
}
# The models' config.json: type, hidden, intermediate, layers, heads, key-value heads, vocabulary.
SIZES = {
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 49152),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128256),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256),
}
CHOSEN = {
    "model.task": "causal-lm",
    "model.max-length": 32,
    "adapter.target-modules": "all-linear",
    "adapter.rank": 2,
    "adapter.num-blocks": 4,
    "train.precision": "fp32",
}


def config(layers: int = 5) -> LlamaConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=96, num_hidden_layers=layers, **heads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_estimate_is_what_a_real_step_of_all_layers_holds(checkpointing: bool):
    """Storages of real tensors, counted while a step of five layers and three sequences runs."""
    settings = parse(CHOSEN | {"train.batch-size": 3, "train.checkpointing": checkpointing})
    model = FederatedModel(LlamaForCausalLM(config()), settings.adapter, settings.model, 0)
    model.model.config.use_cache = False
    if checkpointing:
        model.checkpoint_activations()
    model.train_only(frozenset({"A", "sigma", "B", "tensors"}))
    model.model.train()
    ids = torch.zeros(3, 32, dtype=torch.long)
    with _Peak([*model.model.parameters(), *model.model.buffers()]) as counter:
        mask = torch.ones_like(ids).tril()  # with padding: without any, transformers makes no mask for the attention
        logits = model.model(input_ids=ids, attention_mask=mask).logits
        example_losses(logits, ids)[0].sum().backward()
    found = estimate(settings, config())
    assert found.fixed + 3 * (found.sequence + found.logits) == pytest.approx(counter.peak, rel=0.02)
    assert found.trained == sum(p.numel() for p in model.trained_parameters())
    assert found.parameters == LlamaForCausalLM(config()).num_parameters()


@pytest.mark.parametrize(
    ("task", "kind", "shape"),
    [
        ("classification", BertForSequenceClassification, (6,)),
        ("multi-label", BertForSequenceClassification, (6, 100)),
        ("token-classification", BertForTokenClassification, (6, 33)),
    ],
)
def test_an_estimate_holds_for_an_encoder_that_classifies(
    task: str, kind: type, shape: tuple[int, ...], tiny_model: Path
):
    """A hundred classes, so that a head that is forgotten would show."""
    changes = {"model.task": task, "adapter.target-modules": "query,value", "train.batch-size": 6}
    settings, names = parse(CHOSEN | changes), [str(number) for number in range(100)]
    known = BertConfig.from_pretrained(tiny_model, num_hidden_layers=4, num_labels=len(names))
    model = FederatedModel(kind(known), settings.adapter, settings.model, 0)
    model.train_only(frozenset({"A", "sigma", "B", "tensors"}))
    model.model.train()
    ids = torch.zeros(6, 32, dtype=torch.long)
    with _Peak([*model.model.parameters(), *model.model.buffers()]) as counter:
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids).tril()).logits
        labels = torch.zeros(shape, dtype=torch.float if task == "multi-label" else torch.long)
        example_losses(logits, labels)[0].sum().backward()
    found = estimate(settings, BertConfig.from_pretrained(tiny_model, num_hidden_layers=4), names)
    assert found.fixed + 6 * found.sequence == pytest.approx(counter.peak, rel=0.02)
    assert found.trained == sum(p.numel() for p in model.trained_parameters())


def test_the_parts_of_an_estimate():
    plain = estimate(parse(CHOSEN | {"train.batch-size": 2}), config())
    saved = estimate(parse(CHOSEN | {"train.batch-size": 2, "train.checkpointing": True}), config())
    small = estimate(parse(CHOSEN | {"train.batch-size": 2, "model.quantization": "4bit"}), config())
    assert saved.sequence < 0.5 * plain.sequence
    assert 0 < saved.logits <= plain.logits  # less where a layer that is computed again holds more than the loss
    assert 3 * 32 * 512 * 4 < plain.logits < 8 * 32 * 512 * 4  # a few copies of [tokens, vocabulary]
    linear = 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    assert plain.base - small.base == pytest.approx(linear * (4 - 0.5159), rel=1e-4)
    assert (plain.adapter, plain.optimizer, plain.travels) == tuple(n * plain.trained for n in (4, 12, 4))
    sgd = estimate(parse(CHOSEN | {"train.optimizer": "sgd"}), config())
    assert sgd.optimizer == 8 * sgd.trained


def test_autocast_copies_no_quantized_weight_and_8_bits_hold_the_inputs():
    kinds, few = (
        ("none", "8bit", "4bit"),
        CHOSEN | {"adapter.target-modules": "q_proj"},
    )  # an adapter holds its input too
    half = {k: estimate(parse(few | {"model.quantization": k, "train.precision": "bf16"}), config()) for k in kinds}
    full = {k: estimate(parse(few | {"model.quantization": k}), config()) for k in kinds}
    linear = 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    for kind in kinds[1:]:
        assert half["none"].fixed - half[kind].fixed == pytest.approx(2 * linear, rel=0.1)
    inputs = 5 * 32 * 4 * (32 + 96)  # of gate and down; that of the attention's output is held in any case
    assert full["8bit"].sequence - full["4bit"].sequence == pytest.approx(inputs, rel=0.01)


def test_advice_takes_the_fastest_settings_in_which_four_sequences_fit(monkeypatch):
    kinds = {
        ("none", False): (16e9, 2e9),
        ("none", True): (16e9, 1e9),
        ("4bit", False): (6e9, 2e9),
        ("4bit", True): (6e9, 5e8),
    }

    def known(settings, config):
        base, sequence = kinds[settings.model.quantization, settings.train.checkpointing]
        return Estimate(8 * 10**9, 10**7, base, 0.0, 0.0, 0.0, sequence, 0.0, settings.train.batch_size)

    monkeypatch.setattr("bora_fl.planning.advice.estimate", known)
    settings = parse(CHOSEN)
    found = {memory: advise(settings, None, memory * 1e9).run_config for memory in (8, 12, 24, 32, 80)}
    shown = {m: (c["model.quantization"], c["train.checkpointing"], c["train.batch-size"]) for m, c in found.items()}
    assert shown == {
        8: ("4bit", True, 1),
        12: ("4bit", True, 8),
        24: ("none", True, 4),
        32: ("none", False, 4),
        80: ("none", False, 16),
    }
    assert all(c["train.batch-size"] * c["train.accumulation"] == 16 for c in found.values())
    with pytest.raises(ConfigError, match=r"--gpu 6GB with model\.max-length = 32: not one sequence fits"):
        advise(settings, None, 6e9)
    advice = advise(settings, None, 24e9)
    assert advice.estimate.total + RUNTIME <= 0.9 * 24e9
    assert replace(advice.estimate, batch=8).total + RUNTIME > 0.9 * 24e9


@pytest.mark.parametrize(("text", "bytes"), [("24GB", 24e9), ("80 gib", 80 * 2**30), ("512MB", 512e6)])
def test_a_memory_is_read(text: str, bytes: float):
    assert gigabytes(text) == bytes


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", "24 parsecs", ""])
def test_what_is_no_memory_is_refused(text: str):
    with pytest.raises(ConfigError, match="write a memory such as 24GB"):
        gigabytes(text)


def test_there_are_recipes_of_1_to_8_billion_parameters():
    assert {path.stem for path in RECIPES} == set(PUBLISHED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_says_that_it_was_not_run(path: Path):
    recipe = read_recipe(path)
    assert recipe.status.startswith("planned, not run")
    assert recipe.source.startswith("https://huggingface.co/")
    assert recipe.settings.model.task == "causal-lm"
    assert recipe.estimate["parameters"] == PUBLISHED[path.stem]
    assert recipe.estimate["step"] <= 0.9 * gigabytes(recipe.gpu)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_sizes_of_its_model(path: Path):
    """As they are published, and as transformers makes a model of them."""
    config = read_recipe(path).config
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ]
    assert (config.model_type, *(getattr(config, name) for name in names)) == SIZES[path.stem]
    assert config.tie_word_embeddings == (path.stem not in {"qwen2.5-7b", "llama-3.1-8b"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[path.stem]


@pytest.mark.parametrize(
    "path", [p if p.stem == "llama-3.2-1b" else pytest.param(p, marks=pytest.mark.slow) for p in RECIPES], ids=str
)
def test_a_recipe_has_the_estimate_that_plan_prints(path: Path):
    recipe = read_recipe(path)
    found = rows(estimate(recipe.settings, recipe.config))
    assert {name: round(value) for name, value in found.items()} == recipe.estimate


def test_a_recipe_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("title = 'mine'")
    with pytest.raises(ConfigError, match=r"recipe .*mine\.toml: KeyError: 'architecture'"):
        read_recipe(tmp_path / "mine.toml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": precision} | changes
        for precision in ("fp32", "bf16")
        for changes in (
            {},
            {"train.checkpointing": True},
            {"data.packing": True},
            {"model.quantization": "8bit"},
            {"model.quantization": "4bit"},
        )
    ],
    ids=lambda changes: " ".join(str(value) for value in changes.values()),
)
def test_a_real_step_of_smollm2_holds_what_is_planned(changes: dict[str, str | bool]):
    """The peak of a process's memory, less what malloc keeps between its tensors."""
    from transformers import AutoConfig

    from bora_fl.models import resolve

    chosen = CHOSEN | {"model.name": "embedded:smollm2", "model.max-length": 96, "train.batch-size": 4}
    chosen |= {"adapter.target-modules": "q_proj,v_proj", "adapter.rank": 8, "adapter.num-blocks": 8} | changes
    settings = parse(chosen)
    planned = estimate(settings, AutoConfig.from_pretrained(resolve(settings.model.name))).total
    code = (
        "import json, sys; from transformers import AutoConfig; from bora_fl.config import parse;"
        "from bora_fl.models import resolve; from bora_fl.planning.measuring import measure_step;"
        "from bora_fl.planning.memory import estimate; settings = parse(json.loads(sys.argv[1]));"
        "estimate(settings, AutoConfig.from_pretrained(resolve(settings.model.name)));"  # loads libraries
        "print(measure_step(settings).held)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(chosen)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert float(done.stdout.split()[-1]) == pytest.approx(planned, rel=0.1), done.stderr
