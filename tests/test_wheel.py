"""The wheel, installed and used from an empty folder, where no file of the checkout is in reach.

``INSTALLED`` names the Python of an environment that it was installed in, such as `make test-install` makes from
the index; without it the environment is made of links to what is installed here.
"""

import email
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tests.installed import User, build, linked

WITHOUT_US = """
import json, sys
sys.modules["bora_fl"] = None
"""
CLASSIFY = """
from transformers import pipeline
pipe = pipeline("text-classification", "merged")
print(json.dumps(pipe(json.loads(sys.argv[1]))))
"""
WITH_US = """
import bora_fl, json, sys
import torch
from pathlib import Path
assert Path(sys.prefix) in Path(bora_fl.__file__).parents, bora_fl.__file__
model, tokenizer = bora_fl.load("runs/reviews")
inputs = tokenizer(json.loads(sys.argv[1]), padding=True, return_tensors="pt")
with torch.no_grad():
    likely = model(**inputs).logits.softmax(-1).max(-1)
rows = zip(likely.indices.tolist(), likely.values.tolist())
print(json.dumps([{"label": model.config.id2label[i], "score": p} for i, p in rows]))
"""
# The same conversation by the merged model, and by PEFT with the LoRA adapter that says where its base is.
ANSWER = """
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("merged")
asked = json.loads(sys.argv[1])
for model in AutoModelForCausalLM.from_pretrained("merged"), AutoPeftModelForCausalLM.from_pretrained("lora"):
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0][ids["input_ids"].shape[1] :]
    print(json.dumps(tokenizer.decode(new, skip_special_tokens=True)))
"""
TEXTS = ["the film is good and great", "a sad awful phone it was"]
SHORT = ("-c", "run.num-rounds=2", "-c", "train.local-steps=4", "-c", "train.precision=fp32")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if place := os.environ.get("INSTALLED"):
        return Path(place).absolute()
    return linked(tmp_path_factory.mktemp("environment"), wheel, "simulation")


def test_a_classifier_from_an_empty_folder(python: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path):
    do = User(python, tmp_path)
    frame = pd.read_parquet(tiny_data)
    frame[["text", "label_name"]].rename(columns={"label_name": "stars"}).to_csv(tmp_path / "reviews.csv", index=False)
    options = ["--data", "reviews.csv", "--label-column", "stars", "--model", str(tiny_model), "--clients", "2"]
    do("bora-fl", "init", *options)
    do("bora-fl", "run", *SHORT)
    (tmp_path / "reviews.csv").unlink()
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    predicted = [json.loads(row) for row in do("bora-fl", "predict", "runs/reviews", "texts.txt").splitlines()]
    do("bora-fl", "export", "runs/reviews", "merged")
    for code in (WITHOUT_US + CLASSIFY, WITH_US):
        loaded = json.loads(do("python", "-P", "-c", code, json.dumps(TEXTS)))
        assert [row["label"] for row in loaded] == [row["label"] for row in predicted]
        scores = [row["score"] for row in loaded]
        # Solved on an untrained model's features, which hardly differ, the head's terms cancel three digits of float32.
        assert scores == pytest.approx([row["probability"] for row in predicted], abs=2e-3)
    assert {row["label"] for row in predicted} <= {"bad", "good"}


def test_a_language_model_from_an_empty_folder(python: Path, tiny_causal: Path, tmp_path: Path):
    do = User(python, tmp_path)
    asked = [{"role": "user", "content": "is the film good"}]
    dialog = {"messages": [*asked, {"role": "assistant", "content": "it was great"}]}
    (tmp_path / "dialogs.jsonl").write_text(f"{json.dumps(dialog)}\n" * 80)
    options = ["--data", "dialogs.jsonl", "--task", "causal-lm", "--model", str(tiny_causal), "--clients", "2"]
    do("bora-fl", "init", *options)
    do("bora-fl", "run", *SHORT, "-c", "train.learning-rate=0.5")
    (tmp_path / "dialogs.jsonl").unlink()
    (tmp_path / "asked.jsonl").write_text(json.dumps(dialog))
    row = json.loads(do("bora-fl", "predict", "runs/dialogs", "asked.jsonl", "--max-new-tokens", "8"))
    assert row["reference"] == "it was great"
    do("bora-fl", "export", "runs/dialogs", "merged")
    do("bora-fl", "export", "runs/dialogs", "lora", "--as", "lora")
    said = do("python", "-P", "-c", WITHOUT_US + ANSWER, json.dumps(asked))
    assert [json.loads(line) for line in said.splitlines()] == [row["response"]] * 2
    assert row["response"]


def test_the_wheel_is_what_an_index_takes(wheel: Path, python: Path):
    names = subprocess.run([python, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True).stdout
    assert "bora_fl/py.typed" in names
    assert "licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(file))
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert metadata["License"] is None
    pytest.importorskip("twine", reason="twine is not here")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
