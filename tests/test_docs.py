"""Every code block of the README and of docs/ is executed, read by the program it is for, or marked with why not.

A mark is a comment before the block: ``<!-- not run: why -->``. Python blocks are executed, page by page, with what
`PRELUDES` gives them. Of commands, every ``bora-fl`` is parsed by its own options. `tests/deployment/page.py` executes
those of docs/deployment.md, and `tests/test_tutorials.py` the notebooks that are made of the tutorials.
"""

import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from typer.main import get_command

from bora_fl.cli import cli
from docs.notebooks import notebook

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
TUTORIALS = [path for path in PAGES if path.parent.name == "tutorials" or path.name == "start.md"]
CAUSAL = "from transformers import AutoModelForCausalLM as C\nmodel = C.from_pretrained('causal')\n"
PRELUDES = {
    "README.md": CAUSAL,
    "adapter.md": CAUSAL + "import torch\nbase_model = C.from_pretrained('causal')\n",
    "data.md": """
from pathlib import Path
rows = "".join(f"word {number},{number % 2}\\n" for number in range(400))
Path("reviews.csv").write_text("text,label\\n" + rows)
""",
    "kernels.md": """
import torch
x, W, bias, scaling = torch.randn(3, 16), torch.randn(16, 16), torch.randn(16), 1.0
A, B, Sigma = torch.randn(2, 16), torch.randn(16, 2), torch.rand(4, 4, 2)
""",
    "scale.md": """
import torch
from bora_fl.blocks import BlockFactors, StreamingMerge, factor_mean as mean_of
first, other = (BlockFactors(torch.randn(16, 2), torch.rand(2, 2, 2), torch.randn(2, 16)) for _ in range(2))
rank, replies, factor_mean, region = 2, [(first, 1.0)], mean_of([first, other], [0.5, 0.5]), StreamingMerge()
region.add(other, 1.0)
""",
}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    why: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, m.start("language")) + 1, m["language"], m["code"], m["why"] or "")
        for m in FENCE.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each ``bora-fl`` command of a block."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for is_mark, part in itertools.groupby(words, key=lambda word: word in ("|", "&&", ";")):
            found = [word for word in part if not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if not is_mark and found and Path(found[0]).name == "bora-fl":
                yield found[1:]


def parse(command: click.Command, words: list[str]) -> None:
    """Let a command parse its arguments, without doing anything."""
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        parse(command.commands[words[0]], words[1:])
    else:
        command.make_context("bora-fl", words)


@pytest.mark.parametrize("block", [block for block in ALL if block.language in ("", "bash")], ids=str)
def test_every_command_has_the_options_that_it_is_given(block: Block):
    for words in commands(block.code):
        try:
            parse(get_command(cli), ["7" if word == "RUN_ID" else word for word in words if word != "..."])
        except click.exceptions.Exit:
            pass  # --help, --version
        except click.ClickException as error:
            raise AssertionError(f"{block}: bora-fl {shlex.join(words)}: {error.format_message()}") from error


def test_every_block_is_of_a_kind_that_is_checked():
    assert {block.language for block in ALL} <= {"", "bash", "python", "toml", "json", "text"}
    for block in ALL:
        if block.language == "toml":
            tomllib.loads(block.code)
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p not in TUTORIALS and any(b.language == "python" for b in blocks(p))],
    ids=lambda p: p.name,
)
def test_the_python_blocks_run(page: Path, tiny_model: Path, tiny_causal: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model)
    Path("causal").symlink_to(tiny_causal)
    space: dict[str, object] = {"__name__": "page"}
    exec(PRELUDES.get(page.name, ""), space)
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if not block.why:
                exec(code, space)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_s_notebook_has_the_page_s_blocks(page: Path):
    made = notebook(page.read_text())
    if importlib.util.find_spec("nbformat"):
        importlib.import_module("nbformat").validate(made)
    shown = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    runs = [block for block in blocks(page) if block.language in ("bash", "python") and not block.why]
    assert [source.removeprefix("%%bash -e\n") for source in shown] == [block.code.rstrip("\n") for block in runs]
    prose = "".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert not re.search(r"\]\((?!https?:)", prose)
