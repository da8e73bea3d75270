"""What warm workers save: rounds of a deployment over loopback with and without them.

    bora-fl bench worker

The first round of each is left out: it fills the caches of both. A round's time runs from the server's first message to
the merged adapter; the central test set is kept small, so that it is not the server's evaluation that is measured.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bora_fl.config import Scalar
from bora_fl.deployment.loopback import Deployment, finished

LIMIT = 3600.0


def measure(folder: Path, config: dict[str, Scalar], *, workers: bool) -> tuple[list[float], list[int]]:
    """Return the seconds of every round but the first, and each site's number of base-model loads (with workers)."""
    with Deployment(folder, workers=workers) as deployment:
        finished(deployment.submit(config), LIMIT, deployment.services)
        seconds = [float(str(row["seconds"])) for row in deployment.rounds()]
        loads = [site.work().base_loads for site in deployment.sites] if workers else []
    return seconds[1:], loads


def main(given: Sequence[str] | None = None) -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15, help="local steps; 15 is the default of the run config")
    arguments = parser.parse_args(given)
    config: dict[str, Scalar] = {
        "run.num-rounds": arguments.rounds,
        "run.evaluate-every": arguments.rounds,
        "run.threads": 1,
        "data.max-test-examples": 50,
        "data.evaluation-fraction": 0.02,
        "head.init": "random",  # solving it takes passes over all data, with and without workers
        "train.local-steps": arguments.steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        warm, loads = measure(Path(folder) / "warm", config, workers=True)
        cold, _ = measure(Path(folder) / "cold", config, workers=False)
    with_workers, without = statistics.median(warm), statistics.median(cold)
    print(f"with workers     {with_workers:7.1f} s a round (median of {len(warm)}); base-model loads by site {loads}")
    print(f"without workers  {without:7.1f} s a round (median of {len(cold)})")
    print(f"ratio            {with_workers / without:7.2f}")


if __name__ == "__main__":
    main()
