"""What a stage hands to the loop: its batches, its loss, and what of it must survive a crash."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from vpmoe.batch import Batch
from vpmoe.losses.base import Loss


def tokens_before(inputs: Mapping[str, Any]) -> int:
    """Tokens that a student saw in the runs it comes from: each names its parent under `init`.

    Args:
        inputs: `Plan.inputs`.
    """
    parent = inputs.get("init")
    return parent["tokens_seen"] + tokens_before(parent["inputs"]) if parent else 0


class Plan(ABC):
    """A stage as the loop sees it.

    Attributes:
        num_steps: Optimizer steps from the first to the last.
        inputs: What the run was made from (dataset, parent checkpoint, teacher), for manifests.
    """

    num_steps: int
    inputs: Mapping[str, Any]

    @abstractmethod
    def micro_batches(self, step: int) -> tuple[Sequence[Batch], Loss]:
        """This rank's share of the global batch of `step` (from 0), cut up, and its loss.

        May sample rollouts first. Ranks may return different numbers of rows and micro-batches,
        but must name the same loss.
        """

    def metrics(self) -> Mapping[str, float | int]:
        """Numbers of the last step that only the stage knows, the same on every rank."""
        return {}

    def state(self) -> dict[str, Any]:
        """What `micro_batches` depends on besides its argument; the same on every rank.

        Plain values, bytes and arrays, nested in dicts and lists.
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        del state
