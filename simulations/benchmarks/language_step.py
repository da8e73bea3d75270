"""A training step of a language model with LoRA and with BoRA: `bora-fl bench language-step [--size 1b --rows 4 …]`.

A Llama of random weights in bfloat16, every linear layer adapted, autocast, AdamW. Repeats are interleaved; the table
has medians, the median of the ratio to PEFT's LoRA of equal rank within a repeat, and on a GPU the memory of a step
beyond weights, adapters and optimizer. The wall clock counts: on a GPU a step often waits for Python.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bora_fl.adapters import BoraConfig
from bora_fl.adapters.layer import BoraAdapter
from bora_fl.adapters.sigma_batch import sigmas_at_once

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
LORA = "PEFT LoRA, rank r"


def adapted(size: str, config: Any, device: str) -> Any:
    """The model with its adapters, which are kept in float32."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    *widths, vocabulary = SIZES[size]
    shape = LlamaConfig(
        **dict(zip(NAMES, widths, strict=True)), vocab_size=vocabulary, tie_word_embeddings=size != "8b"
    )
    with torch.device(device):
        model = LlamaForCausalLM(shape).to(torch.bfloat16)
    model.config.use_cache = False
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def stepper(model: Any, ids: torch.Tensor, compiled: bool) -> Callable[[], float]:
    """A function that takes one step and returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    adapters = [module for module in model.modules() if isinstance(module, BoraAdapter)]
    called = torch.compile(model) if compiled else model

    def step() -> float:
        together = sigmas_at_once(adapters) if adapters else contextlib.nullcontext()
        with torch.autocast(ids.device.type, torch.bfloat16), together:
            loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A row for each adapter: milliseconds, ratio, memory of a step in bytes (0 on a CPU), trained parameters, loss."""
    from peft import LoraConfig

    r, b = chosen.rank, chosen.blocks
    configs = {
        LORA: LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS),
        "PEFT LoRA, rank b·r": LoraConfig(r=r * b, lora_alpha=r * b, target_modules=TARGETS),
        "BoRA": BoraConfig(r=r, num_blocks=b, target_modules=TARGETS),
    }
    gpu = chosen.device == "cuda"
    ids = torch.randint(0, SIZES[chosen.size][-1], (chosen.rows, chosen.tokens), device=chosen.device)
    steps, rows = {}, {}
    for name, config in configs.items():
        model = adapted(chosen.size, config, chosen.device)
        steps[name] = step = stepper(model, ids, chosen.compile)
        for _ in range(3):
            step()
        before = 0
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss = step()
        memory = torch.cuda.max_memory_allocated() - before if gpu else 0
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[name] = {"step_bytes": float(memory), "trained": float(trained), "loss": loss}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(chosen.repeats):
        for name, step in steps.items():
            began = time.perf_counter()
            step()  # reading the loss waits for the GPU
            seconds[name].append(time.perf_counter() - began)
    for name, row in rows.items():
        row["ms"] = 1e3 * statistics.median(seconds[name])
        row["ratio"] = statistics.median(a / c for a, c in zip(seconds[name], seconds[LORA], strict=True))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench language-step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--json", help="also write the rows to this file")
    chosen = parser.parse_args(arguments)
    rows = measure(chosen)
    print(f"\n{chosen.size}, {chosen.rows} rows of {chosen.tokens} tokens, r = {chosen.rank}, b = {chosen.blocks}\n")
    print("| adapter | ms | ratio | step, MB | trained |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = f"{row['ms']:.1f} | {row['ratio']:.2f} | {row['step_bytes'] / 1e6:.0f} | {row['trained']:.0f}"
        print(f"| {name} | {cells} |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(vars(chosen) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
