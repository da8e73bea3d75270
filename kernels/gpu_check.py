"""Everything that needs a GPU, in one command: `bora-fl bench gpu-check [--json gpu_check.json]`.

It runs the correctness tests of the Triton kernels for real (from a checkout, which has them), then the bench, then
each path's time beside the floor that the machine's own measured bandwidth and GEMM rate allow, and writes one JSON.
It stops after the tests when one fails: there are no times for a wrong result.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bora_fl.kernels.bench import cost
from bora_fl.kernels.bench import layer as bench
from bora_fl.kernels.bench.rivals import DTYPES
from bora_fl.kernels.launch_plan import LayerShape

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "triton_cases.py"


def _seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of a call on the GPU."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def measured_machine() -> dict[str, float]:
    """Measure what a copy and a large bf16 product reach here: bytes/s and flop/s."""
    source = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {
        "bandwidth": 2 * source.nbytes / _seconds(lambda: target.copy_(source)),
        "peak": 2 * 8192**3 / _seconds(lambda: torch.mm(a, a)),
    }


def correctness() -> dict[str, Any]:
    """Run the kernels' tests on this GPU; returns their summary and exit code."""
    if not TESTS.is_file():
        raise SystemExit(f"{TESTS} is missing: run this from a checkout, the installed package has no tests")
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", str(TESTS)]
    if importlib.util.find_spec("xdist"):  # compiling takes most of the time, and it takes a CPU
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    print(f"running the kernels' tests: {' '.join(command[2:])}", flush=True)
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parents[2])
    summary = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr[-500:]
    seconds = time.monotonic() - start
    return {"exit_code": result.returncode, "summary": summary, "seconds": seconds, "output": result.stdout[-8000:]}


def floor(tokens: int, width: int, blocks: int, rank: int, dtype: str, machine: dict[str, float]) -> dict[str, float]:
    """Return the least milliseconds of the frozen products and of the branch's three passes on the measured machine."""
    x_dtype, factor_dtype = DTYPES[dtype]
    shape = LayerShape(tokens, width, width, blocks, rank, x_dtype, factor_dtype, width)
    product = cost.gemm(shape, accumulate=False)
    products = 2 * max(product.bytes / machine["bandwidth"], product.flops / machine["peak"])
    passes = 3 * tokens * width * x_dtype.itemsize / machine["bandwidth"]
    return {"products_ms": 1e3 * products, "floor_ms": 1e3 * (products + passes)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="gpu_check.json")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here; the kernels' tests in the interpreter and `python -m bora_fl.kernels.aot` need none")
        return 2
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "correctness": correctness(),
    }
    print(report["correctness"]["summary"])
    if report["correctness"]["exit_code"] == 0:
        report["machine"] = measured_machine()
        report["bench"] = {}
        for tokens, width in ((8192, 4096), (2048, 768)):
            given = ["--tokens", str(tokens), "--width", str(width), "--device", "cuda"]
            options = bench.parser().parse_args(given)
            for dtype in ("bf16", "bf16/fp32"):
                rows = bench.measure(options, dtype)
                least = floor(tokens, width, options.blocks, options.rank, dtype, report["machine"])
                for row in rows.values():
                    row["share_of_floor"] = least["floor_ms"] / row["both_ms"]
                report["bench"][f"{dtype} T={tokens} n=m={width}"] = {"rows": rows, **least}
                print(f"\n{dtype}, T={tokens}, n=m={width}: floor {least['floor_ms']:.3f} ms\n{bench.table(rows)}")
    Path(chosen.json).write_text(json.dumps(report, indent=1))
    return int(report["correctness"]["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
