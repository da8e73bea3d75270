import pytest

from bora_fl.simulations.benchmarks import simulation


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("backend", "steps", "total"), [("one process", 2, 12), ("processes", 40, 120)])
def test_the_loop_does_the_federations_steps(backend, steps, total, tiny_config, capsys, monkeypatch) -> None:
    own = {"adapter.rank": 2, "adapter.num-blocks": 4, "train.precision": "fp32"}
    settings = simulation.settings_of
    monkeypatch.setattr(simulation, "settings_of", lambda options: settings(options) | own)
    given = {"--data": "data.name", "--model": "model.name"}
    sizes = ["--clients", "3", "--rounds", "2", "--steps", str(steps), "--repeats", "1", "--length", "16"]
    simulation.main(
        [
            "--backend",
            backend,
            *sizes,
            *(str(text) for pair in given.items() for text in (pair[0], tiny_config[pair[1]])),
        ]
    )
    printed = capsys.readouterr().out
    assert f"{total} steps in all" in printed
    assert "of the loop" in printed
