"""What a simulation costs beside its training: `bora-fl bench simulation [--clients 20 --rounds 5 --steps 4]`.

A federation inside one process against a bare loop of as many steps on the same batches: forward and backward pass,
clipping and AdamW in plain torch, with no federation around it. CPU seconds on one thread, the median of interleaved
repeats, after one federation that loads libraries, model and data. Every federation's adapter is the same bit for bit,
or nothing is printed.

With `--backend ray` or `processes` the federation is `bora-fl run --simulate` instead, one client at a time, and what
counts is the CPU time of all its processes after round 1, in which they load; its adapter must agree to 1e-5.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from bora_fl.client.site import Site, site
from bora_fl.config import Scalar, Settings, parse
from bora_fl.data import draw_batches
from bora_fl.device import autocast, settle
from bora_fl.evaluate import example_losses
from bora_fl.paths import state_in
from bora_fl.report import training_rows
from bora_fl.seeds import derive
from bora_fl.simulations.engine import simulate
from bora_fl.simulations.launch import BACKENDS
from bora_fl.state import ALL


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


def bare(place: Site, settings: Settings, clients: int, first: int = 1) -> int:
    """The batches of all rounds from the first on through the same model, in one loop; the number of steps."""
    model = place.model()
    model.train_only(ALL)
    parameters, device, steps = model.trained_parameters(), settle(model.model), 0
    model.model.train()
    for round in range(first, settings.run.num_rounds + 1):
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


def after_round_1(
    config: dict[str, Scalar], clients: int, folder: Path, backend: str
) -> tuple[dict[str, Tensor], float]:
    """A whole run on a backend; the adapter's tensors, and the CPU seconds of all processes after round 1.

    Raises:
        SystemExit: If the run fails.
    """
    command = [sys.executable, "-m", "bora_fl.cli", "run", "--simulate", str(clients), "--backend", backend]
    command += ["--cpus", str(psutil.cpu_count())]  # one client at a time, as in the loop
    for key, value in (config | {"run.output-dir": str(folder)}).items():
        command += ["-c", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    seconds: dict[int, float] = {}  # by process, which may end before the run does
    marks: dict[int, float] = {}  # all processes' seconds when a round's row was there
    log = folder.with_suffix(".log")
    with log.open("w") as output, psutil.Popen(command, stdout=output, stderr=output) as process:
        while process.poll() is None:
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    seconds[one.pid] = times.user + times.system
            marks.setdefault(len(training_rows(folder / "metrics.jsonl")), sum(seconds.values()))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the run on {backend} failed:\n{log.read_text()[-2000:]}")
    if 1 not in marks:
        raise SystemExit("the rounds are too short to be told apart: give more --steps")
    return load_file(folder / "adapter" / "adapter_model.safetensors"), marks[max(marks)] - marks[1]


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
    parser.add_argument("--backend", choices=("one process", *BACKENDS), default="one process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, apart = settings_of(options), options.backend in BACKENDS
    if apart and options.rounds < 2:
        parser.error("--backend counts from the second round on: --rounds 2 or more")
    settings, tolerance = parse(config), 1e-5 if apart else 0.0
    found: dict[str, list[float]] = {"bare": [], "federation": []}
    steps = 0
    with tempfile.TemporaryDirectory() as folder, state_in(Path(folder) / "state"):
        wanted = federation(config, options.clients, Path(folder) / "first")
        place = site(settings)
        for repeat in range(options.repeats):
            began = time.process_time()
            steps = bare(place, settings, options.clients, first=2 if apart else 1)
            found["bare"].append(time.process_time() - began)
            output = Path(folder) / str(repeat)
            began = time.process_time()
            if apart:
                adapter, spent = after_round_1(config, options.clients, output, options.backend)
            else:
                adapter = federation(config, options.clients, output)
                spent = time.process_time() - began
            found["federation"].append(spent)
            for name, tensor in wanted.items():
                if not torch.allclose(adapter[name], tensor, rtol=tolerance, atol=tolerance):
                    raise SystemExit("two runs of one federation differ, so no time is printed")
    loop, run = (statistics.median(found[name]) for name in ("bare", "federation"))
    ratio = statistics.median(f / b for f, b in zip(found["federation"], found["bare"], strict=True))
    beyond = run - 1.05 * loop
    counted = f"rounds 2 to {options.rounds}" if apart else f"{options.rounds} rounds"
    print(f"{options.clients} clients x {counted} x {options.steps} steps, {steps} steps in all")
    print(f"  bare loop           {loop:>8.2f} s of CPU, {1e3 * loop / steps:.1f} ms a step")
    print(f"  {options.backend:<19} {run:>8.2f} s of CPU, {ratio:.3f} of the loop, {beyond:+.2f} s from 1.05")


if __name__ == "__main__":
    main()
