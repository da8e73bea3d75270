import copy
import json
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bora_fl.adapters import BoraConfig, read_factors
from bora_fl.adapters.convert import adapter_to_lora, lora_error, save_as_lora


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"up": nn.Linear(12, 18), "down": nn.Linear(18, 6), "last": Conv1D(12, 6)})
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["down"](self.body["up"](x).relu())
        return self.head(self.body["last"](x))


def model_and_bora(**settings: object) -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    model = Mixed().eval()
    config = BoraConfig(
        **{"r": 2, "num_blocks": 3, "target_modules": ["up", "down"], "init_weights": False, **settings}
    )
    return model, get_peft_model(copy.deepcopy(model), config)


SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "scaled": {"use_rslora": True, "bora_alpha": 5},
    "identity": {"sigma_transform": "identity", "num_blocks": 6},
    "one block": {"num_blocks": 1},
    "other ranks": {"rank_pattern": {"up": 4}, "alpha_pattern": {"down": 3}},
    "Conv1D": {"target_modules": ["last"], "fan_in_fan_out": True},
    "trained bias": {"bias": "bora_only"},
    "head": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_the_lora_and_computes_the_same(name: str, tmp_path: Path) -> None:
    base, bora = model_and_bora(**SETTINGS[name])
    with torch.no_grad():
        for parameter in bora.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.5)
    x = torch.randn(7, 12)
    if name in ("trained bias", "head"):
        with pytest.warns(UserWarning, match="merge the model for those"):
            save_as_lora(bora, tmp_path / "lora")
    else:
        save_as_lora(bora, tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(lora(x), bora(x), rtol=1e-5, atol=1e-6)
    assert (lora(x) - base(x)).abs().max() > 0.03


def test_the_lora_is_what_servers_read(tmp_path: Path) -> None:
    _, bora = model_and_bora(**SETTINGS["other ranks"])
    save_as_lora(bora, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (12, 12, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert sorted(config["target_modules"]) == ["down", "up"]
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: list(value.shape) for key, value in state.items()} == {
        "base_model.model.body.up.lora_A.weight": [12, 12],
        "base_model.model.body.up.lora_B.weight": [18, 12],
        "base_model.model.body.down.lora_A.weight": [12, 18],
        "base_model.model.body.down.lora_B.weight": [6, 12],
    }
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert not state["base_model.model.body.down.lora_A.weight"][6:].any()


def test_modules_that_share_a_last_name_with_others_are_named_in_full() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6)), "b": nn.Sequential(nn.Linear(6, 6))})
    config, _ = adapter_to_lora(get_peft_model(model, BoraConfig(num_blocks=2, target_modules=["a.0"])))
    assert config.target_modules == {"a.0"}


def test_one_block_with_sigma_one_gives_back_a_and_b() -> None:
    _, bora = model_and_bora(num_blocks=1, sigma_transform="identity", bora_alpha=6)
    _, state = adapter_to_lora(bora)
    adapter = bora.base_model.model.body["up"].adapter("default")
    assert torch.equal(state["base_model.model.body.up.lora_A.weight"], adapter.A)
    torch.testing.assert_close(state["base_model.model.body.up.lora_B.weight"], 3 * adapter.B, rtol=1e-6, atol=0)


def test_the_converted_adapter_keeps_its_name_and_leaves_the_model_alone() -> None:
    base, bora = model_and_bora()
    bora.add_adapter("other", BoraConfig(r=1, num_blocks=2, target_modules=["down"], init_weights=False))
    before = get_peft_model_state_dict(bora, adapter_name="other")
    config, state = adapter_to_lora(bora, "other")
    assert isinstance(config, LoraConfig)
    after = get_peft_model_state_dict(bora, adapter_name="other")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    lora = get_peft_model(copy.deepcopy(base), config)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    bora.set_adapter("other")
    x = torch.randn(4, 12)
    torch.testing.assert_close(lora(x), bora(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_name='missing'"):
        adapter_to_lora(bora, "missing")


def test_pefts_own_conversion_accepts_the_adapter() -> None:
    base, bora = model_and_bora()
    config, state = convert_to_lora(bora, rank=6)
    lora = get_peft_model(copy.deepcopy(base), config)
    set_peft_model_state_dict(lora, state)
    x = torch.randn(4, 12)
    torch.testing.assert_close(lora(x), bora(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "other ranks", "one block", "Conv1D"])
@pytest.mark.parametrize("rank", [1, 3, 5, 40])
def test_a_lower_rank_is_the_truncated_svd_and_its_error_is_what_it_loses(name: str, rank: int) -> None:
    _, bora = model_and_bora(**SETTINGS[name])
    config, state = adapter_to_lora(bora, rank=rank)
    assert config.r == config.lora_alpha == rank
    lost = whole = 0.0
    for layer, factors in read_factors(bora).items():
        dense = factors.to(torch.float64).dense()
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        A, B = (state[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        assert (A.shape[0], B.shape[1]) == (rank, rank)
        torch.testing.assert_close(B.double() @ A.double(), best, rtol=1e-5, atol=1e-6 * float(s[0]))
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    assert lora_error(bora, rank) == pytest.approx((lost / whole) ** 0.5, rel=1e-4, abs=1e-6)


def test_a_rank_below_one_is_refused() -> None:
    _, bora = model_and_bora()
    with pytest.raises(ValueError, match="rank is 0"):
        adapter_to_lora(bora, rank=0)
