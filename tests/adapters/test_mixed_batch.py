import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import bora_fl.adapters.mixed_batch as mixed_batch
from bora_fl.adapters import BoraConfig, BoraLayer

# Four adapters of one shape, two of another, and one that only some layers have.
ADAPTERS = {f"same{k}": {"r": 3, "num_blocks": 2} for k in range(4)}
ADAPTERS |= {f"other{k}": {"r": 2, "num_blocks": 4, "sigma_transform": "identity"} for k in range(2)}
ADAPTERS["partial"] = {"r": 5, "num_blocks": 1, "target_modules": ["c_fc"]}
NAMES = ["same2", "__base__", "other1", "same0", "partial", "same2", "other0", "same1", "same3", "__base__"]
SEVERAL_EACH = [name for name in ("same1", "same0", "same3") for _ in range(2)]  # one entry of the table for two rows
MARKS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def adapted(base: nn.Module, **settings: object) -> nn.Module:
    model = None
    for name, own in ADAPTERS.items():
        config = BoraConfig(**{"target_modules": ["c_attn", "c_fc"], "init_weights": False, **settings, **own})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def gpt2(dtype: torch.dtype = torch.float64, head: type = GPT2LMHeadModel, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16, **MARKS)
    return adapted(head(config).to(dtype), **settings)


def alone(model: nn.Module, name: str, **inputs: Tensor) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p.requires_grad_() for name, p in model.named_parameters() if "bora_adapter" in name}


@pytest.mark.parametrize("table_from", [2, 3, 99])
@pytest.mark.parametrize("names", [NAMES, SEVERAL_EACH])
def test_each_row_and_its_gradients_are_those_of_the_row_alone(names: list[str], table_from: int, monkeypatch) -> None:
    monkeypatch.setattr(mixed_batch, "_TABLE_FROM", table_from)
    model = gpt2()
    ids = torch.randint(1, 11, (len(names), 5), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(len(names), 5, 11, dtype=torch.float64)
    rows = [alone(model, name, input_ids=ids[k : k + 1])[0] for k, name in enumerate(names)]
    assert min((rows[k] - model(input_ids=ids[k : k + 1]).logits[0]).abs().max() for k in (0, 1, 2)) > 1e-3
    parameters = trained(model)
    expected = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(names):
        expected = expected + (alone(model, name, input_ids=ids[k : k + 1])[0] * weights[k]).sum()
        trained(model)  # set_adapter freezes the others
    alone_grads = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
    mixed = model(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad((mixed * weights).sum(), parameters.values(), allow_unused=True)
    for name, mine, theirs in zip(parameters, grads, alone_grads, strict=True):
        assert (theirs is not None) == (name.split(".")[-2] in names), name
        if theirs is None:
            assert mine is None
            continue
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_equals_the_rows_alone(autocast: bool) -> None:
    model = gpt2(torch.float32 if autocast else torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, BoraLayer):
            layer.bora_adapter.float()  # as PEFT keeps adapters over a half-precision base
    ids = torch.randint(1, 11, (len(NAMES), 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = model(input_ids=ids, adapter_names=NAMES).logits
        rows = torch.stack([alone(model, name, input_ids=ids[k : k + 1])[0] for k, name in enumerate(NAMES)])
    assert mixed.dtype == rows.dtype == torch.bfloat16
    assert (mixed - rows).float().norm() / rows.float().norm() < 2e-2


def test_modules_to_save_follow_their_adapter() -> None:
    model = gpt2(head=GPT2ForSequenceClassification, modules_to_save=["score"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
        ids = torch.randint(1, 11, (len(NAMES), 5))
        mixed = model(input_ids=ids, adapter_names=NAMES).logits
        rows = [alone(model, name, input_ids=ids[k : k + 1])[0] for k, name in enumerate(NAMES)]
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_generation_serves_each_row_with_its_adapter(kind: str, num_beams: int) -> None:
    torch.manual_seed(0)
    if kind == "decoder":
        model = gpt2()
    else:
        sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0))
        own = {"target_modules": ["q", "wi"]}
        ADAPTERS_T5 = {name: {**settings, **own} for name, settings in ADAPTERS.items()}
        model = get_peft_model(base.double(), BoraConfig(init_weights=False, **ADAPTERS_T5["same0"]), "same0")
        for name in list(ADAPTERS)[1:]:
            model.add_adapter(name, BoraConfig(init_weights=False, **ADAPTERS_T5[name]))
        model.double().eval()
    for parameter in trained(model).values():
        parameter.data.mul_(3)  # so that adapters change what is generated
    ids = torch.randint(1, 11, (len(NAMES), 4), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **options)
    rows = []
    for k, name in enumerate(NAMES):
        inputs = {"input_ids": ids[k : k + 1], "attention_mask": torch.ones(1, 4, dtype=torch.long), **options}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(**inputs)[0])
        else:
            model.set_adapter(name)
            rows.append(model.generate(**inputs)[0])
    assert torch.equal(mixed, torch.stack(rows))
    assert len({tuple(row.tolist()) for row in rows}) > 3


def lora() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))


def bora() -> nn.Module:
    return get_peft_model(nn.Sequential(nn.Linear(8, 8)), BoraConfig(target_modules=["0"], num_blocks=2, r=2))


MISTAKES = {
    "training": (["default"] * 3, lambda model: model.train()),
    "unknown": (["default", "nobody", "nowhere"], lambda model: model.eval()),
    "length": (["default"] * 2, lambda model: model.eval()),
    "merged": (["default"] * 3, lambda model: (model.eval(), model.merge_adapter())),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_the_words_of_lora_and_leave_nothing_behind(mistake: str) -> None:
    names, prepare = MISTAKES[mistake]
    messages = []
    for model in (bora(), lora()):
        prepare(model)
        with pytest.raises(ValueError, match="adapter") as caught:
            model(torch.randn(3, 8), adapter_names=names)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    model = bora().eval()
    with pytest.raises(ValueError, match="Length"):
        model(torch.randn(3, 8), adapter_names=["default"] * 2)
    assert model(torch.randn(3, 8)).shape == (3, 8)


def test_disabled_adapters_stay_disabled_and_activated_lora_is_refused() -> None:
    model, x = gpt2(), torch.arange(1, 5).view(2, 2)
    with model.disable_adapter():
        base = model(input_ids=x).logits
        assert torch.equal(model(input_ids=x, adapter_names=["same0", "same1"]).logits, base)
    assert torch.equal(model(input_ids=x, adapter_names=["__base__"] * 2).logits, base)
    with pytest.raises(ValueError, match="activated LoRA"):
        model(input_ids=x, alora_offsets=[0, 0])
