"""Stage 3: the student writes, the teacher says how likely it finds each token, the student learns.

Here sampling, scoring and training take turns in one process. They meet in `RolloutSource` and
`RolloutBuffer` only, which is where workers of their own can take over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import torch.distributed as dist
from pydantic import Field

from vpmoe.batch import Batch, Rollout
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.loader import PackedLoader
from vpmoe.data.mixture import anchors_before, uses_anchor
from vpmoe.data.prompts import DatasetPrompts, QueryPrompts
from vpmoe.errors import RunError
from vpmoe.losses import CrossEntropyConfig, Loss, SampledReverseKLConfig
from vpmoe.models.student import Student
from vpmoe.rollouts.buffer import RolloutBuffer
from vpmoe.rollouts.collate import pack_rollouts
from vpmoe.rollouts.curriculum import EFFORTS, CurriculumConfig
from vpmoe.rollouts.doctor import require_same_prompts, require_sampler_equals_trainer
from vpmoe.rollouts.gates import GatesConfig, RoundHealth, broken_gates, round_health
from vpmoe.rollouts.source import LocalRollouts, Request, RolloutsConfig, RolloutSource
from vpmoe.stages.base import (
    Prepared,
    StageConfig,
    open_student,
    rank_batches,
    run_stage,
)
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.server import ServerTeacherConfig
from vpmoe.train.device import World
from vpmoe.train.hooks import Observer
from vpmoe.train.plan import Plan

_DOCTOR_ROLLOUTS = 8

# Config


class OnPolicyConfig(StageConfig):
    """Stage 3: on-policy distillation with a cross-entropy anchor."""

    kind: Literal["on_policy"] = "on_policy"
    loss: SampledReverseKLConfig = SampledReverseKLConfig()
    """Of the student's own completions."""
    anchor_loss: CrossEntropyConfig = CrossEntropyConfig()
    """Of the dataset's answers."""
    ce_anchor: float = Field(default=0.15, ge=0, lt=1)
    """Share of steps that are plain cross-entropy on the dataset, placed by the step's number."""
    teacher: Annotated[LocalTeacherConfig | ServerTeacherConfig, Field(discriminator="kind")]
    """Who scores: it must know text that nobody wrote before, so a recorded one will not do."""
    rollouts: RolloutsConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    gates: GatesConfig = GatesConfig()


# Build


class OnPolicy(Plan):
    """Steps on the student's own completions, with cross-entropy steps in between.

    Args:
        config: The stage's settings.
        source: Where scored rollouts come from.
        inputs: Where the student comes from, for manifests.
        ranks: The ranks that train together.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        source: RolloutSource,
        dataset: Dataset,
        inputs: dict[str, Any],
        ranks: World,
    ) -> None:
        self.inputs = {**inputs, "data": dataset.identity}
        self._config = config
        self._source = source
        self._ranks = ranks
        seq_len = config.batch.seq_len
        self._anchor = PackedLoader(dataset, seq_len=seq_len, seed=config.seed)
        self._anchor_loss = config.anchor_loss.build()
        self._loss = config.loss.build()
        if config.rollouts.per_step < ranks.size:
            raise RunError(
                f"rollouts.per_step {config.rollouts.per_step} is smaller than the {ranks.size} "
                "processes",
                hint="raise it, or start fewer processes",
            )
        size, stale = config.rollouts, config.rollouts.max_staleness_steps
        self._buffer = RolloutBuffer(
            capacity=size.per_step * size.steps_per_round, max_staleness_steps=stale
        )
        # A completion is about as long as the dataset's own, so its conversation is too.
        slots = config.batch.global_batch_size * seq_len * self._anchor.fill_rate
        own = size.per_step * float(dataset.lengths.mean())
        share = config.ce_anchor
        self.num_steps = config.budget.num_steps(share * slots + (1 - share) * own)
        self._next_prompt = 0
        self._spent = 0  # tokens of the student's own conversations trained on
        self._first_health: RoundHealth | None = None
        self._row: dict[str, float] = {}

    # Step

    def micro_batches(self, step: int) -> tuple[Sequence[Batch], Loss]:
        """The rank's part of the anchor's batch, or of the next completions, sampled if need be."""
        config = self._config
        self._row = {}
        if uses_anchor(step, config.ce_anchor):
            start = anchors_before(step, config.ce_anchor) * config.batch.global_batch_size
            return rank_batches(self._anchor, start, config.batch, self._ranks), self._anchor_loss
        self._require_samples_worth_it(step)
        self._buffer.drop_stale(step)
        if len(self._buffer) < config.rollouts.per_step:
            self._sample_round(step)
        taken = self._buffer.take(config.rollouts.per_step)
        self._spent += sum(len(r.prompt) + len(r.completion) for r in taken)
        self._row |= _rollout_metrics(taken, step) | {
            "rollout/buffer_depth": len(self._buffer),
            "rollout/dropped": self._buffer.num_dropped,
        }
        ranks = self._ranks
        begin, end = (len(taken) * (ranks.rank + i) // ranks.size for i in (0, 1))
        whole = pack_rollouts(taken[begin:end], seq_len=config.batch.seq_len)
        size = config.batch.micro_batch_size
        num_rows = len(whole.tokens)
        return [
            whole.rows(i, min(i + size, num_rows)) for i in range(0, num_rows, size)
        ], self._loss

    def _sample_round(self, step: int) -> None:
        """Fill the buffer; stop the run if the student has gone astray."""
        config, ranks = self._config, self._ranks
        phase = config.curriculum.phase(self._progress(step))
        count = config.rollouts.per_step * config.rollouts.steps_per_round
        members = range(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)
        rollouts = self._source.round(Request(self._next_prompt, members, phase, step))
        if ranks.size > 1:
            parts: list[list[Rollout]] = [[] for _ in range(ranks.size)]
            dist.all_gather_object(parts, rollouts)
            rollouts = [rollout for part in parts for rollout in part]
        self._next_prompt += -(-count // phase.rollouts_per_prompt)
        health = round_health(rollouts)
        self._first_health = self._first_health or health
        broken = broken_gates(health, self._first_health, config.gates)
        if broken:
            raise RunError(
                f"on-policy training paused at step {step}: {'; '.join(broken)}",
                hint="look at the samples; then resume with other [gates], or start anew with a "
                "lower learning rate or a larger ce_anchor",
            )
        self._buffer.put(rollouts)
        self._row |= {f"time/{part}_s": seconds for part, seconds in self._source.seconds.items()}

    def _require_samples_worth_it(self, step: int) -> None:
        """Stop the run if the latest step's importance ratios left hardly any sample."""
        share, limit = self._loss.sample_share, self._config.gates.min_sample_share
        if not share >= limit:
            raise RunError(
                f"on-policy training paused at step {step}: effective sample size over tokens: "
                f"{share:.3g}, limit {limit:g}",
                hint="lower the learning rate or rollouts.max_staleness_steps in a new run, or "
                "resume with a lower gates.min_sample_share",
            )

    def _progress(self, step: int) -> float:
        """Fraction of the stage that is over, in its own tokens where the budget is in tokens."""
        tokens = self._config.budget.tokens
        own_share = 1 - self._config.ce_anchor
        return self._spent / (tokens * own_share) if tokens else step / self.num_steps

    def metrics(self) -> Mapping[str, float]:
        """What the completions of the last step were like; nothing after an anchor's step.

        Times are this rank's own: while one of sampler, teacher and trainer works, the others wait.
        """
        return self._row

    def state(self) -> dict[str, Any]:
        """Questions asked, tokens spent, completions waiting, the latest step's sample size, the
        first round's health.
        """
        first = self._first_health
        return {
            "next_prompt": self._next_prompt,
            "spent": self._spent,
            "buffer": self._buffer.state(),
            "loss": self._loss.state_dict(),
            "first_health": asdict(first) if first else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self._next_prompt = state["next_prompt"]
        self._spent = state["spent"]
        self._buffer.load_state(state["buffer"])
        self._loss.load_state_dict(state["loss"])
        first = state["first_health"]
        self._first_health = RoundHealth(**first) if first else None


def _rollout_metrics(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """Lengths and counts by effort, staleness, form, and the gap to the teacher when sampled."""
    health = round_health(rollouts)
    row = {f"rollout/{name}_pct": 100 * share for name, share in health.shares.items()}
    row["rollout/format_valid_pct"] = 100 * (1 - health.shares["invalid"])
    row["rollout/teacher_minus_student_nats"] = -health.reverse_kl_nats
    for effort in EFFORTS:
        lengths = [len(r.completion) for r in rollouts if r.reasoning_effort == effort]
        row[f"rollout/count_{effort}"] = len(lengths)
        if lengths:
            row[f"rollout/length_{effort}"] = float(np.mean(lengths))
    row["rollout/staleness_steps"] = float(np.mean([step - r.policy_version for r in rollouts]))
    return row


def examine(
    student: Student, source: RolloutSource, config: OnPolicyConfig, dataset: Dataset
) -> dict[str, float]:
    """Checks before the first step: prompts and log-probs must agree on every path.

    Raises:
        RunError: If the student was trained on other prompts than it is about to get, or if the
            sampler's log-probs are not the trainer's.
    """
    phase = config.curriculum.phase(0.0)
    rollouts = source.round(Request(0, range(_DOCTOR_ROLLOUTS), phase, 0))
    gap = require_sampler_equals_trainer(
        student,
        rollouts,
        seq_len=config.batch.seq_len,
        tolerance_nats=config.rollouts.doctor_tolerance_nats,
    )
    return {"sampler_trainer_gap_nats": gap}


def require_known_prompts(origin: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse prompts that are rendered otherwise than those the student was trained on.

    Raises:
        RunError: If the parent's dataset and this one render a question differently.
    """
    before = ((origin.get("init") or {}).get("inputs") or {}).get("data") or {}
    if "render" not in before:
        return
    then, now = RenderConfig(**before["render"]), render_of(dataset)
    require_same_prompts(*(Renderer(render).prompt("What?") for render in (then, now)))


def render_of(dataset: Dataset) -> RenderConfig:
    """How a dataset renders what stands before a question."""
    return RenderConfig(**dataset.manifest["config"]["render"])


def prepare(config: OnPolicyConfig, ranks: World) -> Prepared:
    """Student, sampler and teacher, examined before the first step."""
    student, inputs = open_student(config, ranks.device)
    dataset = Dataset(config.data, "train")
    require_known_prompts(inputs, dataset)
    render = render_of(dataset)
    asked = config.rollouts.prompts
    pool = QueryPrompts(asked, render) if asked else DatasetPrompts(dataset)
    teacher = config.teacher.build()
    source = LocalRollouts(
        student,
        teacher,
        pool,
        config.rollouts,
        seed=config.seed,
        has_effort=render.system,
    )
    found = examine(student, source, config, dataset)
    inputs = {**inputs, "teacher": teacher.identity.as_dict()}
    plan = OnPolicy(config, source, dataset, inputs, ranks)
    return Prepared(student, plan, {"doctor": found})


# Run


def run(
    config: OnPolicyConfig, *, resume: bool = False, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """What the run came to; checkpoints and metrics are in its folder.

    Args:
        config: What to train, on what, for how long.
        resume: Go on from the newest checkpoint of the run's folder.
        observers: Readers of the metrics stream, e.g. a progress bar.
    """
    return run_stage(config, prepare, resume=resume, observers=observers)
