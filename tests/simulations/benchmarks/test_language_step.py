import json
from pathlib import Path

import pytest

from bora_fl.simulations.benchmarks import language_step


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_compares_adapters_that_start_from_the_same_loss(tmp_path: Path, capsys) -> None:
    language_step.main(["--repeats", "1", "--tokens", "8", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(found) == {language_step.LORA, "PEFT LoRA, rank b·r", "BoRA"}
    sides = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    lora = 2 * sum(16 * (n + m) for n, m in sides)
    assert found[language_step.LORA]["trained"] == lora
    assert found["BoRA"]["trained"] == lora + 2 * 7 * 8 * 8 * 16
    assert found["PEFT LoRA, rank b·r"]["trained"] == 8 * lora
    losses = [row["loss"] for row in found.values()]  # of the fourth step
    assert max(losses) - min(losses) < 0.2
    assert "| BoRA |" in capsys.readouterr().out
