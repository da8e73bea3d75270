"""A base delta and an adapter say the same, on a model whose weights lie transposed; which head is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from transformers import GPT2Config, GPT2LMHeadModel

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, ConfigError, ModelSettings, Settings, StrategySettings
from bora_fl.models import FederatedModel
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import build
from bora_fl.strategies.server_state import ServerState

SIZES = {"c_attn": (24, 8), "attn.c_proj": (8, 8), "c_fc": (32, 8), "mlp.c_proj": (8, 32)}  # [m, n] in GPT-2


def gpt2(method: str, num_blocks: int, dtype: torch.dtype = torch.float64) -> FederatedModel:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    ).to(dtype)
    adapter = AdapterSettings(
        method=method, rank=2, num_blocks=num_blocks, alpha=4.0, target_modules="c_attn,c_proj,c_fc"
    )
    model = FederatedModel(base.eval(), adapter, ModelSettings(task="causal-lm"), seed=0)
    model.model.eval()
    return model


def drawn(model: FederatedModel) -> AdapterState:
    """The model's state with a B that is not zero."""
    state, generator = model.read(), torch.Generator().manual_seed(1)
    layers = {
        name: BlockFactors(torch.randn(f.B.shape, generator=generator), f.sigma, f.A, f.scaling)
        for name, f in state.layers.items()
    }
    return AdapterState(layers, state.tensors)


def logits(model: FederatedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=torch.arange(8).view(2, 4)).logits.double()


@pytest.mark.parametrize(("method", "num_blocks"), [("bora", 1), ("bora", 4), ("lora", 1)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_delta_in_the_weights_gives_the_logits_of_the_adapter(method: str, num_blocks: int) -> None:
    model = gpt2(method, num_blocks)
    assert {f.shape for f in model.read().layers.values()} == set(SIZES.values())
    start, moved = model.read(), drawn(model)
    before = logits(model)
    model.write(moved)
    adapted = logits(model)
    model.write(start)
    saved = {name: model.save_base(name) for name in moved.layers}
    assert torch.equal(logits(model), before)
    model.add_to_base(moved.layers)
    difference = (adapted - before).abs().max()
    assert difference > 0.1
    assert (logits(model) - adapted).abs().max() < 1e-5 * difference  # the state travels in float32
    model.restore_base(saved)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("method", "num_blocks"), [("bora", 4), ("lora", 1)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_state_is_written_and_read_back(method: str, num_blocks: int) -> None:
    model = gpt2(method, num_blocks, torch.float32)
    moved = drawn(model)
    model.write(moved)
    for name, factors in model.read().layers.items():
        torch.testing.assert_close(factors.dense(), moved.layers[name].dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "num_blocks"), [("bora", 4), ("lora", 1), ("ravan", 4)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_what_is_read_is_float32_whatever_the_adapter_is_and_a_copy(method: str, num_blocks: int) -> None:
    model = gpt2(method, num_blocks, torch.float64)
    state = model.read()
    for tensor in [*(t for f in state.layers.values() for t in (f.A, f.B, f.sigma)), *state.tensors.values()]:
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
        tensor.fill_(7.0)
    assert not any(bool((p == 7).all()) for p in model.all_trained_parameters())


def test_a_base_that_cannot_be_written_is_named() -> None:
    model = gpt2("bora", 2)
    name = next(iter(model.read().layers))
    model._layers[name].quantization_backend = ForwardOnlyQuantizationBackend("awq")
    with pytest.raises(ConfigError, match=rf"in layer '{name}' the base weight is quantized by awq.*strategy.name"):
        model.add_to_base(drawn(model).layers)


def trained_cores(model: FederatedModel, seed: int) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    """What a client sends after its cores and scales went anywhere, and every layer's update."""
    torch.manual_seed(seed)
    model.train_only(frozenset({"tensors"}))
    with torch.no_grad():
        for parameter in model.other_parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.read(), deltas(model)


def deltas(model: FederatedModel) -> dict[str, torch.Tensor]:
    return {name: layer.delta("default").double() for name, layer in model._layers.items()}


@pytest.mark.parametrize("method", ["ravan", "dense-core"])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 5.0, 2.5)])
def test_the_mean_of_cores_is_the_mean_of_the_products(method: str, weights: tuple[float, ...]) -> None:
    settings = Settings(
        strategy=StrategySettings(name="fedavg"), adapter=AdapterSettings(method=method, rank=2, num_blocks=4)
    )
    server, client = gpt2(method, 4, torch.float32), gpt2(method, 4, torch.float32)
    start = server.read()
    assert {name.rpartition(".")[2] for name in start.tensors} == {"H"}  # the scales stay with the client
    updates, wanted = [], dict.fromkeys(deltas(server), torch.zeros(()))
    for k, weight in enumerate(weights):
        client.write(start)
        state, products = trained_cores(client, k)
        updates.append(ClientUpdate(k, weight, state))
        wanted = {name: wanted[name] + weight / sum(weights) * product for name, product in products.items()}
        client.write(state)  # where the server's model would start from this client alone, it is this client's
        for name, product in deltas(client).items():
            torch.testing.assert_close(product, products[name], rtol=1e-5, atol=1e-6)
    after, _ = build(settings).aggregate(ServerState.start(start), updates, 1)
    server.write(after.current)
    for name, product in deltas(server).items():
        torch.testing.assert_close(product, wanted[name], rtol=1e-5, atol=1e-5)
    assert all(bool((scales == 1).all()) for scales in server._scales.values())
    assert server.num_trained == sum(p.numel() + p.shape[:-2].numel() for p in start.tensors.values())


SMALL = {"vocab_size": 12, "num_labels": 3}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bart": ("classification_head", {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}),
    "T5": ("classification_head", {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}),
    "XLNet": ("sequence_summary logits_proj", {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}),
    "DistilBert": ("pre_classifier classifier", {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}),
    "GPT2": ("score", {"n_embd": 8, "n_layer": 1, "n_head": 2}),
}
MORE = {"Bart": {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}}
MORE |= {"T5": {"decoder_start_token_id": 0, "eos_token_id": 2}, "GPT2": {"bos_token_id": 0, "eos_token_id": 2}}


def classifier(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **HEADS[kind][1], **MORE.get(kind, {}), pad_token_id=1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("whole", ["", "pooler"])
def test_what_is_drawn_beside_the_body_and_not_trained_is_saved(whole: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(**SMALL, **sizes, pooler_hidden_size=8)
    torch.manual_seed(9)
    body = transformers.DebertaV2Model(config).state_dict()

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        model = transformers.DebertaV2ForSequenceClassification(config).eval()
        model.deberta.load_state_dict(body)  # which comes from the base model's files
        return model

    names = "query_proj,value_proj"
    adapter = AdapterSettings(rank=2, num_blocks=2, target_modules=names, modules_to_save=whole)
    model = FederatedModel(drawn(0), adapter, ModelSettings(task="classification"), seed=0)
    assert {name.partition(".")[0] for name in model.read().tensors} == {"classifier", *whole.split()}
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save(tmp_path, [])
    ids = torch.tensor([[4, 5, 6, 2], [7, 4, 9, 2]])
    with torch.no_grad():
        expected = model.model.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(drawn(1), str(tmp_path)).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("task", ["classification", "multi-label"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_the_head_is_trained_and_saved_whatever_its_name(task: Any, kind: str, tmp_path: Path) -> None:
    adapter = AdapterSettings(method="lora", rank=2, target_modules="all-linear")
    model = FederatedModel(classifier(kind), adapter, ModelSettings(task=task), seed=0)
    assert {name.partition(".")[0] for name in model.read().tensors} == set(HEADS[kind][0].split())
    assert not any(name.startswith(tuple(HEADS[kind][0].split())) for name in model.read().layers)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save(tmp_path, [])
    fresh = classifier(kind)
    with torch.no_grad():
        for name in HEADS[kind][0].split():  # a head is drawn anew by whoever loads the base model
            for parameter in fresh.get_submodule(name).parameters():
                parameter.zero_()
        ids = torch.tensor([[4, 5, 6, 2], [7, 4, 9, 2]])
        expected = model.model.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["bora", "lora"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, as it adapts the layer
def test_an_output_layer_that_shares_the_embeddings_weight_is_adapted_alone(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(config).eval()
    adapter = AdapterSettings(method=method, rank=2, num_blocks=2, target_modules="q_proj,lm_head")
    model = FederatedModel(base, adapter, ModelSettings(task="causal-lm"), seed=0)
    start, moved, before = model.read(), drawn(model), logits(model)
    model.write(moved)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    model.write(start)
    saved = {name: model.save_base(name) for name in moved.layers}
    model.add_to_base(moved.layers)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    model.restore_base(saved)
    model.write(moved)
    model.model.merge_and_unload().save_pretrained(tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = merged(input_ids=torch.arange(8).view(2, 4)).logits.detach().double()
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4)
