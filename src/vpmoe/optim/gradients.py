"""Gradients as the optimizer reads them, and their norms."""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from vpmoe.errors import RunError
from vpmoe.optim.groups import Role, group_by_role


def gradient_of(name: str, param: Tensor) -> Tensor:
    """The parameter's gradient: `main_grad`, where a distributed wrapper sums it, or else `grad`.

    Raises:
        RunError: If there is neither; every parameter of a model takes part in every step.

    References:
        own; `main_grad` is Megatron-Core's float32 gradient buffer.
    """
    gradient = getattr(param, "main_grad", None)
    gradient = param.grad if gradient is None else gradient
    if gradient is None:
        raise RunError(
            f"parameter {name} has no gradient",
            hint="it takes no part in the loss: freeze it, or leave it out of the optimizer",
        )
    return gradient


@torch.no_grad()
def global_grad_norm(named_params: Iterable[tuple[str, Tensor]]) -> Float[Tensor, ""]:
    """Euclidean norm of all gradients together, float32 or wider.

    Args:
        named_params: Every parameter of the model, not only those that this rank owns.

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks" (ICML 2013),
        arXiv:1211.5063: the norm that clipping looks at.
    """
    gradients = [gradient_of(name, param) for name, param in named_params]
    if all(g.is_cuda and g.dtype == torch.float32 for g in gradients):
        norms = torch._foreach_norm(gradients)  # few launches for thousands of parameters
    else:
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
            for g in gradients
        ]
    return torch.linalg.vector_norm(torch.stack(norms))


def grad_norms(named_params: Iterable[tuple[str, Tensor]]) -> dict[Role, Float[Tensor, ""]]:
    """`global_grad_norm` of each role that has parameters: what is logged per group.

    References:
        own; the roles of `vpmoe.optim.groups`.
    """
    groups = group_by_role(named_params)
    return {role: global_grad_norm(members) for role, members in groups.items() if members}
