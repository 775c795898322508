"""NorMuon's step on a GPU: two passes over a parameter around the orthogonalization."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from vpmoe.kernels.polar import polar_, polar_fits
from vpmoe.kernels.updates import look_ahead, move_, row_factors_, row_squares
from vpmoe.optim.config import NorMuonConfig
from vpmoe.optim.gradients import gradient_of
from vpmoe.optim.normuon import EPS, MatrixBucket, update_scale
from vpmoe.optim.polar_express import COEFFICIENTS, SAFETY, polar_express_folded
from vpmoe.optim.polar_express import EPS as POLAR_EPS
from vpmoe.optim.weights import ActiveSlices, Weight, active_of

MAX_COLS = 8192  # of a row that one program sums up
LARGE = 2**22  # numbers from which a parameter is worth launches of its own


class BucketPart:
    """Matrices that are moved together: one large parameter, or small ones stacked.

    Args:
        bucket: Whose matrices they are.
        members: The parameters; float32 copies of several become views of one stack.
        state: Their slices of the bucket's state.
    """

    def __init__(self, bucket: MatrixBucket, members: list[Weight], state: slice) -> None:
        self.members = members
        self.config = bucket.config
        self.shape = bucket.momentum.shape[1:]
        self.momentum = bucket.momentum[state]
        self.second_moment = bucket.second_moment[state]
        self.slices = [weight.param.numel() // self.shape.numel() for weight in members]
        self.stack = None if len(members) == 1 else self._stacked()

    def _stacked(self) -> Tensor | None:
        masters = [weight.master for weight in self.members]
        if any(master is None for master in masters):
            return None
        stack = torch.cat([m.view(-1, *self.shape) for m in masters if m is not None])
        for weight, view in zip(self.members, stack.split(self.slices), strict=True):
            weight.master = view.view(weight.param.shape)
        return stack

    def step(self, lr: float, active_slices: ActiveSlices, *, gradient_scale: float) -> None:
        """Move every matrix by one update; `MatrixBucket.step` is the reference.

        References:
            As `optim.normuon.normuon_update`.
        """
        config, members = self.config, self.members
        gradients = [gradient_of(w.name, w.param).view(-1, *self.shape) for w in members]
        gradient = gradients[0].contiguous() if len(members) == 1 else torch.cat(gradients)
        active = active_of(members, active_slices, self.slices)
        is_wide = config.polar_dtype == "float32"
        direction = look_ahead(
            gradient,
            self.momentum,
            active,
            decay=config.momentum,
            scale=gradient_scale,
            dtype=torch.float32 if is_wide else torch.bfloat16,
        )
        polar, squares = orthogonalized(direction, config=config)
        factor = row_factors(polar, squares, self.second_moment, active, config=config)
        rates = {"lr": lr, "decay": config.decay_of("matrix")}
        if len(members) == 1:
            weight = members[0]
            copy = None if weight.master is None else weight.param.detach().view(polar.shape)
            move_(weight.value.view(polar.shape), copy, polar, factor, active, **rates)
            return
        values = [weight.value.view(-1, *self.shape) for weight in members]
        stack = torch.cat(values) if self.stack is None else self.stack
        move_(stack, None, polar, factor, active, **rates)
        views = [v.view_as(w.param) for v, w in zip(stack.split(self.slices), members, strict=True)]
        torch._foreach_copy_([weight.param.detach() for weight in members], views)


def parts_of(bucket: MatrixBucket) -> list[BucketPart]:
    """Large parameters one by one, runs of small ones together.

    References:
        own.
    """
    parts, begin, end, run = [], 0, 0, []
    for weight, count in zip(bucket.weights, bucket.slices, strict=True):
        if weight.param.numel() >= LARGE:
            if run:
                parts.append(BucketPart(bucket, run, slice(begin, end)))
            parts.append(BucketPart(bucket, [weight], slice(end, end + count)))
            begin, run = end + count, []
        else:
            run.append(weight)
        end += count
    if run:
        parts.append(BucketPart(bucket, run, slice(begin, end)))
    return parts


def orthogonalized(
    direction: Float[Tensor, "stack rows cols"], *, config: NorMuonConfig
) -> tuple[Float[Tensor, "stack rows cols"], Float[Tensor, "stack rows 1"] | None]:
    """Polar Express of the matrices, and sums of squares of its rows where they come for free.

    References:
        As `optim.polar_express.polar_express`.
    """
    if config.polar_dtype == "float32":
        return polar_express_folded(direction, steps=config.polar_steps), None
    if polar_fits(*direction.shape[1:], steps=config.polar_steps):
        table = _coefficients(config.polar_steps, direction.device)
        return direction, polar_(direction, table, safety=SAFETY, eps=POLAR_EPS)
    return polar_express_folded(direction, steps=config.polar_steps), None


@cache
def _coefficients(steps: int, device: torch.device) -> Tensor:
    return torch.tensor(COEFFICIENTS[steps], device=device)


def row_factors(
    polar: Float[Tensor, "stack rows cols"],
    squares: Float[Tensor, "stack rows 1"] | None,
    second_moment: Float[Tensor, "stack kept_rows kept_cols"],
    active: Float[Tensor, "stack 1 1"] | None,
    *,
    config: NorMuonConfig,
) -> Float[Tensor, "stack kept_rows kept_cols"]:
    """What multiplies each row (or column) of the orthogonalised update; v moves in place.

    Both norms follow from the sums of squares of the rows, so the update is read once at most.

    References:
        As `optim.normuon.normuon_update`.
    """
    rows, cols = polar.shape[1:]
    scale, rate = update_scale(rows, cols, scale=config.scale), 1 - config.beta2
    if second_moment.shape[2] == 1:
        if squares is None:
            squares = _row_squares(polar)
        return row_factors_(
            squares, second_moment, active, cols=cols, rate=rate, scale=scale, eps=EPS
        )
    sums = _squared_norms(polar, dim=1)
    second_moment.lerp_(sums / rows, rate if active is None else rate * active)
    inverse = (second_moment + EPS).rsqrt()
    norm = sums.sum(dim=(1, 2), keepdim=True).sqrt()
    new_norm = (sums * inverse.square()).sum(dim=(1, 2), keepdim=True).sqrt()
    factor = norm / new_norm.clamp_min(EPS) * scale
    return inverse * (factor if active is None else factor * active)


def _row_squares(polar: Tensor) -> Tensor:
    cols = polar.shape[2]
    fits = cols & (cols - 1) == 0 and cols <= MAX_COLS
    return row_squares(polar) if fits else _squared_norms(polar, dim=2)


def _squared_norms(polar: Tensor, *, dim: int) -> Tensor:
    return torch.linalg.vector_norm(polar, dim=dim, keepdim=True, dtype=torch.float32).square()
