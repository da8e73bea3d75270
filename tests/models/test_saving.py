"""What is written is opened in a process where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bora_fl.config import ModelSettings
from bora_fl.models import load_base, load_tokenizer
from bora_fl.models.saving import save_pooled, save_sentence_transformers

TEXTS = ["the film was good", "a very very bad and awful book it was", "nice"]
NAMES = ["bad", "good", "plain"]

PLAIN = """
import json, sys, torch
sys.modules["bora_fl"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
texts, *folders = json.loads(sys.argv[1])
found = []
for folder in folders:
    try:
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit("opened without its code")
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    labels = [one["label"] for one in pipeline("text-classification", folder, trust_remote_code=True)(texts)]
    found.append([logits.tolist(), labels])
print(json.dumps(found))
"""

SENTENCES = """
import json, sys
sys.modules["bora_fl"] = None
from sentence_transformers import SentenceTransformer
texts, *folders = json.loads(sys.argv[1])
print(json.dumps([SentenceTransformer(folder, device="cpu").encode(texts).tolist() for folder in folders]))
"""


def model_and_logits(tiny_model: Path, pooling: str, max_length: int = 16):
    settings = ModelSettings(name=str(tiny_model), pooling=pooling)
    model, tokenizer = load_base(settings, NAMES, 0).eval(), load_tokenizer(settings)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        model.classifier.weight.mul_(100)  # texts differ by more than the tolerance
        cut = {"truncation": True, "max_length": max_length}
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt", **cut)).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    return model, tokenizer, logits


def run(code: str, folders: list[Path], tmp_path: Path):
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", code, json.dumps([TEXTS, *map(str, folders)])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **quiet}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_saved_model_predicts_the_same_in_plain_transformers(tiny_model: Path, tmp_path: Path):
    folders, expected = [], []
    for pooling in ("mean", "last", "layers"):
        model, tokenizer, logits = model_and_logits(tiny_model, pooling)
        save_pooled(model, tokenizer, tmp_path / pooling)
        folders.append(tmp_path / pooling)
        expected.append(logits)
    for (found, labels), logits in zip(run(PLAIN, folders, tmp_path), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-6)
        assert labels == [NAMES[i] for i in logits.argmax(1)]


def test_a_saved_model_predicts_the_same_in_sentence_transformers(tiny_model: Path, tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    folders, expected = [], []
    for pooling, max_length in (("mean", 16), ("cls", 16), ("last", 16), ("mean", 5)):
        model, tokenizer, logits = model_and_logits(tiny_model, pooling, max_length)
        folders.append(tmp_path / f"{pooling}-{max_length}")
        save_sentence_transformers(model, tokenizer, folders[-1], NAMES, max_length)
        expected.append(logits)
    for found, logits in zip(run(SENTENCES, folders, tmp_path), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-5, atol=1e-6)


def test_a_model_without_pooling_is_no_sentence_encoder(tiny_model: Path, tmp_path: Path):
    for settings in (ModelSettings(name=str(tiny_model)), ModelSettings(name=str(tiny_model), pooling="layers")):
        with pytest.raises(ValueError, match=r"model\.pooling"):
            save_sentence_transformers(load_base(settings, NAMES, 0), load_tokenizer(settings), tmp_path, NAMES, 16)
