import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bora_fl.paths import atomically, cache_folder, damaged, path_part, state_folder, state_in, write_atomically


def test_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, folder, default in (
        ("BORA_FL_CACHE", cache_folder, ".cache/bora_fl"),
        ("BORA_FL_STATE", state_folder, ".local/state/bora_fl"),
    ):
        monkeypatch.setenv(variable, "~/elsewhere")
        assert folder() == Path.home() / "elsewhere"
        monkeypatch.setenv(variable, "")
        assert folder() == Path.home() / default


@pytest.mark.parametrize("content", [b"\x00\xff", "naïve\n"])
def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, b"old and longer than the new one")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(path.parent) == ["file.json"]


def test_a_secret_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode)))
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_atomically(path, "new", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert modes[0] == 0o600
    assert len(modes) == 2  # the file, then its folder


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_half_way_leaves_the_old_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "kept"
    with atomically(path) as part:
        _write(part, kind, "old")
    with pytest.raises(FileNotFoundError), atomically(path) as part:
        _write(part, kind, "new", then="no such file")
    assert _read(path) == "old"
    assert os.listdir(tmp_path) == ["kept"]
    with atomically(path) as part:
        _write(part, kind, "new")
    assert _read(path) == "new"
    assert os.listdir(tmp_path) == ["kept"]


def test_every_file_of_a_folder_is_on_the_device_before_the_folder_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, (tmp_path / "a").exists()))
    )
    with atomically(tmp_path / "a") as part:
        (part / "b").mkdir(parents=True)
        (part / "b" / "c").write_text("c")
    inodes = {(tmp_path / name).stat().st_ino for name in ("a", "a/b", "a/b/c")}
    assert {inode for inode, in_place in flushed if not in_place} == inodes


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, wholes = tmp_path / "file", [str(i) * 10_000 for i in range(4)]
    seen: set[str] = set()

    def write(whole: str) -> None:
        for _ in range(20):
            write_atomically(path, whole)
            seen.add(path.read_text())

    threads = [threading.Thread(target=write, args=(whole,)) for whole in wholes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(wholes)
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    code = (
        "import os, signal; from pathlib import Path; from bora_fl.paths import atomically\n"
        f"with atomically(Path({str(path)!r})) as part: part.write_text('ne'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert path.read_text() == "old"
    assert len(list(tmp_path.glob(".*.part"))) == 1


def _write(path: Path, kind: str, content: str, then: str = "") -> None:
    if kind == "folder":
        path.mkdir()
        path /= "inside"
    path.write_text(content)
    if then:
        Path(path.parent, then).read_text()


def _read(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize(
    "text", ["..", ".", "", "a/b", "../x", "a\\b", "a.b", "a\0b", "a\n", "ä", " ", "~", "x" * 65, "²"]
)
def test_what_could_lead_elsewhere_is_no_part_of_a_path(text: str):
    with pytest.raises(ValueError, match="is no name for a file"):
        path_part(text)


@pytest.mark.parametrize("text", ["run", "0f" * 16, "A_b-9", "x" * 64])
def test_ids_are_parts_of_paths(text: str):
    assert path_part(text) == text


def test_damage_is_seen_and_named(tmp_path: Path):
    files = [tmp_path / "a", tmp_path / "b" / "c"]
    (tmp_path / "b").mkdir()
    for file in files:
        file.write_bytes(b"content of " + file.name.encode())
    sums = tmp_path / "SHA256SUMS"
    assert damaged(sums, files) == []  # lists them
    assert damaged(sums, []) == []
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0
    files[1].write_bytes(b"Content of c")
    assert damaged(sums, files) == ["b/c"]
    files[0].unlink()
    assert damaged(sums, files) == ["a", "b/c"]
    sums.write_bytes(b"\xff nothing")
    assert damaged(sums, files) != []


def test_state_is_elsewhere_for_a_while(tmp_path: Path):
    before = state_folder()
    with state_in(tmp_path):
        assert state_folder() == tmp_path
    assert state_folder() == before
