"""NorMuon: momentum, orthogonalisation, row normalisation; matrices of one shape in one batch."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vpmoe.optim.config import NorMuonConfig
from vpmoe.optim.polar_express import polar_express
from vpmoe.optim.weights import ActiveSlices, Weight, active_of, batches, state_dtype

EPS = 1e-10


def update_scale(rows: int, cols: int, *, scale: str) -> float:
    """Factor c(m, n) on the normalised update of a rows x cols matrix.

    `fork` keeps the update's spectral norm near 1 for wide matrices and grows it for tall ones;
    `rms` gives every entry a root mean square of .2, so that AdamW's learning rates carry over.

    References:
        Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon, for `fork`.
        Liu et al., "Muon is Scalable for LLM Training" (2025), arXiv:2502.16982, for `rms`.
    """
    return math.sqrt(max(1.0, rows / cols)) if scale == "fork" else 0.2 * math.sqrt(max(rows, cols))


def second_moment_shape(rows: int, cols: int, *, axis: str) -> tuple[int, int]:
    """Shape of one matrix's second moment: a column of rows, or a row of columns.

    References:
        own; the two rules of `NorMuonConfig.second_moment_axis`.
    """
    return (1, cols) if axis == "long" and cols > rows else (rows, 1)


def normuon_update(
    gradients: Float[Tensor, "stack rows cols"],
    momentum: Float[Tensor, "stack rows cols"],
    second_moment: Float[Tensor, "stack kept_rows kept_cols"],
    active: Float[Tensor, "stack 1 1"] | None = None,
    *,
    config: NorMuonConfig,
) -> Float[Tensor, "stack rows cols"]:
    r"""What to subtract from each matrix per unit of learning rate.

    :math:`M \leftarrow \mu M + (1-\mu) G`, :math:`U = (1-\mu) G + \mu M`, O = Polar Express of U,
    :math:`v \leftarrow \beta_2 v + (1-\beta_2) \overline{O^2}` per row, O over the root of v, then
    back to O's Frobenius norm, times c(m, n). Every statistic is a matrix's own: nothing is shared
    along the stack. No bias correction: the norm is restored anyway.

    Args:
        gradients: One matrix per slice; overwritten.
        momentum: M, changed in place.
        second_moment: v, changed in place; which axis it keeps follows from its shape.
        active: 0 for slices whose M and v must stay as they are; their update is 0.
        config: The rule's numbers.

    References:
        Li et al., "NorMuon" (2025), arXiv:2510.05491. Difference: Polar Express instead of
        Newton-Schulz, norm restored instead of a fixed root mean square, slices without tokens
        rest.
    """
    rate, rate2 = 1 - config.momentum, 1 - config.beta2
    wide = momentum.to(gradients.dtype)
    wide.lerp_(gradients, rate if active is None else rate * active)
    momentum.copy_(wide)
    looked_ahead = gradients.lerp_(wide, config.momentum)
    precision = _polar_dtype(gradients, config)
    polar = polar_express(looked_ahead.to(precision), steps=config.polar_steps)
    polar = polar.to(gradients.dtype)
    kept_axis = -1 if second_moment.shape[-1] == 1 else -2
    squares = polar.square().mean(dim=kept_axis, keepdim=True)
    second_moment.lerp_(squares, rate2 if active is None else rate2 * active)
    normalised = polar * (second_moment + EPS).rsqrt()
    norm, new_norm = (torch.linalg.matrix_norm(x, keepdim=True) for x in (polar, normalised))
    rows, cols = polar.shape[-2:]
    factor = norm / new_norm.clamp_min(EPS) * update_scale(rows, cols, scale=config.scale)
    return normalised * (factor if active is None else factor * active)


def _polar_dtype(gradients: Tensor, config: NorMuonConfig) -> torch.dtype:
    if config.polar_dtype == "auto":
        return torch.bfloat16 if gradients.is_cuda else gradients.dtype
    return getattr(torch, config.polar_dtype)


class MatrixBucket:
    """Matrices of one shape, with their state stacked so that one batch of kernels moves them.

    Args:
        weights: Parameters whose last two axes agree; leading axes are stacks of matrices.
        config: The rule's numbers.
    """

    def __init__(self, weights: list[Weight], config: NorMuonConfig) -> None:
        self.weights = weights
        self.config = config
        first = weights[0].param
        rows, cols = first.shape[-2:]
        self.slices = [weight.param.numel() // (rows * cols) for weight in weights]
        stack = sum(self.slices)
        kept = second_moment_shape(rows, cols, axis=config.second_moment_axis)
        wide = state_dtype(first)
        stored = wide if config.momentum_dtype == "float32" else torch.bfloat16
        self.momentum = torch.zeros(stack, rows, cols, dtype=stored, device=first.device)
        self.second_moment = torch.zeros(stack, *kept, dtype=wide, device=first.device)
        self._parts = self._gpu_parts()

    def _gpu_parts(self) -> list[Any]:
        """What a GPU moves at a time; empty where `normuon_update` does it."""
        if not (self.momentum.is_cuda and self.second_moment.dtype == torch.float32):
            return []
        # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
        from vpmoe.optim.normuon_gpu import parts_of

        return parts_of(self)

    @torch.no_grad()
    def step(self, lr: float, active_slices: ActiveSlices, *, gradient_scale: float = 1.0) -> None:
        """Move every matrix by one update, given what multiplies its gradient."""
        for part in self._parts:
            part.step(lr, active_slices, gradient_scale=gradient_scale)
        if self._parts:
            return
        rows, cols = self.momentum.shape[1:]
        gradients = torch.cat([weight.gradient.reshape(-1, rows, cols) for weight in self.weights])
        if gradient_scale != 1:
            gradients *= gradient_scale
        active = active_of(self.weights, active_slices, self.slices)
        update = normuon_update(
            gradients, self.momentum, self.second_moment, active, config=self.config
        )
        decay = lr * self.config.decay_of("matrix")
        resting = None if active is None else (1 - decay * active).split(self.slices)
        for index, (weight, change) in enumerate(
            zip(self.weights, update.split(self.slices), strict=True)
        ):
            value = weight.value.view(-1, rows, cols)
            value.mul_(1 - decay if resting is None else resting[index])
            value.add_(change, alpha=-lr)
            weight.publish()

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's name and state, as views of the stacks."""
        momenta = self.momentum.split(self.slices)
        moments = self.second_moment.split(self.slices)
        for weight, momentum, moment in zip(self.weights, momenta, moments, strict=True):
            leading = weight.param.shape[:-2]
            yield (
                weight.name,
                {
                    "momentum": momentum.view(weight.param.shape),
                    "second_moment": moment.view(*leading, *moment.shape[1:]),
                    **weight.state(),
                },
            )


def matrix_buckets(weights: Iterable[Weight], config: NorMuonConfig) -> list[MatrixBucket]:
    """The matrices in as few batches as their shapes and the bound on temporaries allow.

    References:
        own.
    """
    by_shape: dict[tuple[object, ...], list[Weight]] = {}
    for weight in weights:
        param = weight.param
        by_shape.setdefault((param.shape[-2:], param.dtype, param.device), []).append(weight)
    return [MatrixBucket(b, config) for same in by_shape.values() for b in batches(same)]
