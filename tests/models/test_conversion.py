"""A model converted earlier is used again only if it is as it was written."""

from pathlib import Path

import pytest

from bora_fl.config import ConfigError
from bora_fl.models import base as models


def test_a_damaged_conversion_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"whole " + name.encode())
    gguf = tmp_path / "tiny.gguf"
    assert models._from_gguf(gguf) == folder  # from before digests: they are written now
    assert models._from_gguf(gguf) == folder
    (folder / "model.safetensors").write_bytes(b"wholf model.safetensors")
    with pytest.raises(ConfigError, match=rf"model.safetensors in {folder} is not .* delete the folder with `rm -r"):
        models._from_gguf(gguf)
