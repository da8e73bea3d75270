import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from bora_fl.config import AdapterSettings, ConfigError, ModelSettings, parse
from bora_fl.models import FederatedModel, load_base, settled
from bora_fl.models.base import LAYERED, trained_pooling
from bora_fl.models.pooling import pool, pooled_class

SIZES = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "DistilBert": {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2},
    "Albert": {**SMALL, "embedding_size": 8},
    "Camembert": SMALL,
    "Deberta": SMALL,
    "DebertaV2": SMALL,
    "Electra": {**SMALL, "embedding_size": 8},
    "MPNet": SMALL,
    "XLMRoberta": SMALL,
    "ModernBert": {**SMALL, "cls_token_id": 1, "sep_token_id": 2},
}


def build(family: str, pooling: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return pooled_class(getattr(transformers, f"{family}ForSequenceClassification"), pooling)(config).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_of_a_padded_batch_is_that_of_each_text(pooling: str, side: str):
    lengths, width, d = [5, 1, 3], 7, 4
    hidden = torch.randn(3, width, d, dtype=torch.float64)
    mask = torch.zeros(3, width, dtype=torch.long)
    expected = []
    for i, length in enumerate(lengths):
        kept = slice(0, length) if side == "right" else slice(width - length, width)
        mask[i, kept] = 1
        text = hidden[i, kept]
        expected.append({"mean": text.mean(0), "cls": text[0], "last": text[-1]}[pooling])
    hidden[mask == 0] = float("nan")
    found = pool(hidden, mask, pooling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_on_all_layers_reads_the_mean_of_each(family: str):
    model = build(family, "layers")
    ids = torch.randint(3, 40, (2, 5))
    with torch.no_grad():
        states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
        found = model(input_ids=ids)
    head = getattr(model, model.head_name)
    assert head.in_features == 3 * 16
    expected = torch.stack([torch.cat([layer[i].mean(0) for layer in states]) for i in range(2)])
    torch.testing.assert_close(found.logits, expected @ head.weight.T + (0 if head.bias is None else head.bias))


@pytest.mark.parametrize("pooling", ["mean", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_has_the_logits_of_each_text_alone(family: str, pooling: str):
    model = build(family, pooling)
    texts = [torch.randint(3, 40, (length,)) for length in (2, 6, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask).logits
        alone = torch.cat([model(input_ids=text[None]).logits for text in texts])
        hidden = model.base_model(input_ids=texts[0][None]).last_hidden_state
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-6)
    if pooling == "mean":
        head = getattr(model, model.head_name)
        torch.testing.assert_close(batch[:1], head(hidden.mean(1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_parameters_are_those_of_the_class(family: str):
    model = build(family, "mean")
    own = getattr(transformers, f"{family}ForSequenceClassification")(model.config)
    body = f"{own.base_model_prefix}."
    names = {name for name, _ in model.named_parameters() if name.startswith(body)}
    assert names == {name for name, _ in own.named_parameters() if name.startswith(body) and ".pooler." not in name}
    assert {name for name, _ in model.named_parameters()} - names == {"classifier.weight", "classifier.bias"}
    out = model(input_ids=torch.full((2, 3), 5), labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    assert isinstance(model(input_ids=torch.full((2, 3), 5), return_dict=False), tuple)


def encoder(tiny_model: Path, folder: Path, stated: dict) -> ModelSettings:
    shutil.copytree(tiny_model, folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    return ModelSettings(name=str(folder))


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, None),
    ],
)
def test_auto_is_what_a_sentence_encoder_states(stated: dict, pooling: str | None, tiny_model: Path, tmp_path: Path):
    settings = encoder(tiny_model, tmp_path / "encoder", stated)
    assert trained_pooling(settings) == pooling
    assert getattr(load_base(settings, ["a", "b"], 0), "pooling", None) == pooling


def test_auto_leaves_other_models_as_their_class_has_them(tiny_model: Path):
    model = load_base(ModelSettings(name=str(tiny_model)), ["a", "b"], 0)
    assert type(model) is transformers.BertForSequenceClassification


def test_a_decoder_reads_its_last_token_only(tmp_path: Path):
    config = transformers.LlamaConfig(**{**SIZES, **SMALL})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.pooling = 'mean'.*last or auto"):
        load_base(ModelSettings(name=str(tmp_path), pooling="mean"), ["a", "b"], 0)
    model = load_base(ModelSettings(name=str(tmp_path), pooling="last"), ["a", "b"], 0)
    assert type(model) is transformers.LlamaForSequenceClassification


def test_a_language_model_has_no_pooling():
    with pytest.raises(ConfigError, match=r"model\.pooling = 'mean' with model\.task = 'causal-lm'"):
        parse({"model.pooling": "mean", "model.task": "causal-lm"})


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_the_adapted_model_trains_its_head_and_body_under_checkpointing_and_autocast(tiny_model: Path):
    settings = ModelSettings(name=str(tiny_model), pooling="mean")
    base = load_base(settings, ["a", "b"], 0)
    federated = FederatedModel(base, AdapterSettings(rank=2, num_blocks=4), settings, 0)
    assert set(federated.read().tensors) == {"classifier.weight", "classifier.bias"}
    federated.model.gradient_checkpointing_enable()
    federated.model.enable_input_require_grads()
    federated.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = federated.model(input_ids=torch.full((2, 3), 7), attention_mask=torch.ones(2, 3).long()).logits
    logits.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in federated.trained_parameters())


def test_per_sample_gradients_sum_to_the_batch_gradient(tiny_model: Path):
    from bora_fl.client.per_sample import SampleGradients

    settings = ModelSettings(name=str(tiny_model), pooling="mean")
    base = load_base(settings, ["a", "b"], 0)
    model = FederatedModel(base, AdapterSettings(rank=2, num_blocks=4), settings, 0).model.train()
    batch = {"input_ids": torch.randint(5, 20, (3, 6)), "attention_mask": torch.ones(3, 6).long()}
    batch["attention_mask"][1, 2:] = 0
    model(**batch).logits.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trained]
    with SampleGradients(model) as gradients:
        model(**batch).logits.square().sum().backward()
        found = gradients.take(3)
        for parameter, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(found[parameter].sum(0), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [{"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True}], ids=str)
def test_a_solved_head_reads_every_layer_of_a_sentence_encoder(given: dict, tiny_model: Path, tmp_path: Path):
    name = encoder(tiny_model, tmp_path / "encoder", given).name
    assert settled(parse({"model.name": name})).model.pooling == "layers"


@pytest.mark.parametrize(
    "other",
    [
        {"model.name": "plain"},
        {"model.pooling": "mean"},
        {"head.init": "random"},
        {"privacy.mode": "record", "privacy.epsilon": 3.0, "privacy.delta": 1e-3, "strategy.weighting": "uniform"},
        {"privacy.mode": "client", "strategy.weighting": "uniform"},
        {"privacy.secure-aggregation": True},
        {"model.task": "causal-lm"},
    ],
    ids=str,
)
def test_auto_stays_what_the_model_was_trained_for(other: dict, tiny_model: Path, tmp_path: Path):
    own = encoder(tiny_model, tmp_path / "encoder", {"pooling_mode_mean_tokens": True}).name
    config = {"model.name": own} | other | ({"model.name": str(tiny_model)} if "model.name" in other else {})
    settings = parse(config)
    assert settled(settings) is settings


@pytest.mark.parametrize("stated", ["lasttoken", "max"])
def test_auto_does_not_read_every_layer_of_other_encoders(stated: str, tiny_model: Path, tmp_path: Path):
    settings = parse({"model.name": encoder(tiny_model, tmp_path / "encoder", {"pooling_mode": stated}).name})
    assert settled(settings) is settings


def test_every_family_that_auto_may_read_whole_is_tested():
    families = {getattr(transformers, f"{family}Config").model_type for family in FAMILIES}
    assert families == LAYERED
