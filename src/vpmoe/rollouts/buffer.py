"""A bounded first-in first-out store of scored rollouts that refuses stale ones."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from vpmoe.batch import Rollout
from vpmoe.errors import RunError


class RolloutBuffer:
    """Rollouts between the samplers that make them and the trainer that spends them.

    Args:
        capacity: Most rollouts held at once.
        max_staleness_steps: Oldest policy, in optimizer steps, whose rollouts may be trained on.
    """

    def __init__(self, *, capacity: int, max_staleness_steps: int) -> None:
        self.capacity = capacity
        self.max_staleness_steps = max_staleness_steps
        self.num_dropped = 0
        self._held: deque[Rollout] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def put(self, rollouts: Sequence[Rollout]) -> None:
        """Add scored rollouts in order.

        Raises:
            RunError: If one is unscored or the buffer would overflow.
        """
        if any(rollout.teacher_logprobs is None for rollout in rollouts):
            raise RunError("an unscored rollout reached the buffer", hint="score it first")
        if len(self._held) + len(rollouts) > self.capacity:
            raise RunError(
                f"the rollout buffer holds {len(self._held)} of {self.capacity} "
                f"and was given {len(rollouts)} more",
                hint="raise buffer.capacity, or sample fewer rollouts per round",
            )
        self._held.extend(rollouts)

    def drop_stale(self, step: int) -> int:
        """Forget rollouts too old to be trained on at `step`; how many that were."""
        before = len(self._held)
        fresh = [r for r in self._held if step - r.policy_version <= self.max_staleness_steps]
        self._held = deque(fresh)
        dropped = before - len(self._held)
        self.num_dropped += dropped
        return dropped

    def take(self, count: int) -> list[Rollout]:
        """The oldest `count` rollouts, removed.

        Raises:
            RunError: If fewer are held.
        """
        if count > len(self._held):
            raise RunError(f"asked for {count} rollouts and the buffer holds {len(self._held)}")
        return [self._held.popleft() for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to hold the same rollouts, as plain values and arrays."""
        return {
            "num_dropped": self.num_dropped,
            "rollouts": [dict(vars(rollout)) for rollout in self._held],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state()` gave."""
        self.num_dropped = state["num_dropped"]
        self._held = deque(Rollout(**fields) for fields in state["rollouts"])
