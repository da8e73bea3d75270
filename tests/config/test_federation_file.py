import tomllib
from pathlib import Path

import pytest

from bora_fl.config import FEDERATION_FILE, ConfigError, Federation, Settings, federation_text, read_federation

CHOSEN = {"model.name": 'a "b" \\ ü', "train.learning-rate": 1e-05, "run.resume": True, "run.num-rounds": 3}


@pytest.mark.parametrize("who", [{"simulate": 5}, {"connection": "hospitals"}, {}])
def test_what_is_written_is_read(who: dict, tmp_path: Path):
    written = Federation(**who, run_config=CHOSEN)
    (tmp_path / FEDERATION_FILE).write_text(federation_text(written), encoding="utf8")
    assert read_federation(tmp_path) == written


def test_every_setting_can_stand_in_the_file(tmp_path: Path):
    text = federation_text(Federation(2, "", Settings().flat()))
    (tmp_path / FEDERATION_FILE).write_text(text, encoding="utf8")
    assert read_federation(tmp_path).run_config == Settings().flat()
    keys = [f"{group}.{key}" for group, keys in tomllib.loads(text).items() for key in keys if group != "federation"]
    assert keys == list(Settings().flat())
    assert "# r\nrank = 8" in text


def test_a_file_of_windows_is_read(tmp_path: Path):
    (tmp_path / FEDERATION_FILE).write_bytes(b"\xef\xbb\xbf[federation]\r\nsimulate = 2\r\n")
    assert read_federation(tmp_path).simulate == 2


def test_a_folder_without_the_file_says_nothing(tmp_path: Path):
    assert read_federation(tmp_path) == Federation()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = 0.1", r"federation\.toml: train\.lr = 0\.1: no such setting; use train\.learning-rate"),
        ("[train]\nbatch-size = 0", r"federation\.toml: train\.batch-size = 0: .*greater than or equal to 1"),
        ("[trane]\nbatch-size = 1", r"federation\.toml: trane\.batch-size = 1: .*did you mean train\.batch-size"),
        ("[adapter]\ntarget-modules = ['q', 'v']", r"federation\.toml: adapter\.target-modules = \['q', 'v'\]: write"),
        ("rounds = 3", r"federation\.toml: rounds = 3: it stands in no table; use run\.num-rounds"),
        ("[federation]\nclients = 3", r"federation\.toml: federation\.clients = 3: no such key; use one of simulate"),
        ("[federation]\nsimulate = '3'", r"federation\.simulate = '3': write the number"),
        ("[federation]\nsimulate = true", r"federation\.simulate = True: write the number"),
        ("[federation]\nconnection = 3", r"federation\.connection = 3: write the name"),
        ("[federation]\nsimulate = 2\nconnection = 'a'", "leave one out"),
        ("federation = 3", r"federation = 3: it is a table"),
        ("[model]\nname = minilm", r"federation\.toml: it is no TOML .*double quotes"),
    ],
)
def test_a_wrong_line_is_named_with_the_file(text: str, message: str, tmp_path: Path):
    (tmp_path / FEDERATION_FILE).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_federation(tmp_path)


def test_all_wrong_lines_are_named_at_once(tmp_path: Path):
    (tmp_path / FEDERATION_FILE).write_text("[adapter]\nrank = -1\nalpha = -1.0")
    with pytest.raises(ConfigError) as error:
        read_federation(tmp_path)
    assert [line.startswith(f"{FEDERATION_FILE}: adapter.") for line in str(error.value).splitlines()] == [True, True]
