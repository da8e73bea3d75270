"""Large files are read from the disk: the same rows, in a memory that does not grow with them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from bora_fl.config import ConfigError, DataSettings, ModelSettings
from bora_fl.data import client_data, flat, load_dataset, mapped, tokenize
from bora_fl.data.encoded import Encoded

ROWS = 600


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "PIECE_BYTES", 4096)
    monkeypatch.setattr(mapped, "_ROWS", 64)


def rows() -> list[dict[str, Any]]:
    """Some fields are there in later pieces alone, and some of another type."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"sun {i}", **({"name": "x"} if i > 400 else {})},
                {"role": "assistant", "content": "moon " * (i % 7)},
            ],
            "number": i if i < 300 else i + 0.5,
            "task": ["a", "b", "c"][i % 3],
            **({"late": "word"} if i > 500 else {}),
            "split": "test" if i % 10 == 0 else "train",
        }
        for i in range(ROWS)
    ]


def write(path: Path, found: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    else:
        flat_rows = [
            {"text": f'sun, "moon"\n{row["task"]}', "task": row["task"], "split": row["split"]} for row in found
        ]
        pa.csv.write_csv(pa.Table.from_pylist(flat_rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_the_rows_are_those_of_a_small_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path, rows())
    settings = DataSettings(name=str(path), label_column="", partition_by="task")
    whole = load_dataset(settings)
    monkeypatch.setattr("bora_fl.data.files.LARGE", 0)
    monkeypatch.setattr("bora_fl.data.loading._recent", None)
    found = load_dataset(settings)
    assert len(list((tmp_path / "cache" / "tables").glob("*/*.arrow"))) > 3
    assert found.settings == whole.settings
    for ours, wanted in ((found.train, whole.train), (found.test, whole.test)):
        assert ours is not None
        assert wanted is not None
        assert ours.to_list() == wanted.to_list()
    (tmp_path / "cache" / "tables").rename(tmp_path / "moved")
    write(path, rows()[:300])
    assert len(load_dataset(settings).train) < len(found.train)


def test_a_changed_file_is_read_anew_and_the_old_rows_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bora_fl.data.files.LARGE", 0)
    path = tmp_path / "rows.jsonl"
    settings = DataSettings(name=str(path), label_column="")
    for count in (200, 400):
        write(path, rows()[:count])
        loaded = load_dataset(settings)
        assert loaded.test is not None
        assert len(loaded.train) + len(loaded.test) <= count
    assert len(list((tmp_path / "cache" / "tables").glob("*-*"))) == 1


def test_tokens_on_the_disk_are_the_same(chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, rows())
    data, model = DataSettings(name=str(path), label_column="", partition_by="task"), ModelSettings(task="causal-lm")
    raw = load_dataset(data)
    wanted = tokenize(raw.train, raw.settings, model, chat)
    monkeypatch.setattr(flat, "LARGE", 100)
    monkeypatch.setattr("bora_fl.data.loading._ROWS", 50)
    found = tokenize(raw.train, raw.settings, model, chat)
    assert isinstance(found.tokens, np.memmap)
    for name in ("tokens", "targets", "begin", "lengths", "prompts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    client = client_data(data, model, chat, 1, 3, 0)
    assert isinstance(client.train, Encoded)
    assert client.train.batch(np.arange(4))["input_ids"].shape[0] == 4


@pytest.mark.parametrize("late", ["word", "7", "1.5", "2024-01-01"])
@pytest.mark.parametrize("early", ["", "3", "2.5", "true"])
def test_a_cell_of_another_kind_may_come_late(
    early: str, late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,note\n" + f"the film,{early}\n" * 400 + f"the film,{late}\n" * 400)
    settings = DataSettings(name=str(path), label_column="", test_split="")
    whole = load_dataset(settings).train["note"][:]
    monkeypatch.setattr("bora_fl.data.files.LARGE", 0)
    monkeypatch.setattr("bora_fl.data.loading._recent", None)
    assert load_dataset(settings).train["note"][:] == whole


def test_what_cannot_be_read_or_converted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bora_fl.data.files.LARGE", 0)
    path = tmp_path / "rows.jsonl"
    write(path, rows())
    with path.open("a") as file:
        file.write("no json\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_dataset(DataSettings(name=str(path)))
    assert not list((tmp_path / "cache" / "tables").glob("*-*"))
    write(path, rows()[:500])
    (tmp_path / "cache2").write_text("")
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache2"))
    with pytest.raises(ConfigError, match="BORA_FL_CACHE"):
        load_dataset(DataSettings(name=str(path)))


MEASURE = """
import sys, threading, time
import numpy as np
from transformers import AutoTokenizer
from bora_fl.config import DataSettings, ModelSettings
from bora_fl.data import client_data, files, flat, mapped
import bora_fl.data.partitions, datasets, flwr_datasets, pyarrow.json

path, folder, large = sys.argv[1], sys.argv[2], int(sys.argv[3])
files.LARGE = flat.LARGE = large
mapped.PIECE_BYTES = 1 << 20

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

tokenizer, most, done = AutoTokenizer.from_pretrained(folder), [0.0], []
tokenizer(["the film was good"] * 5000)
def watch():
    while not done:
        most[0] = max(most[0], anonymous())
        time.sleep(0.005)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
data = DataSettings(name=path, test_split="", label_column="", partition="iid")
found = client_data(data, ModelSettings(task="causal-lm", max_length=4096), tokenizer, 0, 2, 0)
for first in range(0, 64, 8):
    found.train.batch(np.arange(first, first + 8))
done.append(1)
thread.join()
print(most[0] - start, int(found.train.lengths.sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_data(tiny_causal: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": f"the film was {'x' * 400} and good " * 40})
    with path.open("w") as file:
        for _ in range(3000):
            file.write(line + "\n")
    megabytes = path.stat().st_size / 2**20
    assert megabytes > 45

    command = [sys.executable, "-c", MEASURE, str(path), str(tiny_causal), str(1 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, tokens = done.stdout.split()
    assert int(tokens) > 100_000
    assert float(memory) < megabytes / 2  # 157 MB with all in memory
