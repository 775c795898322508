"""Which implementation computes the hot paths; every one equals the reference."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vpmoe.errors import ConfigError
from vpmoe.models.attention.base import QueriesKeysValues, heads_reference
from vpmoe.models.attention.sink import AttentionScope, attend_reference
from vpmoe.models.decode import Decoder, ReferenceDecoder
from vpmoe.models.experts import moe_reference
from vpmoe.models.experts_grouped import moe_grouped, require_grouped
from vpmoe.models.norm import add_norm_reference
from vpmoe.models.router import route_reference

KernelsName = Literal["reference", "grouped", "fused"]


@dataclass(frozen=True)
class Kernels:
    """One implementation of everything that a faster one may replace.

    Attributes:
        add_norm: Same arguments and result as `add_norm_reference`.
        heads: Same arguments and result as `heads_reference`.
        attend: Same arguments and result as `attend_reference`, but for the scope.
        moe: Same arguments and result as `moe_reference`.
        route: Same arguments and result as `route_reference`.
        embed: Rows of an embedding, as `torch.nn.functional.embedding`.
        scope: What `attend` wants to know of an `AttentionScope`, made once per batch.
        region: Wraps what lies between the others, a layer's dense part.
        decoder: What a sampler stands on: takes a student, and `slots`, `capacity` and
            `keeps_experts` by name.
        draw: Tokens from logits, in place of `rollouts.draw.choose`; None for that one.
        require: Refuses students, devices and dtypes that it does not compute.
    """

    add_norm: Callable[..., tuple[Tensor, ...]]
    heads: Callable[..., QueriesKeysValues]
    attend: Callable[..., Tensor]
    moe: Callable[..., Tensor]
    route: Callable[..., Any]
    embed: Callable[[Tensor, Tensor], Tensor]
    scope: Callable[[AttentionScope], Any]
    region: Callable[[Callable[..., Any]], Callable[..., Any]]
    decoder: Callable[..., Decoder]
    draw: Callable[..., tuple[Tensor, Tensor, Tensor]] | None
    require: Callable[..., None]


def _same(value: Any) -> Any:
    return value


def _anything(config: Any, *, device: torch.device | str, dtype: torch.dtype) -> None:
    del config, device, dtype


REFERENCE = Kernels(
    add_norm=add_norm_reference,
    heads=heads_reference,
    attend=attend_reference,
    moe=moe_reference,
    route=route_reference,
    embed=F.embedding,
    scope=_same,
    region=_same,
    decoder=ReferenceDecoder,
    draw=None,
    require=_anything,
)

# The experts by one product of PyTorch's own: an opinion besides the reference and the kernels.
GROUPED = replace(REFERENCE, moe=moe_grouped, require=require_grouped)


def kernels_named(name: str) -> Kernels:
    """The implementation of that name.

    Raises:
        ConfigError: If there is none, or not here; another one is never taken in its place.

    References:
        own.
    """
    plain = {"reference": REFERENCE, "grouped": GROUPED}
    if name in plain:
        return plain[name]
    if name != "fused":
        raise ConfigError(
            [(f"kernels {name!r} are not available", "known kernels: reference, grouped, fused")]
        )
    if not torch.cuda.is_available():
        build = torch.__version__ if torch.version.cuda else f"{torch.__version__} without CUDA"
        raise ConfigError(
            [
                (
                    f"kernels 'fused' need an NVIDIA GPU, found none (torch {build})",
                    'set kernels = "reference", or run on a machine with a GPU',
                )
            ]
        )
    # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
    from vpmoe.models.fused import FUSED

    return FUSED
