"""PEFT's own test suite, taken from its source distribution and pointed at BoRA.

Every upstream test that is parametrized over PEFT methods runs, over the configurations below; upstream tests of one
named method are left where they are. The source distribution is fetched once into `.build/`; without it this fails.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from types import FunctionType, ModuleType

import huggingface_hub
import pytest

from bora_fl.adapters import BoraConfig
from tests.prepare import upstream_peft

PACKAGE = "upstream_peft_tests"

pytestmark = [
    # What upstream's tests provoke: configs named after models that have no name and are not on the hub, active
    # adapters deleted, adapters merged on top of others, FSDP with one process, a fixture style that pytest will drop.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning"),
    pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Class-scoped fixtures defined as instance methods:pytest.PytestDeprecationWarning"
    ),
]

ONE_LAYER, BOTH_LAYERS = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}
IDENTITY = {"sigma_transform": "identity"}
# Upstream trains with large inputs and steps; a small alpha keeps two adapted layers finite.
CONFIGURATIONS: list[tuple[str, str, dict[str, object]]] = [
    ("one block", "MLP", {"target_modules": "lin0", "num_blocks": 1}),
    ("one block, identity", "MLP", {**BOTH_LAYERS, "num_blocks": 1, **IDENTITY}),
    ("two blocks", "MLP", {**BOTH_LAYERS, "num_blocks": 2}),
    ("two blocks, identity", "MLP", {**BOTH_LAYERS, "num_blocks": 2, "bora_alpha": 1, **IDENTITY}),
    ("five blocks", "MLP", {**ONE_LAYER, "num_blocks": 5, "r": 2}),
    ("five blocks, ones", "MLP", {**ONE_LAYER, "num_blocks": 5, "r": 3, **IDENTITY, "sigma_init": "ones"}),
    ("dropout", "MLP", {**ONE_LAYER, "num_blocks": 2, "bora_dropout": 0.1}),
    ("rank-stabilized", "MLP", {**BOTH_LAYERS, "num_blocks": 2, "use_rslora": True, "bora_alpha": 1}),
    ("patterns", "MLP", {**BOTH_LAYERS, "num_blocks": 2, "rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin1": 2}}),
    ("modules to save", "MLP", {**ONE_LAYER, "num_blocks": 2, "modules_to_save": ["lin1"]}),
    ("all linear but one", "MLP", {"target_modules": "all-linear", "exclude_modules": ["lin1"], "num_blocks": 2}),
    ("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"], "num_blocks": 1}),
]

PAIRS: list[tuple[str, dict[str, object], dict[str, object]]] = [
    ("same layer", {**ONE_LAYER, "num_blocks": 2}, {**ONE_LAYER, "num_blocks": 2}),
    ("other layer", {**ONE_LAYER, "num_blocks": 2}, {"target_modules": ["lin1"], "num_blocks": 2}),
    ("other blocks and rank", {**ONE_LAYER, "num_blocks": 5, "r": 3}, {**ONE_LAYER, "num_blocks": 1}),
    ("other transform", {**BOTH_LAYERS, "num_blocks": 2}, {**ONE_LAYER, "num_blocks": 2, **IDENTITY}),
]


def import_upstream() -> ModuleType:
    """Import upstream's `test_custom_models`, whose relative imports need a package."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(upstream_peft())]
    sys.modules[PACKAGE] = package
    # One import line needs diffusers, and only tests of image models use it.
    stand_in = None if importlib.util.find_spec("diffusers") else ModuleType("diffusers")
    if stand_in is not None:
        stand_in.StableDiffusionPipeline = None  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stand_in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"{PACKAGE}.test_custom_models")
    finally:
        if stand_in is not None:
            del sys.modules["diffusers"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Hugging Face libraries from asking the hub about models that are made here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # Upstream goes online for a model's first test.
    seen = {model: 1 for _, model, _ in CONFIGURATIONS}
    monkeypatch.setattr(sys.modules[f"{PACKAGE}.testing_utils"], "_HUB_MODEL_ACCESSES", seen)


def point_at_bora(upstream: ModuleType) -> dict[str, type]:
    """Replace upstream's matrices in place and return its classes, reduced to the tests that use them."""
    matrices = (upstream.TEST_CASES, upstream.ALL_PEFT_CONFIG_CLASSES, upstream.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES)
    upstream.TEST_CASES[:] = [(name, model, BoraConfig, settings) for name, model, settings in CONFIGURATIONS]
    upstream.ALL_PEFT_CONFIG_CLASSES[:] = [BoraConfig]
    upstream.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (name, "bora", BoraConfig, {**first, "init_weights": False}, {**second, "init_weights": False})
        for name, first, second in PAIRS
    ]

    def uses_a_matrix(test: FunctionType) -> bool:
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        return any(mark.args[1] is matrix for mark in marks for matrix in matrices)

    classes = {}
    for name, cls in vars(upstream).items():
        if not (isinstance(cls, type) and name.startswith("Test") and cls.__module__ == upstream.__name__):
            continue
        tests = {key: value for key, value in vars(cls).items() if key.startswith("test_")}
        other = {key: None for key, test in tests.items() if not uses_a_matrix(test)}
        if len(other) < len(tests):
            classes[name] = type(name, (cls,), other)
    return classes


upstream = import_upstream()
globals().update(point_at_bora(upstream))
