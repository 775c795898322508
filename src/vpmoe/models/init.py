"""First weights: a function of the seed and of each parameter's name alone."""

import hashlib
import math

import torch
from torch import Tensor, nn

OUTPUT_WEIGHTS = ("o_proj.weight", "down.weight", "down_weight")  # what writes to the residual
EMBEDDING = "embedding.weight"
ZEROS = ("bias", "sinks")
ONES = ("gamma", "value_lambda")
AS_BUILT = ("log_freq",)
FLOAT32 = ("router.weight", "router.bias", "sinks", "value_lambda", "log_freq")


def name_seed(name: str, *, seed: int) -> int:
    """A generator seed for one parameter, 63 bits.

    Every parameter has its own stream, so an ablation that adds or drops one leaves the first
    values of all others as they were.

    References:
        own.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def init_weights(
    model: nn.Module, *, seed: int, std: float, num_layers: int, embedding_std: float | None = None
) -> None:
    """Fill every parameter: normal matrices, zero biases and sinks, unit gains and lambdas.

    Matrices that write to the residual stream are smaller by sqrt(2 * num_layers). The numbers
    depend on the kind of device, not on the dtype.

    Args:
        model: What is filled.
        seed: With each parameter's name it decides that parameter's values.
        std: Standard deviation of matrices.
        num_layers: Layers that write to the stream twice each.
        embedding_std: Standard deviation of the embedding; `std` where it is None.

    References:
        Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(ZEROS):
            parameter.zero_()
        elif name.endswith(ONES):
            parameter.fill_(1.0)
        elif not name.endswith(AS_BUILT):
            scale = std / math.sqrt(2 * num_layers) if name.endswith(OUTPUT_WEIGHTS) else std
            if name.endswith(EMBEDDING) and embedding_std is not None:
                scale = embedding_std
            parameter.copy_(_normal(parameter, name_seed(name, seed=seed)).mul_(scale))


def _normal(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters a dtype in place, except those that stay float32 or wider.

    References:
        own: router, sinks, lambdas and frequencies lose too much in bfloat16.
    """
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wide if name.endswith(FLOAT32) else dtype)
