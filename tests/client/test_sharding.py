"""A base model whose weights two processes share out, and what it is refused with."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp

from bora_fl.client import processes, sharding
from bora_fl.config import parse
from bora_fl.wire.refusals import Refused


def test_two_processes_hold_a_half_each_and_compute_what_the_whole_does(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.client.sharded_process", str(tmp_path / "store")]
    both = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        for found in json.loads(out.splitlines()[-1]).values():
            assert found["held"] == pytest.approx(0.5, abs=0.02)  # rows are not cut: 97 of them are 49 and 48
            assert found["logits"] <= 1e-6
            assert found["gradients"] <= 1e-6 * found["gradients_at_most"]
            assert found["gradients_at_most"] > 0
            assert found["added"]
            assert found["restored"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.quantization": "8bit"}, "model.quantization = '8bit'.*set it to none"),
        ({"train.compile": True}, "train.compile = true.*set it to false"),
        ({"adapter.method": "full"}, "adapter.method = 'full'.*choose an adapter"),
    ],
)
def test_what_a_shared_out_base_does_not_train_with_is_refused(changes: dict, text: str):
    settings = parse({"model.task": "causal-lm"} | changes)
    with pytest.raises(Refused, match=text + ", or start the worker without --shard"):
        sharding.require_sharding(settings)
    sharding.require_sharding(parse({"model.task": "causal-lm", "train.checkpointing": True}))


@pytest.mark.parametrize(
    ("named", "count", "devices"), [("-1", 0, []), ("0,1", 0, []), ("3,-1", 1, ["3"]), ("", 2, ["0", "1"])]
)
def test_a_name_of_no_gpu_is_none(named: str, count: int, devices: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert processes._take_first_device() == devices


def test_fewer_gpus_than_processes_and_an_old_torch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Refused, match=r"--processes 4 --shard with 2 GPUs.*give --processes 2"):
        sharding.connect(tmp_path / "store", 0, 4, devices=2)

    def fully_shard(module, *, mesh=None):
        """As torch 2.6 has it."""

    assert "ignored_params" in inspect.signature(torch.distributed.fsdp.fully_shard).parameters
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", fully_shard)
    with pytest.raises(Refused, match=r"takes torch 2\.7 or newer, this is"):
        sharding.connect(tmp_path / "store", 0, 2, devices=0)
