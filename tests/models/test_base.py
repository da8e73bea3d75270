"""What a causal language model is, and what only looks like one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, LlamaModel

from bora_fl.config import AdapterSettings, ConfigError, ModelSettings
from bora_fl.models import FederatedModel, load_base, load_tokenizer
from bora_fl.models.base import require_whole
from bora_fl.predicting.prediction import classify


def sees_ahead(model: torch.nn.Module) -> bool:
    """Whether an earlier token's logits change with the last token."""
    one, other = torch.tensor([[7, 8, 9]]), torch.tensor([[7, 8, 10]])
    with torch.no_grad():
        return not torch.equal(model.eval()(one).logits[:, :2], model(other).logits[:, :2])


def causal(folder: Path) -> ModelSettings:
    return ModelSettings(name=str(folder), task="causal-lm")


def test_a_decoder_is_loaded(tiny_causal: Path) -> None:
    assert not sees_ahead(load_base(causal(tiny_causal), None, 0))


@pytest.mark.parametrize("decoder", [False, True])
def test_an_encoder_is_refused_and_a_decoder_of_its_kind_is_not(decoder: bool, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=decoder,
    )
    (AutoModelForCausalLM.from_config(config) if decoder else BertForMaskedLM(config)).save_pretrained(tmp_path)
    assert sees_ahead(AutoModelForCausalLM.from_pretrained(tmp_path)) != decoder
    if decoder:
        load_base(causal(tmp_path), None, 0)
        return
    with pytest.raises(ConfigError, match=r"model.task = 'causal-lm': bert is an encoder.*set model.task to class"):
        load_base(causal(tmp_path), None, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_its_head_is_refused_unless_the_embeddings_are_it(
    tied: bool, tiny_causal: Path, tmp_path: Path
) -> None:
    model = LlamaModel.from_pretrained(tiny_causal)
    model.config.tie_word_embeddings = tied
    model.save_pretrained(tmp_path)
    if tied:
        load_base(causal(tmp_path), None, 0)
        return
    with pytest.raises(ConfigError, match="it was saved as LlamaModel, without the head"):
        load_base(causal(tmp_path), None, 0)


def test_files_that_lack_a_tensor_are_refused(tiny_causal: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"its files lack model.layers.1.mlp.down_proj.weight.*\(3 tensors\)"):
        load_base(causal(tmp_path), None, 0)


@pytest.mark.parametrize("load", [lambda settings: load_base(settings, None, 0), require_whole])
def test_a_language_model_whose_files_lack_its_head_is_refused(load, tiny_causal: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ConfigError, match=r"model\.name = .*its files lack lm_head\.weight \(1 tensor\).*saved as a causal"
    ):
        load(causal(tmp_path))


def test_files_that_hold_all_or_are_not_here_are_not_refused(tiny_causal: Path, tmp_path: Path) -> None:
    require_whole(causal(tiny_causal))
    tied = AutoModelForCausalLM.from_pretrained(tiny_causal, tie_word_embeddings=True)
    tied.tie_weights()
    tied.save_pretrained(tmp_path)
    require_whole(causal(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    require_whole(causal(tmp_path))


def test_the_attention_is_the_one_that_is_asked_for(tiny_causal: Path) -> None:
    settings = causal(tiny_causal)
    eager = load_base(settings.model_copy(update={"attention": "eager"}), None, 0)
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model.attention = 'flash_attention_2': .*set model.attention to auto"):
        load_base(settings.model_copy(update={"attention": "flash_attention_2"}), None, 0)


@pytest.mark.parametrize("known", [None, 3, 1], ids=["none", "another", "the end's"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("task", ["classification", "multi-label"])
def test_a_decoders_head_reads_the_same_token_alone_and_in_a_batch(
    task: Any, padded: bool, known: int | None, tiny_causal: Path, tmp_path: Path
) -> None:
    """Whatever the model's config says of padding: the tokenizer is what fills batches up."""
    source = AutoModelForCausalLM.from_pretrained(tiny_causal)
    source.config.pad_token_id = known
    source.config.eos_token_id = source.generation_config.eos_token_id = [6, 1]
    source.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    if not padded:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path), task=task)
    model, tokenizer = load_base(settings, ["a", "b", "c"], 0).eval(), load_tokenizer(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    (alone,) = classify(model, tokenizer, ["film is"], 16)
    first, _ = classify(model, tokenizer, ["film is", "the film is good or bad or the film"], 16)
    assert first == (alone[0], pytest.approx(alone[1], rel=1e-4))


def test_a_language_model_with_several_ends_is_loaded_and_saved(tiny_causal: Path, tmp_path: Path) -> None:
    """As Llama 3's models for conversations."""
    source = AutoModelForCausalLM.from_pretrained(tiny_causal)
    source.config.pad_token_id, source.config.eos_token_id = None, [6, 1]
    source.save_pretrained(tmp_path)
    model = load_base(causal(tmp_path), None, 0)
    assert model.config.pad_token_id == 6
    assert model.config.eos_token_id == [6, 1]
    model.save_pretrained(tmp_path / "again")
    assert load_base(causal(tmp_path / "again"), None, 0).config.eos_token_id == [6, 1]


def test_modules_that_are_trained_whole_are_part_of_the_state(tiny_causal: Path) -> None:
    settings, adapter = causal(tiny_causal), AdapterSettings(rank=2, num_blocks=4, target_modules="q_proj")
    whole = adapter.model_copy(update={"modules_to_save": "lm_head, layers.1.input_layernorm"})
    model = FederatedModel(load_base(settings, None, 0), whole, settings, 0)
    state = model.read()
    assert set(state.tensors) == {"lm_head.weight", "model.layers.1.input_layernorm.weight"}
    model.train_only(frozenset({"tensors"}))
    assert len(model.trained_parameters()) == 2
    for tensor in state.tensors.values():
        tensor += 1
    model.write(state)
    assert torch.equal(model.read().tensors["lm_head.weight"], state.tensors["lm_head.weight"])
    with pytest.raises(ConfigError, match=r"adapter.modules-to-save = 'lm_haed': the model has no module 'lm_haed'"):
        FederatedModel(
            load_base(settings, None, 0), adapter.model_copy(update={"modules_to_save": "lm_haed"}), settings, 0
        )
