from collections.abc import Iterator
from pathlib import Path

import pytest

from bora_fl.client import job
from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.client.worker.servicer import SiteWorker
from tests.client.worker.in_process import Training, serving


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    stand_in = Training()
    monkeypatch.setattr(job, "perform", stand_in)
    yield stand_in
    stand_in.finish.set()


@pytest.fixture
def unix(tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(Address(path=tmp_path / "private" / "worker.sock"), wait=10.0)


@pytest.fixture
def worker(unix: WorkerSettings) -> Iterator[SiteWorker]:
    with serving(unix) as running:
        yield running
