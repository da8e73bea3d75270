"""One of two processes that share a tiny Llama out: `python -m tests.client.sharded_process PATH RANK` prints JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from bora_fl.client import sharding
from bora_fl.client.processes import loopback
from bora_fl.config import parse
from bora_fl.evaluate import example_losses
from bora_fl.models import FederatedModel

PARTS = frozenset({"A", "sigma", "B", "tensors"})
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def made(tied: bool) -> FederatedModel:
    settings = parse({"model.task": "causal-lm", "adapter.target-modules": "q_proj,down_proj", "adapter.rank": 4})
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, use_cache=False, tie_word_embeddings=tied, **SIZES))
    model = FederatedModel(base, settings.adapter, settings.model, 0)
    for parameter in model.factor_parameters(frozenset({"B"})):
        torch.nn.init.normal_(parameter, std=0.1)
    model.train_only(PARTS)
    return model


def main(path: Path, rank: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    mesh = sharding.connect(path, rank, 2, devices=0)
    found = {}
    for tied in (False, True):
        whole, part = made(tied), made(tied)
        size = sharding.base_bytes(whole.model)
        sharding.shard_base(part, mesh)
        ids = torch.arange(14).view(2, 7) + rank
        with torch.no_grad():  # before training, as a client does
            same = [part.model(input_ids=ids).logits, whole.model(input_ids=ids).logits]
        for model in (whole, part):
            example_losses(model.model(input_ids=ids).logits, ids)[0].sum().backward()
        grads = [[p.grad for p in model.trained_parameters()] for model in (whole, part)]
        held = sharding.base_bytes(part.model)
        layer = next(iter(part.adapted_layers()))
        before = part.save_base(layer)
        delta = torch.randn(part.adapted_layers()[layer].get_base_layer().weight.shape)
        added = []
        for model in (whole, part):
            model.add_to_base({layer: delta})
            weight = model.adapted_layers()[layer].get_base_layer().weight.detach()
            added.append(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        part.restore_base({layer: before})
        restored = part.adapted_layers()[layer].get_base_layer().weight.detach()
        found["tied" if tied else "untied"] = {
            "held": held / size,
            "logits": float((same[0] - same[1]).abs().max()),
            "gradients": max(float((ours - theirs).abs().max()) for ours, theirs in zip(*grads, strict=True)),
            "gradients_at_most": max(float(grad.abs().max()) for grad in grads[0]),
            "added": torch.equal(*added),
            "restored": torch.equal(restored.to_local(), before.to_local()),
        }
    print(json.dumps(found), flush=True)
    sharding.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
