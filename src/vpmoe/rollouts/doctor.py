"""Checks before the first on-policy step: the three paths must speak of the same tokens."""

from collections.abc import Sequence

import numpy as np
import torch

from vpmoe.batch import Rollout
from vpmoe.errors import RunError
from vpmoe.head import token_logprobs
from vpmoe.models.student import Student
from vpmoe.rollouts.collate import pack_rollouts
from vpmoe.spans import Span


def require_sampler_equals_trainer(
    student: Student, rollouts: Sequence[Rollout], *, seq_len: int, tolerance_nats: float
) -> float:
    """Mean |log-prob of the sampler - log-prob of the trainer| over sampled tokens, in nats.

    The trainer recomputes the sampled tokens in packed rows, without a cache. A difference means a
    broken cache, a mask that leaks, other positions, or other prompts; or, in deep students whose
    routing is not replayed, experts that rounding chose otherwise.

    Raises:
        RunError: If the mean difference exceeds `tolerance_nats`.

    References:
        own; the failure it looks for is a renderer mismatch of 0.29 nats per token that made
        on-policy distillation worse than imitation (tinker-cookbook, thread 796).
    """
    batch = pack_rollouts(rollouts, seq_len=seq_len).to(student.head_weight.device)
    with torch.no_grad():
        output = student(
            batch.tokens,
            positions=batch.positions,
            document_ids=batch.document_ids,
            expert_ids=batch.expert_ids,
        )
    sampled = batch.span_ids != Span.IGNORE
    recomputed = token_logprobs(
        output.hidden[sampled], student.head_weight, student.rows_of(batch.labels[sampled])
    )
    assert batch.rollout_logprobs is not None
    gap = (recomputed - batch.rollout_logprobs[sampled]).abs().mean().item()
    if not gap <= tolerance_nats:
        is_free = batch.expert_ids is None and student.routers()
        raise RunError(
            f"sampler and trainer disagree by {gap:.4f} nats per token on the student's own "
            f"tokens, tolerance {tolerance_nats:g}",
            hint="the key/value cache, the masks or the prompts differ between the two paths"
            + (", or the experts: set rollouts.replay_routing = true" if is_free else ""),
        )
    return gap


def require_same_prompts(student_prompt: np.ndarray, teacher_prompt: np.ndarray) -> None:
    """Refuse a teacher that would be asked something else than the student.

    Args:
        student_prompt: o200k ids of one rendered prompt.
        teacher_prompt: The same row, rendered as the teacher gets it.

    Raises:
        RunError: Naming the first token that differs.

    References:
        own.
    """
    if np.array_equal(student_prompt, teacher_prompt):
        return
    shared = min(len(student_prompt), len(teacher_prompt))
    different = np.flatnonzero(student_prompt[:shared] != teacher_prompt[:shared])
    place = int(different[0]) if different.size else shared
    raise RunError(
        f"student and teacher prompts differ from token {place} on "
        f"({len(student_prompt)} and {len(teacher_prompt)} tokens)",
        hint="render both with the same [render] settings and the same reasoning effort",
    )
