import re
from pathlib import Path

from bora_fl.simulations.benchmarks import codecs
from bora_fl.simulations.benchmarks.codecs import Row


def test_a_table_pairs_the_seeds_and_a_file_is_gone_on_with(tmp_path: Path, monkeypatch, capsys) -> None:
    accuracy = {("float32", 0): 0.70, ("float32", 1): 0.80, ("int8", 0): 0.69, ("int8", 1): 0.80}
    done: list[tuple[str, int]] = []

    def run(options: object, codec: str, seed: int) -> Row:
        done.append((codec, seed))
        return Row(codec, seed, 0.5, accuracy[codec, seed], 1.0, 100.0 if codec == "float32" else 25.0)

    monkeypatch.setattr(codecs, "run", run)
    given = ["--codecs", "float32", "int8", "--rows", str(tmp_path / "rows.csv")]
    codecs.main([*given, "--seeds", "0"])
    codecs.main([*given, "--seeds", "0", "1", "--picture", str(tmp_path / "picture.png")])
    assert done == [("float32", 0), ("int8", 0), ("float32", 1), ("int8", 1)]
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.split(r"\s{2,}", line.strip()) == ["int8", "25", "0.25", "2", "0.7450", "-0.50 ± 6.35", "1.000"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5


def test_a_run_reports_what_the_codec_sends(tiny_config, tmp_path: Path, monkeypatch) -> None:
    given = ["--data", str(tiny_config["data.name"]), "--clients", "2", "--rounds", "1", "--steps", "1", "--seeds", "3"]
    simulate = codecs.simulate
    own = {"model.name": tiny_config["model.name"], "adapter.rank": 16, "adapter.num-blocks": 4}
    monkeypatch.setattr(codecs, "simulate", lambda config, clients: simulate(config | own, clients))
    codecs.main([*given, "--codecs", "float32", "int8", "--rows", str(tmp_path / "rows.csv")])
    whole, few = codecs.read(tmp_path / "rows.csv")
    assert (whole.codec, whole.seed, few.codec, few.seed) == ("float32", 3, "int8", 3)
    assert few.kilobytes < whole.kilobytes
    assert whole.start == few.start
