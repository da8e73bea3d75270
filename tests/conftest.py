"""A tiny real BERT and a tiny data set with three natural clients, so that whole federations run in seconds."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from bora_fl.paths import state_in

# Ray's workers yield to everything else by default: beside other tests they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")

GOOD = ["good", "great", "fine", "happy", "nice"]
BAD = ["bad", "awful", "sad", "poor", "wrong"]
PLAIN = ["the", "a", "film", "book", "phone", "was", "is", "very", "it", "and"]


@pytest.fixture(autouse=True)
def any_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's command, run in this process, lets it import installed extensions alone for good."""
    monkeypatch.setattr("bora_fl.config.extensions._installed_only", False)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes ledgers or audit logs to the user's own state folder."""
    with state_in(tmp_path_factory.mktemp("state")):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained BERT of two layers, 16 wide, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PLAIN, *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama of two layers, 16 wide, and a tokenizer of words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("causal")
    words = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *PLAIN, *GOOD, *BAD]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": None, "eos_token_id": 6, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **marks)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file: 240 training and 60 test sentences of two classes, from three domains with different mixtures."""
    rng = random.Random(0)
    rows = []
    for number in range(300):
        domain = ["films", "books", "phones"][number % 3]
        label = int(rng.random() < [0.3, 0.5, 0.7][number % 3])
        words = [*rng.sample(PLAIN, 4), *rng.sample(GOOD if label else BAD, 2)]
        rng.shuffle(words)
        split = "test" if number >= 240 else "train"
        rows.append((f"{' '.join(words)}", label, ["bad", "good"][label], domain, split))
    path = tmp_path_factory.mktemp("data") / "tiny.parquet"
    pd.DataFrame(rows, columns=["text", "label", "label_name", "domain", "split"]).to_parquet(path)
    return path


@pytest.fixture
def tiny_config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> dict[str, bool | int | float | str]:
    """A run config of three short rounds over the three domains, from a random head to the last round's adapter."""
    return {
        "model.name": str(tiny_model),
        "model.max-length": 16,
        "adapter.rank": 2,
        "adapter.num-blocks": 4,
        "adapter.alpha": 4.0,
        "data.name": str(tiny_data),
        "head.init": "random",
        "run.keep-best": False,
        "train.local-steps": 4,
        "train.batch-size": 8,
        "train.learning-rate": 0.02,
        "strategy.name": "fedavg",
        "train.precision": "fp32",
        "run.num-rounds": 3,
        "run.threads": 1,
        "run.output-dir": str(tmp_path / "run"),
    }
