"""What leaves a client after a round, and what it keeps: its own factors, the sent state, what a codec lost."""

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from bora_fl.client.identity import ClientIdentity
from bora_fl.client.lost import LOST, keep_lost, recall_lost
from bora_fl.client.moments import MOMENTS
from bora_fl.config import Settings
from bora_fl.seeds import derive
from bora_fl.state import AdapterState, flatten, unflatten
from bora_fl.wire.records import KEPT, Instruction, Pack, changes, from_arrays, keep, part_of, plain, to_arrays
from bora_fl.wire.release import Release
from bora_fl.wire.sparsity import keep_components, sparsify
from bora_fl.wire.updates import Coding

LOCAL, OWNER = "local-factors", "run"


def own(memory: RecordDict, run_id: str) -> None:
    """Forget what another run has left: Flower gives all runs of one series the same memory."""
    mark = ConfigRecord({"run-id": run_id})
    if memory.config_records.get(OWNER) != mark:
        for name in (LOCAL, LOST, MOMENTS, KEPT):
            memory.pop(name, None)
        memory[OWNER] = mark


def remember(memory: RecordDict, trained: AdapterState, instruction: Instruction) -> None:
    """Keep what does not leave the client."""
    local = {
        name: t for name, t in flatten(trained).items() if part_of(name) in instruction.trains - instruction.shares
    }
    if local:
        memory[LOCAL] = to_arrays(local)


def leave(
    release: Release,
    sent: AdapterState,
    received: AdapterState,
    instruction: Instruction,
    settings: Settings,
    who: ClientIdentity,
    memory: RecordDict,
) -> RecordDict:
    """The reply that a release leaves in, and what the client keeps of it.

    Args:
        release: What training yields.
        sent: The state that the message carried.
        received: The same with the client's own factors, at its rank.
        instruction: What the message asked.
        settings: The run's.
        who: The client.
        memory: What the client keeps between rounds; changed.
    """
    remember(memory, release.state, instruction)
    keep(memory, flatten(sent), instruction.keeps)
    if instruction.sparsity < 1:
        cut = keep_components if instruction.sparsity_by == "components" else sparsify
        release = replace(release, state=cut(release.state, received, instruction.sparsity))
    pack = _packing(settings, instruction, who, memory)
    return release.content(sent, instruction.shares & instruction.trains, instruction.round, pack)


def _packing(settings: Settings, instruction: Instruction, who: ClientIdentity, memory: RecordDict) -> Pack:
    """How the reply's tensors travel; what a codec loses is kept for the next reply."""
    if settings.privacy.secure_aggregation:
        return plain  # what is masked is summed entry by entry, so it must be there in full
    if instruction.sparsity < 1:
        return changes
    coding = Coding.of(settings)

    def pack(entries: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lost = recall_lost(memory, sent, instruction)
        seed = derive(settings.run.seed, "codec", instruction.round, who.partition)
        packed, rest = coding.encode(entries, sent, lost, seed)
        keep_lost(memory, lost | rest, {**sent, **entries}, instruction)
        return packed

    return pack if coding.codec.stages else plain


def recall(memory: RecordDict, sent: AdapterState, instruction: Instruction) -> AdapterState:
    """What was sent, with the client's own factors where they never leave it."""
    kept: ArrayRecord | None = memory.array_records.get(LOCAL)
    if kept is None:
        return sent
    flat = flatten(sent)
    local = {n: t for n, t in from_arrays(kept).items() if n in flat and part_of(n) not in instruction.shares}
    return unflatten(flat | local)
