from pathlib import Path

from bora_fl.simulations.attacks.run import AttackRun
from bora_fl.simulations.grid import execute, is_finished, outcome


def test_a_run_leaves_its_outcome(tiny_config, tmp_path: Path):
    config = tiny_config | {"run.num-rounds": 1}
    run = AttackRun("backdoor", "none", 0, 3, 1, config, tmp_path)
    execute(run)
    assert is_finished(run)
    result = outcome(run).result
    assert 0 <= result["backdoor"] <= 1
    assert run.line(result) == f"{result['accuracy']:.3f}"
    assert not (run.folder / "adapter").exists()


def test_whatever_decides_the_outcome_decides_the_folder(tmp_path: Path):
    first = AttackRun("backdoor", "none", 0, 3, 1, {"a": 1}, tmp_path)
    others = [
        AttackRun("flip-sign", "none", 0, 3, 1, {"a": 1}, tmp_path),
        AttackRun("backdoor", "none", 1, 3, 1, {"a": 1}, tmp_path),
        AttackRun("backdoor", "none", 0, 4, 1, {"a": 1}, tmp_path),
        AttackRun("backdoor", "none", 0, 3, 2, {"a": 1}, tmp_path),
        AttackRun("backdoor", "none", 0, 3, 1, {"a": 2}, tmp_path),
    ]
    assert len({run.folder for run in [first, *others]}) == 6
