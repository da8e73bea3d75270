"""A language model as one GGUF file, which llama.cpp and Ollama run.

Layers of Llama's shape are the same in transformers and in llama.cpp but for one thing: transformers rotates the first
half of a head with its second half, llama.cpp each even row with the odd one after it. So the rows of Llama's queries
and keys are put in that order. Qwen2's stay, as llama.cpp rotates them in halves too.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bora_fl.config import ConfigError
from bora_fl.exporting.gguf_tokenizer import vocabulary
from bora_fl.paths import atomically

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""Classes of transformers, and llama.cpp's name for them."""

_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
"""What GGUF calls a dtype, and a file of it."""


def write_gguf(model: Any, tokenizer: Any, path: Path, name: str, dtype: str = "") -> None:
    """Write a model and its tokenizer.

    Args:
        model: Of a class in `ARCHITECTURES`, with nothing of PEFT in it.
        tokenizer: Its tokenizer.
        path: The file.
        name: Of the model, for whoever lists it.
        dtype: Of the matrices, as they are by default. Vectors are float32.

    Raises:
        ConfigError: If llama.cpp would not run this model as transformers does, or its tokenizer is not converted here.
    """
    import gguf

    architecture = _architecture(model)
    words = vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    wanted = getattr(torch, dtype) if dtype else model.get_input_embeddings().weight.dtype
    tensors = [(place, each, wanted if each.ndim > 1 else torch.float32) for place, each in _tensors(model)]
    with atomically(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[_TYPES[wanted][1]])
        _add_shape(writer, model)
        writer.add_tokenizer_model(words.model)
        writer.add_tokenizer_pre(words.cut)
        writer.add_token_list(words.tokens)
        writer.add_token_types(words.kinds)
        if words.merges:
            writer.add_token_merges(words.merges)
        if words.scores:
            writer.add_token_scores(words.scores)
            writer.add_add_space_prefix(words.prefix_space)
        _add_special_tokens(writer, tokenizer)
        for place, tensor, kind in tensors:
            raw = gguf.GGMLQuantizationType[_TYPES[kind][0]]
            writer.add_tensor_info(place, tensor.shape, np.dtype(np.float32), tensor.numel() * kind.itemsize, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, tensor, kind in tensors:  # one at a time, so that no second model lies in memory
            writer.write_tensor_data(_bytes(_turned(place, tensor, model), kind))
        writer.close()


def _architecture(model: Any) -> str:
    """llama.cpp's name for a model.

    Raises:
        ConfigError: If it is none of those, or its settings are.
    """
    kind, config = type(model).__name__, model.config
    if kind.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"--as gguf: the model is a {kind}, and llama.cpp runs language models; export it with --as merged"
        )
    if kind not in ARCHITECTURES:
        raise _unknown(f"the model is a {kind}, and only {', '.join(ARCHITECTURES)} are")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear") and (rope, ARCHITECTURES[kind]) != ("llama3", "llama"):
        raise _unknown(f"the positions of this {kind} are of the kind {rope}, which is not")
    if config.hidden_act != "silu":
        raise _unknown(f"the activation of this {kind} is {config.hidden_act}, and only silu is")
    return ARCHITECTURES[kind]


def _add_shape(writer: Any, model: Any) -> None:
    import gguf

    config = model.config
    head = _head_size(config)
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)
    # llama.cpp has no window in these architectures: up to its length there is no difference.
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _add_special_tokens(writer: Any, tokenizer: Any) -> None:
    for name, index in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
    ):
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    added = tokenizer("").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id in added)
    writer.add_add_eos_token(added[-1:] == [tokenizer.eos_token_id] and len(added) > (tokenizer.bos_token_id in added))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file, by llama.cpp's name for it.

    Raises:
        ConfigError: If it has no name for one.
    """
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(model))
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    if model.config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequency_factors(model)
    for ours, tensor in model.state_dict().items():
        if ours == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is none
        place = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise _unknown(f"this {type(model).__name__} has the tensor {ours}, which is not")
        yield place, tensor


def _frequency_factors(model: Any) -> torch.Tensor:
    """By how much each of a head's frequencies is lower than without scaling, ``[head size / 2]``."""
    scaled: torch.Tensor = model.model.rotary_emb.inv_freq.float()
    head = _head_size(model.config)
    plain: torch.Tensor = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2) / head)
    return plain / scaled


def _turned(place: str, tensor: torch.Tensor, model: Any) -> torch.Tensor:
    """A tensor with its rows in llama.cpp's order: of a Llama's head, a row of either half after the other."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place.split(".")[-2])
    if heads is None or ARCHITECTURES[type(model).__name__] != "llama":
        return tensor
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _bytes(tensor: torch.Tensor, kind: torch.dtype) -> np.ndarray[Any, Any]:
    """A tensor's memory in a dtype that NumPy may not have."""
    return tensor.detach().cpu().to(kind).contiguous().flatten().view(torch.uint8).numpy()


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        f"--as gguf: {what} converted here; export with --as merged, and run llama.cpp's convert_hf_to_gguf.py on that "
        "folder"
    )
