"""Each tutorial as a notebook beside its page, so that its text stands once, in Markdown.

A hook of MkDocs (`make docs`). ``python docs/notebooks.py PAGE.md`` prints one.
"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_BLOCK = re.compile(
    r"(?P<mark><!-- not run: .+? -->\n+)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


def is_tutorial(page: str) -> bool:
    """Whether a page, by its path below docs/, is one that a reader follows step by step."""
    return page.startswith("tutorials/") or page == "start.md"


def notebook(text: str) -> dict[str, Any]:
    """A page as a notebook of nbformat 4.5; a block that is marked as not run stays text."""
    cells: list[dict[str, Any]] = []
    begin = 0
    for block in _BLOCK.finditer(text):
        if not block["mark"]:
            cells += [*_prose(text[begin : block.start()]), _code(block["language"], block["code"])]
            begin = block.end()
    cells += _prose(text[begin:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the notebooks to the site."""
    from mkdocs.structure.files import File

    for file in [file for file in files if is_tutorial(file.src_uri) and file.src_uri.endswith(".md")]:
        content = json.dumps(notebook(file.content_string), indent=1)
        files.append(File.generated(config, f"{file.src_uri.removesuffix('.md')}.ipynb", content=content))
    return files


def on_page_markdown(markdown: str, page: "Page", **_: Any) -> str:
    """Link a tutorial to its notebook."""
    uri = page.file.src_uri
    link = f"\n\n[This page as a notebook]({Path(uri).stem}.ipynb)\n" if is_tutorial(uri) else ""
    return markdown + link


def _prose(text: str) -> list[dict[str, Any]]:
    """A cell of text, if there is any; links to other pages lead nowhere from a notebook."""
    text = _LINK.sub(r"\1", text).strip()
    return [{"cell_type": "markdown", "metadata": {}, "source": text}] if text else []


def _code(language: str, code: str) -> dict[str, Any]:
    source = f"%%bash -e\n{code}" if language == "bash" else code  # -e: the first command that fails ends the cell
    return {
        "cell_type": "code",
        "metadata": {},
        "source": source.rstrip("\n"),
        "execution_count": None,
        "outputs": [],
    }


if __name__ == "__main__":
    print(json.dumps(notebook(Path(sys.argv[1]).read_text()), indent=1))
