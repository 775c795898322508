"""AdamW over lists of parameters: embeddings, head, routers, norms, biases and scalars."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Iterator

import torch
from torch import Tensor

from vpmoe.optim.config import AdamKeys
from vpmoe.optim.gradients import gradient_of
from vpmoe.optim.weights import ActiveSlices, Weight, state_dtype

LARGE = 2**20  # numbers from which a parameter is worth a launch of its own


def adamw_update(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    config: AdamKeys,
    lr_and_decay: tuple[float, float],
    step: int,
) -> None:
    """Move the values in place by one bias-corrected step with decoupled weight decay.

    Args:
        values: Weights, changed in place.
        gradients: Of each weight.
        exp_avg: First moments, changed in place.
        exp_avg_sq: Second moments, changed in place.
        config: Betas and eps.
        lr_and_decay: Learning rate, and the decay that it multiplies.
        step: Counted from 1.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019),
        arXiv:1711.05101.
    """
    lr, decay = lr_and_decay
    beta1, beta2 = config.adam_betas
    torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(roots, config.adam_eps)
    torch._foreach_mul_(values, 1 - lr * decay)
    torch._foreach_addcdiv_(values, exp_avg, roots, -lr / (1 - beta1**step))


def _is_worth_a_kernel(weight: Weight, active_slices: ActiveSlices) -> bool:
    large = weight.param.is_cuda and weight.param.numel() >= LARGE
    return large and weight.name not in active_slices and weight.value.dtype == torch.float32


def _move_on_gpu(
    weight: Weight,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    config: AdamKeys,
    lr_and_decay: tuple[float, float],
    step: int,
) -> None:
    """One pass over a large parameter: `adamw_update` in one kernel."""
    # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
    from vpmoe.kernels.updates import adamw_

    adamw_(
        weight.value,
        None if weight.master is None else weight.param.detach(),
        gradient_of(weight.name, weight.param).contiguous(),
        exp_avg,
        exp_avg_sq,
        betas_and_eps=(*config.adam_betas, config.adam_eps),
        lr_and_decay=lr_and_decay,
        step=step,
    )


class AdamWList:
    """Parameters of one role, with AdamW's two moments of each.

    Args:
        weights: The parameters.
        config: Betas and eps.
        decay: Weight decay of the role.
    """

    def __init__(self, weights: list[Weight], config: AdamKeys, *, decay: float) -> None:
        self.weights = weights
        self.config = config
        self.decay = decay
        zeros = [torch.zeros_like(w.param, dtype=state_dtype(w.param)) for w in weights]
        self.exp_avg = zeros
        self.exp_avg_sq = [z.clone() for z in zeros]

    @torch.no_grad()
    def step(self, lr: float, active_slices: ActiveSlices, *, step: int) -> None:
        """Move every parameter by one update; slices without tokens keep value and moments."""
        members = list(zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True))
        alone = [m for m in members if _is_worth_a_kernel(m[0], active_slices)]
        members = [m for m in members if not _is_worth_a_kernel(m[0], active_slices)]
        for weight, first, second in alone:
            _move_on_gpu(
                weight, first, second, config=self.config, lr_and_decay=(lr, self.decay), step=step
            )
        if not members:
            return
        weights, exp_avg, exp_avg_sq = (list(column) for column in zip(*members, strict=True))
        values = [weight.value for weight in weights]
        resting = [
            (tensor, tensor.clone(), active_slices[weight.name].to(tensor.device))
            for weight, *tensors in zip(weights, values, exp_avg, exp_avg_sq, strict=True)
            if weight.name in active_slices
            for tensor in tensors
        ]
        adamw_update(
            values,
            [weight.gradient for weight in weights],
            exp_avg,
            exp_avg_sq,
            config=self.config,
            lr_and_decay=(lr, self.decay),
            step=step,
        )
        for tensor, before, mask in resting:
            tensor.copy_(torch.where(mask.view(-1, *[1] * (tensor.ndim - 1)), tensor, before))
        for weight in weights:
            weight.publish()

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's name and state."""
        for weight, first, second in zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True):
            yield weight.name, {"exp_avg": first, "exp_avg_sq": second, **weight.state()}
