"""A second opinion on routed experts: PyTorch's own product of rows in groups."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.errors import ConfigError
from vpmoe.models.experts import ExpertWeights, through_experts
from vpmoe.models.mlp import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNED_BYTES = 16  # of a row of any operand


def moe_grouped(
    hidden: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows chosen"],
    expert_weights: Float[Tensor, "rows chosen"],
    experts: ExpertWeights,
    *,
    activation: Activation,
    residual: Float[Tensor, "rows dim"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """`moe_reference` with one product for all experts: fewer launches, nothing read on the host.

    References:
        `torch.nn.functional.grouped_mm`; see `moe_reference`. Difference: a bias is added after
        the product is rounded, and its gradient is a sum of gathered rows.
    """
    flat = expert_ids.flatten()
    ends = torch.bincount(flat, minlength=experts.up.shape[0]).cumsum(0).int()
    expert_of_row = flat.sort(stable=True).values.long()

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        # In half precision a bias's gradient would be a sum that is rounded after every row.
        return out if bias is None else out + bias.float()[expert_of_row].to(out.dtype)

    out = through_experts(hidden, expert_ids, expert_weights, experts, linear, activation)
    return out if residual is None else residual + out


def require_grouped(config: Any, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Refuse what the product does not take.

    Raises:
        ConfigError: Naming the dtype, or the width that is not aligned.

    References:
        own.
    """
    del device
    problems = []
    if dtype not in DTYPES:
        problems.append((f"kernels 'grouped' with {dtype} weights", "use bfloat16 or float32"))
    if config.moe is not None:
        step = ALIGNED_BYTES // dtype.itemsize
        sizes = (("hidden_size", config.hidden_size), ("expert_hidden", config.moe.expert_hidden))
        problems += [
            (f"kernels 'grouped' with {name} {size}", f"a multiple of {step} fits")
            for name, size in sizes
            if size % step
        ]
    if problems:
        raise ConfigError(
            [(what, f'{hint}, or set kernels = "reference"') for what, hint in problems]
        )
