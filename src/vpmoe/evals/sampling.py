"""Questions to completions: what every judgement of a student's own text starts from."""

from collections.abc import Sequence

import numpy as np

from vpmoe.batch import ReasoningEffort, Rollout
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import Renderer
from vpmoe.data.problems import Problem
from vpmoe.data.prompts import DatasetPrompts, Prompt
from vpmoe.models.student import Student
from vpmoe.rollouts.sampler import Sampler
from vpmoe.teachers.local import LocalTeacher
from vpmoe.vocabulary import STOP_TOKENS


def problem_prompts(
    problems: Sequence[Problem], renderer: Renderer, *, effort: ReasoningEffort | None = None
) -> list[Prompt]:
    """The prompts of verifiable problems, rendered as in training."""
    return [Prompt(p.sample_id, renderer.prompt(p.query, effort)) for p in problems]


def dataset_prompts(dataset: Dataset, *, limit: int) -> list[Prompt]:
    """The prompts of a split's first conversations, exactly as they are stored."""
    pool = DatasetPrompts(dataset)
    return [pool.prompt(index, None) for index in range(min(limit, len(pool)))]


def sample(
    student: Student,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    max_batch: int = 64,
    effort: ReasoningEffort = "medium",
) -> list[Rollout]:
    """One completion per prompt; the same ones whenever the arguments are the same."""
    completions = Sampler(student, max_batch=max_batch).generate(
        [prompt.tokens for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return [
        Rollout(
            sample_id=prompt.sample_id,
            prompt=np.asarray(prompt.tokens, dtype=np.int64),
            completion=completion.tokens,
            rollout_logprobs=completion.logprobs,
            policy_version=0,
            reasoning_effort=effort,
            stop_reason=completion.stop_reason,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def teacher_answers(
    teacher: LocalTeacher,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    effort: ReasoningEffort = "medium",
) -> list[Rollout]:
    """A teacher's greedy completions, in the form the same judgements read."""
    completions = teacher.complete([p.tokens for p in prompts], max_new_tokens=max_new_tokens)
    return [
        Rollout(
            sample_id=prompt.sample_id,
            prompt=np.asarray(prompt.tokens, dtype=np.int64),
            completion=completion,
            rollout_logprobs=np.zeros(len(completion), dtype=np.float32),
            policy_version=0,
            reasoning_effort=effort,
            stop_reason="stop" if completion[-1] in STOP_TOKENS else "length",
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
