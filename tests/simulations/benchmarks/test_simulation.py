import pytest

from bora_fl.simulations.benchmarks import simulation


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loop_does_the_federations_steps(tiny_config, capsys, monkeypatch) -> None:
    own = {"adapter.rank": 2, "adapter.num-blocks": 4, "train.precision": "fp32"}
    settings = simulation.settings_of
    monkeypatch.setattr(simulation, "settings_of", lambda options: settings(options) | own)
    given = {"--data": "data.name", "--model": "model.name"}
    sizes = ["--clients", "3", "--rounds", "2", "--steps", "2", "--repeats", "1", "--length", "16"]
    simulation.main([*sizes, *(str(text) for pair in given.items() for text in (pair[0], tiny_config[pair[1]]))])
    printed = capsys.readouterr().out
    assert "12 steps in all" in printed
    assert "of the loop" in printed
