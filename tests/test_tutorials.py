"""The tutorials as notebooks, executed by Jupyter from an empty folder: tiny models, short rounds, few canaries."""

import os
import re
import sys
from pathlib import Path

import pytest

from docs.notebooks import notebook
from tests.test_docs import ROOT, TUTORIALS

TINY = {
    r"google-bert/bert-base-uncased": "{tiny_model}",
    r"HuggingFaceTB/SmolLM2-135M-Instruct": "{tiny_causal}",
    r"-c run\.num-rounds=\d+": "-c run.num-rounds=2 -c train.local-steps=2 -c train.precision=fp32",
    r"--clients \d+": "--clients 2",
    r"--canaries \d+": "--canaries 32",
}
"""What stands in a page, and what is executed."""


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_an_empty_folder(page: Path, tiny_model: Path, tiny_causal: Path, tmp_path_factory):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not here")
    folder = tmp_path_factory.mktemp("t")  # short: a worker's socket lies below it
    made = notebook(page.read_text())
    for cell in made["cells"]:
        for said, done in TINY.items():
            cell["source"] = re.sub(said, done.format(tiny_model=tiny_model, tiny_causal=tiny_causal), cell["source"])
    (folder / "bin").mkdir()
    (folder / "bin" / "bora-fl").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m bora_fl.cli "$@"\n')
    (folder / "bin" / "bora-fl").chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    work = folder / "work"
    work.mkdir()
    book = pytest.importorskip("nbformat").from_dict(made)
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(work)}})
    client.execute(env=environment)  # raises at the first cell that fails, with what it printed
