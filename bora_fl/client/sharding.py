"""A frozen base model whose weights are shared out among the processes that train a client (torch's FSDP2).

Each process holds a part of every frozen weight. A layer's weights are gathered before its forward and its backward
pass and given up after each, so every process must take the same passes in the same order. None may run in inference
mode: the gathered weights would stay tensors of it. The adapter, and a head that trains, are whole in each process.
"""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from bora_fl.client.share import LONGEST
from bora_fl.config import Settings
from bora_fl.device import pick_device
from bora_fl.models import FederatedModel
from bora_fl.wire.refusals import Code, Refused

log = logging.getLogger(__name__)


def connect(path: Path, rank: int, size: int, devices: int) -> DeviceMesh:
    """Connect the processes that share a base model out; all must call this.

    FSDP needs torch's default group: NCCL where each process has a GPU of its own, gloo on a CPU.

    Args:
        path: File through which the processes find each other.
        rank: Which process, from 0.
        size: Out of how many.
        devices: GPUs that all of them have.

    Raises:
        Refused: If there are GPUs, but fewer than processes, or torch is too old.
    """
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise Refused(
            Code.WORKER_UNAVAILABLE,
            f"bora-fl worker --shard takes torch 2.7 or newer, this is {torch.__version__}; upgrade it, or leave "
            "--shard out",
        )
    if 0 < devices < size:
        raise Refused(
            Code.WORKER_UNAVAILABLE,
            f"bora-fl worker --processes {size} --shard with {devices} GPUs: each process needs one of its own; give "
            f"--processes {devices}",
        )
    kind = "cuda" if devices else "cpu"
    backend = "nccl" if devices else "gloo"
    store = dist.FileStore(str(path), size)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST)
    return init_device_mesh(kind, (size,))


def disconnect() -> None:
    """End this process's part of the group, if it has one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def require_sharding(settings: Settings) -> None:
    """Refuse what a base model that is shared out does not train with.

    Raises:
        Refused: For a quantized base, torch.compile or full fine-tuning.
    """
    rules = (
        (
            settings.model.quantization != "none",
            f"model.quantization = {settings.model.quantization!r}",
            "quantized weights are not cut; set it to none, or start the worker without --shard",
        ),
        (
            settings.train.compile,
            "train.compile = true",
            "the gathering of weights is not compiled; set it to false, or start the worker without --shard",
        ),
        (
            settings.adapter.method == "full",
            "adapter.method = 'full'",
            "nothing is frozen; choose an adapter, or start the worker without --shard",
        ),
    )
    for refused, what, why in rules:
        if refused:
            raise Refused(Code.RUN_CONFIG_INVALID, f"{what} with a sharded base (bora-fl worker --shard): {why}")


def shard_base(model: FederatedModel, mesh: DeviceMesh) -> None:
    """Keep this process's part of every frozen weight, and give up the rest.

    Args:
        model: Whole, on the CPU; all that trains, and heads with their copies, stay as they are.
        mesh: From `connect`.
    """
    from peft.utils import ModulesToSaveWrapper
    from torch.distributed.fsdp import fully_shard

    net, device = model.model, pick_device()
    whole = {p for p in net.parameters() if p.requires_grad}
    for module in net.modules():
        if isinstance(module, ModulesToSaveWrapper):
            whole.update(module.parameters())
    size = base_bytes(net)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole, "reshard_after_forward": True}
    names = set(net.get_base_model()._no_split_modules or ())
    layers = [module for module in net.modules() if type(module).__name__ in names]
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(net, **options)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    log.info("this process holds %.3f of %.3f MB of the base model", base_bytes(net) / 1e6, size / 1e6)


def base_bytes(net: nn.Module) -> int:
    """Bytes of the frozen weights that this process holds."""
    frozen = [p for p in net.parameters() if not p.requires_grad]
    tensors: list[Tensor] = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
