"""Direct preference optimization: TRL's own loss, pairs in every form, the reference once, a federation that learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bora_fl.client import site as sites
from bora_fl.client.site import Site
from bora_fl.client.training import train
from bora_fl.config import ConfigError, ModelSettings, TrainSettings, parse
from bora_fl.data import Pairs, load_dataset, tokenize
from bora_fl.evaluate import evaluate, preference_losses
from bora_fl.models import FederatedModel, load_base, reference
from bora_fl.models.reference import reference_log_probs
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate
from bora_fl.state import flatten_factors
from tests.conftest import BAD, GOOD

BETA = 0.3


def rows(count: int) -> list[dict[str, Any]]:
    """Good words are chosen and bad ones rejected, in responses of different lengths."""
    things = ["film", "book", "phone"]
    return [
        {
            "prompt": f"was the {things[i % 3]} {'very ' * (i % 4)}",
            "chosen": f"it was {GOOD[i % 5]}",
            "rejected": f"the {things[i % 3]} was {BAD[i % 5]} {BAD[(i + 1) % 5]}",
            "domain": things[i % 3],
        }
        for i in range(count)
    ]


@pytest.fixture
def config(tiny_config, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(90)))
    return tiny_config | {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "model.max-length": 32,
        "adapter.target-modules": "q_proj,v_proj",
        "data.name": str(path),
        "train.dpo-beta": BETA,
    }


def model_and_pairs(config: dict[str, Any]) -> tuple[FederatedModel, Pairs]:
    settings = parse(config)
    model = FederatedModel(load_base(settings.model, None, 0), settings.adapter, settings.model, 0)
    torch.manual_seed(1)
    for parameter in model.trained_parameters():  # an adapter that says something
        torch.nn.init.normal_(parameter, std=0.3)
    raw = load_dataset(settings.data)
    pairs = tokenize(raw.train, raw.settings, settings.model, AutoTokenizer.from_pretrained(settings.model.name))
    assert isinstance(pairs, Pairs)
    return model, pairs


def trl_trainer(model: Any, tokenizer: Any, data: Any, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(
        output_dir=str(folder), beta=BETA, use_cpu=True, bf16=False, report_to="none", max_length=32, disable_tqdm=True
    )
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16
def test_tokens_loss_and_margin_are_trls(config: dict[str, Any], tiny_causal: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    conversational = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows(8)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    trainer = trl_trainer(
        AutoModelForCausalLM.from_pretrained(tiny_causal), tokenizer, Dataset.from_list(conversational), tmp_path
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.model.eval()
    inputs = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, dict(inputs))

    settings = parse(config | {"adapter.method": "lora"})
    ours = FederatedModel(trainer.model, settings.adapter, settings.model, 0)
    raw = load_dataset(settings.data.model_copy(update={"test_split": ""}))
    pairs = tokenize(raw.train.select(range(8)), raw.settings, settings.model, tokenizer)
    assert isinstance(pairs, Pairs)
    batch = pairs.batch(np.arange(8))
    width = inputs["input_ids"].shape[1]
    masks = (batch["attention_mask"][:, :width], inputs["attention_mask"])
    assert torch.equal(batch["input_ids"][:, :width] * masks[0], inputs["input_ids"] * masks[1])
    assert torch.equal(batch["labels"][:, :width] != -100, inputs["completion_mask"].bool())
    known = replace(pairs, reference=reference_log_probs(ours, pairs, 6, torch.no_grad))
    found = evaluate(trainer.model, known, 6, beta=BETA)
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    metrics = {key: values[-1] for key, values in trainer._metrics["eval"].items()}
    assert found.accuracy == pytest.approx(metrics["rewards/accuracies"])
    assert found.margin == pytest.approx(metrics["rewards/margins"], rel=1e-4)


def test_training_takes_the_gradient_of_the_mean_over_pairs(config: dict[str, Any]) -> None:
    model, pairs = model_and_pairs(config)
    pairs = pairs.select(np.arange(6))
    pairs = replace(pairs, reference=reference_log_probs(model, pairs, 4, torch.no_grad))
    batch = pairs.batch(np.arange(6))
    logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses, margins = preference_losses(logits, batch["labels"], batch["reference"], BETA)
    losses.mean().backward()
    expected = [p.grad.clone() for p in model.trained_parameters()]
    before = [p.detach().clone() for p in model.trained_parameters()]
    options = {"local_steps": 1, "batch_size": 2, "accumulation": 3, "optimizer": "sgd", "learning_rate": 1.0}
    settings = TrainSettings(**options, dpo_beta=BETA, max_grad_norm=0.0, length_bucket=1, precision="fp32")
    result = train(model, pairs, settings, seed=0)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    for start, parameter, gradient in zip(before, model.trained_parameters(), expected, strict=True):
        torch.testing.assert_close(start - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)
    assert not torch.equal(margins, torch.zeros(6))


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


ASKED, GIVEN, OTHER = "was the film", "it was good", "it was very sad"
FORMS: dict[str, dict[str, Any]] = {
    "messages": {
        "prompt": messages(("user", ASKED)),
        "chosen": messages(("assistant", GIVEN)),
        "rejected": messages(("assistant", OTHER)),
    },
    "prompt in the responses": {
        "chosen": messages(("user", ASKED), ("assistant", GIVEN)),
        "rejected": messages(("user", ASKED), ("assistant", OTHER)),
    },
    "prompt in both places": {
        "prompt": ASKED,
        "chosen": messages(("user", ASKED), ("assistant", GIVEN)),
        "rejected": messages(("user", ASKED), ("assistant", OTHER)),
    },
    "a text for the prompt": {
        "prompt": ASKED,
        "chosen": messages(("assistant", GIVEN)),
        "rejected": messages(("assistant", OTHER)),
    },
    "texts for the responses": {"prompt": messages(("user", ASKED)), "chosen": GIVEN, "rejected": OTHER},
    "other names": {"question": ASKED, "preferred": GIVEN, "dispreferred": OTHER},
}


def encoded(row: dict[str, Any], tiny_causal: Path, folder: Path, **model: Any) -> Pairs:
    path = folder / "row.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    settings = parse({"data.name": str(path), "data.test-split": "", "model.task": "causal-lm"})
    raw = load_dataset(settings.data)
    assert raw.settings.format == "preference"
    limits = ModelSettings(task="causal-lm", name=str(tiny_causal), **model)
    pairs = tokenize(raw.train, raw.settings, limits, AutoTokenizer.from_pretrained(tiny_causal))
    assert isinstance(pairs, Pairs)
    return pairs


@pytest.mark.parametrize("form", FORMS)
def test_every_form_makes_the_same_pair(form: str, tiny_causal: Path, tmp_path: Path) -> None:
    wanted = encoded({"prompt": ASKED, "chosen": GIVEN, "rejected": OTHER}, tiny_causal, tmp_path)
    found = encoded(FORMS[form], tiny_causal, tmp_path)
    for name, tensor in wanted.batch(np.arange(3)).items():
        assert torch.equal(found.batch(np.arange(3))[name], tensor)


def test_responses_that_begin_alike_without_a_prompt_are_written_as_they_are(tiny_causal: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    row = {"chosen": "was the film good", "rejected": "was the film very bad"}
    batch = encoded(row, tiny_causal, tmp_path).batch(np.array([0]))
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == ["was the film good <eos>", "was the film very bad <eos>"]
    targets = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert targets == ["good <eos>", "very bad <eos>"]


def test_a_long_pair_keeps_one_prompt_and_both_responses(tiny_causal: Path, tmp_path: Path) -> None:
    row = {"prompt": "was the " * 20, "chosen": "it was good", "rejected": "it was very very very very sad"}
    pairs = encoded(row, tiny_causal, tmp_path, max_length=16)
    batch = pairs.batch(np.array([0]))
    assert pairs.cut
    assert batch["input_ids"].shape[1] == 16
    prompts = [
        ids[(labels < 0) & mask.bool()]
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    assert torch.equal(*prompts)
    assert (batch["labels"] >= 0).any(1).all()


def test_rows_without_two_different_responses_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    odd = [
        {"prompt": "a", "chosen": "good", "rejected": "good"},
        {"prompt": "a", "chosen": "good", "rejected": None},
        {"prompt": "a", "chosen": " ", "rejected": "bad"},
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in odd))
    settings = parse({"data.name": str(path), "data.test-split": "", "model.task": "causal-lm"}).data
    assert len(load_dataset(settings).train) == 1
    path.write_text("".join(json.dumps(row) + "\n" for row in odd[:3]))
    with pytest.raises(ConfigError, match="two different responses"):
        load_dataset(settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy.mode": "record", "strategy.weighting": "uniform"}, "the record would be a pair"),
        ({"adapter.method": "full"}, "choose an adapter"),
        ({"data.packing": True}, "data.packing = true with data.format = 'preference'"),
    ],
)
def test_what_pairs_cannot_be_trained_with_is_refused(
    change: dict[str, Any], words: str, config: dict[str, Any]
) -> None:
    from bora_fl.deployment.doctor.preflight import preflight

    with pytest.raises(ConfigError, match=words):
        simulate(config | change, 3)
    with pytest.raises(ConfigError, match=words):
        preflight(parse(config | change))


@pytest.mark.parametrize("shared", [0, 1])
def test_pairs_that_are_cut_before_they_differ(
    shared: int, config: dict[str, Any], tmp_path: Path, caplog: Any
) -> None:
    """All such pairs are refused before anything starts; some are told of."""
    from bora_fl.deployment.doctor.preflight import preflight

    path, same = tmp_path / "long.jsonl", "very " * 40
    long = [{"prompt": "the film was", "chosen": f"{same} good", "rejected": f"{same} bad"}] * 20
    path.write_text("".join(json.dumps(row) + "\n" for row in [*long, *rows(shared)]))
    settings = parse(config | {"data.name": str(path), "data.test-split": "", "data.partition": "iid"})
    if shared:
        preflight(settings)
        assert "the responses of 20 of 21 pairs do not differ within model.max-length" in caplog.text
    else:
        with pytest.raises(ConfigError, match=r"model\.max-length = 32: the responses of none of 20 pairs.*raise it"):
            preflight(settings)


@pytest.mark.parametrize("mode", ["client", "local"])
def test_pairs_train_where_the_unit_is_a_client(mode: str, config: dict[str, Any]) -> None:
    """The first message with the mode alone says what else to set; with that, two rounds run."""
    from bora_fl.deployment.doctor.preflight import preflight

    with pytest.raises(ConfigError, match=f"privacy.mode = '{mode}'.*set strategy.weighting to uniform"):
        parse(config | {"privacy.mode": mode})
    private = {"privacy.mode": mode, "strategy.weighting": "uniform", "strategy.fraction-evaluate": 0.0}
    chosen = config | private | {"run.num-rounds": 2}
    preflight(parse(chosen))
    found = read_rows(simulate(chosen, 3) / "metrics.jsonl")
    assert [row["round"] for row in found] == [0, 1, 2]
    assert found[-1]["epsilon"]["unit"] == "client"
    assert np.isfinite(found[-1]["loss"])
    assert found[-1]["loss"] != found[0]["loss"]


def test_the_reference_is_the_base_models_and_computed_once(config: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(sites, "_current", None)
    calls = []
    original = reference.reference_log_probs
    monkeypatch.setattr(reference, "reference_log_probs", lambda *args: calls.append(1) or original(*args))
    settings = parse(config)
    site = Site(settings)
    first = site.data(0, 3)
    assert len(calls) == 2  # what it trains on, and what it holds out
    base = load_base(settings.model, None, 0)
    batch = replace(first.train, reference=None).batch(np.arange(len(first.train)))  # type: ignore[arg-type]
    logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    words = logits[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    wanted = words.sum(1).view(2, -1).T
    assert isinstance(first.train, Pairs)
    assert first.train.reference is not None
    np.testing.assert_allclose(first.train.reference, wanted.detach().numpy(), rtol=1e-5)
    site.data(0, 3)
    Site(settings).data(0, 3)  # another process of the site
    assert len(calls) == 2

    # A fold changes the frozen weights, and not what the pairs are compared with.
    model = site.model()
    changed = {name: replace(factors, B=torch.ones_like(factors.B)) for name, factors in model.read().layers.items()}
    fold = flatten_factors(changed, "1/")
    site.store_folds(model, "run", fold, 1)
    site.fold_to(model, "run", 1)
    folded = model.save_base(next(iter(model.adapted_layers())))
    again = site.data(1, 3)
    assert len(calls) == 4
    assert isinstance(folded, torch.Tensor)
    torch.testing.assert_close(model.save_base(next(iter(model.adapted_layers()))), folded)
    fresh = Site(settings).data(1, 3)
    assert isinstance(again.train, Pairs)
    assert isinstance(fresh.train, Pairs)
    np.testing.assert_array_equal(again.train.reference, fresh.train.reference)  # type: ignore[arg-type]


def test_a_reference_of_another_precision_or_of_a_damaged_file_is_computed_anew(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    found = Site(parse(config | {"train.precision": "fp32"})).data(0, 3)
    half = Site(parse(config | {"train.precision": "bf16"})).data(0, 3)
    assert isinstance(found.train, Pairs)
    assert isinstance(half.train, Pairs)
    assert found.train.reference is not None
    assert half.train.reference is not None
    assert not np.array_equal(found.train.reference, half.train.reference)
    files = sorted((tmp_path / "cache" / "references").iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])

    def full(*_: Any, **__: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(reference, "write_atomically", full)  # and where nothing can be written, it is not kept
    again = Site(parse(config | {"train.precision": "fp32"})).data(0, 3)
    assert isinstance(again.train, Pairs)
    np.testing.assert_array_equal(again.train.reference, found.train.reference)  # type: ignore[arg-type]


def test_a_federation_learns_what_is_preferred(config: dict[str, Any]) -> None:
    folder = simulate(config | {"run.generate-every": 2, "run.num-rounds": 2, "train.local-steps": 8}, 3)
    found = read_rows(folder / "metrics.jsonl")
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert found[0]["margin"] == 0
    assert found[-1]["loss"] < 0.6
    assert found[-1]["accuracy"] == 1
    assert found[-1]["margin"] > 0.2
    assert all(row["perplexity"] is None for row in found)
    assert found[-1]["client_loss"] < found[1]["client_loss"]
    assert found[-1]["generation"]["examples"] == 9
