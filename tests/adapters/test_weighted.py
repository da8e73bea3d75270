import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from bora_fl.adapters import BoraConfig, read_factors
from bora_fl.adapters.state import named_layers

SETTINGS = {
    "first": {"r": 2, "bora_alpha": 3, "target_modules": ["0", "2"]},
    "second": {"r": 3, "use_rslora": True, "sigma_transform": "identity", "target_modules": ["0", "2"]},
    "one_layer": {"r": 4, "rank_pattern": {"2": 1}, "target_modules": ["2"]},
}
WEIGHTS = {"first": 1.5, "second": -0.5, "one_layer": 0.25}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6)).double()


def adapted(num_blocks: int) -> PeftModel:
    configs = {n: BoraConfig(num_blocks=num_blocks, init_weights=False, **s) for n, s in SETTINGS.items()}
    model = get_peft_model(base(), configs["first"], "first")
    for name in ("second", "one_layer"):
        model.add_adapter(name, configs[name])
    return model.double()


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {layer: module.get_delta_weight(name) for layer, module in named_layers(model, name)}


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("options", [{"combination_type": "cat"}, {"rank": 9}, {"rank": 2}, {}])
def test_the_new_adapter_is_the_weighted_sum(num_blocks: int, options: dict[str, object], tmp_path) -> None:
    model = adapted(num_blocks)
    x = torch.randn(5, 12, dtype=torch.float64)
    before = model(x)
    parts = {name: deltas(model, name) for name in SETTINGS}
    expected = {layer: sum(WEIGHTS[n] * parts[n][layer] for n in SETTINGS if layer in parts[n]) for layer in ("0", "2")}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", **options)
    assert torch.equal(model(x), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    ranks = {layer: f.rank for layer, f in read_factors(model, "sum").items()}
    wanted = {"cat": {"0": 5, "2": 6}, 9: {"0": 9, "2": 9}, 2: {"0": 2, "2": 2}}
    assert ranks == wanted.get(options.get("combination_type", options.get("rank")), {"0": 3, "2": 3})
    for layer, found in deltas(model, "sum").items():
        error = (found - expected[layer]).norm() / expected[layer].norm()
        if min(ranks.values()) >= 5:
            assert error < 1e-6
        elif num_blocks == 1:  # no factors of this rank are closer than the truncated SVD
            tail = torch.linalg.svdvals(expected[layer])[ranks[layer] :].norm() / expected[layer].norm()
            assert error == pytest.approx(tail.item(), rel=1e-5)
        else:
            assert error < 0.9
    model.save_pretrained(tmp_path, selected_adapters=["sum"], save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(), str(tmp_path / "sum")).double()
    model.set_adapter("sum")
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)


def test_over_a_base_in_half_precision_the_sum_is_in_float32_as_its_parts_are() -> None:
    settings = BoraConfig(num_blocks=2, r=2, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(base().bfloat16(), settings)
    expected = {layer: 2 * delta for layer, delta in deltas(model, "default").items()}
    model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="cat")
    torch.testing.assert_close(deltas(model, "twice"), expected)  # dtypes too


@pytest.mark.parametrize("targets", ["0|1[.]0", "0"])
def test_layers_whose_name_ends_as_another_ones_are_kept_apart(targets: str, tmp_path) -> None:
    """A name alone is what PEFT takes for the end of one: `0` is `1.0` too, of whichever rank comes first."""

    def nested() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))

    ranks = {"0": 2} if targets == "0" else {"0": 2, "1.0": 4}
    pattern = {f"^{layer}": rank for layer, rank in ranks.items()}
    settings = BoraConfig(num_blocks=2, rank_pattern=pattern, target_modules=targets, init_weights=False)
    model = get_peft_model(nested(), settings)
    expected = {layer: 2 * delta for layer, delta in deltas(model, "default").items()}
    model.add_weighted_adapter(["default"], [2.0], "twice")
    assert {layer: f.rank for layer, f in read_factors(model, "twice").items()} == ranks
    torch.testing.assert_close(deltas(model, "twice"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["twice"])
    again = PeftModel.from_pretrained(nested(), str(tmp_path / "twice"))
    torch.testing.assert_close(deltas(again, "default"), expected)


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"),
    [
        (["first", "c"], [1, 1], {}, r"\['c'\] of \['first', 'second', 'one_layer'\]"),
        (["first", "second"], [1], {}, "one weight for each"),
        (["first", "second"], [1, 1], {"combination_type": "ties"}, "use one of refactorize, cat"),
        (["first", "second"], [1, 1], {"rank": 0}, "rank is 0"),
    ],
)
def test_wrong_arguments_are_refused(adapters, weights, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(3).add_weighted_adapter(adapters, weights, "sum", **options)


def test_blocks_must_fit_and_nothing_be_trained_beside_the_factors() -> None:
    model = adapted(3)
    model.add_adapter("halves", BoraConfig(num_blocks=2, target_modules=["0"]))
    model.add_adapter("more", BoraConfig(num_blocks=3, target_modules=["0"], bias="bora_only"))
    for other, message in (("halves", "different num_blocks"), ("more", "beside their factors")):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(["first", other], [1, 1], "sum")
