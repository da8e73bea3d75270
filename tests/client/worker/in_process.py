"""Workers in this process, and a stand-in for the training."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from bora_fl.client.worker.address import WorkerSettings
from bora_fl.client.worker.servicer import SiteWorker
from bora_fl.client.worker.serving import serve
from bora_fl.wire.schema import REPLY


class Training:
    """Stands in for `perform`: steps until it is told to finish, and keeps book of what ran when."""

    def __init__(self) -> None:
        self.finish, self.started = threading.Event(), threading.Semaphore(0)
        self.at_once = self.most_at_once = 0
        self.order: list[int] = []

    def __call__(
        self,
        kind: str,
        content: RecordDict,
        context: Context,
        on_step: Callable,
        policy_file: Path | None,
        processes=None,
    ) -> RecordDict:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.order.append(int(context.node_config["partition-id"]))
        self.started.release()
        try:
            step = 0
            while not self.finish.is_set():
                on_step("train", step := step + 1, 1000)
                time.sleep(0.01)
            return RecordDict({REPLY: ConfigRecord({"order": len(self.order)})})
        finally:
            self.at_once -= 1


@contextmanager
def serving(settings: WorkerSettings, grace: float = 0.0, policy_file: Path | None = None) -> Iterator[SiteWorker]:
    worker, stop, errors = SiteWorker(policy_file), threading.Event(), []

    def run() -> None:
        try:
            serve(settings, worker, stop=stop, grace=grace)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker
    finally:
        stop.set()
        thread.join(30)
    if errors:
        raise errors[0]


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()
