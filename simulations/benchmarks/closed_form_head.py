"""The head with no round of training: `bora-fl bench closed-form-head`.

Rows: λ by generalized cross-validation, λ = .01 · tr(Σ_w) / d, and a release by each client under record-level
differential privacy at every ε, with C from public text and λ from the noise. No choice looks at the test set. The sums
do not depend on how examples are dealt out, and the noise only on the number of clients: examples are dealt evenly.

Features are computed once for each data set, pooling and length, and kept in the folder that `--features` names.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bora_fl.config import DataSettings, ModelSettings
from bora_fl.data import client_data, load_dataset, test_data
from bora_fl.device import autocast, set_threads
from bora_fl.heads import (
    ClassSums,
    Head,
    choose,
    lda,
    narrow,
    public_features,
    release,
    scaled,
    solve_private,
    typical_norm,
)
from bora_fl.heads.features import clip, features
from bora_fl.models import load_base, load_tokenizer
from bora_fl.paths import cache_folder
from bora_fl.privacy.accounting import solve_noise
from bora_fl.privacy.gaussian import SeededRandomness
from bora_fl.seeds import derive

HELD_OUT = 0.1


@dataclass(frozen=True)
class Features:
    """Features and classes of a data set's two splits, and C from public text."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    classes: int
    clip_norm: float


def read_features(arguments: argparse.Namespace) -> Features:
    """The data's features, from the folder or from the model."""
    data = DataSettings(name=arguments.data, partition="iid", evaluation_fraction=0.0)
    model = ModelSettings(name=arguments.model, max_length=arguments.length, pooling=arguments.pooling)
    stem = "-".join([Path(data.name).stem.replace(":", "-"), Path(model.name).stem.replace(":", "-"), model.pooling])
    path = arguments.features / f"{stem}-{model.max_length}-{arguments.precision}.npz"
    if not path.is_file():
        tokenizer = load_tokenizer(model)
        names = load_dataset(data).label_names or []
        base = load_base(model, names, 0)
        splits = {"train": client_data(data, model, tokenizer, 0, 1, 0).train}
        splits["test"] = test_data(data, model, tokenizer) or splits["train"]
        found: dict[str, object] = {
            "classes": len(names),
            "public": public_features(base, tokenizer, len(names), model.max_length).float().numpy(),
        }
        context = partial(autocast, torch.device("cpu"), arguments.precision)
        for split, encoded in splits.items():
            parts = list(features(base, encoded, 128, len(names), context))
            found[split] = torch.cat([x for x, _ in parts]).float().numpy()
            found[f"{split}_classes"] = torch.cat([y for _, y in parts]).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)  # type: ignore[arg-type]
    stored = np.load(path)
    y, test_y = (torch.from_numpy(stored[k]) for k in ("train_classes", "test_classes"))
    x, test, public = (
        narrow(torch.from_numpy(stored[k]), arguments.width).double() for k in ("train", "test", "public")
    )
    return Features(x, y, test, test_y, int(stored["classes"]), typical_norm(public))


def dealt(data: Features, clients: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Each client's training positions, and the held-out ones of all."""
    generator = torch.Generator().manual_seed(derive(seed, "deal"))
    order = torch.randperm(len(data.train), generator=generator)
    held = round(HELD_OUT * len(order))
    return list(order[held:].tensor_split(clients)), order[:held]


def solve(data: Features, clients: int, seed: int, rule: Callable[[ClassSums], float] | None) -> tuple[Head, Head]:
    """The head without privacy, and the same at the scale of the smallest held-out loss."""
    parts, held = dealt(data, clients, seed)
    total = ClassSums.zeros(data.classes, data.train.shape[1])
    for part in parts:
        total = total + ClassSums.of(data.train[part], data.train_classes[part], data.classes)
    head = lda(total, rule(total) if rule else None)
    x, y = data.train[held], data.train_classes[held]
    return head, choose(scaled(head), lambda _, h: float(F.cross_entropy(h(x), y)))[1]


def solve_with_noise(data: Features, clients: int, seed: int, noise: float) -> Head:
    """The head from every client's release; nothing is held out, since nothing is chosen."""
    parts, held = dealt(data, clients, seed)
    total = ClassSums.zeros(data.classes, data.train.shape[1])
    for client, part in enumerate([*parts[:-1], torch.cat([parts[-1], held])]):
        sums = ClassSums.of(clip(data.train[part], data.clip_norm), data.train_classes[part], data.classes)
        total = total + release(sums, noise, SeededRandomness(derive(seed, "release", client)))
    return solve_private(total, noise, clients, data.clip_norm)


def measure(data: Features, head: Head) -> tuple[float, float]:
    """Accuracy and loss on the test set."""
    logits = head(data.test)
    right = logits.argmax(1) == data.test_classes
    return float(right.double().mean()), float(F.cross_entropy(logits, data.test_classes))


def rows(data: Features, arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row for each way to the head."""

    def fixed(sums: ClassSums) -> float:
        return 0.01 * float(sums.within_scatter().trace() / sums.counts.sum() / len(sums.gram))

    ways: dict[str, Callable[[int], tuple[Head, ...]]] = {
        "lambda by cross-validation": lambda seed: solve(data, arguments.clients, seed, None),
        "lambda = .01 tr / d": lambda seed: solve(data, arguments.clients, seed, fixed),
    }
    for epsilon in arguments.epsilon:
        noise = solve_noise(epsilon, arguments.delta, 1.0, 1)
        ways[f"record-level epsilon {epsilon:g}"] = lambda seed, noise=noise: (  # type: ignore[misc]
            solve_with_noise(data, arguments.clients, seed, noise),
        )
    for name, way in ways.items():
        began = time.perf_counter()
        found = [[measure(data, head) for head in way(seed)] for seed in arguments.seeds]
        yield {
            "head": name,
            "accuracy": statistics.fmean(f[0][0] for f in found),
            "accuracies": [f[0][0] for f in found],
            "loss": statistics.fmean(f[0][1] for f in found),
            "loss at the held-out scale": statistics.fmean(f[-1][1] for f in found) if len(found[0]) > 1 else None,
            "seconds": (time.perf_counter() - began) / len(arguments.seeds),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench closed-form-head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="embedded:sentiment4", help="a value of data.name with a split test")
    parser.add_argument("--model", default="embedded:minilm", help="a value of model.name")
    parser.add_argument("--pooling", default="auto", choices=["auto", "cls", "mean", "last", "layers"])
    parser.add_argument("--width", type=int, default=0, help="head.max-width; 0 is all")
    parser.add_argument("--length", type=int, default=48, help="model.max-length")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--epsilon", type=float, nargs="*", default=[1.0, 3.0, 6.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    folder = cache_folder() / "features"
    parser.add_argument("--features", type=Path, default=folder, help="folder of computed features")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    set_threads(0)
    data = read_features(options)
    print(f"{len(data.train)} + {len(data.test)} examples, {data.classes} classes, C = {data.clip_norm:.2f}")
    print(f"{'head':<28}{'accuracy':>10}{'lowest':>9}{'highest':>9}{'loss':>8}{'scaled':>8}{'s':>7}")
    results = []
    for row in rows(data, options):
        results.append(row)
        accuracies: list[float] = row["accuracies"]  # type: ignore[assignment]
        scale = row["loss at the held-out scale"]
        print(
            f"{row['head']:<28}{row['accuracy']:>10.4f}{min(accuracies):>9.4f}{max(accuracies):>9.4f}"
            f"{row['loss']:>8.3f}{'-' if scale is None else f'{scale:.3f}':>8}{row['seconds']:>7.2f}",
            flush=True,
        )
    if options.json:
        used = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        stored = {"options": used, "clip_norm": data.clip_norm, "rows": results}
        options.json.write_text(json.dumps(stored, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
