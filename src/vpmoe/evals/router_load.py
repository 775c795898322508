"""Which experts held-out text goes to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
    numbers = [n for n in range(1, student.config.num_layers + 1) if student.config.is_moe(n)]
    load = RouterLoad(layers=numbers, expert_counts=[])
    sums: dict[int, Tensor] = {}
    hooks = [
        student.layers[number - 1].register_forward_hook(_counter(sums, number))
        for number in numbers
    ]
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
        statistics = output[-1]  # of a layer's result
        if statistics is not None:
            now = statistics.tokens_per_expert.double()
            sums[number] = sums[number] + now if number in sums else now

    return count
