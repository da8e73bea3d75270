"""Laws of every way to deal examples, the meaning of each, and the messages of deals that cannot be."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bora_fl.config import ConfigError, DataSettings
from bora_fl.data import load_dataset, partition, partition_picture

KINDS = [k for k in get_args(DataSettings.model_fields["partition"].annotation) if k != "local"]


def change(settings: DataSettings, **fields: Any) -> DataSettings:
    return settings.model_copy(update=fields)


def deals(settings: DataSettings, seed: int) -> list[list[list[int]]]:
    """What every kind deals to four clients."""
    return [[p.tolist() for p in partition(change(settings, partition=kind), 4, seed)] for kind in KINDS]


@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_to_one_client(kind: str, clients: int, shop: DataSettings) -> None:
    settings = change(shop, partition=kind, classes_per_client=4)
    parts = partition(settings, clients, seed=3)
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "natural"])
def test_the_seed_decides(kind: str, shop: DataSettings) -> None:
    settings = change(shop, partition=kind)
    one, same, other = (partition(settings, 4, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_process_imports_little_and_deals_like_any_other(shop: DataSettings) -> None:
    program = """
import json, sys
from bora_fl.config import DataSettings
from bora_fl.data import partition
slow = [m for m in ("transformers", "datasets", "flwr_datasets", "matplotlib") if m in sys.modules]
kinds, settings = json.loads(sys.argv[1]), DataSettings.model_validate_json(sys.argv[2])
deals = [partition(settings.model_copy(update={"partition": kind}), 4, 7) for kind in kinds]
print(json.dumps([slow, [[p.tolist() for p in deal] for deal in deals]]))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, json.dumps(KINDS), shop.model_dump_json(by_alias=False)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [[], deals(shop, 7)]


def test_iid_parts_are_equal_and_mixed(shop: DataSettings) -> None:
    parts = partition(change(shop, partition="iid"), 7, 0)
    assert {len(part) for part in parts} <= {42, 43}
    assert all(len(set(part // 100)) == 3 for part in parts)


@pytest.mark.parametrize(
    ("kind", "size"), [("linear", lambda i: i), ("square", lambda i: i**2), ("exponential", np.exp)]
)
def test_skewed_sizes_follow_their_function(kind: str, size: Any, shop: DataSettings) -> None:
    sizes = np.array([len(part) for part in partition(change(shop, partition=kind), 4, 0)])
    expected = size(np.arange(1.0, 5.0))
    assert np.abs(sizes - 300 * expected / expected.sum()).max() <= 4  # rounding down, the rest to the last


def test_natural_clients_are_the_ids_in_order(shop: DataSettings) -> None:
    shops = np.array(load_dataset(shop).train["shop"][:])
    parts = partition(change(shop, partition="natural"), 5, 0)
    assert [set(shops[part]) for part in parts] == [{"s0"}, {"s1"}, {"s2"}, {"s3"}, {"s4"}]


def test_data_of_a_sites_own_is_all_its_own(shop: DataSettings) -> None:
    local = shop.model_copy(update={"partition": "local"})
    for rows in partition(local, 3, seed=0):
        np.testing.assert_array_equal(rows, np.arange(300))


def test_fewer_clients_than_ids_hold_whole_ids_evenly(shop: DataSettings) -> None:
    shops = np.array(load_dataset(shop).train["shop"][:])
    parts = partition(change(shop, partition="natural"), 2, 0)
    assert not set(shops[parts[0]]) & set(shops[parts[1]])
    sizes, biggest = [len(part) for part in parts], max(Counter(shops).values())
    assert max(sizes) - min(sizes) <= biggest


def test_natural_ids_may_be_numbers(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": list("abcd"), "label": [0, 1, 0, 1], "user": [10, 9, 9, 2]}), tmp_path / "d.parquet"
    )
    settings = DataSettings(name=str(tmp_path / "d.parquet"), test_split="", partition_by="user")
    assert [part.tolist() for part in partition(settings, 3, 0)] == [[3], [1, 2], [0]]


def shares(settings: DataSettings, clients: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[clients, classes]: each client's class mix."""
    labels = np.array(load_dataset(settings).train["label"][:])
    parts = partition(settings, clients, seed)
    counts = np.stack([np.bincount(labels[part], minlength=4) for part in parts])
    return counts / counts.sum(axis=1, keepdims=True)


def test_alpha_sets_the_skew_of_a_dirichlet_deal(shop: DataSettings) -> None:
    overall = shares(change(shop, partition="iid"), 1, 0)[0]
    distance = {
        alpha: np.mean(
            [
                np.abs(shares(change(shop, partition="dirichlet", alpha=alpha), 4, seed) - overall).sum()
                for seed in range(5)
            ]
        )
        for alpha in (0.2, 2.0, 1000.0)
    }
    assert distance[0.2] > 1.5 * distance[2.0] > 3 * distance[1000.0]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_pathological_clients_hold_so_many_classes(classes: int, shop: DataSettings) -> None:
    for seed in range(3):
        mix = shares(change(shop, partition="pathological", classes_per_client=classes), 4, seed)
        assert (mix > 0).sum(axis=1).tolist() == [classes] * 4
        assert (mix > 0).any(axis=0).all()


def test_without_classes_the_ids_are_dealt(shop: DataSettings) -> None:
    settings = change(shop, partition="pathological", classes_per_client=1, label_column="")
    shops = np.array(load_dataset(settings).train["shop"][:])
    assert [len(set(shops[part])) for part in partition(settings, 5, 0)] == [1] * 5


@pytest.mark.parametrize(
    ("fields", "clients", "parts"),
    [
        ({"partition": "iid"}, 301, ["data.num-partitions = 301", "300 examples"]),
        ({"partition": "iid"}, 0, ["data.num-partitions = 0", "at least 1"]),
        ({"partition": "natural"}, 6, ["data.partition-by = 'shop'", "s0, s1, s2, s3, s4", "6 clients", "at most 5"]),
        ({"partition": "natural", "partition_by": "user"}, 2, ["data.partition-by = 'user'", "columns are", "shop"]),
        ({"partition": "pathological", "classes_per_client": 5}, 2, ["data.classes-per-client = 5", "4 classes"]),
        ({"partition": "pathological", "classes_per_client": 4}, 99, ["data.classes-per-client = 4", "fewer"]),
        ({"partition": "dirichlet", "alpha": 1e-3}, 40, ["data.alpha = 0.001", "40 clients", "larger alpha"]),
        ({"partition": "exponential"}, 30, ["data.partition = 'exponential'", "30 clients", "linear"]),
    ],
)
def test_deals_that_cannot_be_name_key_value_and_remedy(
    fields: dict[str, Any], clients: int, parts: list[str], shop: DataSettings
) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(change(shop, **fields), clients, 0)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_rows_without_an_id_are_counted(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": list("abc"), "label": [0, 1, 0], "user": ["u", None, "v"]}), tmp_path / "d.parquet"
    )
    with pytest.raises(ConfigError, match=r"data.partition-by = 'user': 1 of 3 rows have no id"):
        partition(DataSettings(name=str(tmp_path / "d.parquet"), test_split="", partition_by="user"), 2, 0)


def test_an_empty_cell_is_no_id(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label,user\na,0,u\nb,1,\nc,0,v\n")
    with pytest.raises(ConfigError, match=r"data.partition-by = 'user': 1 of 3 rows have no id"):
        partition(DataSettings(name=str(tmp_path / "d.csv"), test_split="", partition_by="user"), 3, 0)


def test_nothing_is_printed(shop: DataSettings, capfd: pytest.CaptureFixture[str]) -> None:
    deals(shop, 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fields", [{}, {"partition": "dirichlet"}, {"label_column": "", "partition_by": "gone", "partition": "iid"}]
)
def test_picture_is_a_png(fields: dict[str, Any], shop: DataSettings, tmp_path: Path) -> None:
    path = partition_picture(change(shop, **fields), 5, 0, tmp_path / "new" / "split.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_ids_are_found_where_no_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"text": ["a", "b", "c", "d"], "Source": ["x", "y", "x", "y"], "tags": [["t"]] * 4}
    pq.write_table(pa.table(columns), path)
    settings = DataSettings(name=str(path), test_split="", label_column="")
    assert [part.tolist() for part in partition(settings, 2, 0)] == [[0, 2], [1, 3]]
    for name, words in (("task", "columns are text, Source, tags"), ("tags", "holds list.*no id")):
        with pytest.raises(ConfigError, match=words):
            partition(change(settings, partition_by=name), 2, 0)


def test_what_is_learned_is_no_id_unless_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"text": list("abcd"), "topic": ["x", "y"] * 2, "language": ["de", "de", "en", "en"]}
    pq.write_table(pa.table(columns), path)
    settings = DataSettings(name=str(path), test_split="", label_column="topic")
    assert [part.tolist() for part in partition(settings, 2, 0)] == [[0, 1], [2, 3]]
    assert [part.tolist() for part in partition(change(settings, partition_by="topic"), 2, 0)] == [[0, 2], [1, 3]]
    with pytest.raises(ConfigError, match=r"partition-by = 'language': 2 ids \(de, en\)"):
        partition(settings, 3, 0)
    pq.write_table(pa.table(columns).drop_columns("language"), path)
    with pytest.raises(ConfigError, match=r"data.partition-by = 'domain'.*columns are text, topic"):
        partition(settings, 2, 0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of the pictures that are saved."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure.axes[0]))
    return found


@pytest.mark.parametrize("label", ["label", ""])
def test_a_picture_names_the_ids_column_and_few_of_its_ids(label: str, tmp_path: Path, drawn: list[Any]) -> None:
    path, users = tmp_path / "rows.parquet", [f"u{i:02}" for i in range(60)]
    pq.write_table(pa.table({"text": users, "label": [0, 1] * 30, "user": users}), path)
    settings = DataSettings(name=str(path), test_split="", label_column=label)
    partition_picture(settings, 3, 0, tmp_path / "split.png")
    (axes,) = drawn
    assert ", by user, seed 0" in axes.get_title()
    assert axes.get_xticklabels()[0].get_text().split("\n") == ["u00", "u03", "u06", "and 17 more"]
    assert len(axes.patches) == 3 * (2 if label else 1)


def test_a_picture_of_a_deal_without_ids_does_without_them(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": list("abcd"), "domain": ["x", None, "x", "y"]}), path)
    partition_picture(DataSettings(name=str(path), test_split="", partition="iid"), 2, 0, tmp_path / "split.png")
    assert len(drawn[0].patches) == 2
