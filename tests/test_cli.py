import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import bora_fl
from bora_fl.cli import COMMANDS, _mistake, cli, console
from bora_fl.config import ConfigError, Settings
from bora_fl.deployment.launch import Outcome
from bora_fl.report import RoundReport, append_row
from bora_fl.simulations.benchmarks.command import BENCHMARKS
from bora_fl.strategies.observer import RunFailedError

HEAVY = ("torch", "flwr", "pydantic", "transformers", "peft", "numpy", "scipy", "matplotlib", "grpc", "cryptography")


def call(*arguments: str) -> tuple[int, str]:
    console.width = 200  # it takes its width from the environment that it was made in
    result = CliRunner().invoke(cli, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if isinstance(result.exception, ConfigError):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_what_the_list_of_commands_says(command: str):
    module, summary = COMMANDS[command]
    function = getattr(importlib.import_module(f"{module}.command"), command)
    assert function.__doc__.splitlines()[0] == summary
    code, text = call(command, "--help")
    assert code == 0
    assert summary in text


def test_help_lists_every_command_and_imports_no_library():
    code = (
        "import sys; from bora_fl.cli import console, main\n"
        "try: main()\n"
        f"finally: print('imported', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "imported []" in done.stdout
    own = ("config", "strategies", "fetch", "run", "demo", "init", "certificates")
    assert all(f" {name} " in done.stdout for name in (*own, *COMMANDS))


def test_the_version():
    assert call("--version") == (0, f"bora-fl {bora_fl.__version__}\n")


def test_config_lists_all_a_group_or_what_has_a_word_in_it():
    every, group = call("config")[1], call("config", "train")[1]
    assert all(key in every for key in Settings().flat())
    assert "train.learning-rate" in group
    assert "adapter.rank" not in group
    assert "strategy.residual-rank" in call("config", "RANK")[1]
    assert "train.learning-rate" in call("config", "lr")[1]  # another tool's name for it
    with pytest.raises(ConfigError, match=r"config nosuch: "):
        call("config", "nosuch")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_bench_reaches_every_benchmark(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(BENCHMARKS[name][0]).main(["--help"])
    assert leaving.value.code == 0
    assert f"usage: bora-fl bench {name}" in capsys.readouterr().out
    assert f" {name} " in call("bench", "--list")[1]


def test_bench_hands_over_options_and_the_exit_code():
    code, text = call("bench", "cost", "--tokens", "64", "--width", "128")
    assert code == 0
    assert "PEFT LoRA, rank 16" in text
    if not torch.cuda.is_available():
        assert call("bench", "gpu-check")[0] == 2
    assert call("bench", "cost", "--nonsense")[0] == 2
    with pytest.raises(ConfigError, match="bench coast: no such benchmark; use one of layer, cost"):
        call("bench", "coast")


def test_bench_all_runs_each_as_the_command_and_says_which_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(
        "bora_fl.simulations.benchmarks.command.BENCHMARKS",
        {"lost": ("", "first, which the command's own process does not know"), "cost": ("", "second")},
    )
    code, text = call("bench", "--output", str(tmp_path / "out"), "all")
    assert code == 1
    assert "first" in text
    assert "second" in text
    assert "failed: lost" in text
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert [(row["command"], row["exit_code"] != 0) for row in written["benchmarks"]] == [
        ("bora-fl bench lost", True),
        ("bora-fl bench cost", False),
    ]
    assert "PEFT LoRA" in written["benchmarks"][1]["output"]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `bora-fl run` would start in a folder with a federation.toml."""
    found: list[tuple] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federation.toml").write_text("[federation]\nsimulate = 3\n\n[run]\nseed = 5\nnum-rounds = 2\n")
    monkeypatch.setattr(
        "bora_fl.cli._simulate", lambda app, config, how, as_json: found.append((config, how.num_clients))
    )

    def deploy(app: Path, config: dict, connection: str, **options: object) -> Outcome:
        found.append((config, connection))
        return Outcome(tmp_path / "log")

    monkeypatch.setattr("bora_fl.deployment.launch.run", deploy)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ({"run.seed": 5, "run.num-rounds": 2}, 3)),
        (["-c", "run.num-rounds=9"], ({"run.seed": 5, "run.num-rounds": 9}, 3)),
        (["--simulate", "4"], ({"run.seed": 5, "run.num-rounds": 2}, 4)),
        (["hospitals"], ({"run.seed": 5, "run.num-rounds": 2}, "hospitals")),
    ],
)
def test_run_does_what_the_folder_s_file_says_and_what_is_given_wins(
    arguments: list[str], expected: tuple, started: list[tuple]
):
    assert call("run", *arguments)[0] == 0
    assert started == [expected]


def test_what_is_given_is_judged_together_with_the_file(started: list[tuple]):
    Path("federation.toml").write_text('[federation]\nsimulate = 3\n\n[model]\ntask = "causal-lm"\n')
    assert call("run", "-c", "run.generate-every=2")[0] == 0
    assert started[0][0] == {"model.task": "causal-lm", "run.generate-every": 2}
    with pytest.raises(ConfigError, match=r"generate-every = 2 with model.task = 'classification'"):
        call("run", "-c", "run.generate-every=2", "-c", "model.task=classification")


def test_run_goes_to_the_deployment_that_the_file_names(started: list[tuple]):
    Path("federation.toml").write_text('[federation]\nconnection = "hospitals"\n')
    assert call("run")[0] == 0
    assert call("run", "--simulate", "2")[0] == 0
    assert started == [({}, "hospitals"), ({}, 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attach", "5", "-c", "run.num-rounds=3"], r"--run-config 'run.num-rounds=3' with --attach 5"),
        (["--attach", "5", "--cpus", "2"], r"--cpus with --attach 5"),
        (["hospitals", "--gpus", "0.5", "--backend", "ray"], r"--gpus, --backend with connection 'hospitals'"),
    ],
)
def test_what_a_deployment_s_run_would_ignore_is_refused(arguments: list[str], words: str, started: list[tuple]):
    with pytest.raises(ConfigError, match=words):
        call("run", *arguments)
    assert started == []


def test_run_without_anything_to_run_says_how(started: list[tuple]):
    Path("federation.toml").unlink()
    with pytest.raises(ConfigError, match=r"nothing to run: .*--simulate.*bora-fl init"):
        call("run")
    assert started == []


def test_demo_runs_the_default_model_and_data_in_a_folder_that_is_free(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from bora_fl import data
    from bora_fl.simulations import launch

    asked = []
    monkeypatch.setattr(data, "fetch", lambda name: tmp_path)

    def run(app, config, simulation, show):
        asked.append((config, simulation))
        return SimpleNamespace(rows=[], folder=tmp_path)

    monkeypatch.setattr(launch, "run", run)
    (tmp_path / "demo").mkdir()
    assert call("demo", "--output", str(tmp_path / "demo"), "-c", "run.resume=true")[0] == 0
    assert asked.pop()[0]["run.output-dir"] == str(tmp_path / "demo")
    assert call("demo", "--output", str(tmp_path / "demo"), "-c", "run.num-rounds=2")[0] == 0
    ((config, simulation),) = asked
    assert config["run.output-dir"] == str(tmp_path / "demo-2")
    assert config["run.num-rounds"] == 2
    assert simulation.num_clients == 4


def test_json_lines_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bora_fl.deployment.launch import LaunchError
    from bora_fl.simulations import launch

    folder, fails = tmp_path / "out", []

    def run(app, config, simulation, show):
        folder.mkdir(exist_ok=True)
        for number in range(2):
            append_row(folder / "metrics.jsonl", RoundReport(number, 0.5).row())
            show(f"round {number}/1")
        if fails:
            raise LaunchError("the run ended with code 9")
        return SimpleNamespace(rows=[], folder=folder, log=folder / "run.log")

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.chdir(tmp_path)
    command = ["run", "--simulate", "2", "--json", "-c", f"run.output-dir={folder}"]
    code, text = call(*command)
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events] == ["line", "round", "line", "round", "completed"]
    assert [event["round"] for event in events if event["event"] == "round"] == [0, 1]
    assert (code, events[-1]["folder"]) == (0, str(folder))
    fails.append(True)
    code, text = call(*command)
    last = json.loads(text.splitlines()[-1])
    assert (code, last) == (1, {"event": "failed", "message": "the run ended with code 9", "exit_code": 1})
    code, text = call(*command, "-c", "run.num-rounds=-1")
    assert (code, json.loads(text)["exit_code"]) == (2, 2)


@pytest.mark.parametrize(
    ("task", "first"), [("causal-lm", "bora-fl chat 'my run'"), ("classification", "bora-fl predict 'my run' FILE")]
)
def test_a_finished_run_names_what_may_be_done_with_it(
    task: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from bora_fl.simulations import launch

    folder = tmp_path / "my run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model.task": task}))
    monkeypatch.setattr(launch, "run", lambda *_, **__: SimpleNamespace(rows=[], folder=folder, log=folder / "run.log"))
    monkeypatch.chdir(tmp_path)
    code, text = call("run", "--simulate", "2", "-c", f"run.output-dir={folder}")
    commands = [line.partition(": ")[2] for line in text.splitlines() if "bora-fl" in line]
    assert code == 0
    assert commands[0] == first
    assert commands[-1] == "bora-fl ui 'my run'"


def test_a_federation_that_cannot_train_ends_in_one_message():
    assert _mistake(RunFailedError("round 1: not one usable reply")) == ("failed", "round 1: not one usable reply", 1)
    assert _mistake(RuntimeError("a fault of the program")) is None
