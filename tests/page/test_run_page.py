"""The page of a run, read as a browser would: structure, content, and that nothing is fetched."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.config import ConfigError, Settings
from bora_fl.page.charts import line_chart, ticks
from bora_fl.page.run_page import run_page
from bora_fl.privacy.accounting import summarize
from bora_fl.report import ClientMetrics, RoundReport, append_row
from bora_fl.wire.refusals import Code, Refusal

VOID = {"meta", "img"}


class Tables(HTMLParser):
    """Tables by the heading that they stand under, and the attributes of every tag; tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._heading = ""
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open += [] if tag in VOID else [tag]
        if tag in ("h1", "h2"):
            self._heading = ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if {"h1", "h2"} & set(self._open):
            self._heading += data
        elif {"td", "th"} & set(self._open):
            self.tables[self._heading][-1][-1] += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three rounds under record-level privacy, with a rejected reply in each of two."""
    settings = {"run.num-rounds": 3, "strategy.name": "<script>alert(1)</script>", "privacy.mode": "record"}
    (tmp_path / "config.json").write_text(json.dumps(Settings().flat() | settings))
    (tmp_path / "versions.json").write_text(json.dumps({"bora_fl": "1.2.3", "code": "0123abcd"}))
    why = Refusal(Code.BUDGET_EXCEEDED, "00c0ffee").line()
    for number in range(4):
        clients = {c: ClientMetrics(c, 4.0, 10.0 + c, 1 / (1 + number), eval_loss=0.5, eval_examples=3) for c in (0, 1)}
        report = RoundReport(
            number,
            1 / (1 + number),
            0.5 + number / 10,
            "central",
            train_loss=0.9,
            client_loss=0.8,
            client_accuracy=0.4,
            clients=2,
            rejected=number % 2,
            reasons={"7": why} if number == 1 else {"8": "<b>odd</b>"} if number == 3 else {},
            epsilon=summarize({"0": 0.5 * number, "1": 0.25}, "record") if number else None,
            per_client=clients if number else {},
        )
        append_row(tmp_path / "metrics.jsonl", report.row())
    return tmp_path


def test_the_page_shows_rounds_clients_privacy_rejections_settings_and_versions(folder: Path):
    tables = Tables(run_page(folder)).tables
    assert [row[0] for row in tables["Rounds"]] == ["round", "0", "1", "2", "3"]
    assert tables["Rounds"][4][2:4] == ["0.25", "0.8"]
    assert [row[:2] for row in tables["Clients"][1:]] == [["0", "3"], ["1", "3"]]
    assert tables["Rejected replies"][1][:3] == ["1", "7", "-"]
    assert tables["Rejected replies"][2] == ["3", "8", "-", "<b>odd</b>"]
    settings = {row[0]: row[1] for row in tables["Settings"]}
    assert settings.keys() - {"setting"} == Settings().flat().keys()
    assert settings["strategy.name"] == "<script>alert(1)</script>"
    assert ["code", "0123abcd"] in tables["Versions"]
    assert "largest epsilon per record" in run_page(folder)


def test_a_loss_that_is_no_number_stands_in_the_table_and_in_no_chart(folder: Path):
    append_row(folder / "metrics.jsonl", RoundReport(9, math.nan, 0.25, "central", clients=2).row())
    page = run_page(folder)
    assert Tables(page).tables["Rounds"][-1][:4] == ["9", "-", "nan", "0.25"]
    assert "central test set, round 9: nan" not in page


def test_a_code_of_the_closed_list_has_a_column_of_its_own(folder: Path):
    row = RoundReport(4, reasons={"9": f"{Code.OUT_OF_MEMORY}: {Code.OUT_OF_MEMORY.sentence} (error 1)"}).row()
    append_row(folder / "metrics.jsonl", row)
    assert Tables(run_page(folder)).tables["Rejected replies"][-1][2] == "out-of-memory"


def test_what_of_a_damaged_run_can_be_read_is_shown_and_the_rest_named(folder: Path):
    whole = Tables(run_page(folder)).tables["Rounds"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9}\n{"round": 10, "clie')
    (folder / "versions.json").write_text('{"bora_fl": ')
    text = run_page(folder)
    assert Tables(text).tables["Rounds"] == whole
    assert "2 lines of metrics.jsonl are no rounds" in text
    assert "versions.json cannot be read" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"model.na', "config.json is damaged"),
        ("config.json", "[1]", "config.json is damaged"),
        ("config.json", "{}", "it has no model.name, data.name, strategy.name"),
        ("metrics.jsonl", '{"round": 1}\n', "metrics.jsonl, samples.jsonl or config.json is damaged"),
        ("samples.jsonl", '{"round": 1}\n', "metrics.jsonl, samples.jsonl or config.json is damaged"),
    ],
)
def test_a_run_that_cannot_be_shown_is_named(name: str, content: str, words: str, folder: Path):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        run_page(folder)


def test_nothing_is_fetched_and_nothing_that_a_run_names_is_code(folder: Path):
    text = run_page(folder)
    page = Tables(text)
    assert not re.findall(r"https?:|url\(|@import|<link|<iframe", text)
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"href", "action", "onclick"}, tag
        assert (attributes.get("src") or "data:").startswith("data:")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    metas = {a.get("name") or a.get("http-equiv"): a.get("content") for tag, a in page.tags if tag == "meta"}
    assert metas["Content-Security-Policy"].startswith("default-src 'none'")
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in text


def test_the_command_writes_it_as_private_as_the_metrics(folder: Path, tmp_path: Path):
    result = CliRunner().invoke(cli, ["ui", str(folder)])
    assert result.exit_code == 0
    assert (folder / "report.html").stat().st_mode & 0o077 == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"RUN .*empty.*name the output folder"):
        run_page(tmp_path / "empty")


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 12, True, [0, 2, 4, 6, 8, 10, 12]),
        (0, 1, True, [0, 1]),
        (1, 3, True, [1, 2, 3]),
        (0.61, 0.72, False, [0.62, 0.64, 0.66, 0.68, 0.7, 0.72]),
        (5, 5, False, [5]),
        (-1e-9, 1e9, False, [0, 2e8, 4e8, 6e8, 8e8, 1e9]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, whole, expected):
    assert ticks(low, high, whole) == pytest.approx(expected)


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 1.0), (1, 1.0)], [(3, -2.0), (9, 5.5)]])
def test_a_chart_stays_inside_its_picture(points):
    text = line_chart("<loss>", {"a & b": points, "none": []})
    assert "<loss>" not in text
    assert "a &amp; b" in text
    assert "none" not in text.replace("fill=none", "")
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', text):
        assert 0 <= float(x) <= 460
        assert 0 <= float(y) <= 240
    assert line_chart("loss", {"a": []}) == ""


def test_a_browser_loads_it_sorts_it_and_asks_nobody(folder: Path, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is here")
    script = "document.querySelectorAll('h2 ~ .wide th button')[0].click();" * 2  # descending
    script += (
        "addEventListener('load', () => { const root = document.documentElement;"
        "root.dataset.wide = root.scrollWidth > root.clientWidth;"
        "root.dataset.asked = performance.getEntriesByType('resource').map(e => e.name).join(' '); });"
    )
    (tmp_path / "page.html").write_text(run_page(folder).replace("</body>", f"<script>{script}</script></body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=600,800", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    rounds = shown[shown.index("Rounds</h2>") :]
    assert re.findall(r"<tr><td>(\d+)</td>", rounds)[:4] == ["3", "2", "1", "0"]
    assert 'aria-sort="descending"' in shown
    assert 'data-asked=""' in shown
    assert 'data-wide="false"' in shown  # tables scroll inside the page, as on a phone
