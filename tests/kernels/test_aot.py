import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bora_fl.kernels import aot
from bora_fl.kernels.launch_plan import LayerShape

SHAPE = LayerShape(64, 64, 64, 2, 16, torch.bfloat16, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("arch", "dtype", "rank"), [("sm_80", "bf16", 64), ("sm_90", "bf16", 16), ("gfx942", "bf16/fp32", 16)]
)
def test_kernels_compile_without_spills_and_with_matrix_instructions(
    arch: str, dtype: str, rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reports = list(aot.check([arch], [8], [rank], [dtype]))
    assert {report.launch.kernel for report in reports} == set(aot.KERNELS)
    assert not [str(report) for report in reports if report.failures]
    assert all(report.registers > 0 for report in reports)
    assert all(report.widest_load == 128 for report in reports)


def test_each_fault_is_named() -> None:
    launch = aot.launches(SHAPE)[0]
    good = aot.Report("sm_86", launch, "bf16", 100, spills=0, shared=1024, matrix_instructions=4, widest_load=128)
    assert good.failures == []
    assert dataclasses.replace(good, spills=2).failures == ["spills (2)"]
    assert dataclasses.replace(good, matrix_instructions=0).failures == ["no matrix instruction"]
    assert dataclasses.replace(good, shared=100 * 1024).failures == ["shared memory above 101376"]


def test_the_command_exits_with_one_when_a_kernel_has_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = aot.Report("sm_90", aot.launches(SHAPE)[0], "bf16", 100, 0, 1024, 4, 128)
    for reports, code in (([good], 0), ([good, dataclasses.replace(good, spills=1)], 1)):
        monkeypatch.setattr(aot, "check", lambda *_, reports=reports, **__: iter(reports))
        assert aot.main(["--arch", "sm_90"]) == code
    assert "2 launches compiled, 1 with failures" in capsys.readouterr().out
