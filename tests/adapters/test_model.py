import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import bora_fl.adapters.layer
import bora_fl.adapters.model
from bora_fl.adapters import BoraConfig, BoraLayer
from bora_fl.adapters.state import named_layers

TOKENS = torch.arange(12).reshape(2, 6)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    ).eval()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in named_layers(model)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(10, 20), nn.Linear(20, 8), nn.Embedding(4, 10)
        self.attention = nn.MultiheadAttention(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_transformers_models_train_save_load_and_merge(make: type, tmp_path: Path) -> None:
    model = make()
    base = copy.deepcopy(model)
    before = model(TOKENS).logits.detach()
    config = BoraConfig(r=2, num_blocks=4, target_modules="all-linear", modules_to_save=["classifier"] * (make is bert))
    model = get_peft_model(model, config)
    assert torch.equal(model(TOKENS).logits, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(TOKENS).logits.detach()
    assert (trained - before).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, trained)
    torch.testing.assert_close(loaded.merge_and_unload()(TOKENS).logits, trained, rtol=1e-4, atol=1e-5)


def test_all_linear_leaves_out_the_output_layer_and_default_targets_follow_the_architecture() -> None:
    assert len(names(get_peft_model(llama(), BoraConfig(r=2, num_blocks=4, target_modules="all-linear")))) == 14
    default = names(get_peft_model(llama(), BoraConfig(r=2, num_blocks=4)))
    assert [name.rpartition(".")[2] for name in default] == ["q_proj", "v_proj"] * 2
    chosen = BoraConfig(r=2, num_blocks=4, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers")
    assert names(get_peft_model(llama(), chosen)) == ["model.layers.1.self_attn.q_proj"]


def test_patterns_set_rank_and_alpha_by_name() -> None:
    config = BoraConfig(
        r=2,
        num_blocks=2,
        bora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 8, r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"v_proj": 32},
    )
    layers = dict(named_layers(get_peft_model(llama(), config)))
    found = {name[len("model.layers.") :].replace(".self_attn", ""): a for name, a in layers.items()}
    adapters = {name: layer.adapter("default") for name, layer in found.items()}
    assert {name: (a.rank, a.scaling) for name, a in adapters.items()} == {
        "0.q_proj": (2, 2.0),
        "0.v_proj": (8, 4.0),
        "1.q_proj": (4, 1.0),
        "1.v_proj": (8, 4.0),
    }


def test_blocks_that_do_not_divide_are_named_with_what_fits_and_the_model_is_left_alone() -> None:
    model = Small()
    with pytest.raises(ValueError, match="num_blocks=4") as caught:
        get_peft_model(model, BoraConfig(num_blocks=4, target_modules=["second", "first"]))
    message = str(caught.value)
    assert "'first' [20, 10] (1, 2, 5, 10)" in message
    assert "'second'" not in message
    assert "fit all targeted modules: 1, 2." in message
    assert not any(isinstance(module, BoraLayer) for module in model.modules())
    model = get_peft_model(model, BoraConfig(num_blocks=5, target_modules=["first"]))
    with pytest.raises(ValueError, match="fit 1 of 2 modules"):
        model.add_adapter("other", BoraConfig(num_blocks=5, target_modules=["first", "second"]))
    assert list(model.peft_config) == ["default"]
    assert names(model) == ["first"]
    with pytest.raises(ValueError, match="and 5 more"):
        get_peft_model(llama(), BoraConfig(num_blocks=16, target_modules="all-linear", exclude_modules=".*q_proj"))


@pytest.mark.parametrize(
    ("target", "message"),
    [("table", "'table' is a Embedding"), ("attention.out_proj", "reads its weight without calling it")],
)
def test_a_target_that_cannot_be_adapted_is_refused(target: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        get_peft_model(Small(), BoraConfig(num_blocks=2, target_modules=[target]))


def test_adapters_of_different_blocks_and_transforms_add_up() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Small(), BoraConfig(num_blocks=5, target_modules=["first"], init_weights=False), "one")
    other = BoraConfig(num_blocks=2, r=3, target_modules=["first"], init_weights=False, sigma_transform="identity")
    model.add_adapter("two", other)
    layer = model.base_model.model.first
    x = torch.randn(3, 10)
    branches = {name: layer.adapter(name)(x) for name in ("one", "two")}
    expected = layer.base_layer(x)
    torch.testing.assert_close(layer(x), expected + branches["one"], rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(layer(x), expected + branches["one"] + branches["two"], rtol=1e-5, atol=1e-5)
    model.set_adapter("two")
    torch.testing.assert_close(layer(x), expected + branches["two"], rtol=1e-5, atol=1e-5)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"two"}


def test_disabling_an_adapter_that_trained_biases_warns() -> None:
    model = get_peft_model(Small(), BoraConfig(num_blocks=2, target_modules=["first"], bias="bora_only"))
    trained = {name.rpartition("model.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"first.base_layer.bias"} | {f"first.bora_adapter.default.{part}" for part in ("A", "sigma", "B")}
    with pytest.warns(UserWarning, match="bias configured to be 'bora_only'"), model.disable_adapter():
        pass


class EightBitLinear(nn.Module):
    """A weight in 8-bit integers with one scale."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None
        self.store(weight)

    def store(self, weight: Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantized(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized())


class EightBitBackend(QuantizationBackend):
    layer_type = "linear"
    supports_merge = True
    backend_name = "eight bit"

    def get_base_weight(self, base_layer: EightBitLinear) -> Tensor:
        return base_layer.dequantized()

    def set_base_weight(self, peft_layer: BoraLayer, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().store(weight_data)


def test_a_quantized_base_runs_through_its_own_call_and_merges_through_its_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(layer: nn.Module, **_: object) -> QuantizationBackend | None:
        return EightBitBackend() if isinstance(layer, EightBitLinear) else None

    for module in (bora_fl.adapters.layer, bora_fl.adapters.model):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)
    torch.manual_seed(0)
    base = EightBitLinear(torch.randn(8, 12))
    config = BoraConfig(num_blocks=4, r=2, target_modules=["0"], init_weights=False)
    with pytest.warns(UserWarning, match="Unsupported layer type"):  # PEFT's list of shapes does not know this class
        model = get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    assert "quantization_backend='eight bit'" in repr(layer)
    x = torch.randn(5, 12)
    expected = nn.functional.linear(x, base.dequantized() + layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    step = base.scale.item()
    assert base.weight.dtype == torch.int8
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.5 * step * x.abs().sum(-1).max().item())
