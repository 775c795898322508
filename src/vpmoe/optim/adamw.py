"""AdamW over lists of parameters: embeddings, head, routers, norms, biases and scalars."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpmoe.optim.config import AdamKeys
from vpmoe.optim.weights import ActiveSlices, Weight, state_dtype


@dataclass(frozen=True)
class AdamStep:
    """What one step is taken with.

    Attributes:
        config: Betas and eps.
        lr: Learning rate.
        decay: Weight decay, which it multiplies.
        step: Counted from 1.
        gradient_scale: What multiplies every gradient.
    """

    config: AdamKeys
    lr: float
    decay: float
    step: int
    gradient_scale: float = 1.0


def adamw_update(
    values: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    rule: AdamStep,
) -> None:
    """Move the values in place by one bias-corrected step with decoupled weight decay.

    Args:
        values: Weights, changed in place.
        gradients: Of each weight.
        exp_avg: First moments, changed in place.
        exp_avg_sq: Second moments, changed in place.
        rule: Rates and betas; gradients are scaled already.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019),
        arXiv:1711.05101.
    """
    lr, step = rule.lr, rule.step
    beta1, beta2 = rule.config.adam_betas
    torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(roots, rule.config.adam_eps)
    torch._foreach_mul_(values, 1 - lr * rule.decay)
    torch._foreach_addcdiv_(values, exp_avg, roots, -lr / (1 - beta1**step))


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
        self._parts, self._in_parts = self._gpu_parts()

    def _gpu_parts(self) -> tuple[list[Any], frozenset[str]]:
        """Whatever a GPU moves in few passes; the rest goes through `adamw_update`."""
        if not all(w.param.is_cuda and w.value.dtype == torch.float32 for w in self.weights):
            return [], frozenset()
        # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
        from vpmoe.optim.adamw_gpu import LARGE, LargeWeight, SmallWeights

        is_small = [w.master is not None and w.param.numel() < LARGE for w in self.weights]
        small = [w for w, flag in zip(self.weights, is_small, strict=True) if flag]
        names = [w.name for w in small]
        parts: list[Any] = []
        if small:
            together = SmallWeights(small)
            moments = [iter(together.views(moment)) for moment in together.moments]
            for own, views in zip((self.exp_avg, self.exp_avg_sq), moments, strict=True):
                own[:] = [next(views) if f else o for o, f in zip(own, is_small, strict=True)]
            parts.append(together)
        for member in zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True):
            if member[0].param.numel() >= LARGE:
                parts.append(LargeWeight(*member))
                names.append(member[0].name)
        return parts, frozenset(names)

    @torch.no_grad()
    def step(
        self, lr: float, active_slices: ActiveSlices, *, step: int, gradient_scale: float = 1.0
    ) -> None:
        """Move every parameter by one update; slices without tokens keep value and moments."""
        rule = AdamStep(self.config, lr, self.decay, step, gradient_scale)
        for part in self._parts:
            part.step(rule, active_slices)
        members = zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True)
        rest = [member for member in members if member[0].name not in self._in_parts]
        if not rest:
            return
        weights, exp_avg, exp_avg_sq = (list(column) for column in zip(*rest, strict=True))
        values = [weight.value for weight in weights]
        gradients = [weight.gradient for weight in weights]
        if gradient_scale != 1:
            gradients = [gradient * gradient_scale for gradient in gradients]
        resting = [
            (tensor, tensor.clone(), active_slices[weight.name].to(tensor.device))
            for weight, *tensors in zip(weights, values, exp_avg, exp_avg_sq, strict=True)
            if weight.name in active_slices
            for tensor in tensors
        ]
        adamw_update(values, gradients, exp_avg, exp_avg_sq, rule)
        for tensor, before, mask in resting:
            tensor.copy_(torch.where(mask.view(-1, *[1] * (tensor.ndim - 1)), tensor, before))
        for weight in weights:
            weight.publish()

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's name and state."""
        for weight, first, second in zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True):
            yield weight.name, {"exp_avg": first, "exp_avg_sq": second, **weight.state()}
