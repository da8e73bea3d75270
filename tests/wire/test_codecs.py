"""What each codec promises of bytes and error, over random tensors; stages compose; error feedback loses nothing."""

import math

import pytest
import torch

from bora_fl.config import ConfigError, parse
from bora_fl.strategies.aggregation import build
from bora_fl.wire.codecs import Codec
from bora_fl.wire.updates import Coding

SHAPES = [(), (1,), (7,), (37, 5), (5, 64), (3, 3, 5), (1, 1, 1), (40, 30)]
# Name to the largest relative error of the Frobenius norm that it may have.
ERRORS = {
    "float32": 0.0,
    "fp16": 2**-11 + 1e-6,
    "bf16": 2**-8,
    "topk:0.5": math.sqrt(0.5),
    "topk:0.1": math.sqrt(0.9),
    "topk:1": 0.0,
    "lowrank:2": 1.0,
    "lowrank:64": 0.0,
    "topk:0.5+fp16": math.sqrt(0.5) + 2**-10,
    "lowrank:64+bf16": 2**-7,
}


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * 10 ** float(torch.rand((), generator=g) * 4 - 3)


def through(name: str, tensor: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, int]:
    codec = Codec.parse(name)
    parts = codec.encode(tensor, torch.Generator().manual_seed(seed))
    return codec.decode(parts, tuple(tensor.shape)), sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_within_the_bound(name: str, shape: tuple[int, ...]):
    for seed in range(3):
        tensor = drawn(shape, seed)
        found, _ = through(name, tensor)
        assert found.shape == tensor.shape
        assert float((found - tensor).norm()) <= (ERRORS[name] + 1e-6) * float(tensor.norm())
    zero, _ = through(name, torch.zeros(shape))
    assert bool((zero == 0).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_err_by_less_than_a_step_and_by_nothing_in_the_mean(bits: int, shape: tuple[int, ...]):
    tensor, most = drawn(shape, 1), 2 ** (bits - 1) - 1
    found = torch.stack([through(f"int{bits}", tensor, seed)[0] for seed in range(400)])
    step = float(tensor.abs().max()) / most
    assert float((found - tensor).abs().max()) <= step * (1 + 1e-5)
    assert float((found.mean(0) - tensor).abs().max()) < 5 * step / 2 / math.sqrt(400)


def test_low_rank_is_the_closest_of_its_rank():
    tensor = drawn((40, 30), 0)
    values = torch.linalg.svdvals(tensor.double())
    error = float((through("lowrank:3", tensor)[0] - tensor).norm())
    assert error == pytest.approx(float(values[3:].square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "share"),
    [("fp16", 0.5), ("int8", 0.26), ("int4", 0.14), ("topk:0.1", 0.13), ("topk:0.1+int8", 0.06), ("lowrank:2", 0.3)],
)
def test_bytes(name: str, share: float):
    tensor = drawn((384, 8), 0)
    assert through(name, tensor)[1] <= share * tensor.nbytes


@pytest.mark.parametrize("name", ["topk:0.1", "int4", "lowrank:1+int8", "topk:0.3+int4"])
def test_error_feedback_sends_everything_in_the_long_run(name: str):
    coding, sent = Coding(Codec.parse(name), "identity"), {"x": torch.zeros(40, 6)}
    total, received, lost = torch.zeros(40, 6), torch.zeros(40, 6), dict[str, torch.Tensor]()
    for round in range(30):
        update = {"x": drawn((40, 6), round)}
        entries, lost = coding.encode(update, sent, lost, round)
        total += update["x"]
        received += coding.decode(entries, sent)["x"]
        torch.testing.assert_close(received + lost["x"], total, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["int4", "topk:0.1", "lowrank:1"])
def test_sigma_stays_positive_and_a_whole_tensor_is_taken_as_it_is(name: str):
    coding = Coding(Codec.parse(name), "exp_norm")
    sent = {"layers/q/sigma": torch.rand(4, 4, 6) + 1e-4, "layers/q/A": torch.zeros(2, 3)}
    trained = {"layers/q/sigma": torch.rand(4, 4, 6) + 1e-4}
    entries, _ = coding.encode(trained, sent, {}, 0)
    assert bool((coding.decode(entries, sent)["layers/q/sigma"] > 0).all())
    assert coding.decode(trained, sent)["layers/q/sigma"] is trained["layers/q/sigma"]


@pytest.mark.parametrize("spoil", ["missing", "dtype", "shape", "unknown", "twice"])
def test_parts_that_do_not_fit_are_refused(spoil: str):
    coding, sent = Coding(Codec.parse("topk:0.5+int8"), "identity"), {"x": torch.zeros(8, 3)}
    entries, _ = coding.encode({"x": drawn((8, 3), 0)}, sent, {}, 0)
    assert coding.decode(entries, sent)["x"].shape == (8, 3)
    if spoil == "missing":
        del entries["x#values.scale"]
    elif spoil == "dtype":
        entries["x#values.code"] = entries["x#values.code"].int()
    elif spoil == "shape":
        entries["x#values.code"] = entries["x#values.code"][:, :-1]
    elif spoil == "unknown":
        entries["y#gaps"] = entries["x#gaps"]
    else:
        entries["x"] = torch.zeros(8, 3)
    with pytest.raises(ValueError, match=r"does not decode by topk:0.5\+int8|was sent coded"):
        coding.decode(entries, sent)


@pytest.mark.parametrize("name", ["", "float64", "topk", "topk:0", "topk:2", "lowrank:0", "int8+topk:0.1", "fp16+fp16"])
def test_a_name_that_is_no_codec_is_refused(name: str):
    with pytest.raises(ValueError, match=r"wire\.codec = "):
        build(parse({"wire.codec": name}))


def test_masked_and_sparse_updates_have_no_codec():
    with pytest.raises(ConfigError, match="secure-aggregation"):
        parse({"wire.codec": "int8", "privacy.secure-aggregation": True, "strategy.name": "fedavg"})
    with pytest.raises(ValueError, match="use fedavg with topk"):
        build(parse({"wire.codec": "int8", "strategy.name": "cellm"}))
