"""GGUF files, read back by transformers and by llama.cpp, whose readers know nothing of what writes here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.exporting import export_gguf, load_run
from bora_fl.exporting.gguf_file import write_gguf
from bora_fl.exporting.gguf_tokenizer import vocabulary
from bora_fl.simulations.engine import simulate

gguf = pytest.importorskip("gguf", reason="gguf is not here")

TEXTS = [
    "the film is good, and it's great!",
    "  a sad phone in 2024\n\nit was 17% awful",
    "naïve Zoë → 日本",
    "<user>hi<end>",
]
CHAT = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
MARKS = ["<pad>", "<end>", "<user>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None}
SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 32}
SCALED |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(cut: str = "gpt-2") -> Any:
    """A byte-level tokenizer trained on a few sentences."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as d
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    parts = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[cut]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(parts), d.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", extra_special_tokens=["<user>"], chat_template=CHAT
    )


def pieces() -> Any:
    """A tokenizer as SentencePiece's converted ones are: bytes as a last resort, spaces as `▁`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import LlamaTokenizer

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.ByteFallback()
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(TEXTS[:2] * 4, trainers.BpeTrainer(vocab_size=340, special_tokens=marks))
    trained = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, chat_template=CHAT)


def llama(tokenizer: Any, rows: int = 0, kind: str = "Llama", **more: Any) -> Any:
    """An untrained model with grouped queries, whose vectors are not all ones."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=rows or len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    config.update(SIZES | ({} if kind == "Qwen2" else {"head_dim": 8}) | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits.float()
    return out


def read(file: Path, config: Any = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {} if config is None else {"config": config}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **more)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def same_tokens(ours: Any, theirs: Any, special: bool = True) -> None:
    for text in TEXTS:
        expected = ours(text, add_special_tokens=special).input_ids
        assert theirs(text, add_special_tokens=special).input_ids == expected, text
    said = [{"role": "user", "content": TEXTS[0]}]
    assert theirs.apply_chat_template(said, tokenize=False) == ours.apply_chat_template(said, tokenize=False)
    assert theirs.eos_token_id == ours.eos_token_id


@pytest.fixture
def tiny_run(tiny_causal: Path, tiny_config, tmp_path: Path) -> Path:
    """A run of two rounds on a tiny Llama with a byte-level tokenizer."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "base")
    llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    dialog = {"messages": [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is good"}]}
    (tmp_path / "dialogs.jsonl").write_text(f"{json.dumps(dialog)}\n" * 60)
    causal = {"model.name": str(tmp_path / "base"), "model.task": "causal-lm", "model.max-length": 32}
    causal |= {"data.name": str(tmp_path / "dialogs.jsonl"), "data.format": "messages", "head.init": "random"}
    causal |= {"data.partition": "iid", "data.num-partitions": 2, "adapter.target-modules": "q_proj,k_proj,v_proj"}
    return simulate(tiny_config | causal | {"run.num-rounds": 2, "train.learning-rate": 0.3}, 2)


@pytest.mark.parametrize("dtype", ["", "float16", "bfloat16"])
def test_a_run_s_file_gives_the_run_s_logits_and_tokens(tiny_run: Path, tmp_path: Path, dtype: str):
    options = ["--dtype", dtype] if dtype else []
    done = CliRunner().invoke(cli, ["export", str(tiny_run), str(tmp_path / "out"), "--as", "gguf", *options])
    assert done.exit_code == 0, done.output
    file = tmp_path / "out" / "model.gguf"
    assert str(file) in done.output.replace("\n", "")
    model, tokenizer = read(file)
    trained, ours = load_run(tiny_run)
    expected = logits(trained.model)
    with trained.model.disable_adapter():
        assert (logits(trained.model) - expected).abs().max() > 0.01  # so that a file of the base model would fail
    if dtype:  # what the file should hold: the merged model with its matrices rounded
        merged = trained.model.merge_and_unload()
        with torch.no_grad():
            for tensor in merged.parameters():
                tensor.copy_(tensor.to(getattr(torch, dtype)) if tensor.ndim > 1 else tensor)
        expected = logits(merged)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    same_tokens(ours, tokenizer)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.attn_q.weight"] == {"": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert stored["output_norm.weight"] == "F32"
    assert "output.weight" not in stored


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}}),
        ("Mistral", {}),
        ("Qwen2", {}),
    ],
)
def test_each_architecture_is_read_as_it_was(kind: str, more: dict[str, Any], tmp_path: Path):
    tokenizer = byte_level("smollm")
    model = llama(tokenizer, rows=len(tokenizer) + 5, kind=kind, **more)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "tiny")
    # Neither biases nor scaled positions does transformers see in a file.
    again, words = read(tmp_path / "model.gguf", model.config if more else None)
    if "rope_parameters" in more:
        fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
        assert fields["llama.rope.scaling.type"].contents() == "linear"
        assert fields["llama.rope.scaling.factor"].contents() == 2.0
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    same_tokens(tokenizer, words)


@pytest.mark.parametrize(("window", "context"), [(16, 16), (None, 64), (4096, 64)])
def test_the_context_is_no_longer_than_a_window_that_llama_cpp_leaves_out(window: Any, context: int, tmp_path: Path):
    tokenizer = byte_level()
    write_gguf(llama(tokenizer, kind="Mistral", sliding_window=window), tokenizer, tmp_path / "model.gguf", "tiny")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == context


def test_scaled_positions_are_written_as_factors_of_the_frequencies(tmp_path: Path):
    tokenizer = byte_level("llama-bpe")
    model = llama(tokenizer, rope_parameters=SCALED)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "tiny")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.tensor(factors), model.model.rotary_emb.inv_freq)
    assert factors[0] == pytest.approx(1.0)  # a high frequency stays
    assert factors[-1] == pytest.approx(8.0)
    assert reader.fields["tokenizer.ggml.pre"].contents() == "llama-bpe"


def test_a_tokenizer_of_pieces_is_read_as_it_was(tmp_path: Path):
    tokenizer = pieces()
    write_gguf(llama(tokenizer), tokenizer, tmp_path / "model.gguf", "tiny")
    _, words = read(tmp_path / "model.gguf")
    same_tokens(tokenizer, words, special=False)  # transformers 5.20 does not see the next field
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.add_bos_token"].contents()
    kinds = vocabulary(tokenizer, len(tokenizer)).kinds
    assert [kinds[tokenizer.convert_tokens_to_ids(token)] for token in ("<unk>", "</s>", "<0x0A>", "▁")] == [2, 3, 6, 1]


def test_pieces_of_text_that_llama_cpp_would_not_change_so_are_refused():
    from tokenizers import normalizers, pre_tokenizers

    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = pieces()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer, core.normalizer = None, normalizers.Sequence(spaces)  # as older files have it
    assert vocabulary(tokenizer, len(tokenizer)).model == "llama"
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *spaces])
    with pytest.raises(ConfigError, match=r"normalizer Lowercase.*convert_hf_to_gguf\.py"):
        vocabulary(tokenizer, len(tokenizer))
    core.normalizer, core.pre_tokenizer = None, pre_tokenizers.Digits(individual_digits=True)
    with pytest.raises(ConfigError, match="pre-tokenizer Digits"):
        vocabulary(tokenizer, len(tokenizer))


def test_rows_without_a_token_are_marked_as_unused():
    tokenizer = byte_level()
    found = vocabulary(tokenizer, len(tokenizer) + 2)
    assert (found.tokens[-1], found.kinds[-1]) == (f"[PAD{len(tokenizer) + 1}]", 5)
    assert found.kinds[tokenizer.eos_token_id] == 3
    with pytest.raises(ConfigError, match="embedding"):
        vocabulary(tokenizer, len(tokenizer) - 1)


def test_what_is_not_converted_is_named_with_the_remedy(tiny_config, tiny_causal: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = simulate(tiny_config | {"run.num-rounds": 1}, 3)
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification.*language models.*--as merged$"):
        export_gguf(folder, tmp_path / "model.gguf")
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*--as merged.*convert_hf_to_gguf\.py"):
        write_gguf(other, None, tmp_path / "model.gguf", "tiny")
    model, words = AutoModelForCausalLM.from_pretrained(tiny_causal), AutoTokenizer.from_pretrained(tiny_causal)
    with pytest.raises(ConfigError, match=r"tokenizer is WordLevel.*--as merged"):
        write_gguf(model, words, tmp_path / "model.gguf", "tiny")
    good = byte_level()
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    for more, named in (({"hidden_act": "gelu"}, "gelu"), ({"rope_parameters": yarn}, "yarn")):
        with pytest.raises(ConfigError, match=named):
            write_gguf(llama(good, **more), good, tmp_path / "model.gguf", "tiny")
    assert not (tmp_path / "model.gguf").exists()


# Native threads of a server: in a process of their own. Its cache of keys and values is of 16 bits.
LLAMA_CPP = """
import json, sys, xllamacpp
for path in sys.argv[2:]:
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.cpuparams.n_threads = path, 64, 1, 1
    server = xllamacpp.Server(options)
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 4}
    done = server.handle_completions(asked | {"prompt": list(range(5, 25))})
    read = server.handle_completions(asked | {"prompt": sys.argv[1]})
    likely = done["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print("said", json.dumps([[row["id"] for row in likely], [row["logprob"] for row in likely], read["usage"]]))
"""


def test_llama_cpp_runs_the_files_as_transformers_does(tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not here")
    biased, linear = {"attention_bias": True}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    made = {
        "biased": (byte_level("smollm"), {"kind": "Llama", **biased}),
        "linear": (byte_level("gpt-2"), {"kind": "Llama", "rope_parameters": linear}),
        "scaled": (byte_level("llama-bpe"), {"kind": "Llama", "rope_parameters": SCALED}),
        "qwen2": (byte_level("gpt-2"), {"kind": "Qwen2"}),
        "pieces": (pieces(), {"kind": "Mistral"}),
    }
    expected = []
    for name, (tokenizer, more) in made.items():
        model = llama(tokenizer, **more)
        write_gguf(model, tokenizer, tmp_path / f"{name}.gguf", name)
        with torch.no_grad():
            likely = model(input_ids=torch.arange(5, 25)[None]).logits[0, -1].log_softmax(-1).topk(4)
        expected.append((likely.indices.tolist(), likely.values.tolist(), len(tokenizer(TEXTS[2]).input_ids)))
    files = [str(tmp_path / f"{name}.gguf") for name in made]
    command = [sys.executable, "-c", LLAMA_CPP, TEXTS[2], *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    for name, (ids, values, tokens), (its, its_values, usage) in zip(made, expected, said, strict=True):
        assert its == ids, name
        assert its_values == pytest.approx(values, abs=0.01), name
        assert usage["prompt_tokens"] == tokens, name


@pytest.mark.slow
def test_the_default_language_model(tmp_path: Path):
    """SmolLM2 with an adapter that changes it, to a file and back."""
    from peft import get_peft_model

    from bora_fl.adapters import BoraConfig
    from bora_fl.config import ModelSettings
    from bora_fl.models import load_base, load_tokenizer

    settings = ModelSettings(name="embedded:smollm2", task="causal-lm")
    tokenizer = load_tokenizer(settings)
    adapter = BoraConfig(r=4, num_blocks=3, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(load_base(settings, None, 0), adapter)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "bora_adapter" in name:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    write_gguf(merged, tokenizer, tmp_path / "model.gguf", "smollm2")
    again, words = read(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-4)
    same_tokens(tokenizer, words)
