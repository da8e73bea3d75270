"""``metrics.jsonl``: a row a round, whatever a crash or a disk has done to the file."""

import json
from pathlib import Path

import pytest

from bora_fl.report import append_row, drop_rows_after, read_rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def rounds(path: Path) -> list[int]:
    return [row["round"] for row in read_rows(path)]


@pytest.mark.parametrize(
    "bad",
    [b"{", b"\xff\xfe", b"", b"[]", b"3", b"null", b'{"loss": 1}', b'{"round": "2"}', b'{"round": true}', b"[" * 5000],
    ids=lambda bad: repr(bad[:12]),
)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_bad_line_loses_no_other(bad: bytes, position: int, path: Path):
    lines = [json.dumps({"round": n, "loss": 1 / n}).encode() for n in (1, 2, 3)]
    lines.insert(position, bad)
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert rounds(path) == [1, 2, 3]
    drop_rows_after(path, 2)
    assert rounds(path) == [1, 2]
    aside = path.with_name("metrics.jsonl.unreadable")
    assert (aside.read_bytes() if bad else b"\n") == bad + b"\n"


def test_a_round_that_was_written_twice_counts_once(path: Path):
    for number, loss in ((1, 0.9), (2, 0.8), (2, 0.7), (3, 0.6)):
        append_row(path, {"round": number, "loss": loss})
    assert [(row["round"], row["loss"]) for row in read_rows(path)] == [(1, 0.9), (2, 0.7), (3, 0.6)]


@pytest.mark.parametrize("length", [1, 5, 11])
def test_a_line_that_was_cut_off_spoils_not_the_next(length: int, path: Path):
    append_row(path, {"round": 1})
    append_row(path, {"round": 2})
    path.write_bytes(path.read_bytes()[:-length])
    append_row(path, {"round": 3})
    assert rounds(path) in ([1, 3], [1, 2, 3])
    assert (rounds(path) == [1, 2, 3]) == (length == 1)  # only its end was lost


def test_rows_are_their_owner_s_alone(path: Path):
    path.touch(mode=0o644)
    append_row(path, {"round": 1})
    assert path.stat().st_mode & 0o777 == 0o600
    drop_rows_after(path, 1)
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_file_there_are_no_rows(path: Path):
    assert read_rows(path) == []
