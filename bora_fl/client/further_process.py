"""A further process of a site's worker: does its share of every job until its standard input ends."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from bora_fl.client import head, sharding
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.processes import ALIKE, loopback, read_job
from bora_fl.client.round import evaluate_round, train_along, train_share
from bora_fl.client.share import Share, StoppedError, connect
from bora_fl.client.site import site
from bora_fl.client.worker.pieces import Assembly
from bora_fl.config import extensions, parse
from bora_fl.wire.refusals import Refused

log = logging.getLogger(__name__)


def main(path: str, rank: int, size: int, devices: int | None = None) -> None:
    """Train until the first process ends, or a failure that it does not share.

    Args:
        path: File through which the processes find each other.
        rank: Which process this is.
        size: Out of how many.
        devices: GPUs that all have, where they share the base model's weights out; else None.
    """
    for name in (signal.SIGINT, signal.SIGTERM):  # they are for the first process, whose end is this one's
        signal.signal(name, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s process {rank}: %(message)s")
    extensions.take_installed_only()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    store = FileStore(path, size)
    store.set(f"process-{rank}", "here")
    group, mesh = connect(store, rank, size), None
    if devices is not None:
        mesh = sharding.connect(Path(path).with_name("shards"), rank, size, devices)
    while job := read_job(sys.stdin.buffer):
        told, received = job
        share = Share(rank, size, group, mesh is not None)
        try:
            _follow(told, received, share, mesh)
        except (StoppedError, FloatingPointError):  # in all processes alike
            log.info("the training was ended")
        except Refused as refused:
            if mesh is None or refused.code not in ALIKE:  # a share of the training is for what the first one accepted
                raise


def _follow(told: dict[str, Any], received: Assembly, share: Share, mesh: DeviceMesh | None) -> None:
    """Do what the first process does, as far as it passes through the model; what comes of it is dropped."""
    here, who = site(parse(told["settings"]), mesh), ClientIdentity(**told["who"])
    content, memory = received.content, received.memory
    match told["job"]:
        case "share":
            train_share(here, content, who, memory, share)
        case "train":
            train_along(here, content, who, memory, share, told["evaluates"])
        case "evaluate":
            evaluate_round(here, content, who, memory)
        case "head-statistics":
            head.statistics(here, content, who, memory)
        case "head-losses":
            head.losses(here, content, who, memory)
        case "warm-up":
            here.warm_up((who.partition, who.num_partitions) if who.num_partitions else None)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
