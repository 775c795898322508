"""How hard the student thinks, and how often it answers: a function of the tokens spent."""

from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from vpmoe.batch import ReasoningEffort
from vpmoe.config import Config

EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
GOLDEN_RATIO = 0.618_033_988_749_894_9


class PhaseConfig(Config):
    """One stretch of the curriculum; the shares of the three efforts add up to one."""

    until: float = Field(gt=0, le=1)
    """Fraction of the stage's tokens at which the phase ends."""
    low: float = Field(default=0.0, ge=0, le=1)
    medium: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=0.0, ge=0, le=1)
    rollouts_per_prompt: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _shares_add_up(self) -> Self:
        total = self.low + self.medium + self.high
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"low + medium + high is {total:g}, not 1")
        return self


class CurriculumConfig(Config):
    """Phases in order; the last one ends at 1. The default is the plan's 3a, 3b, 3c."""

    phases: tuple[PhaseConfig, ...] = (
        PhaseConfig(until=0.3, low=0.7, medium=0.3),
        PhaseConfig(until=0.6, low=0.2, medium=0.6, high=0.2),
        PhaseConfig(until=0.7, low=0.2, medium=0.6, high=0.2, rollouts_per_prompt=2),
        PhaseConfig(until=1.0, low=0.1, medium=0.3, high=0.6, rollouts_per_prompt=2),
    )

    @model_validator(mode="after")
    def _phases_cover_the_stage(self) -> Self:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] != 1.0 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"phases end at {ends}: they must rise and the last must end at 1")
        return self

    def phase(self, progress: float) -> PhaseConfig:
        """The phase at `progress`, the fraction of the stage's tokens already spent."""
        return next((p for p in self.phases if progress < p.until), self.phases[-1])


def effort_of(phase: PhaseConfig, prompt_number: int) -> ReasoningEffort:
    """The reasoning effort of the stage's `prompt_number`-th prompt.

    Multiples of the golden ratio modulo one fill the unit interval evenly in every prefix, so the
    shares hold by counting, not by luck, and need no state to resume.

    References:
        own; the low-discrepancy sequence is Weyl's, "Über die Gleichverteilung von Zahlen mod.
        Eins" (1916).
    """
    place = (0.5 + prompt_number * GOLDEN_RATIO) % 1.0
    if place < phase.low:
        return "low"
    return "medium" if place < phase.low + phase.medium else "high"
