"""Texts with several classes or a number, and words with a class each: from data to what other programs open."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.common import parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import recorddict_to_fitres
from sklearn.metrics import f1_score, r2_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

import bora_fl
from bora_fl.client import secure_aggregation
from bora_fl.config import ConfigError, parse
from bora_fl.heads import ClassSums, release_noise
from bora_fl.heads.private import noise_stds
from bora_fl.report import read_rows
from bora_fl.strategies import head
from bora_fl.strategies.secure_aggregation import SecureMean
from bora_fl.wire.release import StatisticsRelease
from tests.conftest import BAD, GOOD, PLAIN

SEVERAL = {"model.task": "multi-label", "data.label-column": "labels"}
NUMBER = {"model.task": "regression", "data.label-column": "score"}
WORDS = {"model.task": "token-classification", "data.text-column": "tokens", "data.label-column": "tags"}


def tag(word: str) -> str:
    return "B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with zero, one or two labels, the class of each word, and a number."""
    rng, noise = random.Random(0), random.Random(1)
    rows = []
    for number in range(240):
        words = rng.sample(PLAIN, 4) + rng.sample(GOOD, rng.randint(0, 1)) + rng.sample(BAD, rng.randint(0, 1))
        rng.shuffle(words)
        labels = [name for name, known in (("good", GOOD), ("bad", BAD)) if set(known) & set(words)]
        split = "test" if number >= 180 else "train"
        score = 50 + 20 * ("good" in labels) - 25 * ("bad" in labels) + noise.gauss(0, 1)
        rows.append((" ".join(words), labels, words, list(map(tag, words)), score, ["a", "b", "c"][number % 3], split))
    path = tmp_path_factory.mktemp("tasks") / "data.parquet"
    columns = ["text", "labels", "tokens", "tags", "score", "domain", "split"]
    pd.DataFrame(rows, columns=columns).to_parquet(path)
    return path


@pytest.fixture
def config(tiny_config, data: Path) -> dict:
    return tiny_config | {
        "data.name": str(data),
        "head.init": "auto",
        "run.num-rounds": 2,
        "train.learning-rate": 0.002,
        "run.keep-best": True,
    }


TASKS = pytest.mark.parametrize(
    "task", [SEVERAL, WORDS, NUMBER], ids=["multi-label", "token-classification", "regression"]
)


@TASKS
def test_a_federation_learns_the_task_from_a_solved_head_and_other_programs_predict_the_same(
    task: dict, config: dict, data: Path, tmp_path: Path
):
    run = bora_fl.simulate(config | task, clients=3)
    rows = read_rows(run / "metrics.jsonl")
    assert rows[0]["head"].startswith("solved" if task == NUMBER else "x")
    assert rows[0]["accuracy"] > (0.4 if task == NUMBER else 0.85)
    assert rows[-1]["loss"] < rows[0]["loss"] or (task == NUMBER and rows[-1]["kept"] == 0)
    card = (run / "adapter" / "README.md").read_text()
    table = pd.read_parquet(data).query("split == 'test'")
    merged = bora_fl.export(run, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    if task == NUMBER:
        assert "pipeline_tag: text-classification" in card
        theirs = pipeline("text-classification", str(merged), trust_remote_code=True)(list(table.text))
        found = bora_fl.predict(run, list(table.text))
        assert [row["value"] for row in found] == pytest.approx(
            [row["score"] for row in theirs], rel=5e-3
        )  # one by one
        assert {row["label"] for row in theirs} == {"score"}
        assert rows[-1]["accuracy"] == pytest.approx(r2_score(table.score, [row["value"] for row in found]), abs=1e-4)
        return
    if task == SEVERAL:
        assert "pipeline_tag: text-classification" in card
        theirs = pipeline("text-classification", str(merged), trust_remote_code=True, top_k=None)(list(table.text))
        expected = [{part["label"]: part["score"] for part in row} for row in theirs]
        found = bora_fl.predict(run, list(table.text))
        for row, chances in zip(found, expected, strict=True):
            assert row["probabilities"] == pytest.approx(chances, abs=0.01)  # they go one by one
            assert row["labels"] == [name for name, chance in row["probabilities"].items() if chance > 0.5]
        right = [f1_score(np.isin(["bad", "good"], t), np.isin(["bad", "good"], r["labels"]), zero_division=1.0)
                 for t, r in zip(table.labels, found, strict=True)]  # fmt: skip
        assert rows[-1]["accuracy"] == pytest.approx(np.mean(right))
        with pytest.raises(ConfigError, match="sentence-transformers"):  # the default head reads every layer
            bora_fl.export(run, tmp_path / "st", "sentence-transformers")
        return
    assert "pipeline_tag: token-classification" in card
    model = AutoModelForTokenClassification.from_pretrained(merged).eval()
    found = bora_fl.predict(run, [*table.text, ["the", "good", "film"], " ".join(["good"] * 20)])
    right = []
    for words, row, truth in zip(table.tokens, found, table.tags, strict=False):
        inputs = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=16, return_tensors="pt")
        logits = model(**inputs).logits[0].softmax(-1)
        at = [inputs.word_ids().index(k) if k in inputs.word_ids() else None for k in range(len(words))]
        assert row["words"] == list(words)
        assert row["labels"] == [p if p is None else model.config.id2label[int(logits[p].argmax())] for p in at]
        right += [a == b for a, b in zip(row["labels"], truth, strict=True)]
    assert rows[-1]["accuracy"] == pytest.approx(np.mean(right))
    named = [[label or "O" for label in row["labels"]] for row in found[: len(table)]]
    pairs = [pair for row, truth in zip(named, table.tags, strict=True) for pair in zip(row, truth, strict=True)]
    both = sum(a == b != "O" for a, b in pairs)
    marked = sum(label != "O" for labels in [*named, *table.tags] for label in labels)
    assert rows[-1]["f1"] == pytest.approx(2 * both / marked)  # every entity is one word here
    assert found[-2]["words"] == ["the", "good", "film"]
    assert [label is None for label in found[-1]["labels"]] == [False] * 14 + [True] * 6  # of 16 tokens two are special


@TASKS
@pytest.mark.parametrize("mode", ["record", "client", "masked"])
def test_the_tasks_are_trained_under_privacy(task: dict, mode: str, config: dict, tmp_path: Path):
    config["privacy.ledger-dir"] = str(tmp_path / "ledger")
    private = {"privacy.mode": mode, "strategy.weighting": "uniform", "run.keep-best": False, "privacy.epsilon": 8.0}
    if mode == "masked":
        private = {"privacy.secure-aggregation": True, "privacy.clipping-range": 64.0}
    rows = read_rows(bora_fl.simulate(config | task | private | {"run.num-rounds": 1}, clients=3) / "metrics.jsonl")
    assert rows[-1]["clients"] == 3, rows[-1]["reasons"]
    assert bool(rows[0]["head"]) == (mode == "masked")


def test_the_sums_of_several_labels_are_the_same_behind_masks_as_without(config: dict):
    settings = parse(config | SEVERAL | {"privacy.secure-aggregation": True, "privacy.clipping-range": 1e3})
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(20, 6, generator=generator) + 3, torch.rand(20, 4, generator=generator).round()) for _ in "ab"
    ]
    sums = [ClassSums.of(x, y, 4) for x, y in parts]
    vectors = []
    for client in sums:
        reply = StatisticsRelease(client.to_tensors(torch.float64), 0).content(0)
        sent = recorddict_to_fitres(
            secure_aggregation._for_the_head(reply, settings, "head-statistics"), keep_input=True
        )
        vectors.append(parameters_to_ndarrays(sent.parameters)[0])
    found = SecureMean([np.mean(vectors, 0)], frozenset({1, 2}), {}, 0)
    added = head._unmasked(found, (5, 6), settings.privacy.max_examples, exact=True, several=True)
    whole = sums[0] + sums[1]
    for name in ("counts", "sums", "gram", "total"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-6, atol=1e-6)


def test_a_head_of_several_labels_cannot_be_solved_under_record_level_privacy(config: dict):
    for task in (SEVERAL, WORDS):
        with pytest.raises(ConfigError, match=r"head.init = 'closed-form' .* as often as it has labels"):
            parse(
                config | task | {"head.init": "closed-form", "privacy.mode": "record", "strategy.weighting": "uniform"}
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SEVERAL | {"data.label-column": "domain"}, "one class of each text; set model.task to classification"),
        (SEVERAL | {"data.text-column": "tokens"}, "row 1 has 6 words and 2 labels; give each word one, null for none"),
        (WORDS | {"data.text-column": "text"}, "a list of classes for each text; set model.task to multi-label"),
        (WORDS | {"data.label-column": "domain"}, "holds list<.*>, not text"),
        (WORDS | {"model.task": "causal-lm"}, "set model.task to token-classification"),
        ({"data.label-column": "labels"}, "set model.task to multi-label"),
        (WORDS | {"model.pooling": "mean"}, "set model.pooling to auto"),
        (SEVERAL | {"train.label-prior": 1.0}, "set train.label-prior to 0"),
        (WORDS | {"train.distillation": 1.0}, "set train.distillation to 0"),
        (NUMBER | {"train.not-true-distillation": 1.0}, "set train.not-true-distillation to 0"),
        (
            NUMBER | {"data.label-column": "domain"},
            "a, b, c, which are no numbers; .* set model.task to classification",
        ),
        (NUMBER | {"model.task": "classification"}, "it holds numbers; set model.task to regression"),
        (NUMBER | {"head.number-range": "5,1"}, "is no pair low,high of numbers"),
        (NUMBER | {"head.number-range": "0,nan"}, "is no pair low,high of numbers"),
        (SEVERAL | {"head.number-range": "0,1"}, "leave head.number-range empty"),
    ],
)
def test_data_of_another_task_is_refused_with_the_remedy(changes: dict, message: str, config: dict):
    with pytest.raises(ConfigError, match=message):
        bora_fl.simulate(config | changes, clients=3)


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_head_of_a_number_is_solved_under_record_level_privacy_where_its_range_is_known(
    rounds: int, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[torch.Tensor, float]] = []

    def zero(tensor: torch.Tensor, std: float, _: object) -> torch.Tensor:
        seen.append((tensor, std))
        return tensor

    monkeypatch.setattr("bora_fl.heads.private.add_noise", zero)
    private = {"privacy.mode": "record", "strategy.weighting": "uniform", "run.keep-best": False}
    private |= {"privacy.ledger-dir": str(tmp_path / "ledger"), "run.num-rounds": rounds}
    with pytest.raises(ConfigError, match=r"head.number-range = '': nothing bounds what one number adds"):
        parse(config | NUMBER | private | {"head.init": "closed-form"})
    known = {"head.number-range": "0,300", "head.init": "closed-form", "privacy.epsilon": 1e4}
    run = bora_fl.simulate(config | NUMBER | private | known, clients=3)
    rows = read_rows(run / "metrics.jsonl")
    assert (rows[0]["head"], rows[0]["clients"], rows[-1]["round"]) == ("solved", 3, rounds)
    assert rows[0]["loss"] < 300  # the numbers have a variance of 260 around 50, and the middle of the range is 150
    assert rows[0]["epsilon"] == rows[-1]["epsilon"]
    assert (rows[0]["epsilon"]["unit"], rows[0]["epsilon"]["largest"]) == ("record", 1e4)
    stds = noise_stds(release_noise(parse(config | NUMBER | private | known)), number=True)
    assert [std for _, std in seen] == pytest.approx([stds[2], *stds[:2]] * 3)
    for triangle, _ in seen[::3]:  # of 54 examples, whose features and numbers have a norm of at most 1
        assert float(triangle[-1]) <= 54 / 2


def test_numbers_are_learned_from_a_random_head(config: dict, data: Path, tmp_path: Path):
    table = pd.read_parquet(data)
    table.assign(score=table.score / 50 - 1).to_parquet(tmp_path / "small.parquet")
    small = {"data.name": str(tmp_path / "small.parquet"), "head.init": "random", "head.solve-again": "never"}
    small |= {"train.learning-rate": 0.02, "run.num-rounds": 8, "run.keep-best": False, "train.local-steps": 16}
    rows = read_rows(bora_fl.simulate(config | NUMBER | small, clients=3) / "metrics.jsonl")
    assert (rows[0]["head"], rows[0]["accuracy"]) == ("", 0)
    assert rows[-1]["accuracy"] > 0.1
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_a_number_s_model_is_exported_for_sentence_transformers(config: dict, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    run = bora_fl.simulate(config | NUMBER | {"model.pooling": "mean", "run.num-rounds": 1}, clients=3)
    folder = bora_fl.export(run, tmp_path / "st", "sentence-transformers")
    texts = ["was it a good film", "bad"]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    found = [row["value"] for row in bora_fl.predict(run, texts)]
    assert theirs[:, 0].tolist() == pytest.approx(found, abs=1e-3)


def test_a_number_far_from_0_is_learned_in_bfloat16_too(config: dict, data: Path, tmp_path: Path):
    table = pd.read_parquet(data)
    table.assign(score=table.score / 25 + 2000).to_parquet(tmp_path / "far.parquet")
    far = {"data.name": str(tmp_path / "far.parquet"), "train.precision": "bf16", "model.pooling": "mean"}
    run = bora_fl.simulate(config | NUMBER | far, clients=3)
    rows = read_rows(run / "metrics.jsonl")
    assert rows[0]["accuracy"] > 0.3
    test = table.query("split == 'test'")
    found = [row["value"] for row in bora_fl.predict(run, list(test.text))]
    assert r2_score(test.score / 25 + 2000, found) > 0.3


def test_what_the_sums_have_cost_is_told_although_no_head_can_be_solved(
    config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(*_: object, **__: object) -> None:
        raise ValueError("sums of no examples")

    monkeypatch.setattr(head, "solve_private_number", none)
    private = {"privacy.mode": "record", "strategy.weighting": "uniform", "run.keep-best": False, "run.num-rounds": 1}
    private |= {"privacy.ledger-dir": str(tmp_path / "ledger"), "head.number-range": "0,100", "privacy.epsilon": 4.0}
    rows = read_rows(bora_fl.simulate(config | NUMBER | private, clients=3) / "metrics.jsonl")
    assert (rows[0]["head"], rows[0]["epsilon"]["largest"]) == ("", 4.0)
