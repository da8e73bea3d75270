"""Quantized base models: what is quantized, that training over it is exact, and what comes out of a federation."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bora_fl.client.site import Site
from bora_fl.config import ConfigError, parse
from bora_fl.exporting import export_merged
from bora_fl.models import load_result, read_result
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.presets import PRESETS

bitsandbytes = pytest.importorskip("bitsandbytes")
ALL = frozenset({"A", "sigma", "B", "tensors"})


@pytest.fixture
def config(tiny_causal: Path, tmp_path: Path) -> dict[str, bool | int | float | str]:
    words = ["good", "bad", "great", "sad"]
    rows = [{"prompt": f"the film was {words[n % 4]}", "response": f"it was {words[n % 4]}"} for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "model.max-length": 16,
        "model.quantization": "4bit",
        "adapter.target-modules": "q_proj,v_proj,down_proj",
        "adapter.rank": 2,
        "adapter.num-blocks": 4,
        "data.name": str(tmp_path / "pairs.jsonl"),
        "data.partition": "iid",
        "train.precision": "fp32",
        "train.learning-rate": 0.05,
        "run.num-rounds": 2,
        "run.threads": 1,
        "run.output-dir": str(tmp_path / "run"),
    }


def dequantize(module: nn.Module) -> None:
    """Put linear layers with the same weights in the places of the quantized ones."""
    for name, child in module.named_children():
        if isinstance(child, bitsandbytes.nn.Linear4bit):
            plain = nn.Linear(child.in_features, child.out_features, bias=False)
            weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            setattr(module, name, plain)
        else:
            dequantize(child)


def gradients(site: Site) -> dict[str, torch.Tensor]:
    model = site.model()
    model.train_only(ALL)
    for parts in model.adapted_layers().values():
        torch.manual_seed(0)
        nn.init.normal_(parts.bora_adapter["default"].B, std=0.1)
    batch = site.data(0, 2).train.batch(range(8))
    model.model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_trained().items()}


def test_four_bits_are_nf4_with_double_quantization_in_the_body_alone(config):
    base = Site(parse(config))._base
    layers = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert type(base.lm_head) is nn.Linear


def test_gradients_over_a_quantized_base_are_those_over_the_weights_that_it_stands_for(config):
    site, plain = Site(parse(config)), Site(parse(config))
    dequantize(plain._base)
    found, wanted = gradients(site), gradients(plain)
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_eight_bits_train_too(config):
    site = Site(parse(config | {"model.quantization": "8bit"}))
    assert any(isinstance(m, bitsandbytes.nn.Linear8bitLt) for m in site._base.modules())
    full = gradients(Site(parse(config | {"model.quantization": "none"})))
    found = gradients(site)
    assert all(float((found[n] - g).norm()) <= 0.2 * float(g.norm()) for n, g in full.items() if "q_proj/B" in n)


def test_a_classifier_keeps_its_head_in_full(tiny_config):
    site = Site(parse(tiny_config | {"model.quantization": "4bit"}))
    model = site.model()
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in site._base.modules())
    assert [p.dtype for p in model.head_parameters()] == [torch.float32] * 2


def test_a_federation_over_a_quantized_base_exports_the_full_one_with_the_delta(config, tiny_causal, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = simulate(config, 2)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    result = read_result(folder)
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in load_result(result).model.modules())
    merged = AutoModelForCausalLM.from_pretrained(export_merged(folder, tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_causal)
    state = load_result(result).read()
    moved = {name: merged.get_submodule(name).weight - plain.get_submodule(name).weight for name in state.layers}
    for name, factors in state.layers.items():
        torch.testing.assert_close(moved[name], factors.dense(), rtol=1e-4, atol=1e-6)
    assert any(float(value.detach().abs().max()) > 1e-3 for value in moved.values())


@pytest.mark.parametrize(
    ("chosen", "remedy"),
    [
        ({"strategy.name": "refactor", "strategy.residual": "fold"}, "strategy.residual to carry or drop"),
        *(({"strategy.name": name}, "strategy.name to refactor") for name, row in PRESETS.items() if row.folds),
    ],
)
def test_what_folds_into_the_frozen_weights_is_refused(config, chosen, remedy: str):
    """The message names the setting that folds, and no other."""
    words = rf"model\.quantization = '4bit'.* rounded away; set model\.quantization to none, or {remedy}$"
    with pytest.raises(ConfigError, match=words) as caught:
        build(parse(config | chosen))
    assert ("strategy.residual" in str(caught.value)) == ("strategy.residual" in chosen)
    build(parse(config | {"strategy.residual": "carry"}))


def test_quantized_weights_are_not_trained(config):
    with pytest.raises(ConfigError, match=r"model\.quantization = '4bit' with adapter\.method = 'full'"):
        parse(config | {"adapter.method": "full"})
