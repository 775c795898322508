import pytest
import torch

from vpmoe.losses import LossInputs, SampledReverseKLConfig, span_means
from vpmoe.losses.sampled_reverse_kl import effective_sample_share, sampled_reverse_kl

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
TEACHER_LOGITS = torch.tensor([1.5, 1.8, -0.5, -2.0, 0.0], dtype=torch.float64)
TEACHER = TEACHER_LOGITS.log_softmax(dim=0)
REVERSE_KL_GRADIENT = [0.143709, -0.216394, 0.019449, 0.021170, 0.032066]


def inputs_of(labels, rollout_logprobs):
    """One row per label, all with the table's logits (the head is the identity)."""
    count = len(labels)
    return LossInputs(
        hidden=LOGITS.repeat(count, 1).requires_grad_(),
        head_weight=torch.eye(5, dtype=torch.float64),
        labels=torch.tensor(labels),
        span_ids=torch.ones(count, dtype=torch.uint8),
        content_mask=torch.ones(count, dtype=torch.bool),
        teacher_logprobs=TEACHER[labels],
        rollout_logprobs=rollout_logprobs,
    )


def one_label(config, rollout_logprob=-1.3):
    inputs = inputs_of([1], torch.tensor([rollout_logprob], dtype=torch.float64))
    output = config.build()(inputs, torch.tensor([0.0, 1.0, 0.0]))
    output.total.backward()
    return output, inputs.hidden.grad[0]


def test_worked_example_on_policy():
    output, gradient = one_label(SampledReverseKLConfig())
    assert output.total.item() == pytest.approx(1.365069, abs=5e-7)
    assert gradient.tolist() == pytest.approx(
        [0.488151, -0.687439, 0.066064, 0.024304, 0.108921], abs=6e-7
    )
    means = span_means(output.sums)
    assert means["reverse_kl"][1].item() == pytest.approx(-0.867020, abs=5e-7)


def test_worked_example_with_importance_ratio():
    output, gradient = one_label(SampledReverseKLConfig(importance="plain"))
    assert output.total.item() == pytest.approx(-0.658934, abs=5e-7)
    assert gradient.tolist() == pytest.approx(
        [0.370994, -0.522453, 0.050209, 0.018471, 0.082780], abs=6e-7
    )
    assert span_means(output.sums)["importance_ratio"][1].item() == pytest.approx(
        0.759999, abs=5e-7
    )


def test_truncated_ratio_is_the_plain_one_below_the_cap_and_the_cap_above():
    below = one_label(SampledReverseKLConfig(importance="truncated"))[1]
    torch.testing.assert_close(below, one_label(SampledReverseKLConfig(importance="plain"))[1])
    capped = SampledReverseKLConfig(importance="truncated", importance_cap=1.5)
    output, above = one_label(capped, rollout_logprob=-9.0)
    torch.testing.assert_close(above, 1.5 * one_label(SampledReverseKLConfig())[1])
    assert output.metrics["importance_truncated"].tolist() == [0, 1, 0]


def test_advantage_clip_bounds_the_gradient():
    """A = .867 clipped to .5 scales the gradient by .5 / .867."""
    output, gradient = one_label(SampledReverseKLConfig(advantage_clip=0.5))
    free = one_label(SampledReverseKLConfig())[1]
    torch.testing.assert_close(gradient, free * 0.5 / (TEACHER[1] - LOGITS.log_softmax(0)[1]))
    assert output.metrics["advantage_clipped"].tolist() == [0, 1, 0]


def exact_reverse_kl_gradient(logits, teacher_logprobs):
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=-1)
    (logprobs.exp() * (logprobs - teacher_logprobs)).sum().backward()
    return logits.grad


def test_expected_gradient_is_the_reverse_kl_gradient():
    """Every token of a seven-way categorical, weighted by its probability under the student."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(dim=0)
    expected = torch.zeros(7, dtype=torch.float64)
    for token, probability in enumerate(logits.softmax(dim=0)):
        leaf = logits.clone().requires_grad_()
        logprob = leaf.log_softmax(dim=0)[token : token + 1]
        sampled_reverse_kl(logprob, teacher[token : token + 1]).sum().backward()
        expected += probability * leaf.grad
    torch.testing.assert_close(
        expected, exact_reverse_kl_gradient(logits, teacher), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("importance", ["plain", "truncated"])
def test_expected_gradient_off_policy_through_the_chunked_head(importance):
    """Tokens drawn from another distribution, corrected by the ratio: the same gradient."""
    behaviour = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)
    inputs = inputs_of([0, 1, 2, 3, 4], behaviour.log())
    config = SampledReverseKLConfig(importance=importance, importance_cap=10.0, chunk_rows=2)
    config.build()(inputs, torch.tensor([0.0, 1.0, 0.0])).total.backward()
    expected = (behaviour[:, None] * inputs.hidden.grad).sum(dim=0)
    torch.testing.assert_close(
        expected, exact_reverse_kl_gradient(LOGITS, TEACHER), rtol=1e-12, atol=1e-14
    )
    assert expected.tolist() == pytest.approx(REVERSE_KL_GRADIENT, abs=6e-7)


def test_logged_estimates_average_to_the_reverse_kl():
    """Both k1 and k3, over all tokens weighted by p, give .177735; k3 never goes below 0."""
    probabilities = LOGITS.softmax(dim=0)
    k1 = k3 = 0.0
    for token in range(5):
        inputs = inputs_of([token], LOGITS.log_softmax(dim=0)[token : token + 1])
        metrics = SampledReverseKLConfig().build()(inputs, torch.ones(3)).metrics
        k1 += probabilities[token] * metrics["reverse_kl"][1]
        k3 += probabilities[token] * metrics["reverse_kl_k3"][1]
        assert metrics["reverse_kl_k3"][1] >= 0
        assert metrics["importance_ratio"][1].item() == pytest.approx(1.0)
    assert k1.item() == pytest.approx(0.177735, abs=5e-7)
    assert k3.item() == pytest.approx(0.177735, abs=5e-7)


def test_a_teacher_with_grad_is_refused():
    with pytest.raises(ValueError, match="carries grad"):
        sampled_reverse_kl(torch.zeros(1), torch.zeros(1, requires_grad=True))


def test_equal_ratios_are_a_full_sample_and_one_large_ratio_is_not():
    def share(*ratios):
        values = torch.tensor(ratios, dtype=torch.float64)
        return effective_sample_share(values, values.square(), len(ratios))

    assert share(1.0, 1.0, 1.0, 1.0) == share(3.0, 3.0) == 1.0
    assert share(1e6, 1.0, 1.0, 1.0) == pytest.approx(0.25, abs=1e-3)
    assert share() == 1.0


def test_the_sample_share_of_a_step_is_kept_with_the_loss():
    loss = SampledReverseKLConfig().build()
    student = LOGITS.log_softmax(dim=0)[[1, 2]]
    output = loss(inputs_of([1, 2], student - torch.tensor([0.0, 3.0]).log1p()), torch.ones(3))
    assert loss.sample_share == 1.0  # nothing moves before the step is over
    loss.after_step(output.sums)
    assert loss.sample_share == pytest.approx((1 + 4) ** 2 / (2 * (1 + 16)))
    again = SampledReverseKLConfig().build()
    again.load_state_dict(loss.state_dict())
    assert again.sample_share == loss.sample_share
