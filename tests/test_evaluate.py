"""The losses against a loop in float64, and the metrics against all examples at once."""

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from bora_fl.data import Encoded
from bora_fl.evaluate import evaluate, exact_match, example_losses, num_targets, perplexity, rouge_l


def test_a_classifiers_losses_are_those_of_each_example():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    losses, targets, right = example_losses(logits, labels)
    for i in range(5):
        row = logits[i].double()
        assert float(losses[i]) == pytest.approx(float(row.logsumexp(0) - row[labels[i]]), abs=1e-6)
        assert float(right[i]) == float(row.argmax() == labels[i])
    assert targets.tolist() == [1.0] * 5


def test_a_language_models_losses_cover_the_next_token_where_there_is_a_target():
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 3, -100, 5], [1, -100, -100, -100]])
    losses, targets, _ = example_losses(logits, labels)
    scores = logits.double().log_softmax(-1)
    wanted = [-float(scores[0, 0, 3] + scores[0, 2, 5]), 0.0]
    assert losses.tolist() == pytest.approx(wanted, abs=1e-5)
    assert targets.tolist() == [2.0, 0.0]


def test_the_losses_of_words_classes_are_transformers_own():
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = BertForTokenClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=4)).eval()
    ids, labels = torch.randint(0, 20, (3, 6)), torch.randint(0, 4, (3, 6))
    labels[:, 0] = labels[1, 3:] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    shifted = torch.cat([torch.full((3, 1), -100), labels], 1)
    losses, targets, right = example_losses(output.logits, shifted)
    assert float(losses.sum() / targets.sum()) == pytest.approx(float(output.loss), abs=1e-6)
    assert targets.tolist() == [5.0, 2.0, 5.0]
    assert right.tolist() == ((output.logits.argmax(-1) == labels) & (labels >= 0)).sum(1).tolist()
    assert num_targets(shifted) == 12


def test_the_losses_of_several_classes_are_transformers_own_and_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    logits, labels = torch.randn(40, 4), (torch.rand(40, 4) < 0.3).float()
    logits[:3], labels[:2] = -1.0, 0.0  # nothing is found, and of two nothing is to be found
    losses, targets, right = example_losses(logits, labels)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert float(losses.mean()) == pytest.approx(float(expected), abs=1e-6)
    f1 = f1_score(labels.numpy(), (logits > 0).numpy(), average="samples", zero_division=1.0)
    assert float(right.mean()) == pytest.approx(f1, abs=1e-6)
    assert targets.tolist() == [1.0] * 40
    assert num_targets(labels) == 40


def test_the_losses_of_numbers_are_transformers_own():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=1, problem_type="regression")
    model = BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(0, 20, (5, 6)), 30 * torch.randn(5)
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    losses, targets, _ = example_losses(output.logits, labels)
    assert float(losses.mean()) == pytest.approx(float(output.loss), rel=1e-6)
    assert (losses.shape, targets.tolist(), num_targets(labels)) == ((5,), [1.0] * 5, 5)


class Table(nn.Module):
    """Logits by first token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 3))

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.weight[input_ids[:, 0]]})()


def encoded(count):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, count)
    tokens = rng.integers(0, 11, lengths.sum()).astype(np.int32)
    begin = np.concatenate([[0], lengths.cumsum()[:-1]])
    return Encoded(tokens, begin, lengths, np.zeros(count, dtype=np.int64), rng.integers(0, 3, count), 0, 8)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_metrics_do_not_depend_on_the_batches(batch_size):
    data = encoded(13)
    model = Table().train()
    found = evaluate(model, data, batch_size)
    logits = model.weight[torch.as_tensor(data.tokens[data.begin]).long()].detach().double()
    labels = torch.as_tensor(data.classes)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert (found.examples, found.targets) == (13, 13)
    assert model.training


def longest(a: list[str], b: list[str]) -> int:
    """Of the subsequences of `a`, the longest that is one of `b`, by trying all."""

    def within(part: tuple[str, ...]) -> bool:
        rest = iter(b)
        return all(word in rest for word in part)

    return max(size for size in range(len(a) + 1) for part in combinations(a, size) if within(part))


def test_rouge_is_the_f1_of_the_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(60):
        ours, theirs = (draw.choices(["sun", "sea", "snow"], k=draw.randrange(7)) for _ in range(2))
        common = longest(ours, theirs)
        expected = 2 * common / (len(ours) + len(theirs)) if common else 0.0
        assert rouge_l(", ".join(ours), " ".join(theirs).upper()) == pytest.approx(expected)
    assert (exact_match("Yes, it is.", "yes it is"), exact_match("yes", "no")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("\u0915\u0940", "\u0915\u093e", False),  # Hindi, two vowel signs at one letter
        ("caf\u00e9", "cafe\u0301", True),  # one text, composed and not
        ("+", "-", False),
        ("", "!", False),
        (" \U0001f44d", "\U0001f44d\n", True),
        ("-5", "5", False),
        ("is -5.", "Is -5", True),
        ("3-5", "3 5", True),
    ],
)
def test_texts_are_the_same_words_in_every_script(response: str, reference: str, same: bool):
    assert exact_match(response, reference) == same
    if response[:1].isalpha():
        assert rouge_l(response, reference) == same


def test_rouge_is_that_of_rouge_score_on_english():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    random, words = np.random.default_rng(0), ["the", "Film", "was", "it's", "good,", "3.5", "(bad)", "a-b", "-1", "x"]
    for _ in range(200):
        ours, theirs = (" ".join(random.choice(words, size=random.integers(12))) for _ in range(2))
        assert rouge_l(ours, theirs) == pytest.approx(scorer.score(theirs, ours)["rougeL"].fmeasure)


def test_perplexity_is_the_exponential_of_the_loss_and_finite():
    assert perplexity(2.5) == pytest.approx(12.182493960703473)
    assert np.isfinite(perplexity(1e6))


def test_no_examples_are_no_error():
    found = evaluate(Table(), encoded(13).select(np.array([], dtype=int)), 4)
    assert (found.loss, found.accuracy, found.examples) == (0.0, 0.0, 0)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_numbers_are_measured_as_scikit_learn_does(batch_size: int, offset: float):
    from sklearn.metrics import mean_squared_error, r2_score

    model, data = Table(), encoded(40)
    with torch.no_grad():
        first = model.weight[data.tokens[data.begin], 0].numpy()
    near = (first + np.random.default_rng(1).normal(0, 0.5, 40)).astype(np.float32)
    for truth in (near, -near, np.full(40, 2.0, np.float32)):  # good, worse than the mean, and no spread
        examples = replace(data, classes=(truth + np.float32(offset)).astype(np.float32))
        with torch.no_grad():
            model.weight[:, 0] += offset
            found = evaluate(model, examples, batch_size)
            predicted = model.weight[data.tokens[data.begin], 0].numpy()
            model.weight[:, 0] -= offset
        assert found.loss == pytest.approx(mean_squared_error(examples.classes, predicted), rel=1e-4)
        spread = len(set(examples.classes.tolist())) > 1
        expected = max(r2_score(examples.classes, predicted), 0.0) if spread else 0.0
        assert found.accuracy == pytest.approx(expected, abs=1e-4)
        assert (found.examples, found.targets) == (40, 40)
    assert evaluate(model, examples.select(np.array([], np.int64)), batch_size).accuracy == 0
