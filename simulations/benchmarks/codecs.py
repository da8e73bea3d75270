"""What codecs cost in accuracy: `bora-fl bench codecs [--data … --codecs … --seeds …]`.

Every codec, with error feedback, in the same federation on the same seeds: partition, clients, batches and start are
common to the codecs of a seed, so that differences are paired. A run that stands in the file is not run again.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from bora_fl.config import Scalar
from bora_fl.paths import state_in
from bora_fl.report import read_rows
from bora_fl.simulations.compare.intervals import estimate, paired
from bora_fl.simulations.engine import simulate

CODECS = ("float32", "bf16", "int8", "int4", "topk:0.1", "topk:0.1+int8", "topk:0.02+int8")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        codec: ``wire.codec``.
        seed: ``run.seed``.
        start: Accuracy on the test set before round 1.
        accuracy: After the last round.
        loss: After the last round.
        kilobytes: Of a client's update, of a mean client and round.
    """

    codec: str
    seed: int
    start: float
    accuracy: float
    loss: float
    kilobytes: float


def run(options: argparse.Namespace, codec: str, seed: int) -> Row:
    """One federation to its end."""
    config: dict[str, Scalar] = {
        "data.name": options.data,
        "data.partition": "dirichlet",
        "data.max-train-examples": options.examples,
        "data.max-test-examples": options.test_examples,
        "model.max-length": options.length,
        "train.local-steps": options.steps,
        "strategy.evaluate-in-train": False,
        "run.keep-best": False,
        "run.evaluate-every": options.rounds,
        "run.num-rounds": options.rounds,
        "run.seed": seed,
        "run.threads": options.threads,
        "wire.codec": codec,
        "head.solve-again": "never",
    }
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder) / "state"):
        done = simulate(config | {"run.output-dir": f"{folder}/run"}, options.clients)
        rows = read_rows(done / "metrics.jsonl")
    sent = sum(row["bytes_up"] for row in rows[1:]) / (options.clients * options.rounds)
    return Row(codec, seed, rows[0]["accuracy"], rows[-1]["accuracy"], rows[-1]["loss"], sent / 1000)


def read(path: Path) -> list[Row]:
    """The runs of a file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open() as file:
        return [
            Row(row["codec"], int(row["seed"]), *(float(row[f.name]) for f in fields(Row)[2:]))
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write runs, in the order of codecs and seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(
            [*astuple(row)[:2], *(f"{value:.5f}" for value in astuple(row)[2:])]
            for row in sorted(rows, key=lambda r: (_place(r.codec), r.seed))
        )


def _place(codec: str) -> tuple[int, str]:
    return (CODECS.index(codec) if codec in CODECS else len(CODECS), codec)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each codec: bytes, accuracy and, over the seeds of both, the difference from float32 in points."""
    yield f"{'codec':<16}{'kB':>7}{'share':>7}{'seeds':>7}{'accuracy':>10}{'points from float32':>22}{'loss':>8}"
    by_codec = {codec: [r for r in rows if r.codec == codec] for codec in sorted({r.codec for r in rows}, key=_place)}
    plain = {r.seed: r.accuracy for r in by_codec.get("float32", [])}
    whole = estimate([r.kilobytes for r in by_codec.get("float32", [])])
    for codec, found in by_codec.items():
        kilobytes, accuracy = (estimate([getattr(r, name) for r in found]) for name in ("kilobytes", "accuracy"))
        loss, difference = estimate([r.loss for r in found]), paired({r.seed: r.accuracy for r in found}, plain)
        if kilobytes is None or accuracy is None or loss is None:
            continue
        words = "" if codec == "float32" or difference is None else f"{100 * difference.mean:+.2f}"
        if words and difference and difference.half_width is not None:
            words += f" ± {100 * difference.half_width:.2f}"
        share = f"{kilobytes.mean / whole.mean:.2f}" if whole else "-"
        sizes = f"{codec:<16}{kilobytes.mean:>7.0f}{share:>7}{len(found):>7}"
        yield f"{sizes}{accuracy.mean:>10.4f}{words:>22}{loss.mean:>8.3f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture of the points from float32 by bytes: a dot a seed, a line through their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    plain = {r.seed: r.accuracy for r in rows if r.codec == "float32"}
    for codec in sorted({r.codec for r in rows}, key=_place):
        found = [r for r in rows if r.codec == codec and r.seed in plain]
        points = [100 * (r.accuracy - plain[r.seed]) for r in found]
        axes.plot([r.kilobytes for r in found], points, "o", ms=4, alpha=0.4, color="tab:blue")
        if found:
            at = (found[0].kilobytes, sum(points) / len(points))
            axes.plot(*at, "_", ms=18, color="black")
            axes.annotate(codec, at, xytext=(0, 8), textcoords="offset points", fontsize=8, ha="center")
    axes.set(xscale="log", xlabel="kB a client and round", ylabel="points of accuracy from float32")
    axes.margins(x=0.1, y=0.2)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, and write the rows and the picture."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench codecs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="embedded:sentiment4", help="a value of data.name with a split test")
    parser.add_argument("--examples", type=int, default=6000, help="data.max-train-examples")
    parser.add_argument("--test-examples", type=int, default=4000, help="data.max-test-examples")
    parser.add_argument("--length", type=int, default=32, help="model.max-length")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="train.local-steps")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="values of wire.codec")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rows", type=Path, default=Path("runs/codecs.csv"), help="file of the runs, gone on with")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args(arguments)
    rows = read(options.rows)
    for seed in options.seeds:
        for codec in options.codecs:
            if not any((row.codec, row.seed) == (codec, seed) for row in rows):
                rows.append(run(options, codec, seed))
                write(options.rows, rows)
                print(rows[-1], flush=True)
    wanted = [row for row in read(options.rows) if row.codec in options.codecs and row.seed in options.seeds]
    print("\n".join(table(wanted)))
    if options.picture:
        draw(wanted, options.picture)


if __name__ == "__main__":
    main()
