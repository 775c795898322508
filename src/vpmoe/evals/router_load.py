"""Which experts held-out text goes to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vpmoe.models.moe import Moe
from vpmoe.models.student import Student


@dataclass(frozen=True)
class RouterLoad:
    """How many tokens each expert got.

    Attributes:
        layers: Numbers of the layers with experts, from 1.
        expert_counts: Tokens per expert, a row for each of these layers.
    """

    layers: list[int]
    expert_counts: list[list[int]]


@contextmanager
def counting_experts(student: Student) -> Iterator[RouterLoad]:
    """Counts of the forward passes inside, padding left out; filled in when the block ends.

    Passes with a key-value cache are not counted: layers keep no statistics of them.
    """
    found: list[tuple[int, Moe]] = []
    for number, layer in enumerate(student.layers, start=1):
        mlp: object = layer.mlp
        if isinstance(mlp, Moe):
            found.append((number, mlp))
    load = RouterLoad(layers=[number for number, _ in found], expert_counts=[])
    sums: dict[int, Tensor] = {}
    hooks = [moe.register_forward_hook(_counter(sums, number)) for number, moe in found]
    try:
        yield load
    finally:
        for hook in hooks:
            hook.remove()
        load.expert_counts.extend(
            [int(n) for n in sums[i].tolist()] for i in load.layers if i in sums
        )


def _counter(sums: dict[int, Tensor], number: int) -> Callable[[nn.Module, Any, Any], None]:
    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        statistics = output[1]
        if statistics is not None:
            now = statistics.tokens_per_expert.double()
            sums[number] = sums[number] + now if number in sums else now

    return count
