"""What a process that trains does with one message: in the ClientApp's own process, or in a site worker."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch.distributed.device_mesh import DeviceMesh

from bora_fl import preload as _preload  # noqa: F401  (before what else imports the large libraries)
from bora_fl.client import head
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.processes import Job, Processes
from bora_fl.client.refusing import refuse
from bora_fl.client.round import OnStep, evaluate_round, evaluates, train_round
from bora_fl.client.sharding import require_sharding
from bora_fl.client.share import Share
from bora_fl.client.site import Site, site
from bora_fl.config import Settings, extras, parse
from bora_fl.paths import state_folder
from bora_fl.privacy.audit_log import AUDIT_LOG, AuditLogError, append
from bora_fl.privacy.policy import SitePolicy, find_policy, grant
from bora_fl.wire.records import content_digest
from bora_fl.wire.refusals import Code, Refused, refuse_as
from bora_fl.wire.schema import INSTRUCTION, METRICS, REPLY, Kind, refusal

_LOOK = 0.5  # seconds between two looks for whether anybody still waits for a reply that is held


Work = Callable[[Settings, RecordDict, ClientIdentity, RecordDict, SitePolicy | None], RecordDict]
"""Trains in another way than `train_round`: by granted settings, message, client, memory and policy."""


def perform(
    kind: Kind,
    content: RecordDict,
    context: Context,
    on_step: OnStep | None = None,
    policy_file: Path | None = None,
    work: Work | None = None,
    processes: Processes | None = None,
) -> RecordDict:
    """Do what a message asks, as far as the site's policy grants it.

    Args:
        kind: What the message asks for.
        content: The message's content.
        context: The node's; `context.state`, what the client keeps between rounds, is changed in place.
        on_step: Called between steps with what is being done, steps done, and steps in all. What it raises beyond
            `Exception` ends the work and passes through.
        policy_file: This process's own policy, which wins over that of the message's node config.
        work: What trains in the place of `train_round`, for messages of that kind.
        processes: Others that train along.

    Returns:
        The reply's content: a release, or a refusal if anything went wrong at this site, or if the site's audit log has
        no place for it, since nothing leaves unseen.
    """
    started, period = time.monotonic(), 0.0
    try:
        policy = find_policy(context.node_config, policy_file)
        period = policy.reply_not_before if policy else 0.0
        reply = _granted(kind, content, context, on_step, policy, work, processes)
    except Exception as error:  # whatever went wrong, the server is to be told that something did
        reply = refusal(refuse(error))
    try:
        _record(kind, content, context, reply)
    except AuditLogError as error:
        reply = refusal(refuse(Refused(Code.AUDIT_LOG_UNWRITABLE, str(error))))
    if period:
        _hold(started, period, on_step)
    return reply


def _record(kind: Kind, content: RecordDict, context: Context, reply: RecordDict) -> None:
    """Add to the site's audit log what is about to leave."""
    asked = content.config_records.get(INSTRUCTION, ConfigRecord())
    metrics = reply.metric_records.get(METRICS, MetricRecord())
    append(
        state_folder() / AUDIT_LOG,
        kind=kind,
        outcome="refused" if "refused" in reply.config_records.get(REPLY, ConfigRecord()) else "released",
        node=context.node_id,
        partition=str(context.node_config.get("partition-id", "")),
        run=str(asked.get("run-id", ""))[:64],
        round=str(asked.get("round", ""))[:20],
        charge={name: str(value) for name, value in metrics.items() if name.startswith("epsilon")},
        reply=content_digest(reply),
    )


def _granted(
    kind: Kind,
    content: RecordDict,
    context: Context,
    on_step: OnStep | None,
    policy: SitePolicy | None,
    work: Work | None,
    processes: Processes | None,
) -> RecordDict:
    """Do what the policy grants."""
    with refuse_as(Code.RUN_CONFIG_INVALID):
        asked = parse(context.run_config)
        extras.require_for(asked)
    settings = grant(policy, asked, kind)
    if processes:
        require_shares(settings, processes.count)
        if processes.shards:
            require_sharding(settings)
    who = ClientIdentity.read(context.node_config, context.node_id)
    if work is not None:
        return work(settings, content, who, context.state, policy)
    with whole_job(settings, content, who, context.state, kind, policy, processes) as (here, share):
        if kind == "train":
            return train_round(here, content, who, context.state, on_step, policy, processes, share)
        if kind == "head-statistics":
            return head.statistics(here, content, who, context.state, on_step, policy)
        if kind == "head-losses":
            return head.losses(here, content, who, context.state, on_step)
        return evaluate_round(here, content, who, context.state, on_step)


@contextmanager
def whole_job(
    settings: Settings,
    content: RecordDict,
    who: ClientIdentity,
    memory: RecordDict,
    job: Job,
    policy: SitePolicy | None,
    processes: Processes | None,
) -> Iterator[tuple[Site, Share | None]]:
    """The site for a job, and this process's share where the others do all of it along, for lack of a whole model."""

    def here(mesh: DeviceMesh | None = None) -> Site:
        found = site(settings, mesh)
        found.folds_mb = policy.folds_mb if policy else 0
        return found

    if processes is None or not processes.shards:
        yield here(), None
        return
    with processes.at_work(settings, content, who, memory, job, evaluates(settings, policy)) as share:
        yield here(processes.mesh), share


def warm_up(
    settings: Settings, partition: tuple[int, int] | None, policy: SitePolicy | None, processes: Processes | None
) -> None:
    """Load what a run needs before its first round.

    Args:
        settings: As the run asks.
        partition: The client whose data is tokenized too, and out of how many; None loads the model alone.
        policy: The site's.
        processes: Others that train along.
    """
    settings, who = grant(policy, settings, "train"), ClientIdentity(*(partition or (0, 0)))
    if processes and processes.shards:
        require_sharding(settings)
    with whole_job(settings, RecordDict(), who, RecordDict(), "warm-up", policy, processes) as (here, _):
        here.warm_up(partition)


def require_shares(settings: Settings, processes: int) -> None:
    """Refuse what is not trained in several processes.

    Raises:
        Refused: For record-level privacy.
    """
    if settings.privacy.mode == "record":
        raise Refused(
            Code.RUN_CONFIG_INVALID,
            f"privacy.mode = 'record' with {processes} processes (bora-fl worker --processes): each step's sample and "
            "noise are drawn once, in one process; start the worker with --processes 1",
        )


def _hold(started: float, period: float, on_step: OnStep | None) -> None:
    """Wait until a whole number of periods has passed since the message came."""
    due = started + period * math.ceil((time.monotonic() - started) / period)
    while (left := due - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))
        if on_step:
            on_step("hold the reply", 0, 1)
