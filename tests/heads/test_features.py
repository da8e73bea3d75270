from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bora_fl.config import AdapterSettings, ModelSettings
from bora_fl.data import Encoded
from bora_fl.evaluate import evaluate
from bora_fl.heads import ClassSums, Head, collect, head_metrics, lda, public_clip_norm, ridge
from bora_fl.models import FederatedModel, load_base, load_tokenizer

NAMES = ["a", "b", "c"]
SIZES = {"vocab_size": 40, "num_labels": 3, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 40, "num_labels": 3, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}


def examples(n: int = 30) -> Encoded:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, n)
    return Encoded(
        tokens=rng.integers(5, 20, lengths.sum()).astype(np.int32),
        begin=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompts=np.zeros(n, np.int64),
        classes=rng.integers(0, 3, n),
        pad_id=0,
        max_length=16,
    )


def models(tiny_model: Path):
    torch.manual_seed(0)
    for pooling in ("auto", "mean"):
        yield pooling, load_base(ModelSettings(name=str(tiny_model), pooling=pooling), NAMES, 0)
    yield "roberta", transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES))
    yield "distilbert", transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**DISTIL))
    yield "llama", transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES))
    settings = ModelSettings(name=str(tiny_model), pooling="mean")
    yield (
        "peft",
        FederatedModel(load_base(settings, NAMES, 0), AdapterSettings(rank=2, num_blocks=4), settings, 0).model,
    )


def test_features_are_what_the_head_reads(tiny_model: Path):
    data = examples()
    for name, model in models(tiny_model):
        model.train()
        whole = collect(model, data, 7, 3)
        assert model.training, name
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 3]
        weight, bias = layers[-1].weight.detach(), layers[-1].bias
        head = Head(weight.double(), None if bias is None else bias.detach().double())
        loss = evaluate(model, data, 4).loss
        # The head on the features gives the model's loss: they are the features it reads.
        assert head_metrics(model, data, 8, {"own": head})["own"].loss == pytest.approx(loss, rel=1e-4), name
        whole.check()
        assert whole.counts.tolist() == np.bincount(data.classes, minlength=3).tolist()
        alone = sum((collect(model, data.select(np.array([i])), 1, 3) for i in range(30)), ClassSums.zeros(3, 16))
        torch.testing.assert_close(alone.sums, whole.sums, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(alone.gram, whole.gram, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_the_sums_of_words_are_over_the_states_that_the_head_reads(kind: str):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForTokenClassification")(getattr(transformers, f"{kind}Config")(**SIZES))
    data = examples()
    tags = np.random.default_rng(1).integers(-1, 3, len(data.tokens))
    tags[tags < 0] = -100
    data = replace(data, classes=None, tags=tags)
    sums = collect(model.train(), data, 7, 3)
    expected = ClassSums.zeros(3, 16)
    model.eval()
    for begin, length in zip(data.begin, data.lengths, strict=True):
        ids = torch.from_numpy(data.tokens[begin : begin + length]).long()[None]
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        known = tags[begin : begin + length] >= 0
        labels = torch.from_numpy(tags[begin : begin + length][known])
        expected = expected + ClassSums.of(states[torch.from_numpy(known)], labels, 3)
    for name in ("counts", "sums", "gram"):
        torch.testing.assert_close(getattr(sums, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    sums.check()
    head = lda(sums)
    with torch.no_grad():
        classifier = model.classifier if kind == "Bert" else model.score
        classifier.weight.copy_(head.weight)
        classifier.bias.copy_(head.bias)
    found, alone = evaluate(model, data, 4), head_metrics(model, data, 8, {"solved": head})["solved"]
    assert (found.loss, found.accuracy) == (pytest.approx(alone.loss, rel=1e-3), alone.accuracy)
    assert (found.examples, found.targets) == (alone.examples, alone.targets) == (30, int((tags >= 0).sum()))


def test_the_sums_of_several_classes_are_those_of_a_loop(tiny_model: Path):
    data = examples()
    labels = np.random.default_rng(1).integers(0, 2, (30, 3)).astype(np.float32)
    several = replace(data, classes=labels)
    model = load_base(ModelSettings(name=str(tiny_model), task="multi-label", pooling="mean"), NAMES, 0)
    assert model.config.problem_type == "multi_label_classification"
    sums = collect(model, several, 7, 3)
    assert sums.counts.tolist() == [*labels.sum(0), 30]
    for label in range(3):
        mine = replace(data, classes=labels[:, label].astype(np.int64))
        one = collect(model, mine, 7, 3)
        torch.testing.assert_close(sums.sums[label], one.sums[1])
        torch.testing.assert_close(sums.total, one.total)
    head = lda(sums)
    assert head_metrics(model, several, 8, {"solved": head})["solved"].accuracy > 0.5


def test_clipped_features_have_a_norm_of_at_most_1(tiny_model: Path):
    model = load_base(ModelSettings(name=str(tiny_model), pooling="mean"), NAMES, 0)
    data = examples()
    assert float(collect(model, data, 8, 3, clip_norm=1e-3).gram.trace()) == pytest.approx(30)
    loose = collect(model, data, 8, 3, clip_norm=100.0)
    torch.testing.assert_close(loose.sums * 100, collect(model, data, 8, 3).sums)


def test_a_solved_head_is_written_into_the_state(tiny_model: Path):
    settings = ModelSettings(name=str(tiny_model), pooling="mean")
    model = FederatedModel(load_base(settings, NAMES, 0), AdapterSettings(rank=2, num_blocks=4), settings, 0)
    weight, bias = model.head_layer()
    assert (weight, bias) == ("classifier.weight", "classifier.bias")
    data = examples()
    head = lda(collect(model.model, data, 8, 3))
    state = model.read()
    state.tensors.update({weight: head.weight.float(), bias: head.bias.float()})
    model.write(state)
    expected = head_metrics(model.model, data, 8, {"solved": head})["solved"]
    found = evaluate(model.model, data, 8)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.accuracy == expected.accuracy


def test_the_head_layer_is_named_for_every_method(tiny_model: Path):
    settings = ModelSettings(name=str(tiny_model))
    full = FederatedModel(load_base(settings, ["a", "b"], 0), AdapterSettings(method="full"), settings, 0)
    assert full.head_layer() == ("classifier.weight", "classifier.bias")
    frozen = AdapterSettings(rank=2, num_blocks=4, train_head=False)
    assert FederatedModel(load_base(settings, NAMES, 0), frozen, settings, 0).head_layer() is None


def test_a_model_without_a_linear_head_is_refused(tiny_model: Path):
    model = load_base(ModelSettings(name=str(tiny_model)), NAMES, 0)
    model.classifier = torch.nn.Sequential(model.classifier, torch.nn.Softmax(1))
    with pytest.raises(ValueError, match="no closed-form head"):
        collect(model, examples(), 8, 3)


def test_no_examples_have_no_sums(tiny_model: Path):
    model = load_base(ModelSettings(name=str(tiny_model)), NAMES, 0)
    nobody = examples().select(np.empty(0, np.int64))
    with pytest.raises(ValueError, match="at least one example"):
        collect(model, nobody, 8, 3)
    head = Head(torch.zeros(3, 16).double(), None)
    assert head_metrics(model, nobody, 8, {"zero": head})["zero"].examples == 0


def test_the_public_clip_norm_needs_no_data(tiny_model: Path):
    settings = ModelSettings(name=str(tiny_model), pooling="mean")
    model, tokenizer = load_base(settings, NAMES, 0), load_tokenizer(settings)
    norm = public_clip_norm(model, tokenizer, 3, 16)
    assert 0 < norm < 100
    assert norm == public_clip_norm(model, tokenizer, 3, 16)


@pytest.mark.parametrize("width", [0, 5])
def test_sums_of_numbers_are_clipped_to_their_range_and_norm_one(width: int, tiny_model: Path):
    numbers = np.linspace(-30, 70, 30).astype(np.float32)
    model = load_base(ModelSettings(name=str(tiny_model), task="regression"), ["score"], 0)
    data = replace(examples(), classes=numbers)
    plain = collect(model, data, 7, 1, width=width)
    dim = plain.gram.shape[0] - 1
    assert (dim, plain.examples) == (width or 16, 30)
    assert float(plain.total[-1]) == pytest.approx(float(numbers.sum()))
    assert float(plain.gram[-1, -1]) == pytest.approx(float(np.square(numbers).sum()))
    bounded = collect(model, data, 7, 1, width=width, clip_norm=1e-3, number_range=(-10.0, 50.0))
    with pytest.raises(ValueError, match="within a range alone"):
        collect(model, data, 7, 1, width=width, clip_norm=1e-3)
    brought = (numbers.clip(-10, 50) - 20) / 30
    assert float(bounded.gram[-1, -1]) == pytest.approx(float(np.square(brought).sum()) / 2, rel=1e-5)
    assert float(bounded.gram.diagonal()[:-1].sum()) == pytest.approx(30 / 2)  # every vector is longer than that
    assert float(bounded.total[-1]) == pytest.approx(float(brought.sum() / 2**0.5), abs=1e-5)
    found = head_metrics(model, data, 7, {"ridge": ridge(plain)})["ridge"] if not width else None
    assert found is None or 0 <= found.accuracy <= 1


RANGES = [(0.0, 5e-324), (1.7e308, 1.75e308), (1.0, 1.0000000000000002), (1e16, 10000000000000002.0), (-1e300, 1e-300)]


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("clip_norm", [5e-324, 1.0, 1e300])
def test_no_range_that_a_server_names_lets_a_record_count_for_more(
    bounds: tuple[float, float], clip_norm: float, tiny_model: Path
):
    model = load_base(ModelSettings(name=str(tiny_model), task="regression"), ["score"], 0)
    for number in (-3.0, 0.0, 1.0, 7e17):
        data = replace(examples(1), classes=np.array([number], np.float32))
        sums = collect(model, data, 7, 1, clip_norm=clip_norm, number_range=bounds)
        assert float(sums.total.norm()) <= 1 + 1e-9
        assert float(torch.linalg.matrix_norm(sums.gram)) <= 1 + 1e-9
