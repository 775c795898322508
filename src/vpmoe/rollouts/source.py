"""Scored rollouts on demand: where samplers and teachers meet the trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, Protocol, Self

from pydantic import Field, model_validator

from vpmoe.batch import ReasoningEffort, Rollout
from vpmoe.config import Config
from vpmoe.data.prompts import PromptPool, shuffled_index
from vpmoe.models.student import Student
from vpmoe.rollouts.curriculum import PhaseConfig, effort_of
from vpmoe.rollouts.sampler import Sampler
from vpmoe.rollouts.scoring import with_teacher
from vpmoe.teachers.base import Teacher

Positive = Annotated[int, Field(gt=0)]


class RolloutsConfig(Config):
    """How the student writes."""

    per_step: Positive
    """Completions in one optimizer step, over all ranks."""
    steps_per_round: Positive = 1
    """Steps fed by one round of sampling; 1 is strictly on-policy."""
    max_new_tokens: Mapping[ReasoningEffort, Positive]
    """Tokens after which a completion is cut, for each effort: { low = 256, medium = 512, ... }."""
    prompts: str = ""
    """Parquet file of questions (synth_id, query); empty takes those of `data`."""
    max_batch: Positive = 256
    """Completions under way at a time; changes nothing but the speed."""
    max_staleness_steps: int = Field(default=0, ge=0)
    """Oldest weights, in steps, whose completions are trained on; at least steps_per_round - 1."""
    replay_routing: bool = True
    """Train each token with the experts that the sampler sent it to; see docs/training.md."""
    doctor_tolerance_nats: float = Field(default=0.02, gt=0)
    """Mean difference allowed between the sampler's log-probs and the trainer's."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        missing = {"low", "medium", "high"} - set(self.max_new_tokens)
        if missing:
            raise ValueError(f"max_new_tokens has no entry for {', '.join(sorted(missing))}")
        if self.max_staleness_steps < self.steps_per_round - 1:
            raise ValueError(
                f"max_staleness_steps {self.max_staleness_steps} would drop rollouts of a round of "
                f"{self.steps_per_round} steps before they are used"
            )
        return self


@dataclass(frozen=True)
class Request:
    """What one round of sampling is asked for.

    Attributes:
        first_prompt: Number of the first question in the stage's stream.
        members: Which completions of the round to make; several processes share a round.
        phase: Efforts, and how many completions a question gets.
        policy_version: Optimizer step of the weights.
    """

    first_prompt: int
    members: range
    phase: PhaseConfig
    policy_version: int


class RolloutSource(Protocol):
    """Where scored rollouts come from.

    Attributes:
        seconds: Time spent in the latest round, by part.
    """

    seconds: Mapping[str, float]

    def round(self, request: Request) -> list[Rollout]:
        """The scored rollouts that were asked for, in order."""
        ...


class LocalRollouts:
    """Samples with the trained student itself and scores with a teacher in this process.

    Args:
        student: The weights of the moment are the policy.
        teacher: Who scores.
        pool: Questions.
        config: How to sample.
        seed: Of the order of questions and of all samples.
        has_effort: Whether prompts have a system message that names an effort.

    Attributes:
        seconds: Time spent in the latest round, by part.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        pool: PromptPool,
        config: RolloutsConfig,
        *,
        seed: int,
        has_effort: bool,
    ) -> None:
        self._sampler = Sampler(
            student, max_batch=config.max_batch, keeps_experts=config.replay_routing
        )
        self._teacher = teacher
        self._pool = pool
        self._config = config
        self._seed = seed
        self._has_effort = has_effort
        self.seconds: Mapping[str, float] = {}

    def round(self, request: Request) -> list[Rollout]:
        """The scored rollouts that were asked for, in order."""
        begin = perf_counter()
        written = self._write(request)
        self._sampler.release()  # the step that follows needs the memory
        middle = perf_counter()
        scored = with_teacher(written, self._teacher)
        self.seconds = {"sampling": middle - begin, "scoring": perf_counter() - middle}
        return scored

    def _write(self, request: Request) -> list[Rollout]:
        members, repeats = request.members, request.phase.rollouts_per_prompt
        numbers = [request.first_prompt + member // repeats for member in members]
        efforts: list[ReasoningEffort] = [effort_of(request.phase, number) for number in numbers]
        prompts = [
            self._pool.prompt(
                shuffled_index(number, len(self._pool), seed=self._seed),
                effort if self._has_effort else None,
            )
            for number, effort in zip(numbers, efforts, strict=True)
        ]
        completions = self._sampler.generate(
            [prompt.tokens for prompt in prompts],
            max_new_tokens=[self._config.max_new_tokens[effort] for effort in efforts],
            seed=_seed_of(self._seed, request.policy_version, members.start),
        )
        return [
            Rollout(
                sample_id=prompt.sample_id,
                prompt=prompt.tokens,
                completion=completion.tokens,
                rollout_logprobs=completion.logprobs,
                policy_version=request.policy_version,
                reasoning_effort=effort,
                stop_reason=completion.stop_reason,
                expert_ids=completion.expert_ids,
            )
            for prompt, effort, completion in zip(prompts, efforts, completions, strict=True)
        ]


def _seed_of(seed: int, policy_version: int, first: int) -> int:
    """Another stream of random numbers for every round and every rank's part of it."""
    return (seed * 1_000_003 + policy_version) * 1_000_003 + first
