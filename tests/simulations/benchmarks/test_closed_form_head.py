import json
from pathlib import Path

import pytest

from bora_fl.simulations.benchmarks import closed_form_head


def test_the_command_measures_every_way_and_keeps_the_features(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch, capsys
):
    arguments = ["--model", str(tiny_model), "--data", str(tiny_data), "--pooling", "mean", "--length", "16"]
    arguments += ["--clients", "3", "--seeds", "0", "1", "--epsilon", "50", "--features", str(tmp_path / "features")]
    arguments += ["--json", str(tmp_path / "rows.json")]
    assert closed_form_head.main(arguments) == 0
    first = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["head"] for row in first] == [
        "lambda by cross-validation",
        "lambda = .01 tr / d",
        "record-level epsilon 50",
    ]
    assert first[0]["accuracy"] > 0.9  # the words of the two classes differ
    assert first[0]["loss at the held-out scale"] <= first[0]["loss"] + 0.05
    assert "240 + 60 examples, 2 classes" in capsys.readouterr().out
    monkeypatch.setattr(closed_form_head, "load_base", None)  # the second time no model is loaded
    closed_form_head.main(arguments)
    second = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["accuracies"] for row in second] == [row["accuracies"] for row in first]


def test_no_example_is_dealt_twice():
    data = closed_form_head.Features(*([closed_form_head.torch.zeros(107, 2)] * 4), 2, 1.0)
    parts, held = closed_form_head.dealt(data, 10, 0)
    assert sorted([*closed_form_head.torch.cat(parts).tolist(), *held.tolist()]) == list(range(107))
    assert len(parts) == 10
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(held) == pytest.approx(10.7, abs=1)
