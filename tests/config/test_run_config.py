import tomllib
from pathlib import Path

import pytest

from bora_fl.config import AdapterSettings, ConfigError, Settings, describe, parse, suggest
from bora_fl.config.run_config import _FOREIGN


def test_the_app_declares_every_key_with_the_default_of_the_settings():
    root = Path(__file__).resolve().parents[2]
    groups = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    declared = {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}
    assert declared == Settings().flat()
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in Settings().flat().items()}


def test_flat_settings_parse_back_to_themselves():
    settings = parse({"adapter.rank": 3, "data.alpha": 0.1, "run.resume": True})
    assert (settings.adapter.rank, settings.data.alpha, settings.run.resume) == (3, 0.1, True)
    assert parse(settings.flat()) == settings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data.alph": 1.0}, ["data.alph", "data.alpha"]),
        ({"data.alpha": 0.0}, ["data.alpha = 0.0", "greater than 0"]),
        ({"adapter.rank": 0}, ["adapter.rank = 0", "greater than or equal to 1"]),
        ({"train.batch-size": "many"}, ["train.batch-size = 'many'", "integer"]),
        ({"data.partition": "random"}, ["data.partition = 'random'", "dirichlet"]),
        ({"train.learning-rate": float("nan")}, ["train.learning-rate = nan", "finite"]),
        ({"adapter.dropout": 0.1, "privacy.mode": "record"}, ["adapter.dropout = 0.1", "set adapter.dropout to 0"]),
        (
            {"train.proximal-mu": 0.1, "privacy.mode": "record"},
            ["train.proximal-mu = 0.1", "set train.proximal-mu to 0"],
        ),
        ({"train.max-grad-norm": 5.0, "privacy.mode": "record"}, ["train.max-grad-norm = 5", "privacy.clip-norm"]),
        (
            {"train.compile": True, "train.prefix-cache-mb": 8},
            ["train.prefix-cache-mb = 8", "set train.prefix-cache-mb to 0"],
        ),
        ({"train.compile": True, "privacy.mode": "record"}, ["train.compile = true", "set train.compile to false"]),
        ({"train.precision": "fp16", "privacy.mode": "record"}, ["train.precision = 'fp16'", "to bf16 or fp32"]),
        ({"train.precision": "fp16", "model.dtype": "float16"}, ["model.dtype = 'float16'", "model.dtype to float32"]),
        (
            {
                "privacy.mode": "client",
                "strategy.weighting": "uniform",
                "data.num-partitions": 20,
                "privacy.delta": 0.05,
            },
            ["privacy.delta = 0.05", "data.num-partitions = 20", "well below 0.05"],
        ),
        ({"privacy.adaptive-clipping": True}, ["privacy.adaptive-clipping = true", "privacy.mode to client"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_remedy(config: dict[str, float | str], words: list[str]):
    with pytest.raises(ConfigError) as error:
        parse(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        parse({"adapter.rank": -1, "data.alpha": -2.0})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("method", "num_blocks", "transform", "wanted"),
    [
        ("bora", 4, "exp_norm", (4, "exp_norm", set())),
        ("bora", 1, "exp_norm", (1, "exp_norm", set())),
        ("bora", 1, "identity", (1, "identity", set())),
        ("lora", 4, "exp_norm", (1, "identity", {"sigma"})),
        ("dora", 4, "exp_norm", (1, "identity", {"sigma"})),
    ],
)
def test_the_adapter_says_what_its_sigma_is(method, num_blocks, transform, wanted):
    adapter = AdapterSettings(method=method, num_blocks=num_blocks, sigma_transform=transform)
    assert (adapter.blocks, adapter.transform, adapter.untrained) == wanted


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "train.learning-rate"),
        ("train.lr", "train.learning-rate"),
        ("fedprox", "train.proximal-mu"),
        ("clients", "--simulate N"),
        ("num_clients", "--simulate N"),
        ("lora_r", "adapter.rank"),
        ("train.learning-rat", "train.learning-rate"),
        ("zzz", "`bora-fl config` lists the keys"),
    ],
)
def test_a_key_of_another_tool_is_answered_by_its_meaning(key: str, meant: str):
    with pytest.raises(ConfigError, match=f"{key} = 1: no such setting; .*{meant}"):
        parse({key: 1})


def test_every_suggestion_exists_and_no_key_of_ours_is_foreign():
    known = Settings().flat()
    for name, meaning in _FOREIGN.items():
        assert name not in known
        assert any(word in known for word in meaning.replace(",", "").split()) or meaning.startswith("--")
        assert suggest(name) == f"use {meaning}"


def test_settings_are_described_all_by_group_or_by_a_word():
    assert len(describe()) == len(Settings().flat())
    group = describe("run")
    assert [key for key, _, _ in group] == [key for key in Settings().flat() if key.startswith("run.")]
    found = {key for key, _, _ in describe("Warm")}
    assert "train.warmup-rounds" in found
    assert [key for key, _, _ in describe("lr")] == ["train.learning-rate"]
    assert [key for key, _, _ in describe("num_train_epochs")] == ["train.local-steps", "train.local-epochs"]
    assert not describe("no such word")
    assert all(meaning for _, _, meaning in describe())
