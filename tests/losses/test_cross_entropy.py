import pytest
import torch

from vpmoe.losses import CrossEntropyConfig, LossInputs

LOGITS = [2.0, 1.0, 0.0, -1.0, 0.5]


def test_worked_example():
    """One token whose logits are its hidden state: value and gradient of the table."""
    hidden = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        hidden=hidden,
        head_weight=torch.eye(5, dtype=torch.float64),
        labels=torch.tensor([1]),
        span_ids=torch.tensor([2], dtype=torch.uint8),
        content_mask=torch.tensor([True]),
    )
    output = CrossEntropyConfig().build()(inputs, torch.tensor([0.0, 0.0, 1.0]))
    output.total.backward()
    assert output.total.item() == pytest.approx(1.574438, abs=5e-7)
    assert hidden.grad[0].tolist() == pytest.approx(
        [0.563021, -0.792876, 0.076197, 0.028031, 0.125627], abs=6e-7
    )
    assert output.token_counts.tolist() == [0, 0, 1]
    assert output.loss_sums.tolist() == pytest.approx([0, 0, 1.574438], abs=5e-7)


def test_equals_torch_cross_entropy_on_the_trained_rows():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(19, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(19, (40,), generator=generator)
    span_ids = torch.randint(2, (40,), generator=generator, dtype=torch.uint8)
    inputs = LossInputs(hidden, head, labels, span_ids, torch.ones(40, dtype=torch.bool))
    scales = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64) / (span_ids == 1).sum()
    total = CrossEntropyConfig(chunk_rows=6).build()(inputs, scales).total
    masked = torch.where(span_ids == 1, labels, -100)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, masked)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(total, (hidden, head))
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
