"""A user's own code, by the name of an entry point or as package.module:attribute."""

import subprocess
import sys
from pathlib import Path

import pytest

from bora_fl.config import ConfigError, DataSettings, ModelSettings, extensions
from bora_fl.data.loading import load_dataset, source_fingerprint
from bora_fl.deployment.flower_app import stage
from bora_fl.models import load_base, resolve
from bora_fl.simulations.compare.plan import plan
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.catalogue import find, names

ROOT = Path(__file__).resolve().parents[2]
CODE = '''
from bora_fl.blocks import factor_mean
from bora_fl.strategies.layer_merge import LayerMerge

def halfway(layer):
    """Move half of the way to the mean of the factors.

    More words.
    """
    return LayerMerge(factor_mean([layer.current, factor_mean(layer.updates, layer.weights)], [0.5, 0.5]))

def reviews(settings):
    from datasets import Dataset
    texts = ["a good film", "a bad book", "the phone was great", "it is awful"] * 10
    rows = Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0] * 10})
    return rows if settings.subset == "one" else (rows, rows.select(range(8)))

def encoder():
    return FOLDER

number = 3
'''


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """A working folder with the module `mine` and the installed package `theirs`, both with the same code."""
    code = CODE.replace("FOLDER", repr(str(tiny_model)))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").write_text(code)
    site = tmp_path / "site"
    (site / "theirs").mkdir(parents=True)
    (site / "theirs" / "__init__.py").write_text("")
    (site / "theirs" / "ours.py").write_text(code)
    (site / "theirs-1.dist-info").mkdir()
    (site / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    lines = [("strategies", "half", "halfway"), ("data", "reviews", "reviews"), ("models", "small", "encoder")]
    text = "".join(f"[bora_fl.{kind}]\n{name} = theirs.ours:{what}\n" for kind, name, what in lines)
    (site / "theirs-1.dist-info" / "entry_points.txt").write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(extensions, "_installed_only", False)
    resolve.cache_clear()
    yield tmp_path
    for name in ("mine", "theirs", "theirs.ours"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["mine:halfway", "half"])
def test_a_strategy_of_ones_own(name: str, folder: Path):
    preset = find(name)
    assert preset.name == name
    assert preset.summary == "Move half of the way to the mean of the factors"
    assert "half" in names()
    with pytest.raises(ConfigError, match=r"hlf.*did you mean half"):
        find("hlf")
    with pytest.raises(ConfigError, match="it is a int; name a Preset"):
        find("mine:number")
    with pytest.raises(ConfigError, match=r"strategy\.name = 'mine:gone'.*cannot be imported from 'mine'.*working"):
        find("mine:gone")


@pytest.mark.parametrize(("data", "model"), [("mine:reviews", "mine:encoder"), ("reviews", "small")])
def test_data_and_a_model_of_ones_own(data: str, model: str, folder: Path):
    settings = DataSettings(name=data)
    found = load_dataset(settings)
    assert (len(found.train), len(found.test), found.label_names) == (40, 8, ["0", "1"])
    assert load_base(ModelSettings(name=model), found.label_names, 0).config.hidden_size == 16
    with pytest.raises(ConfigError, match=r"data\.test-split = 'test'.*set data\.test-split"):
        load_dataset(DataSettings(name=data, subset="one"))
    assert load_dataset(DataSettings(name=data, subset="one", test_split="")).test is None
    with pytest.raises(ConfigError, match=r"return a datasets\.Dataset"):
        load_dataset(DataSettings(name="builtins:repr"))
    other = DataSettings(name="mine:others")  # a new name must not make spent records look new
    assert source_fingerprint(settings, 0) == source_fingerprint(other, 0) != source_fingerprint(settings, 1)


def test_a_run_of_ones_own_parts(folder: Path, tiny_config):
    own = {"strategy.name": "mine:halfway", "data.name": "mine:reviews", "model.name": "mine:encoder"}
    own |= {"data.partition": "iid", "run.num-rounds": 1, "train.local-steps": 1}
    adapter = simulate(tiny_config | own, 2) / "adapter"
    assert "mine:halfway" in (adapter / "README.md").read_text()
    assert "base_model: mine" not in (adapter / "README.md").read_text()


def test_a_comparison_takes_it(folder: Path):
    axes = {"scenarios": ["natural"], "methods": ["bora"], "seeds": [0], "clients": 2, "threads": 1}
    found = plan({}, strategies=["fedavg", "mine:halfway", "half"], root=folder, **axes)
    assert [run.settings.strategy.name for run in found.runs] == ["fedavg", "mine:halfway", "half"]
    assert not any(run.variant.personal for run in found.runs)
    own = found.runs[1].name, found.runs[1].identity
    Path("mine.py").write_text(Path("mine.py").read_text() + "number = 4\n")
    assert (found.runs[1].name, found.runs[1].identity) != own
    assert "code" not in found.runs[0].identity


def test_a_bundle_carries_what_its_settings_refer_to(folder: Path):
    settings = {"strategy.name": "half", "data.name": "mine:reviews", "run.seed": 1}
    assert extensions.portable(settings) == settings | {"strategy.name": "theirs.ours:halfway"}
    app = stage(Path(), folder / "staged", extensions.sources(settings))
    assert (app / "theirs" / "ours.py").is_file()
    code = f"import sys; sys.path.insert(0, {str(app)!r}); import mine, theirs.ours; print(mine.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(app / "mine.py")
    assert extensions.sources({"strategy.name": "fedavg", "data.name": "embedded:sentiment4"}) == []


def test_a_site_s_own_process_imports_no_code_that_a_run_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    extensions.take_installed_only()
    with pytest.raises(ConfigError, match=r"data\.name = 'mine:reviews': this process imports no code that a run"):
        load_dataset(DataSettings(name="mine:reviews", max_train_examples=9))
    assert "mine" not in sys.modules
    assert len(load_dataset(DataSettings(name="reviews", max_train_examples=9)).train) == 9
