"""AdamW's step on a GPU: one pass over each large parameter, one over all small ones together."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpmoe.kernels.updates import adamw_
from vpmoe.optim.adamw import AdamStep
from vpmoe.optim.gradients import gradient_of
from vpmoe.optim.weights import ActiveSlices, Weight

LARGE = 2**20  # numbers from which a parameter is worth a launch of its own


def _numbers(rule: AdamStep) -> dict[str, Any]:
    return {
        "betas_and_eps": (*rule.config.adam_betas, rule.config.adam_eps),
        "lr_and_decay": (rule.lr, rule.decay),
        "step": rule.step,
        "gradient_scale": rule.gradient_scale,
    }


class LargeWeight:
    """One parameter moved by one kernel.

    Args:
        weight: The parameter, float32 or with a float32 copy.
        exp_avg: Its first moment.
        exp_avg_sq: Its second moment.
    """

    def __init__(self, weight: Weight, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.weight = weight
        self.moments = exp_avg, exp_avg_sq

    def step(self, rule: AdamStep, active_slices: ActiveSlices) -> None:
        """One update; `adamw_update` is the reference."""
        weight = self.weight
        active = active_slices.get(weight.name)
        if active is not None:
            shape = (-1, *[1] * (weight.param.ndim - 1))
            active = active.to(weight.param.device).view(shape).expand_as(weight.param).contiguous()
        adamw_(
            weight.value,
            None if weight.master is None else weight.param.detach(),
            gradient_of(weight.name, weight.param).contiguous(),
            self.moments,
            active,
            **_numbers(rule),
        )


class SmallWeights:
    """Narrow parameters whose float32 copies and moments lie in one piece of memory each.

    Args:
        weights: Parameters with float32 copies, which become views.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self.sizes = [weight.param.numel() for weight in weights]
        masters = [weight.master for weight in weights if weight.master is not None]
        self.value = torch.cat([master.reshape(-1) for master in masters])
        self.moments = torch.zeros_like(self.value), torch.zeros_like(self.value)
        for weight, master in zip(weights, self.views(self.value), strict=True):
            weight.master = master
        self._owners: tuple[tuple[str, ...], Tensor] | None = None

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts, in their shapes."""
        parts = flat.split(self.sizes)
        return [
            part.view(weight.param.shape) for weight, part in zip(self.weights, parts, strict=True)
        ]

    def step(self, rule: AdamStep, active_slices: ActiveSlices) -> None:
        """One update of all; `adamw_update` is the reference."""
        gradients = [gradient_of(w.name, w.param).reshape(-1) for w in self.weights]
        adamw_(
            self.value,
            None,
            torch.cat(gradients),
            self.moments,
            self._active(active_slices),
            **_numbers(rule),
        )
        torch._foreach_copy_([w.param.detach() for w in self.weights], self.views(self.value))

    def _active(self, active_slices: ActiveSlices) -> Tensor | None:
        """Which numbers may move, or None for all."""
        names = tuple(w.name for w in self.weights if w.name in active_slices)
        if not names:
            return None
        if self._owners is None or self._owners[0] != names:
            self._owners = names, self._owners_of(names, active_slices)
        device = self.value.device
        masks = [active_slices[name].to(device, torch.bool) for name in names]
        always = torch.ones(1, dtype=torch.bool, device=device)
        return torch.cat([always, *masks])[self._owners[1]]

    def _owners_of(self, names: Sequence[str], active_slices: ActiveSlices) -> Tensor:
        """For each number the place of its slice among all masks; 0 for those without one."""
        first, parts = 1, []
        for weight, size in zip(self.weights, self.sizes, strict=True):
            if weight.name in names:
                count = active_slices[weight.name].numel()
                places = torch.arange(first, first + count, dtype=torch.int32)
                parts.append(places.repeat_interleave(size // count))
                first += count
            else:
                parts.append(torch.zeros(size, dtype=torch.int32))
        return torch.cat(parts).to(self.value.device)
