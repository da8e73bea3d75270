"""A training script's own Trainer as a client: alone, it ends with the script's adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import bora_fl
from bora_fl.adapters import BoraConfig
from bora_fl.config import parse
from bora_fl.models import FederatedModel, load_base
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.observer import RunFailedError
from tests.conftest import BAD, GOOD, PLAIN

WORDS = PLAIN + GOOD + BAD
TARGETS = ["q_proj", "v_proj"]
LORA = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": TARGETS}
BORA = {"task_type": "CAUSAL_LM", "r": 2, "bora_alpha": 4, "num_blocks": 4, "target_modules": TARGETS}


@pytest.fixture
def config(tiny_config, tiny_causal: Path) -> dict[str, Any]:
    return tiny_config | {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "adapter.target-modules": "q_proj,v_proj",
        "data.partition": "iid",
        "data.label-column": "",
    }


def script(kind: str, model: Any, tokenizer: Any, folder: Path) -> Trainer:
    """A script's Trainer: warm-up, a schedule, weight decay, Adam, shuffled batches."""
    texts = [f"{WORDS[i % 20]} {WORDS[(3 * i + 1) % 20]} {WORDS[(7 * i + 5) % 20]}" for i in range(24)]
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "report_to": "none",
        "seed": 3,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    if kind == "dpo":
        trl = pytest.importorskip("trl")
        sides = {"chosen": texts, "rejected": texts[::-1], "prompt": texts[5:] + texts[:5]}
        args = trl.DPOConfig(bf16=False, beta=0.5, **options)
        return trl.DPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(sides), processing_class=tokenizer
        )
    if kind == "trl":
        trl = pytest.importorskip("trl")
        rows = Dataset.from_dict({"text": texts})
        return trl.SFTTrainer(
            model=model, args=trl.SFTConfig(bf16=False, **options), train_dataset=rows, processing_class=tokenizer
        )
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")  # TRL 1.16
@pytest.mark.parametrize(
    ("kind", "adapter", "rounds"),
    [("transformers", LORA, 3), ("transformers", BORA, 1), ("trl", LORA, 2), ("dpo", LORA, 2)],
    ids=["lora", "bora", "trl", "dpo"],
)
def test_one_client_ends_with_the_scripts_adapter(
    kind: str, adapter: dict[str, Any], rounds: int, config: dict[str, Any], tiny_causal: Path, tmp_path: Path
) -> None:
    bora = "num_blocks" in adapter
    config |= {"adapter.method": "bora" if bora else "lora", "run.num-rounds": rounds}
    settings, tokenizer = parse(config), AutoTokenizer.from_pretrained(tiny_causal)
    start = FederatedModel(load_base(settings.model, None, 0), settings.adapter, settings.model, 0)
    start.write(start.read())  # Sigma means the same at any scale of sigma, Adam's steps do not: it is sent at one
    script(kind, start.model, tokenizer, tmp_path / "script").train()

    base = AutoModelForCausalLM.from_pretrained(tiny_causal)
    trainer = script(kind, get_peft_model(base, (BoraConfig if bora else LoraConfig)(**adapter)), tokenizer, tmp_path)
    folder = simulate(config, 1, app=bora_fl.federate(trainer))

    expected = start.read()
    loaded = FederatedModel(bora_fl.load(folder)[0], settings.adapter, settings.model, 0).read()
    for name, factors in expected.layers.items():
        assert factors.B.abs().max() > 0.01
        torch.testing.assert_close(loaded.layers[name].dense(), factors.dense(), rtol=0, atol=1e-6)
    rows = read_rows(folder / "metrics.jsonl")[1:]
    assert [row["per_client"]["0"]["steps"] for row in rows] == [6 / rounds] * rounds
    assert all((0.1 if kind == "dpo" else 2) < row["train_loss"] < 4 for row in rows)
    assert load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("lives", [True, False], ids=["one process", "a process a round"])
@pytest.mark.parametrize("strategy", ["cyclic", "rolora"])
def test_each_round_trains_the_factors_that_are_its_turn(
    strategy: str, lives: bool, config: dict[str, Any], tiny_causal: Path, tmp_path: Path
) -> None:
    """The Trainer has one optimizer, which goes on from round to round."""
    moved: list[set[str]] = []

    def made() -> Any:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), LoraConfig(**LORA))
        trainer = script("transformers", model, AutoTokenizer.from_pretrained(tiny_causal), tmp_path)
        train = trainer.train

        def watched(**options: Any) -> Any:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            result = train(**options)
            moved.append(
                {name.split(".")[-3] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            )
            return result

        trainer.train = watched
        return bora_fl.federate(trainer)

    once = made()
    app = once if lives else lambda message, context: made()(message, context)
    config |= {"adapter.method": "lora", "strategy.name": strategy, "run.num-rounds": 4}
    simulate(config, 1, app=app)
    assert moved == [{"lora_B"}, {"lora_A"}] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy.mode": "record", "strategy.weighting": "uniform"}, "each example's own gradient and Poisson"),
        ({"adapter.rank": 4}, "the run's r is 4, that of the Trainer's adapter 2"),
    ],
)
def test_what_a_trainer_cannot_serve_is_refused(
    change: dict[str, Any], words: str, config: dict[str, Any], tiny_causal: Path, tmp_path: Path, caplog: Any
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), LoraConfig(**LORA))
    trainer = script("transformers", model, AutoTokenizer.from_pretrained(tiny_causal), tmp_path)
    with pytest.raises(RunFailedError):
        simulate(config | {"adapter.method": "lora"} | change, 1, app=bora_fl.federate(trainer))
    assert words in caplog.text


def test_a_loop_of_ones_own_is_called_once_a_round(config: dict[str, Any], tiny_causal: Path) -> None:
    """Plain gradient steps know nothing of rounds: two rounds of three are six."""
    ids = AutoTokenizer.from_pretrained(tiny_causal)(["the film was good and nice", "the book was very sad it"])

    def steps(model: Any, count: int) -> float:
        model.train()
        for _ in range(count):
            rows = torch.tensor(ids["input_ids"])
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 20 * parameter.grad
                        parameter.grad = None
        return loss.item()

    settings = parse(config | {"adapter.method": "lora", "run.num-rounds": 2})
    start = FederatedModel(load_base(settings.model, None, 0), settings.adapter, settings.model, 0)
    last = steps(start.model, 6)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), LoraConfig(**LORA))
    called = []

    def train(round: int, rounds: int) -> dict[str, float]:
        called.append((round, rounds))
        return {"num_examples": 2, "steps": 3, "train_loss": steps(model, 3)}

    folder = simulate(settings.flat(), 1, app=bora_fl.federate(train, model))
    assert called == [(1, 2), (2, 2)]
    loaded = FederatedModel(bora_fl.load(folder)[0], settings.adapter, settings.model, 0).read()
    for name, factors in start.read().layers.items():
        assert factors.B.abs().max() > 0.01
        torch.testing.assert_close(loaded.layers[name].dense(), factors.dense(), rtol=0, atol=1e-6)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["train_loss"] == pytest.approx(last, rel=1e-5)
    assert rows[-1]["per_client"]["0"]["num-examples"] == 2


@pytest.mark.parametrize("found", [{"accuracy": 1.0}, {"num_examples": -1}, {"num_examples": "many"}])
def test_what_a_loop_may_not_return_ends_the_run(
    found: dict[str, Any], config: dict[str, Any], tiny_causal: Path, caplog: Any
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_causal), LoraConfig(**LORA))
    app = bora_fl.federate(lambda round, rounds: found, model)
    with pytest.raises(RunFailedError):
        simulate(config | {"adapter.method": "lora"}, 1, app=app)
    assert "the loop returns" in caplog.text


def test_a_model_without_an_adapter_is_refused(tiny_causal: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    with pytest.raises(ValueError, match="no adapter"):
        bora_fl.federate(script("transformers", model, AutoTokenizer.from_pretrained(tiny_causal), tmp_path))
    with pytest.raises(ValueError, match="no adapter"):
        bora_fl.federate(lambda round, rounds: None, model)
    with pytest.raises(ValueError, match="the function of a round"):
        bora_fl.federate("train", model)
