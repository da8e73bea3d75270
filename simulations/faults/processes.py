"""Faults of processes and machines, injected into a deployment over loopback while it trains."""

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import psutil

from bora_fl.client.init import policy_text
from bora_fl.client.worker.stub import WorkerError
from bora_fl.config import Scalar
from bora_fl.deployment.loopback import Deployment, DeploymentError, Site, finished
from bora_fl.deployment.processes import RESTART_SECONDS, Service
from bora_fl.simulations.faults.verdict import CONFIG, ROUND, Fault, Verdict, judge

LIMIT = 1200.0  # seconds that anything may take
TRAINING, SENT = "Receiving: train message", "Sent successfully"

Injection = Callable[[Deployment], float]


def _loopback(
    injection: Injection, more: Mapping[str, Scalar] | None, absent: tuple[int, ...], workers: bool
) -> Callable[[Path], Verdict]:
    """Start a run, inject the fault, and see the run to its end, resuming it if it stops.

    Args:
        injection: Waits for its moment, injects the fault, restarts what a machine would restart by itself, and returns
            the moment.
        more: More run config.
        absent: Sites that are not there at the start.
        workers: Whether sites have workers; without, every message starts a ClientApp that trains by itself.
    """

    def inject(folder: Path) -> Verdict:
        config = CONFIG | dict(more or {})
        with Deployment(folder, absent=absent, workers=workers) as deployment:
            run = deployment.submit(config)
            moment = injection(deployment)
            before = len(deployment.rounds())
            outcome, lost = "completed", 0
            if (code := _next_round(deployment, run, before)) is not None and code != 0:
                outcome, lost = f"stopped: {_reason(run)}; resumed", 1
                deployment.wait_until_up()
                run = deployment.submit(config | {"run.resume": True})
                _next_round(deployment, run, before)
            seconds = time.monotonic() - moment
            _until(deployment, lambda: run.pid is None, "the end of the run")
            finished(run, 5, deployment.services)
            return judge(deployment.output, config, outcome, seconds, lost)

    return inject


def _next_round(deployment: Deployment, run: Service, before: int) -> int | None:
    """Wait for a round more, or for the run's end and return its exit code."""
    _until(deployment, lambda: len(deployment.rounds()) > before or run.pid is None, "the next round")
    return run.wait(5) if run.pid is None else None


def _until(deployment: Deployment, condition: Callable[[], bool], what: str) -> None:
    """Wait, starting again what ends by itself."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise DeploymentError(f"waited {LIMIT:.0f} s for {what}")
        deployment.tend()
        time.sleep(0.2)


def _reason(run: Service) -> str:
    """What a failed run said last, without its remedies."""
    return run.log.read_text(errors="replace").rpartition("failed: ")[2].partition(";")[0].strip()[:400]


def _apps(service: Service, name: str) -> list[psutil.Process]:
    """The app processes that a SuperExec has started, the newest first."""
    found = []
    with contextlib.suppress(psutil.Error):  # it may have just ended
        for child in psutil.Process(service.pid).children(recursive=True) if service.pid else ():
            with contextlib.suppress(psutil.Error):
                if any(name in part for part in child.cmdline()[:2]):
                    found.append(child)
    return found[::-1]


def _received(site: Site) -> int:
    return site.node.log.read_text(errors="replace").count(TRAINING) if site.node.log.is_file() else 0


def _clientapp(site: Site, older: Collection[int] = ()) -> psutil.Process | None:
    """The site's ClientApp once it has its message: it imports torch after that, to train.

    Args:
        site: The site.
        older: Ids of ClientApps of earlier rounds, which may take some seconds to end.
    """
    for app in _apps(site.executor, "flwr-clientapp"):
        with contextlib.suppress(psutil.Error):
            if app.pid not in older and any("libtorch" in part.path for part in app.memory_maps()):
                return app
    return None


def _at_work(site: Site, older: Collection[int] = ()) -> bool:
    """Whether the site trains: its worker has a job, or without a worker its ClientApp computes."""
    if site.worker is None:
        return (app := _clientapp(site, older)) is not None and _computes(app)
    try:
        return bool(site.work().current)
    except WorkerError:
        return False


def _computes(process: psutil.Process, seconds: float = 3.0) -> bool:
    """Whether a process uses the processor, and does not merely wait."""
    with contextlib.suppress(psutil.Error):
        before = sum(process.cpu_times()[:2])
        time.sleep(seconds)
        return bool(sum(process.cpu_times()[:2]) - before > 0.05)
    return False


def _await_training(deployment: Deployment, site: Site) -> None:
    """Wait until a site is at work on the round in which faults are injected."""
    older = set[int]()

    def has_come() -> bool:
        there = {app.pid for app in _apps(site.executor, "flwr-clientapp")}
        if _received(site) >= ROUND:
            return True
        older.update(there)
        return False

    _until(deployment, has_come, f"round {ROUND}")
    _until(deployment, lambda: _at_work(site, older), "the site to train")


def _restart(*services: Service) -> float:
    moment = time.monotonic()
    time.sleep(RESTART_SECONDS)
    for service in services:
        service.start()
    return moment


def _before_reply(deployment: Deployment, site: Site) -> None:
    """The node is stopped while the site trains, until there is nothing left to do but to reply."""
    _await_training(deployment, site)
    site.node.signal(signal.SIGSTOP)
    _until(deployment, lambda: not _at_work(site), "the end of the training")


def _after_reply(deployment: Deployment, site: Site) -> None:
    _until(deployment, lambda: site.node.log.is_file() and site.node.log.read_text().count(SENT) > ROUND, "the reply")


Stage = Callable[[Deployment, Site], None]
STAGES: dict[str, tuple[str, Stage]] = {
    "mid-round": ("in the middle of a round", _await_training),
    "before-reply": ("before a site replies", _before_reply),
    "after-reply": ("after a site has replied", _after_reply),
}


def _at(stage: Stage, kill: Callable[[Deployment, Site], float]) -> Injection:
    """Kill something at a stage of the round, and let a node go on that the stage has stopped."""

    def inject(deployment: Deployment) -> float:
        site = deployment.sites[1]
        stage(deployment, site)
        try:
            return kill(deployment, site)
        finally:
            site.node.signal(signal.SIGCONT)

    return inject


def _kill_site(_: Deployment, site: Site) -> float:
    site.kill()
    return _restart(*site.services)


def _kill_worker(_: Deployment, site: Site) -> float:
    assert site.worker is not None
    site.worker.kill()
    return _restart(site.worker)


def _kill_clientapp(_: Deployment, site: Site) -> float:
    process = _clientapp(site)
    if process is None:
        raise DeploymentError("there is no ClientApp to kill")
    process.kill()
    return time.monotonic()


def _kill_superlink(deployment: Deployment, _: Site) -> float:
    return _away(deployment, 10.0)


def _kill_serverapp(deployment: Deployment, _: Site) -> float:
    processes = _apps(deployment.executor, "flwr-serverapp")
    if not processes:
        raise DeploymentError("there is no ServerApp to kill")
    processes[0].kill()
    return time.monotonic()


def _site_leaves(deployment: Deployment) -> float:
    site = deployment.sites[1]
    _await_training(deployment, site)
    site.kill()
    return time.monotonic()


def _site_joins(deployment: Deployment) -> float:
    _until(deployment, lambda: len(deployment.rounds()) >= 1, "round 1")
    deployment.sites[2].start()
    return time.monotonic()


def _slow_site(deployment: Deployment) -> float:
    site = deployment.sites[1]
    _await_training(deployment, site)
    moment = time.monotonic()
    assert site.worker is not None
    site.worker.signal(signal.SIGSTOP)
    _until(deployment, lambda: len(deployment.rounds()) >= ROUND, "the deadline")
    site.worker.signal(signal.SIGCONT)
    return moment


def _stopped_worker(deployment: Deployment) -> float:
    site = deployment.sites[1]
    _await_training(deployment, site)
    moment = time.monotonic()
    assert site.worker is not None
    site.worker.signal(signal.SIGSTOP)
    time.sleep(60)
    site.worker.signal(signal.SIGCONT)
    return moment


def _away(deployment: Deployment, seconds: float) -> float:
    moment = time.monotonic()
    deployment.superlink.kill()
    time.sleep(seconds)
    deployment.superlink.start()
    return moment


def _other_policy(deployment: Deployment) -> float:
    """A site joins whose policy trusts another model than the run's: it refuses every round."""
    site = deployment.sites[1]
    assert site.worker is not None
    policy = deployment.folder / "policy.toml"
    chosen = {"data-set": "other", "data-path": "embedded:sentiment4", "models": ["another"], "modes": ["none"]}
    policy.write_text(policy_text(chosen))
    site.worker.command += ["--policy", str(policy)]
    site.start()
    return time.monotonic()


def _fault(
    summary: str,
    injection: Injection,
    more: Mapping[str, Scalar] | None = None,
    absent: tuple[int, ...] = (),
    *,
    workers: bool = True,
) -> Fault:
    where = "loopback" if workers else "loopback, no workers"
    return Fault(summary, where, _loopback(injection, more, absent, workers))


# A SuperNode that is killed is let in again only once the SuperLink has missed its heartbeats, about 50 s later.
LONGER: dict[str, Scalar] = {"run.num-rounds": 4, "run.evaluate-every": 4}
KILLS: dict[str, tuple[str, Callable[[Deployment, Site], float], Mapping[str, Scalar] | None]] = {
    "site": ("a site is killed {}, up again after 5 s", _kill_site, LONGER),
    "worker": ("a site's worker is killed {}, up again after 5 s", _kill_worker, None),
    "clientapp": ("a site's ClientApp is killed {}", _kill_clientapp, None),
    "superlink": ("the SuperLink is killed {}, up again after 10 s", _kill_superlink, None),
    "serverapp": ("the ServerApp is killed {}", _kill_serverapp, None),
}
PROCESS_FAULTS: dict[str, Fault] = {
    f"{name}-{stage}{suffix}": _fault(summary.format(when), _at(at, kill), more, workers=not suffix)
    for suffix in ("", "-no-worker")
    for name, (summary, kill, more) in KILLS.items()
    for stage, (when, at) in STAGES.items()
    # A ClientApp trains only where there is no worker, and is gone once its site has replied.
    if name != ("worker" if suffix else "clientapp") and (name, stage) != ("clientapp", "after-reply")
} | {
    "worker-stopped": _fault("a site's worker is stopped (SIGSTOP) for 60 s while it trains", _stopped_worker),
    "other-policy": _fault("a site's policy trusts another model than the run's", _other_policy, None, (1,)),
    "site-leaves": _fault("a site leaves in the middle of a round, for good", _site_leaves, LONGER),
    "site-joins-late": _fault(
        "a site joins after round 1; strategy.min-nodes = 2", _site_joins, {"strategy.min-nodes": 2}, (2,)
    ),
    "slow-site": _fault("a site is slower than strategy.timeout = 120 s", _slow_site, {"strategy.timeout": 120.0}),
    "superlink-75s": _fault(
        "the SuperLink is killed in the middle of a round, up again after 75 s",
        _at(_await_training, lambda deployment, _: _away(deployment, 75.0)),
    ),
}
