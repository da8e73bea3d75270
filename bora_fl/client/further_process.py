"""A further process of a site's worker: trains its share of every job until its standard input ends."""

import logging
import os
import signal
import sys

from torch.distributed import FileStore  # type: ignore[attr-defined]

from bora_fl.client.identity import ClientIdentity
from bora_fl.client.processes import loopback, read_job
from bora_fl.client.round import train_share
from bora_fl.client.share import Share, StoppedError, connect
from bora_fl.client.site import site
from bora_fl.config import extensions, parse

log = logging.getLogger(__name__)


def main(path: str, rank: int, size: int) -> None:
    """Train until the first process ends, or a failure that it does not share.

    Args:
        path: File through which the processes find each other.
        rank: Which process this is.
        size: Out of how many.
    """
    for name in (signal.SIGINT, signal.SIGTERM):  # they are for the first process, whose end is this one's
        signal.signal(name, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s process {rank}: %(message)s")
    extensions.take_installed_only()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    store = FileStore(path, size)
    store.set(f"process-{rank}", "here")
    group = connect(store, rank, size)
    while job := read_job(sys.stdin.buffer):
        told, received = job
        who = ClientIdentity(**told["who"])
        try:
            train_share(site(parse(told["settings"])), received.content, who, received.memory, Share(rank, size, group))
        except (StoppedError, FloatingPointError):  # in all processes alike
            log.info("the training was ended")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
