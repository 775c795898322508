"""The parameters an optimizer moves: float32 masters, active slices, batches of bounded size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from vpmoe.optim.gradients import gradient_of

MAX_BATCH_ELEMENTS = 2**26  # numbers moved by one call: bounds temporaries to 256 MiB in float32

ActiveSlices = Mapping[str, Bool[Tensor, " experts"]]
"""For a stack of experts, by parameter name: which slices saw a token in this step."""


def state_dtype(param: Tensor) -> torch.dtype:
    """Float32, or the parameter's own type where that is wider.

    References:
        own.
    """
    return torch.promote_types(param.dtype, torch.float32)


class Weight:
    """One parameter, and the float32 copy that is really trained where it is narrower.

    Args:
        name: Dotted name in the model.
        param: The parameter; written in place.
    """

    def __init__(self, name: str, param: Tensor) -> None:
        self.name = name
        self.param = param
        wide = state_dtype(param)
        self.master = None if param.dtype == wide else param.detach().to(wide)

    @property
    def value(self) -> Tensor:
        """What the update rule changes in place."""
        return self.param.detach() if self.master is None else self.master

    @property
    def gradient(self) -> Tensor:
        """This step's gradient, float32 or wider."""
        return gradient_of(self.name, self.param).to(state_dtype(self.param))

    def publish(self) -> None:
        """Round the float32 copy into the parameter."""
        if self.master is not None:
            self.param.detach().copy_(self.master)

    def state(self) -> dict[str, Tensor]:
        """The float32 copy, where there is one."""
        return {} if self.master is None else {"master": self.master}


def batches(
    weights: Iterable[Weight], *, max_elements: int = MAX_BATCH_ELEMENTS
) -> Iterator[list[Weight]]:
    """The weights in order, cut into lists of at most `max_elements` numbers (or one weight).

    References:
        own.
    """
    batch: list[Weight] = []
    for weight in weights:
        if batch and sum(w.param.numel() for w in [*batch, weight]) > max_elements:
            yield batch
            batch = []
        batch.append(weight)
    if batch:
        yield batch


def active_of(
    weights: Sequence[Weight], active_slices: ActiveSlices, slices: Sequence[int]
) -> Tensor | None:
    """1 for each slice that may move and 0 for others, (S, 1, 1); None when all may.

    Args:
        weights: The weights of one bucket.
        active_slices: Masks by name; names not in it are active throughout.
        slices: How many matrices each weight holds.

    References:
        own; "Stale experts" in docs/losses.md.
    """
    if not any(weight.name in active_slices for weight in weights):
        return None
    if len(weights) == 1:
        mask = active_slices[weights[0].name]
        like = weights[0].param
        return mask.to(like.device, state_dtype(like))[:, None, None]
    masks = []
    for weight, count in zip(weights, slices, strict=True):
        mask = active_slices.get(weight.name)
        ones = torch.ones(count, dtype=state_dtype(weight.param), device=weight.param.device)
        masks.append(ones if mask is None else mask.to(ones))
    return torch.cat(masks)[:, None, None]
