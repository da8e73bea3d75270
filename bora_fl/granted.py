"""What a process may use of its machine, by word of the simulation that started it."""

import os

_PREFIX = "BORA_FL_GRANTED_"


def grant(cpus: int, gpus: float) -> dict[str, str]:
    """Environment variables that grant a process cores, and GPUs or a share of one."""
    return {f"{_PREFIX}CPU": str(cpus), f"{_PREFIX}GPU": str(gpus)}


def granted(resource: str) -> float:
    """What this process was granted of a resource, by `grant` or by Ray; 0 if nobody said.

    Args:
        resource: ``CPU`` or ``GPU``.
    """
    if told := os.environ.get(f"{_PREFIX}{resource}"):
        return float(told)
    if "RAY_JOB_ID" not in os.environ and "RAY_RAYLET_PID" not in os.environ:
        return 0.0
    import ray

    return float(ray.get_runtime_context().get_assigned_resources().get(resource, 0.0))


def num_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
