"""A worker in this process: who may call it, in which order it works, and how a job ends."""

import os
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bora_fl.client import job as client_job
from bora_fl.client.app import app
from bora_fl.client.worker import stub
from bora_fl.client.worker.address import Address, WorkerSettings, make_token
from bora_fl.client.worker.service import SERVICE
from bora_fl.client.worker.servicer import QUEUE, SiteWorker
from bora_fl.client.worker.stub import WorkerError, hand_over, status
from bora_fl.config import ConfigError
from bora_fl.wire.refusals import Code
from bora_fl.wire.schema import REPLY
from tests.client.worker.in_process import Training, eventually, serving
from tests.client.worker.messages import content, context


def submit(callers: ThreadPoolExecutor, settings: WorkerSettings, partition: int = 0) -> "Future[RecordDict]":
    return callers.submit(hand_over, settings, "train", content(), context(partition), 60.0)


def health(settings: WorkerSettings, service: str = "") -> int:
    with grpc.insecure_channel(settings.address.target()) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return check(health_pb2.HealthCheckRequest(service=service), timeout=5, wait_for_ready=True).status


@pytest.fixture
def callers():
    with ThreadPoolExecutor(QUEUE + 2) as pool:
        yield pool


def test_only_the_owner_reaches_the_socket(worker: SiteWorker, unix: WorkerSettings):
    assert status(unix).pid == os.getpid()
    path = unix.address.path
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


CONNECT = """
import os, socket, sys
if len(sys.argv) > 2:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except PermissionError:
    print("refused")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
@pytest.mark.parametrize("barrier", ["folder", "socket"])
def test_another_local_user_is_refused(barrier: str, worker: SiteWorker, unix: WorkerSettings, tmp_path: Path):
    assert status(unix).pid == os.getpid()
    for folder in [*tmp_path.parents, tmp_path]:  # everything above the socket's own folder is open
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    if barrier == "socket":
        unix.address.path.parent.chmod(0o755)
    command = [sys.executable, "-c", CONNECT, str(unix.address.path)]
    other = subprocess.run([*command, "as another user"], capture_output=True, text=True, check=True)
    assert other.stdout == "refused\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_a_folder_that_others_reach_into_is_refused(unix: WorkerSettings):
    unix.address.path.parent.mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"), serving(unix):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to give a file away")
def test_a_socket_of_somebody_else_is_sent_nothing(worker: SiteWorker, unix: WorkerSettings, training: Training):
    assert status(unix).pid == os.getpid()
    os.chown(unix.address.path, 65534, -1)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        hand_over(unix, "train", content(), context(), 60.0)
    assert not training.order


def test_a_second_worker_does_not_take_the_socket(worker: SiteWorker, unix: WorkerSettings):
    assert status(unix).pid == os.getpid()
    with pytest.raises(ConfigError, match="another worker"), serving(unix):
        pass
    assert status(unix).pid == os.getpid()


def test_a_stale_socket_is_no_obstacle(unix: WorkerSettings):
    unix.address.path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(unix.address.path))
    with serving(unix):
        assert status(unix).pid == os.getpid()


def test_a_port_wants_the_token(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    make_token(wrong)
    address = Address(host="127.0.0.1", port=port)
    with serving(WorkerSettings(address, right)):
        assert status(WorkerSettings(address, right, wait=10.0)).pid == os.getpid()
        with pytest.raises(WorkerError, match="UNAUTHENTICATED"):
            status(WorkerSettings(address, wrong))
        with pytest.raises(WorkerError, match="token is missing or wrong"):
            hand_over(WorkerSettings(address, wrong), "train", content(), context(), 60.0)
        with grpc.insecure_channel(address.target()) as channel, pytest.raises(grpc.RpcError) as refused:
            stub.Stub(channel).status(stub.StatusRequest(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert health(WorkerSettings(address, right)) == health_pb2.HealthCheckResponse.SERVING


def test_health_tells_of_the_service(worker: SiteWorker, unix: WorkerSettings):
    serving_now = health_pb2.HealthCheckResponse.SERVING
    assert [health(unix), health(unix, SERVICE)] == [serving_now] * 2


def test_jobs_wait_and_run_one_at_a_time_in_order(
    worker: SiteWorker, unix: WorkerSettings, training: Training, callers: ThreadPoolExecutor
):
    replies = []
    for partition in range(3):
        replies.append(submit(callers, unix, partition))
        assert eventually(lambda: len(worker._tickets) == len(replies))
    assert training.started.acquire(timeout=10)
    now = status(unix)
    assert now.waiting == 2
    assert "round 1 train partition 0: train" in now.current
    training.finish.set()
    assert [reply.result().config_records[REPLY]["order"] for reply in replies] == [1, 2, 3]
    assert (training.order, training.most_at_once) == ([0, 1, 2], 1)
    assert (status(unix).trained, status(unix).waiting, status(unix).current) == (3, 0, "")


def test_a_full_queue_is_said_in_words(
    worker: SiteWorker, unix: WorkerSettings, training: Training, callers: ThreadPoolExecutor
):
    replies = [submit(callers, unix) for _ in range(QUEUE + 1)]
    assert eventually(lambda: len(worker._tickets) == QUEUE + 1)
    with pytest.raises(WorkerError, match=f"{QUEUE + 1} jobs are in the queue already"):
        hand_over(unix, "train", content(), context(), 60.0)
    training.finish.set()
    assert all(reply.result() for reply in replies)


def test_a_job_past_its_deadline_ends_and_frees_the_worker(
    worker: SiteWorker, unix: WorkerSettings, training: Training
):
    with pytest.raises(WorkerError, match=r"not done within 1 s \(strategy.timeout\)"):
        hand_over(unix, "train", content(), context(), 1.0)
    assert eventually(lambda: status(unix).cancelled == 1)
    assert training.at_once == 0
    training.finish.set()
    assert hand_over(unix, "train", content(), context(), 60.0)


CALL = """
import sys
from pathlib import Path
from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.client.worker.stub import hand_over
from tests.client.worker.messages import content, context
hand_over(WorkerSettings(Address(path=Path(sys.argv[1]))), "train", content(), context(), 600.0)
"""


@pytest.mark.parametrize("at", ["work", "the queue"])
def test_a_job_whose_caller_dies_ends_and_frees_the_worker(
    at: str, worker: SiteWorker, unix: WorkerSettings, training: Training, callers: ThreadPoolExecutor
):
    other = submit(callers, unix) if at == "the queue" else None
    if other:
        assert training.started.acquire(timeout=10)
    caller = subprocess.Popen([sys.executable, "-c", CALL, str(unix.address.path)])
    try:
        if other:
            assert eventually(lambda: status(unix).waiting == 1, 60)
        else:
            assert training.started.acquire(timeout=60)
    finally:
        caller.kill()
        caller.wait()
    assert eventually(lambda: status(unix).cancelled == 1)
    assert training.at_once == len(worker._tickets) == (1 if other else 0)
    training.finish.set()
    assert other is None or other.result()
    assert hand_over(unix, "train", content(), context(), 60.0)


def test_stopping_refuses_what_waits_and_lets_the_job_at_work_finish(
    unix: WorkerSettings, training: Training, callers: ThreadPoolExecutor
):
    with serving(unix, grace=30.0) as worker:
        first = submit(callers, unix)
        assert training.started.acquire(timeout=10)
        second = submit(callers, unix)
        assert eventually(lambda: len(worker._tickets) == 2)
        threading.Timer(1.0, training.finish.set).start()
    assert first.result().config_records[REPLY]["order"] == 1
    with pytest.raises(WorkerError, match="stopping"):
        second.result()
    assert not unix.address.path.exists()


def test_stopping_without_grace_cancels_the_job_at_work(
    unix: WorkerSettings, training: Training, callers: ThreadPoolExecutor
):
    with serving(unix, grace=0.0):
        reply = submit(callers, unix)
        assert training.started.acquire(timeout=10)
    assert training.at_once == 0
    with pytest.raises(WorkerError, match="ended while it worked on this message"):
        reply.result()


def test_an_adapter_of_80_mb_passes_both_ways(
    worker: SiteWorker, unix: WorkerSettings, monkeypatch: pytest.MonkeyPatch
):
    numbers = np.random.default_rng(0).standard_normal((10, 1 << 20))
    records = RecordDict({"state": ArrayRecord({str(k): Array(row) for k, row in enumerate(numbers)})})

    def keep_and_return(kind, content, context, on_step, policy_file, processes):
        context.state["local-factors"] = content.array_records["state"]
        return content

    monkeypatch.setattr(client_job, "perform", keep_and_return)
    here = context()
    assert hand_over(unix, "train", records, here, 60.0) == records
    assert here.state.array_records["local-factors"] == records.array_records["state"]


@pytest.mark.parametrize("garbage", [b"\x00" * 100_000, b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000)])
def test_garbage_on_the_socket_leaves_it_serving(garbage: bytes, worker: SiteWorker, unix: WorkerSettings):
    assert status(unix).pid == os.getpid()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(unix.address.path))
        with suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(garbage)
    assert status(unix).pid == os.getpid()


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (None, "FAILED_PRECONDITION"),
        ({"version": "0.0.0"}, "FAILED_PRECONDITION"),
        ({"schema": 99}, "FAILED_PRECONDITION"),
        ({"kind": "query"}, "INVALID_ARGUMENT"),
        ({"context": b"\xff\xff"}, "INVALID_ARGUMENT"),
        ({"chunk": b"\xff\xff"}, "INVALID_ARGUMENT"),
    ],
)
def test_a_job_that_cannot_be_understood_is_refused(job, code: str, worker: SiteWorker, unix: WorkerSettings):
    fields = {"version": stub.__version__, "schema": stub.SCHEMA, "kind": "train", "context": b""} | (job or {})
    chunk = fields.pop("chunk", None)
    requests = [] if job is None else [stub.WorkRequest(job=stub.Job(**fields))]
    if chunk:
        requests.append(stub.WorkRequest(chunk=stub.Chunk(data=chunk, last=True)))
    with grpc.insecure_channel(unix.address.target()) as channel, pytest.raises(grpc.RpcError) as refused:
        list(stub.Stub(channel).work(iter(requests), timeout=10, wait_for_ready=True))
    assert refused.value.code().name == code
    assert status(unix).pid == os.getpid()


def test_the_text_of_an_error_in_the_worker_does_not_leave_the_site(
    worker: SiteWorker, unix: WorkerSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_, **__) -> RecordDict:
        raise RuntimeError("Anna Schmidt F32.1")

    monkeypatch.setattr(client_job, "perform", fail)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    node = Context(1, 2, {"partition-id": 0, "worker": f"unix:{unix.address.path}"}, RecordDict(), {})
    reply = app(Message(content(), dst_node_id=2, message_type="train"), node)
    refused = reply.content.config_records[REPLY]
    assert refused["refused"] == Code.WORKER_UNAVAILABLE
    assert "Anna" not in str(reply.content)
    assert "Anna" in caplog.text


def test_a_worker_that_is_not_there_is_named_after_a_wait(tmp_path: Path):
    missing = WorkerSettings(Address(path=tmp_path / "no.sock"), wait=1.0)
    with pytest.raises(WorkerError, match=r"no\.sock cannot be reached \(there is no such socket; waited 1 s\)"):
        hand_over(missing, "train", content(), context(), 60.0)


def test_a_worker_that_comes_back_in_time_is_used(unix: WorkerSettings, training: Training, callers):
    training.finish.set()
    reply = submit(callers, unix)
    with serving(unix, grace=10.0):
        assert reply.result(timeout=20)


def test_a_worker_s_own_policy_goes_with_every_job(
    unix: WorkerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    given = []

    def note(kind, content, context, on_step, policy_file, processes):
        given.append(policy_file)
        return content

    monkeypatch.setattr(client_job, "perform", note)
    with serving(unix, policy_file=tmp_path / "policy.toml"):
        hand_over(unix, "train", content(), context(), 60.0)
        hand_over(unix, "evaluate", content(), context(), 60.0)
    assert given == [tmp_path / "policy.toml"] * 2
