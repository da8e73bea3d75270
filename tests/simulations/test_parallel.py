import os
import time

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from bora_fl.config import ConfigError
from bora_fl.simulations import parallel
from bora_fl.simulations.parallel import WorkerGrid, places
from bora_fl.simulations.pool import Pool

app = ClientApp()


@app.query()
def _query(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


@app.train()
def _train(message: Message, context: Context) -> Message:
    """Counts the client's rounds in its own memory; client 1 crashes, client 2 dies, client 3 is slow."""
    from flwr.app import MetricRecord

    partition = context.node_config["partition-id"]
    if partition == 1:
        raise RuntimeError("no more memory")
    if partition == 2:
        os._exit(7)
    if partition == 3:
        time.sleep(60)
    rounds = context.state.metric_records.setdefault("rounds", MetricRecord({"count": 0}))
    rounds["count"] += 1
    return Message(RecordDict({"rounds": MetricRecord({"count": rounds["count"]})}), reply_to=message)


def deliver_here(delivery: parallel.Delivery) -> parallel.Answer:
    """In a worker: `app` above, which a worker cannot import by a name."""
    parallel.identify()
    return parallel.handle(app, delivery.message, delivery.context), delivery.context.state


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "load", lambda reference: app)
    with Pool(deliver_here, 2, environment={}) as pool:
        yield WorkerGrid("the app above", 5, {}, pool)


def train(grid: WorkerGrid, partitions: list[int], timeout: float | None = None) -> dict[int, Message]:
    messages = [grid.create_message(RecordDict(), "train", partition + 2, "1") for partition in partitions]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return {reply.metadata.src_node_id - 2: reply for reply in replies}


def test_clients_keep_their_memory_whichever_worker_they_meet_and_one_that_fails_fails_alone(grid: WorkerGrid):
    for round in (1, 2, 3):
        replies = train(grid, [4, 1, 2, 0])
        assert {p: r.content["rounds"]["count"] for p, r in replies.items() if r.has_content()} == {0: round, 4: round}
        assert "no more memory" in replies[1].error.reason
        assert "exit code 7" in replies[2].error.reason


def test_who_is_too_slow_is_ended_and_the_next_round_is_whole(grid: WorkerGrid):
    train(grid, [0, 4])  # the workers are up
    started = time.monotonic()
    replies = train(grid, [3, 0], timeout=3)
    assert time.monotonic() - started < 30
    assert replies[0].has_content()
    assert "not done within 3 s" in replies[3].error.reason
    assert train(grid, [0])[0].content["rounds"]["count"] == 3


@pytest.mark.parametrize(
    ("clients", "cores", "gpus", "each", "expected"),
    [
        (10, 4, 0, (1, 0.0), [""] * 4),
        (3, 4, 0, (1, 0.0), [""] * 3),
        (10, 5, 0, (2, 0.0), [""] * 2),
        (10, 16, 2, (1, 0.5), ["0", "0", "1", "1"]),
        (10, 16, 1, (1, 0.3), ["0", "0", "0"]),
        (10, 3, 2, (1, 0.5), ["0", "0", "1"]),
        (10, 16, 4, (1, 2.0), ["0,1", "2,3"]),
    ],
)
def test_workers_fill_the_machine_and_no_more(clients, cores, gpus, each, expected):
    found = places(clients, cores, gpus, *each)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in found] == expected
    assert {place["BORA_FL_GRANTED_CPU"] for place in found} == {str(each[0])}
    assert {place["BORA_FL_GRANTED_GPU"] for place in found} == {str(each[1])}


@pytest.mark.parametrize(
    ("each", "message"), [((3, 0.0), "--cpus 3"), ((1, 0.5), "--gpus 0.5: this machine has 0"), ((1, 1.5), "--gpus")]
)
def test_what_does_not_fit_is_refused(each, message: str):
    with pytest.raises(ConfigError, match=message):
        places(4, 2, 2 if each[1] > 1 else 0, *each)
