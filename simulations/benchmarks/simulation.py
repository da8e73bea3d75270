"""What a simulation costs beside its training: `bora-fl bench simulation [--clients 20 --rounds 5 --steps 4]`.

A federation inside one process against a bare loop of as many steps on the same batches: forward and backward pass,
clipping and AdamW in plain torch, with no federation around it. CPU seconds on one thread, the median of interleaved
repeats, after one federation that loads libraries, model and data. Every federation's adapter is the same bit for bit,
or nothing is printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bora_fl.client.site import Site, site
from bora_fl.config import Scalar, Settings, parse
from bora_fl.data import draw_batches
from bora_fl.device import autocast, settle
from bora_fl.evaluate import example_losses
from bora_fl.paths import state_in
from bora_fl.seeds import derive
from bora_fl.simulations.engine import simulate


def settings_of(options: argparse.Namespace) -> dict[str, Scalar]:
    """The run: trained and merged, and nothing is evaluated."""
    return {
        "data.name": options.data,
        "data.partition": "iid",
        "data.max-train-examples": options.clients * 100,
        "data.evaluation-fraction": 0.0,
        "data.test-split": "",
        "model.name": options.model,
        "model.max-length": options.length,
        "head.init": "random",
        "run.keep-best": False,
        "run.num-rounds": options.rounds,
        "run.threads": 1,
        "train.local-steps": options.steps,
        "strategy.evaluate-in-train": False,
        "strategy.name": options.strategy,
    }


def bare(place: Site, settings: Settings, clients: int) -> int:
    """The same batches through the same model, in one loop; the number of steps."""
    model = place.model()
    model.train_only(frozenset({"A", "sigma", "B", "tensors"}))
    parameters, device, steps = model.trained_parameters(), settle(model.model), 0
    model.model.train()
    for round in range(1, settings.run.num_rounds + 1):
        for client in range(clients):
            data = place.data(client, clients).train
            generator = np.random.default_rng(derive(settings.run.seed, "batches", round, client))
            optimizer = torch.optim.AdamW(parameters, lr=settings.train.learning_rate, weight_decay=0.0)
            train = settings.train
            options = (train.batch_size, train.local_steps, generator, data.lengths, train.length_bucket)
            for indices in draw_batches(len(data), *options):
                batch = {name: tensor.to(device) for name, tensor in data.batch(indices).items()}
                labels = batch.pop("labels")
                optimizer.zero_grad(set_to_none=True)
                with autocast(device, train.precision), model.quick_step():
                    logits = model.model(**batch).logits
                loss = example_losses(logits, labels)[0].mean()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
                optimizer.step()
                steps += 1
    return steps


def federation(config: dict[str, Scalar], clients: int, folder: Path) -> dict[str, Tensor]:
    """A whole run; the adapter's tensors."""
    done = simulate(config | {"run.output-dir": str(folder)}, clients)
    tensors: dict[str, Tensor] = load_file(done / "adapter" / "adapter_model.safetensors")
    return tensors


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="train.local-steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=48, help="model.max-length")
    parser.add_argument("--data", default="embedded:sentiment4", help="data.name")
    parser.add_argument("--model", default="embedded:minilm", help="model.name")
    parser.add_argument("--strategy", default="refactor", help="strategy.name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = settings_of(options)
    settings = parse(config)
    found: dict[str, list[float]] = {"bare": [], "federation": []}
    steps = 0
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder) / "state"):
        wanted = federation(config, options.clients, Path(folder) / "first")
        place = site(settings)
        for repeat in range(options.repeats):
            began = time.process_time()
            steps = bare(place, settings, options.clients)
            found["bare"].append(time.process_time() - began)
            began = time.process_time()
            adapter = federation(config, options.clients, Path(folder) / str(repeat))
            found["federation"].append(time.process_time() - began)
            if any(not torch.equal(adapter[name], tensor) for name, tensor in wanted.items()):
                raise SystemExit("two runs of one federation differ, so no time is printed")
    loop, run = (statistics.median(found[name]) for name in ("bare", "federation"))
    ratio = statistics.median(f / b for f, b in zip(found["federation"], found["bare"], strict=True))
    print(f"{options.clients} clients x {options.rounds} rounds x {options.steps} steps, {steps} steps in all")
    print(f"  bare loop           {loop:>8.2f} s of CPU, {1e3 * loop / steps:.1f} ms a step")
    print(f"  federation          {run:>8.2f} s of CPU, {ratio:.3f} of the loop, {run - 1.05 * loop:+.2f} s from 1.05")


if __name__ == "__main__":
    main()
