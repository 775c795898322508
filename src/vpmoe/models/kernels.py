"""Which implementation computes the hot paths; every one equals the reference."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vpmoe.errors import ConfigError
from vpmoe.models.attention.sink import attend_reference
from vpmoe.models.experts import moe_reference


@dataclass(frozen=True)
class Kernels:
    """One implementation of everything that a faster one may replace.

    Attributes:
        attend: Same arguments and result as `attend_reference`.
        moe: Same arguments and result as `moe_reference`.
    """

    attend: Callable[..., Tensor]
    moe: Callable[..., Tensor]


KERNELS = {"reference": Kernels(attend=attend_reference, moe=moe_reference)}


def kernels_named(name: str) -> Kernels:
    """The implementation of that name.

    Raises:
        ConfigError: If there is none; another one is never taken in its place.

    References:
        own.
    """
    if name not in KERNELS:
        known = ", ".join(KERNELS)
        raise ConfigError([(f"kernels {name!r} are not available", f"known kernels: {known}")])
    return KERNELS[name]
