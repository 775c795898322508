"""Learning-rate schedules: optimizer step to the factor on every learning rate."""

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from vpmoe.config import Config


class _Schedule(Config):
    warmup: float = Field(default=0.01, ge=0)
    """Length of the linear warm-up: a share of all steps below 1, a number of steps from 1 on."""

    def factor(self, step: int, *, num_steps: int) -> float:
        """Factor of one step, counted from 0; the first step of a warm-up already moves."""
        warmup_steps = steps_of(self.warmup, num_steps=num_steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self._after_warmup(step, warmup_steps=warmup_steps, num_steps=num_steps)

    @abstractmethod
    def _after_warmup(self, step: int, *, warmup_steps: int, num_steps: int) -> float: ...


class ConstantConfig(_Schedule):
    """Warm-up, then 1."""

    kind: Literal["constant"] = "constant"

    def _after_warmup(self, step: int, *, warmup_steps: int, num_steps: int) -> float:
        return 1.0


class CosineConfig(_Schedule):
    """Warm-up, then half a cosine from 1 to `final`."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.1, ge=0, le=1)
    """Factor that the end of training approaches."""

    def _after_warmup(self, step: int, *, warmup_steps: int, num_steps: int) -> float:
        progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.final + (1 - self.final) * cosine


class WsdConfig(_Schedule):
    """Warm-up, a stable stretch at 1, then a straight decay to `final`."""

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(default=0.2, ge=0)
    """Length of the decay: a share of all steps below 1, a number of steps from 1 on."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Factor that the end of training approaches."""

    def _after_warmup(self, step: int, *, warmup_steps: int, num_steps: int) -> float:
        decay_steps = steps_of(self.decay, num_steps=num_steps)
        remaining = num_steps - step
        if remaining >= decay_steps:
            return 1.0
        return self.final + (1 - self.final) * max(remaining, 0) / decay_steps


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | WsdConfig, Field(discriminator="kind")]


def steps_of(length: float, *, num_steps: int) -> int:
    """A length as a number of steps: below 1 it is a share of all steps, rounded up.

    References:
        own; what the configs of this file promise.

    Example:
        >>> steps_of(0.1, num_steps=25), steps_of(40.0, num_steps=25), steps_of(0.0, num_steps=25)
        (3, 40, 0)
    """
    return math.ceil(length * num_steps) if length < 1 else round(length)
