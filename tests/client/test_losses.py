"""A sample's loss, and so its clipped gradient, must not depend on the other samples."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bora_fl.client.losses import divergence, not_true_divergence, prior_shift, sample_losses
from bora_fl.client.per_sample import SampleGradients


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    return model


def batches():
    torch.manual_seed(1)
    tokens = torch.randint(17, (4, 6))
    labels = tokens.clone()
    masked = labels.clone()
    masked[1:, :5] = -100
    return tokens, labels, masked


def norm_of_sample_0(llama, tokens, loss):
    with SampleGradients(llama) as collector:
        loss(llama(input_ids=tokens)).sum().backward()
        return next(iter(collector.take(4).values()))[0].norm()


def test_masking_other_sequences_leaves_a_sequence_alone(llama):
    tokens, labels, masked = batches()
    norms = [norm_of_sample_0(llama, tokens, lambda out, y=y: sample_losses(out.logits, y)) for y in (labels, masked)]
    assert torch.equal(*norms)


def test_the_loss_of_the_model_itself_would_couple_them(llama):
    """Why it is not used: the same change moves sample 0's gradient."""
    tokens, labels, masked = batches()
    norms = [
        norm_of_sample_0(llama, tokens, lambda out, y=y: llama.loss_function(out.logits, y, vocab_size=17))
        for y in (labels, masked)
    ]
    assert norms[1] > 1.5 * norms[0]


def test_divergence_is_from_the_received_predictions():
    torch.manual_seed(0)
    logits, received = torch.randn(2, 5, 4, dtype=torch.float64)
    p, q = received.softmax(-1), logits.softmax(-1)
    assert torch.allclose(divergence(logits, received).double(), (p * (p / q).log()).sum(-1), atol=1e-5)
    assert float(divergence(received + 3, received).abs().max()) < 1e-6


def test_held_predictions_of_a_client_of_one_class_end_between_the_two():
    """Where the gradient of `CE + β KL` is zero: (1 + β p) / (1 + β) of the class, β p / (1 + β) of the others."""
    received, label = torch.tensor([[0.3, -1.0, 0.5]]), torch.tensor([1])
    logits = torch.zeros(1, 3, requires_grad=True)
    for _ in range(3000):
        loss = torch.nn.functional.cross_entropy(logits, label) + 2.0 * divergence(logits, received).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.3 * gradient).detach().requires_grad_(True)
    own = torch.nn.functional.one_hot(label, 3)
    assert torch.allclose(logits.softmax(-1), (own + 2 * received.softmax(-1)) / 3, atol=1e-4)


def test_not_true_divergence_is_that_of_the_other_classes():
    """Against probabilities of the softmax over all classes, with the label's taken out and the rest scaled to 1."""
    torch.manual_seed(0)
    logits, received = torch.randn(2, 5, 4)
    labels = torch.tensor([0, 3, 2, 1, 3])
    logits.requires_grad_(True)
    found = not_true_divergence(logits, received, labels)
    for n, label in enumerate(labels.tolist()):
        others = [c for c in range(4) if c != label]
        p, q = (z[n].double().softmax(0)[others] for z in (received, logits.detach()))
        p, q = p / p.sum(), q / q.sum()
        assert found[n].item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.equal(gradient.gather(1, labels[:, None]), torch.zeros(5, 1))
    assert float(not_true_divergence(received + 3, received, labels).abs().max()) < 1e-6


def test_value_is_the_mean_over_a_sequence_s_own_targets():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 3:] = -100
    found = sample_losses(logits, labels)
    expected = [
        functional.cross_entropy(logits[0, :2], labels[0, 1:3]),
        functional.cross_entropy(logits[1, :4], labels[1, 1:]),
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_sequence_without_targets_has_loss_0():
    assert sample_losses(torch.randn(1, 3, 5), torch.full((1, 3), -100)).item() == 0.0


def test_classes():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        sample_losses(logits, labels), functional.cross_entropy(logits, labels, reduction="none")
    )


SHARES = (0.5, 0.3, 0.2)


def test_under_label_skew_the_central_optimum_stays_where_it_is():
    """With Gaussian features of known classes, the Bayes logits of all clients are stationary for a skewed one."""
    torch.manual_seed(0)
    own = torch.tensor([0.02, 0.9, 0.08])
    labels = torch.multinomial(own, 200_000, replacement=True)
    x = torch.randn(len(labels), 2) + 1.5 * torch.eye(3)[labels][:, :2]
    means = 1.5 * torch.eye(3)[:, :2]
    logits = x @ means.T - means.square().sum(1) / 2 + torch.tensor(SHARES).log()
    bias = torch.zeros(3, requires_grad=True)
    classes = np.repeat(np.arange(3), (own * 1e6).round().long())

    def gradient(strength: float) -> float:
        shift = prior_shift(classes, 3, SHARES, strength, 1e-9)
        loss = functional.cross_entropy(logits + bias + shift, labels)
        return float(torch.autograd.grad(loss, bias)[0].abs().max())

    assert gradient(1.0) < 5e-3
    assert gradient(0.0) > 0.1


def test_the_floor_leaves_missing_classes_a_gradient_and_unknown_shares_are_equal():
    alone = np.full(10, 1)
    shift = prior_shift(alone, 3, SHARES, 1.0, 0.1)
    assert torch.allclose(shift, torch.tensor([0.1, (0.9 + 0.1 * 0.3) / 0.3, 0.1]).log())
    assert torch.allclose(prior_shift(alone, 3, (), 2.0, 0.3), 2 * torch.tensor([0.3, 2.4, 0.3]).log())
    assert prior_shift(np.array([0, 0, 1, 1, 2]), 3, (0.4, 0.4, 0.2), 1.0, 0.1).abs().max() < 1e-6
    assert prior_shift(alone, 3, (1.0, 0.0, 0.0), 1.0, 0.1)[1] == 0  # a class that only this client's data has


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.5, float("nan")), (1.5, -0.5, 0.0)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="class shares"):
        prior_shift(np.zeros(3, dtype=np.int64), 3, shares, 1.0, 0.1)
