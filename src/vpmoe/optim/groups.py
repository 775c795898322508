"""Which rule moves which parameter, by its name: an unknown name is an error."""

import re
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from vpmoe.errors import RunError

Role = Literal["matrix", "embed", "head", "router", "vector", "value_lambda"]
ROLES: tuple[Role, ...] = get_args(Role)

# Shape says nothing: the biases of a stack of experts are two-dimensional and a short convolution
# is three-dimensional, and neither is a matrix. Each pattern must match the end of the name.
PATTERNS: dict[Role, str] = {
    "embed": r"embedding\.weight",
    "head": r"head\.weight",
    "router": r"router\.weight",
    "value_lambda": r"value_lambda",
    "vector": r"(\w+_)?bias|gamma|sinks|log_freq|A_log|(\w+_)?conv",
    "matrix": r"[qkvo]_(proj|a|b)\.weight|(gate|up|down)[._]weight",
}
_COMPILED: dict[Role, re.Pattern[str]] = {
    role: re.compile(rf"(?:^|\.)(?:{text})$") for role, text in PATTERNS.items()
}


def role_of(name: str, param: Tensor) -> Role:
    """What a parameter is to the optimizer.

    Args:
        name: Dotted name in the model; prefixes of wrappers do not matter.
        param: The parameter; a matrix must have at least two axes.

    Raises:
        RunError: If no pattern matches the name, or more than one.

    References:
        own; the table `PATTERNS`, and "The optimizer" in docs/losses.md.
    """
    roles: list[Role] = [role for role, pattern in _COMPILED.items() if pattern.search(name)]
    if len(roles) != 1:
        found = f"matches {' and '.join(roles)}" if roles else "has no role"
        raise RunError(
            f"parameter {name} {tuple(param.shape)} {found} in the optimizer",
            hint="give its name to exactly one pattern in vpmoe/optim/groups.py",
        )
    if roles[0] == "matrix" and param.ndim < 2:
        raise RunError(
            f"parameter {name} {tuple(param.shape)} is named like a matrix",
            hint="rename it, or change the patterns in vpmoe/optim/groups.py",
        )
    return roles[0]


def group_by_role(
    named_params: Iterable[tuple[str, Tensor]],
) -> dict[Role, list[tuple[str, Tensor]]]:
    """Every parameter in the list of its one role; roles that nothing has are empty lists.

    References:
        own; see `role_of`.
    """
    groups: dict[Role, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    for name, param in named_params:
        groups[role_of(name, param)].append((name, param))
    return groups
