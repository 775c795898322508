"""What the GPU tests share: errors relative to float64."""

import pytest
import torch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BF16 = 6e-3  # relative error that rounding operands and results to bfloat16 explains


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(named: dict[str, tuple[torch.Tensor, torch.Tensor]], limit: float) -> None:
    errors = {name: relative_error(*pair) for name, pair in named.items()}
    assert all(error < limit for error in errors.values()), errors  # NaN fails too
