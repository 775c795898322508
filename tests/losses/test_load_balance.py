import pytest
import torch

from vpmoe.losses import load_balance_loss


def test_load_balance_worked_example():
    """Two sequences with sum f P = 1.113196 and 1.126453 under coefficient 1e-4."""
    both = torch.tensor(1.113196 + 1.126453, dtype=torch.float64)
    loss = load_balance_loss(both, coefficient=1e-4, num_documents=2)
    assert loss.item() == pytest.approx(1.119824265e-4, abs=1e-10)


def test_load_balance_of_micro_batches_adds_up_to_the_mean_over_documents():
    sums = torch.tensor(
        [3.0, 5.0, 4.0], requires_grad=True
    )  # micro-batches of 2, 1 and 3 documents
    parts = [load_balance_loss(part, coefficient=0.5, num_documents=6) for part in sums]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(0.5 * 12 / 6)
    assert sums.grad.tolist() == pytest.approx([0.5 / 6] * 3)
