import json
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.models import peft_config
from bora_fl.simulations import grid
from bora_fl.simulations.compare import run, timing
from bora_fl.simulations.compare.suites import SUITES, suite
from bora_fl.simulations.compare.timing import in_words, seconds_left

from .made_up import finish, lay_out


@pytest.mark.parametrize("name", SUITES)
def test_every_variant_of_a_suite_can_run_in_every_scenario(name, tmp_path):
    row = suite(name)
    found = lay_out(
        tmp_path,
        dict(row.config),
        strategies=row.strategies.split(","),
        scenarios=row.scenarios.split(","),
        seeds=row.seeds,
    )
    assert not found.skipped
    assert len(found.runs) == len(found.variants) * len(found.scenarios) * row.seeds
    assert len(found.variants) == len(row.strategies.split(","))


def test_the_methods_that_are_compared_train_about_equally_many_numbers(tmp_path):
    row = suite("methods")
    plan = lay_out(
        tmp_path,
        dict(row.config),
        strategies=row.strategies.split(","),
        scenarios=["one-client"],
        seeds=1,
        by_method=row.methods,
    )
    trained = {}
    for one in plan.runs:
        if one.variant.method == "full":
            continue
        layer = torch.nn.ModuleDict({"query": torch.nn.Linear(384, 384), "value": torch.nn.Linear(384, 384)})
        settings = one.settings
        inject_adapter_in_model(peft_config(settings.adapter, settings.model), layer)
        trained[one.variant.method] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained["bora"] == 2 * (384 * 8 * 2 + 8 * 8 * 8)
    assert trained == pytest.approx(dict.fromkeys(trained, trained["bora"]), rel=0.08)
    assert len(trained) == 5


def test_an_unknown_suite_lists_near_misses():
    with pytest.raises(ConfigError, match=r"--suite 'standart'.*standard"):
        suite("standart")


def test_a_method_and_strategy_are_one_variant(tmp_path):
    found = lay_out(tmp_path, strategies=["fedavg", "lora/ffa", "lora/fedavg"], methods=["bora", "lora"])
    assert [str(v) for v in found.variants] == ["bora/fedavg", "lora/fedavg", "lora/ffa"]
    with pytest.raises(ConfigError, match=r"--strategies 'ffaa'.*ffa"):
        lay_out(tmp_path, strategies=["lora/ffaa"])


def test_time_left_scales_with_the_steps_of_what_is_not_finished(tmp_path, monkeypatch):
    runs = lay_out(tmp_path, scenarios=["dirichlet-1", "few-clients"]).runs  # four clients, and three
    monkeypatch.setattr(timing, "_two_rounds", lambda _: (2.0, 0.5))
    steps = sum(run.cost for run in runs)
    assert seconds_left(runs, 2) == pytest.approx((2.0 * len(runs) + 0.5 * steps) / 2)
    finish(runs[0], 0.5)  # in ten seconds
    assert seconds_left(runs, 1) == pytest.approx((steps - runs[0].cost) * 10 / runs[0].cost)
    for one in runs:
        finish(one, 0.5)
    assert seconds_left(runs, 1) == 0.0


def test_two_rounds_are_measured_where_nothing_is_finished(tiny_config, tmp_path):
    config = {k: v for k, v in tiny_config.items() if k not in ("strategy.name", "run.output-dir")}
    runs = lay_out(tmp_path, config | {"train.local-steps": 1, "run.num-rounds": 50}, clients=2, seeds=1).runs
    fixed, scale = timing._two_rounds(runs[0])
    assert 0 < fixed < 60
    assert 0 < scale < 60
    assert not runs[0].folder.exists()


@pytest.mark.parametrize(("again", "solved"), [("end", 2), ("never", 1), ("5", 5)])
def test_a_run_solves_its_head_and_is_evaluated_as_often_as_its_settings_say(again, solved, tmp_path, monkeypatch):
    def simulated(settings, *_, **__):
        """Four seconds for the head, a round of two, and one of which an evaluation took half a second more."""
        folder = Path(settings.run.output_dir)
        folder.mkdir(parents=True)
        rows = [{"round": number, "seconds": seconds} for number, seconds in enumerate((4.0, 2.0, 2.5))]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    monkeypatch.setattr(timing, "simulate", simulated)
    config = {"train.local-steps": 1, "run.num-rounds": 17, "run.evaluate-every": 5, "head.solve-again": again}
    one = lay_out(tmp_path, config, seeds=1).runs[0]
    fixed, scale = timing._two_rounds(one)
    assert fixed == pytest.approx(4.0 * solved + 0.5 * 4)  # rounds 5, 10, 15 and 17
    assert scale * one.cost == pytest.approx(2.0 * 17)


def test_a_run_without_rounds_and_one_with_patience_are_timed_too(tiny_config, tmp_path, monkeypatch):
    config = {k: v for k, v in tiny_config.items() if k not in ("strategy.name", "run.output-dir")}
    config |= {"train.local-steps": 1, "run.keep-best": True, "head.init": "auto"}
    for own in ({"run.num-rounds": 0}, {"run.num-rounds": 5, "run.patience": 1}):
        runs = lay_out(tmp_path, config | own, clients=2, seeds=1, strategies=["fedavg"]).runs
        assert seconds_left(runs, 1) > 0


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "1 min"), (3540, "59 min"), (3600, "1 h 00 min"), (12000, "3 h 20 min")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(("rates", "tuning"), [("0.3,1,3", 108), ("1", 0)])
def test_a_dry_run_says_what_would_run(rates, tuning, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(timing, "_two_rounds", lambda _: (0.0, 1.0))
    monkeypatch.setattr(run, "fetch", lambda name: None)
    monkeypatch.setattr(run.Comparison, "check", lambda comparison: checked.append(comparison))
    arguments = [
        "compare",
        "--suite",
        "retention",
        "--dry-run",
        "--seeds",
        "1",
        "--rates",
        rates,
        "--workers",
        "2",
        "--output",
        str(tmp_path),
    ]
    ended = CliRunner().invoke(cli, arguments)
    assert ended.exit_code == 0, ended.output
    assert f"18 runs, {tuning} to tune them and" in ended.output
    assert "left on this machine" in ended.output
    assert len(checked) == 1  # before it trains two rounds
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_command_tunes_compares_and_measures_the_baselines(tmp_path, monkeypatch):
    """The whole way of the command, over runs that are made up."""
    asked, seeds = [], {}

    def made_up(runs, root, *, title, **_):
        asked.append((title, len(runs)))
        seeds[title] = {one.seed for one in runs}
        for one in runs:
            rate = one.settings.train.learning_rate
            finish(
                one,
                0.8 if one.purpose or one.scenario == "iid" else 0.6,
                client_loss=abs(rate - (3e-3 if one.variant.method == "lora" else 1e-3)),
            )
        return [(one, grid.outcome(one)) for one in runs]

    monkeypatch.setattr(run, "run_grid", made_up)
    monkeypatch.setattr(run, "fetch", lambda name: None)
    monkeypatch.setattr(run.Comparison, "check", lambda _: None)
    options = "--strategies refactor,lora/fedavg --scenarios dirichlet-1 --clients 3 --seeds 2 --tune --baselines all"
    options += " --first-seed 10"
    config = ["-c", "train.learning-rate=0.001", "-c", "run.num-rounds=1"]
    ended = CliRunner().invoke(cli, ["compare", *options.split(), *config, "--output", str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    # Two variants × three rates × two seeds; two variants × two seeds; by seed two IID twins, central, three alone.
    assert seeds == {"tuning": {1000, 1001}, "comparing": {10, 11}, "baselines": {10, 11}}
    assert asked == [("tuning", 12), ("comparing", 4), ("baselines", 12)]
    assert "lora/fedavg in dirichlet-1: 0.003 is at the edge" in " ".join(ended.output.split())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["baseline"] == "bora/refactor"  # the first
    assert [s["learning_rate"] for s in found["summaries"]] == [1e-3, 3e-3]
    assert [s["retention"]["mean"] for s in found["summaries"]] == pytest.approx([0.75, 0.75])
    assert found["references"]["dirichlet-1"]["central"]["mean"] == pytest.approx(0.8)


def test_data_that_no_run_could_use_is_refused_before_any_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_grid", lambda *_, **__: pytest.fail("a run was started"))
    (tmp_path / "texts.jsonl").write_text('{"text": "a film"}\n' * 40)
    options = [
        "--suite",
        "methods",
        "--seeds",
        "1",
        "-c",
        "data.test-split=",
        "-c",
        f"data.name={tmp_path / 'texts.jsonl'}",
    ]
    ended = CliRunner().invoke(cli, ["compare", *options, "--output", str(tmp_path / "out")])
    assert isinstance(ended.exception, ConfigError)
    assert "name the column of the classes" in str(ended.exception)


def test_a_scenario_that_the_data_has_too_few_ids_for_is_named_before_any_starts(tiny_model, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("text,label,site\n" + "a good film,0,u\na bad book,1,v\n" * 30)
    given = {"model.name": str(tiny_model), "adapter.num-blocks": 4, "data.name": str(data)}
    options = {"strategies": ["fedavg"], "seeds": 1}
    found = lay_out(tmp_path, given, scenarios=["iid", "natural", "natural-2"], **options)
    words = r"--scenarios natural: data.partition-by = 'site': 2 ids \(u, v\) cannot be dealt to 4 clients"
    with pytest.raises(ConfigError, match=words) as caught:
        run.Comparison(found, found.variants[0]).check()
    assert len(str(caught.value).splitlines()) == 1
    run.Comparison(lay_out(tmp_path, given, scenarios=["iid", "natural-2"], **options), found.variants[0]).check()


def test_baselines_are_named_one_by_one():
    from bora_fl.simulations.compare.command import _baselines

    assert _baselines("") == _baselines("none") == ()
    assert _baselines("all") == ("local", "central", "iid")
    assert _baselines("central, iid") == ("central", "iid")
    with pytest.raises(ConfigError, match="--baselines 'yes': yes is none of local, central, iid"):
        _baselines("yes")
