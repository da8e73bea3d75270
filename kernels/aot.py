"""Compile every kernel as the host would launch it, for architectures that are not here, and read the machine code.

`python -m bora_fl.kernels.aot [--arch sm_90 …] [--blocks 8 …] [--rank 16 …] [--dtype bf16 …]` prints, for each distinct
launch of a forward and a backward pass, registers, spills, shared memory, matrix instructions and the widest global
load. It exits with 1 when a kernel spills, when a half-precision kernel with a dot has no matrix instruction, or when
shared memory exceeds what the architecture gives a block. It needs Triton, not a GPU.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.knobs import nvidia

from bora_fl.kernels.launch_plan import Launch, LayerShape, backward_plan, forward_plan
from bora_fl.kernels.reference import Needs
from bora_fl.kernels.triton_launch import KERNELS

# Bytes of shared memory (LDS on AMD) that one block may use: CUDA programming guide's table of technical
# specifications per compute capability; AMD's CDNA 3 and CDNA 4 ISA guides.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
DTYPES = {  # name: (dtype of x, dtype of A and B)
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
BLOCKS = (1, 2, 4, 8, 16, 32)
RANKS = (4, 8, 16, 32, 64, 128)
_TRITON_NAME = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+|v_smfmac_\w+)")
_WITHOUT_DOT = ("mix_kernel", "mix_back_kernel", "reduce_kernel")


@dataclass(frozen=True)
class Report:
    """What the machine code of one launch says."""

    arch: str
    launch: Launch
    dtype: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    widest_load: int  # bits

    @property
    def failures(self) -> list[str]:
        """Reasons not to ship this launch; empty when there are none."""
        found = []
        if self.spills:
            found.append(f"spills ({self.spills})")
        if self.launch.kernel not in _WITHOUT_DOT and self.dtype != "fp32" and not self.matrix_instructions:
            found.append("no matrix instruction")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory above {SHARED_LIMIT[self.arch]}")
        return found

    def __str__(self) -> str:
        numbers = self.launch.constants
        verdict = ", ".join(self.failures) or "ok"
        return (
            f"{self.arch:7} {self.launch.kernel:16} {self.dtype:9} b={numbers.get('NB', '-'):>2} "
            f"r={numbers.get('R', '-'):>3} registers={self.registers:3} spills={self.spills} "
            f"shared={self.shared:6} matrix={self.matrix_instructions:3} load={self.widest_load:3} {verdict}"
        )


def _signature(launch: Launch, shape: LayerShape) -> dict[str, str]:
    """Type every argument as the host's tensors and numbers would be typed."""
    x, factor = _TRITON_NAME[shape.x_dtype], _TRITON_NAME[shape.factor_dtype]
    pointers = dict.fromkeys(("x", "y", "dy", "dx", "bias"), x) | dict.fromkeys(
        ("A", "B", "u", "z", "dz", "du"), factor
    )
    pointers |= dict.fromkeys(("dA", "dB"), factor if launch.kernel == "reduce_kernel" else "*fp32")
    # Sigma is kept in float32 under autocast and in mixed precision; reading it wide is the heavier case.
    pointers |= dict.fromkeys(("Sigma", "dSigma", "dA_slices", "dB_slices", "dSigma_slices"), "*fp32")
    pointers |= {"seed": "*i64"}
    integers = ("T", "tiles", "threshold", "slices_A", "slices_Sigma", "slices_B")
    scalars = dict.fromkeys(integers, "i32") | dict.fromkeys(("scaling", "keep_scale"), "fp32")
    names = KERNELS[launch.kernel].arg_names
    return {name: (pointers | scalars).get(name, "constexpr") for name in names}


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, shape: LayerShape, dtype: str, arch: str) -> Report:
    """Compile one launch for one architecture and read its machine code."""
    signature = _signature(launch, shape)
    constants = {(place,): launch.constants[name] for place, name in enumerate(signature) if name in launch.constants}
    # Torch's allocations are aligned to at least 16 bytes, and the launcher specializes on that.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(KERNELS[launch.kernel], signature, constants, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    compiled = compile(source, target=_target(arch), options=options)
    read = _read_cuda if arch.startswith("sm_") else _read_amd
    registers, spills, matrix, load = read(compiled.asm)
    return Report(arch, launch, dtype, registers, spills, compiled.metadata.shared, matrix, load)


def _read_cuda(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return registers, spill instructions, matrix instructions and the widest load of a CUDA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool(nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # A kernel without a stack frame has nowhere to spill to, and disassembling takes longer than compiling.
        framed = re.search(r"STACK:0 ", usage) is None
        sass = _tool(nvidia.nvdisasm.path, "-c", file.name) if framed else ""
    registers = re.search(r"REG:(\d+)", usage)
    ptx = asm["ptx"]
    lanes = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v([24]))?\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx)
    widths = [int(vector or 1) * int(bits) for vector, bits in lanes] + [8 * int(size, 16) for size in copies]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return int(registers[1]) if registers else 0, spills, len(_MATRIX.findall(ptx)), max(widths, default=0)


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return vector registers, spilled registers, matrix instructions and the widest load of an AMD kernel."""
    text = asm["amdgcn"]
    fields = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
    loads = re.findall(r"(?:global|buffer)_load_dwordx?(\d?)", text)
    spills = fields["vgpr_spill_count"] + fields["sgpr_spill_count"]
    return fields["vgpr_count"], spills, len(_MATRIX.findall(text)), 32 * max((int(n or 1) for n in loads), default=0)


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def launches(shape: LayerShape) -> list[Launch]:
    """Return the launches of one forward and one backward pass with all gradients, each kind once."""
    plan = forward_plan(shape) + backward_plan(shape, Needs())
    return list({(launch.kernel, *launch.constants.items()): launch for launch in plan}.values())


def check(
    archs: list[str], blocks: list[int], ranks: list[int], dtypes: list[str], *, width: int = 4096, dropout: bool = True
) -> Iterator[Report]:
    """Compile every launch of the product of the arguments; yields a report as soon as it is known.

    Args:
        archs: names in `SHARED_LIMIT`.
        blocks: values of num_blocks.
        ranks: values of the rank.
        dtypes: names in `DTYPES`.
        width: in_features and out_features.
        dropout: compile with dropout, the heavier case.
    """
    for arch, dtype, b, r in itertools.product(archs, dtypes, blocks, ranks):
        x_dtype, factor_dtype = DTYPES[dtype]
        backend = "cuda" if arch.startswith("sm_") else "hip"
        shape = LayerShape(8192, width, width, b, r, x_dtype, factor_dtype, width, True, dropout, backend)
        for launch in launches(shape):
            yield compile_launch(launch, shape, dtype, arch)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(SHARED_LIMIT), choices=SHARED_LIMIT)
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    parser.add_argument("--rank", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--width", type=int, default=4096, help="in_features and out_features")
    parser.add_argument("--without-dropout", action="store_true")
    chosen = parser.parse_args(arguments)
    failures = count = 0
    reports = check(
        chosen.arch, chosen.blocks, chosen.rank, chosen.dtype, width=chosen.width, dropout=not chosen.without_dropout
    )
    for report in reports:
        count += 1
        failures += bool(report.failures)
        print(report, flush=True)
    print(f"{count} launches compiled, {failures} with failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
