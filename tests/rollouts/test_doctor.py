import dataclasses

import numpy as np
import pytest
import torch

from vpmoe.batch import Rollout
from vpmoe.config import validate
from vpmoe.errors import RunError
from vpmoe.models.config import StudentConfig
from vpmoe.models.student import build_student
from vpmoe.rollouts.doctor import require_same_prompts, require_sampler_equals_trainer
from vpmoe.rollouts.sampler import Sampler
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    END_OF_TEXT,
    FINAL,
    MESSAGE,
    RETURN,
    START,
    USER,
)

SUBSET = sorted(
    {
        *range(40),
        ANALYSIS,
        ASSISTANT,
        CHANNEL,
        END,
        END_OF_TEXT,
        FINAL,
        MESSAGE,
        RETURN,
        START,
        USER,
    }
)


@pytest.fixture(scope="module")
def student():
    config = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_subset": SUBSET,
        "dense_hidden": 32,
        "local_attention": {"kind": "tpa", "window_size": 6},
        "moe": {
            "num_experts": 8,
            "num_experts_per_token": 2,
            "expert_hidden": 16,
            "shared_expert_hidden": 16,
            "router": {"kind": "deepseek_v3", "num_groups": 4, "num_groups_kept": 2},
        },
        "init_std": 0.3,
    }
    return build_student(validate(StudentConfig, config, source="test"), seed=0)


def rollouts_of(student):
    prompts = [
        np.array([START, USER, MESSAGE, *range(n), END, START, ASSISTANT]) for n in (3, 9, 20)
    ]
    written = Sampler(student, max_batch=8).generate(prompts, max_new_tokens=24, seed=1)
    return [
        Rollout(
            sample_id=str(i),
            prompt=prompt,
            completion=completion.tokens,
            rollout_logprobs=completion.logprobs,
            teacher_logprobs=np.zeros_like(completion.logprobs),
            policy_version=0,
            reasoning_effort="low",
            stop_reason=completion.stop_reason,
        )
        for i, (prompt, completion) in enumerate(zip(prompts, written, strict=True))
    ]


def test_sampler_and_trainer_agree(student):
    gap = require_sampler_equals_trainer(
        student, rollouts_of(student), seq_len=128, tolerance_nats=1e-4
    )
    assert gap < 1e-5


def test_prompts_that_the_trainer_sees_differently_are_caught(student):
    """The injected fault: what is trained on was sampled after another prompt."""
    rollouts = [
        dataclasses.replace(r, prompt=np.insert(r.prompt, 3, 30)) for r in rollouts_of(student)
    ]
    with pytest.raises(RunError, match="sampler and trainer disagree by"):
        require_sampler_equals_trainer(student, rollouts, seq_len=128, tolerance_nats=0.01)


def test_log_probs_that_are_not_numbers_are_caught(student):
    rollouts = [
        dataclasses.replace(r, rollout_logprobs=np.full_like(r.rollout_logprobs, torch.nan))
        for r in rollouts_of(student)
    ]
    with pytest.raises(RunError, match="disagree by nan"):
        require_sampler_equals_trainer(student, rollouts, seq_len=128, tolerance_nats=0.01)


def test_the_first_token_that_differs_between_prompts_is_named():
    require_same_prompts(np.array([1, 2, 3]), np.array([1, 2, 3]))
    with pytest.raises(RunError, match=r"from token 1 on \(3 and 2 tokens\)"):
        require_same_prompts(np.array([1, 2, 3]), np.array([1, 3]))
    with pytest.raises(RunError, match="from token 2 on"):
        require_same_prompts(np.array([1, 2, 3]), np.array([1, 2]))
