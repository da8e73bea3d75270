import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType

from bora_fl.adapters import BORA, BoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0 is not a positive integer"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"num_blocks": -1}, "num_blocks=-1"),
        ({"num_blocks": True}, "num_blocks=True"),
        ({"bora_alpha": 0}, "bora_alpha=0 is not a positive number"),
        ({"bora_alpha": float("nan")}, "bora_alpha=nan"),
        ({"bora_dropout": 1.0}, r"bora_dropout=1\.0 is not a probability"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]=-1"),
        ({"bias": "lora_only"}, "bias='lora_only' is unknown; use one of none, all, bora_only"),
        ({"sigma_transform": "exp"}, "sigma_transform='exp' is unknown"),
        ({"sigma_init": "zeros"}, "sigma_init='zeros' is unknown"),
        ({"sigma_init": "ones"}, "cannot be reached by sigma_transform='exp_norm'"),
        ({"init_weights": "gaussian"}, "init_weights='gaussian' is not a switch"),
        ({"layers_pattern": "layers"}, "no effect without layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "does not combine with target_modules"),
        ({"task_type": "SEQ"}, "Invalid task type"),
    ],
)
def test_a_wrong_setting_names_field_and_value(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoraConfig(**settings)


def test_scaling() -> None:
    assert BoraConfig(bora_alpha=16).scaling(4, 16) == 4
    assert BoraConfig(bora_alpha=16, use_rslora=True).scaling(4, 16) == 8


def test_the_type_is_a_full_member_of_the_enumeration() -> None:
    assert PeftType("BORA") is PeftType["BORA"] is PeftType.BORA is BORA
    assert pickle.loads(pickle.dumps(BORA)) is BORA
    assert copy.deepcopy(BORA) is BORA
    assert json.dumps(BORA) == '"BORA"'
    assert BORA in list(PeftType)
    assert len(set(PeftType)) == len(list(PeftType))


def test_a_saved_config_is_found_by_its_type(tmp_path: Path) -> None:
    config = BoraConfig(r=3, num_blocks=2, target_modules=["q", "v"], rank_pattern={"q": 4}, sigma_transform="identity")
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is BoraConfig
    assert {**loaded.to_dict(), "inference_mode": False} == {
        **config.to_dict(),
        "target_modules": loaded.target_modules,
        "inference_mode": False,
    }
    assert set(loaded.target_modules) == {"q", "v"}
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "program",
    [
        # Other libraries look for PEFT without importing it.
        "import bora_fl, sys, importlib.util as u; u.find_spec('peft'); assert 'torch' not in sys.modules; import peft",
        "import peft, bora_fl",
    ],
)
def test_importing_the_package_registers_the_method(program: str) -> None:
    check = "assert type(peft.get_peft_config({'peft_type': 'BORA'})).__name__ == 'BoraConfig'"
    subprocess.run([sys.executable, "-c", f"{program}; {check}"], check=True)
