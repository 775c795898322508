"""NorMuon's step on a GPU: two passes over a parameter, and three products per iteration."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vpmoe.kernels.updates import look_ahead, move_, row_squares
from vpmoe.optim.config import NorMuonConfig
from vpmoe.optim.gradients import gradient_of
from vpmoe.optim.normuon import EPS, MatrixBucket, update_scale
from vpmoe.optim.polar_express import polar_express_folded
from vpmoe.optim.weights import ActiveSlices, Weight, active_of

MAX_COLS = 8192  # of a row that one program sums up
LARGE = 2**22  # numbers from which a parameter is worth launches of its own


def step_bucket(bucket: MatrixBucket, lr: float, active_slices: ActiveSlices) -> None:
    """Move every matrix of a bucket by one update; `MatrixBucket.step` is the reference.

    References:
        As `optim.normuon.normuon_update`.
    """
    decay = bucket.config.decay_of("matrix")
    rows, cols = bucket.momentum.shape[1:]
    for members, part in _parts(bucket):
        gradients = [gradient_of(w.name, w.param).reshape(-1, rows, cols) for w in members]
        gradient = gradients[0].contiguous() if len(members) == 1 else torch.cat(gradients)
        slices = [g.shape[0] for g in gradients]
        active = active_of(members, active_slices, slices)
        direction = look_ahead(
            gradient, bucket.momentum[part], active, decay=bucket.config.momentum
        )
        if bucket.config.polar_dtype == "float32":
            direction = direction.float()
        polar = polar_express_folded(direction, steps=bucket.config.polar_steps)
        factor = row_factors(polar, bucket.second_moment[part], active, config=bucket.config)
        if len(members) == 1:
            weight = members[0]
            param = None if weight.master is None else weight.param.detach().view(-1, rows, cols)
            value = weight.value.view(-1, rows, cols)
            move_(value, param, polar, factor, active, lr=lr, decay=decay)
        else:
            resting = None if active is None else (1 - lr * decay * active).split(slices)
            _move_small(members, (polar * factor).split(slices), resting, lr=lr, decay=decay)


def _parts(bucket: MatrixBucket) -> Iterator[tuple[list[Weight], slice]]:
    """Large parameters one by one, runs of small ones together; and their slices of the state."""
    begin, end, run = 0, 0, []
    for weight, count in zip(bucket.weights, bucket.slices, strict=True):
        if weight.param.numel() >= LARGE:
            if run:
                yield run, slice(begin, end)
            yield [weight], slice(end, end + count)
            begin, run = end + count, []
        else:
            run.append(weight)
        end += count
    if run:
        yield run, slice(begin, end)


def row_factors(
    polar: Float[Tensor, "stack rows cols"],
    second_moment: Float[Tensor, "stack kept_rows kept_cols"],
    active: Float[Tensor, "stack 1 1"] | None,
    *,
    config: NorMuonConfig,
) -> Float[Tensor, "stack kept_rows kept_cols"]:
    """What multiplies each row (or column) of the orthogonalised update; v moves in place.

    Both norms follow from the sums of squares of the rows, so the update is read once.

    References:
        As `optim.normuon.normuon_update`.
    """
    rows, cols = polar.shape[1:]
    axis, length = (2, cols) if second_moment.shape[2] == 1 else (1, rows)
    if axis == 2 and cols & (cols - 1) == 0 and cols <= MAX_COLS:
        sums = row_squares(polar)
    else:
        sums = torch.linalg.vector_norm(polar, dim=axis, keepdim=True, dtype=torch.float32)
        sums = sums.square()
    rate = 1 - config.beta2
    second_moment.lerp_(sums / length, rate if active is None else rate * active)
    inverse = (second_moment + EPS).rsqrt()
    norm = sums.sum(dim=(1, 2), keepdim=True).sqrt()
    new_norm = (sums * inverse.square()).sum(dim=(1, 2), keepdim=True).sqrt()
    scale = norm / new_norm.clamp_min(EPS) * update_scale(rows, cols, scale=config.scale)
    return inverse * (scale if active is None else scale * active)


def _move_small(
    members: list[Weight],
    changes: tuple[Tensor, ...],
    resting: tuple[Tensor, ...] | None,
    *,
    lr: float,
    decay: float,
) -> None:
    values = [
        weight.value.view(change.shape) for weight, change in zip(members, changes, strict=True)
    ]
    if resting is None:
        torch._foreach_mul_(values, 1 - lr * decay)
    else:
        torch._foreach_mul_(values, list(resting))
    torch._foreach_add_(values, list(changes), alpha=-lr)
    publish([w for w in members if w.master is not None])


def publish(members: list[Weight]) -> None:
    """Round float32 copies into their parameters, all at once.

    References:
        own.
    """
    if members:
        masters = [w.master for w in members if w.master is not None]
        torch._foreach_copy_([w.param.detach() for w in members], masters)
