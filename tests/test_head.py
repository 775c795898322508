import pytest
import torch

from vpmoe.head import token_logprobs


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 100])
def test_any_chunk_size_gives_the_dense_log_softmax(chunk_rows):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64)
    weight = torch.randn(11, 5, dtype=torch.float64)
    ids = torch.randint(11, (7,))
    dense = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), ids]
    ours = token_logprobs(hidden, weight, ids, chunk_rows=chunk_rows)
    torch.testing.assert_close(ours, dense, rtol=1e-14, atol=1e-14)


def test_low_precision_states_are_normalised_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(4, 8).bfloat16()
    weight = torch.randn(16, 8).bfloat16()
    ids = torch.arange(4)
    ours = token_logprobs(hidden, weight, ids)
    assert ours.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    torch.testing.assert_close(ours, logits.log_softmax(-1)[torch.arange(4), ids])


def test_worked_example_j7():
    hidden = torch.tensor([[0.5, -1, 0.25], [1, 0.3, -0.7]], dtype=torch.float64)
    weight = torch.tensor(
        [[1, 0, 0.5], [-0.5, 1, 0], [0.2, 0.2, 0.2], [0, -1, 1]], dtype=torch.float64
    )
    nll = -token_logprobs(hidden, weight, torch.tensor([2, 0]))
    assert nll.mean().item() == pytest.approx(1.364316, abs=1e-6)
