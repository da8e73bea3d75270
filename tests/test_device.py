import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from bora_fl import device


def test_bf16_is_measured_once_a_machine_and_kept(tmp_path: Path) -> None:
    path, asked = tmp_path / "folder" / "bf16.json", []

    def measure(share: float) -> float:
        asked.append(share)
        return share

    assert device._measured(path, lambda: measure(0.6))
    assert device._measured(path, lambda: measure(1.4))  # what was measured first stands
    assert asked == [0.6]
    (machine,) = json.loads(path.read_text())
    assert torch.__version__ in machine
    path.write_text(json.dumps({"another machine": 0.5}))
    assert not device._measured(path, lambda: measure(1.4))
    for text in ("no JSON", "[]", "null", json.dumps({machine: "0.5"}), "\N{LATIN SMALL LETTER Y WITH DIAERESIS}"):
        path.write_text(text, encoding="latin1")
        assert device._measured(path, lambda: measure(0.7))
        assert json.loads(path.read_text()) == {machine: 0.7}
    locked = tmp_path / "file"
    locked.touch()
    assert not device._measured(locked / "bf16.json", lambda: measure(1.2))


def test_what_another_user_has_measured_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bf16.json"
    assert device._measured(path, lambda: 0.6)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(device, "FileLock", refuse)
    assert device._measured(path, lambda: 1.4)


def test_without_a_lock_each_process_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bf16.json"
    monkeypatch.setattr(device, "_LOCK_SECONDS", 0.1)
    with FileLock(f"{path}.lock"):
        assert device._measured(path, lambda: 0.6)
    assert not path.exists()

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(device, "FileLock", refuse)
    assert not device._measured(path, lambda: 1.4)


def test_without_the_instructions_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(device, "_bf16_share", lambda: pytest.fail("it is emulated, and slower"))
    assert not device._bf16_pays.__wrapped__("cpu")


def test_the_measurement_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert 0 < device._bf16_share(1) < 100
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
