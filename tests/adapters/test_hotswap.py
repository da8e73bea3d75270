"""An adapter in another's place: the outputs of the other, the tensors of the first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from bora_fl.adapters import BoraConfig, hotswap_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(seed: int, **options: Any) -> Any:
    given = {"r": 2, "num_blocks": 4, "target_modules": ["first", "second"]} | options
    model = get_peft_model(Net(), BoraConfig(**given)).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13, as it traces
def test_the_other_adapter_speaks_and_nothing_is_compiled_again(tmp_path: Path) -> None:
    model, other, x = adapted(1), adapted(2), torch.randn(3, 8)
    other.save_pretrained(str(tmp_path))
    compiled = torch.compile(model, backend="eager")
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    with torch.no_grad():
        assert not torch.allclose(compiled(x), other(x))
        hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(compiled(x), other(x))
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 4}, "r is 2"),
        ({"num_blocks": 2}, "num_blocks is 4"),
        ({"bora_alpha": 3}, "bora_alpha"),
        ({"target_modules": ["first"]}, "target_modules"),
        ({"sigma_transform": "identity"}, "sigma_transform"),
        ({"exclude_modules": ["second"]}, r"second\.bora_adapter\.A is in the model alone"),
    ],
)
def test_what_does_not_fit_changes_nothing(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    model, x = adapted(1), torch.randn(3, 8)
    adapted(2, **options).save_pretrained(str(tmp_path))
    with torch.no_grad():
        before = model(x)
        with pytest.raises(ValueError, match=word):
            hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_layers_that_the_model_has_not_adapted_are_refused(tmp_path: Path) -> None:
    adapted(2).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"second\.bora_adapter\.A is in .* alone"):
        hotswap_adapter(adapted(1, exclude_modules=["second"]), tmp_path)


def test_a_module_to_save_of_another_shape_changes_nothing(tmp_path: Path) -> None:
    """As a head for another number of classes: PEFT loads what fits before it finds what does not."""
    model, x = adapted(1, target_modules=["first"], modules_to_save=["second"]), torch.randn(3, 8)
    other = Net()
    other.second = nn.Linear(12, 5)
    settings = BoraConfig(r=2, num_blocks=4, target_modules=["first"], modules_to_save=["second"], init_weights=False)
    get_peft_model(other, settings).save_pretrained(str(tmp_path))
    with torch.no_grad():
        before = model(x)
        with pytest.raises(ValueError, match=r"second\.weight is \[8, 12\], that of .* \[5, 12\]"):
            hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(1)
    adapted(2).save_pretrained(str(tmp_path))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, tmp_path)
