"""From the sampler's experts to the trainer's: recorded, carried, replayed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models.test_replay import own_choices
from tests.models.test_student import TREE, student_of
from vpmoe.batch import Rollout
from vpmoe.config import validate
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.rollouts.buffer import RolloutBuffer
from vpmoe.rollouts.collate import pack_rollouts
from vpmoe.rollouts.doctor import require_sampler_equals_trainer
from vpmoe.rollouts.sampler import Sampler
from vpmoe.rollouts.source import RolloutsConfig
from vpmoe.train.step import run_student
from vpmoe.vocabulary import END_OF_TEXT

LENGTHS = (3, 11, 1, 7, 5, 9)
LIMITS = [1, 9, 3, 8, 2, 6]


def prompts_of(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, size=n) for n in lengths]


def rollouts_of(student, prompts, limits, *, max_batch=4, **options):
    sampler = Sampler(student, max_batch=max_batch, keeps_experts=True)
    done = sampler.generate(prompts, max_new_tokens=limits, seed=1, **options)
    return [
        Rollout(
            sample_id=str(number),
            prompt=prompt,
            completion=completion.tokens,
            rollout_logprobs=completion.logprobs,
            policy_version=0,
            reasoning_effort="low",
            stop_reason=completion.stop_reason,
            teacher_logprobs=np.zeros_like(completion.logprobs),
            expert_ids=completion.expert_ids,
        )
        for number, (prompt, completion) in enumerate(zip(prompts, done, strict=True))
    ]


def with_end_of_text(**changes):
    """A student that knows the id that pads."""
    tree = {name: value for name, value in TREE.items() if name != "vocab_size"}
    tree |= {"vocab_subset": [*range(96), END_OF_TEXT], **changes}
    return validate(StudentConfig, tree, source="test")


@pytest.mark.parametrize(
    ("max_batch", "override"),
    [(1, "name='all'"), (6, "dense_layers=0"), (2, "moe.num_experts=512")],
)
def test_kept_experts_are_those_of_the_uncached_student(max_batch, override):
    """In slots that are used again, past windows that wrap, with stop tokens, greedy and drawn."""
    student = student_of(override)
    prompts = prompts_of()
    for temperature in (0.0, 1.0):
        settings = {
            "max_new_tokens": LIMITS,
            "temperature": temperature,
            "stop_tokens": tuple(range(0, 97, 9)),
        }
        done, plain = (
            Sampler(student, max_batch=max_batch, keeps_experts=keeps).generate(prompts, **settings)
            for keeps in (True, False)
        )
        for prompt, completion, without in zip(prompts, done, plain, strict=True):
            assert np.array_equal(completion.tokens, without.tokens)
            assert np.array_equal(completion.logprobs, without.logprobs)
            assert without.expert_ids is None
            read = np.concatenate([prompt, completion.tokens])[:-1]
            tokens = torch.from_numpy(read)[None]
            inputs = {
                "tokens": tokens,
                "positions": torch.arange(len(read))[None],
                "document_ids": torch.zeros_like(tokens),
            }
            kept = torch.from_numpy(completion.expert_ids)
            assert kept.dtype == (torch.int16 if "512" in override else torch.uint8)
            assert torch.equal(kept.long(), own_choices(student, **inputs, dtype=torch.int64)[0])
            if temperature == 0:
                sequence = list(prompt)
                for token in completion.tokens:
                    inputs["tokens"] = torch.tensor([sequence])
                    inputs["positions"] = torch.arange(len(sequence))[None]
                    inputs["document_ids"] = torch.zeros_like(inputs["tokens"])
                    with torch.no_grad():
                        last = student.logits(student(**inputs).hidden)[0, -1]
                    assert token == int(last.argmax())
                    sequence.append(token)


def test_a_student_without_experts_keeps_none():
    student = build_student(with_end_of_text(moe=None, dense_layers=5), seed=0)
    (completion,) = Sampler(student, max_batch=1, keeps_experts=True).generate(
        prompts_of((4,)), max_new_tokens=3
    )
    assert completion.expert_ids is None


def test_experts_lie_at_their_tokens_and_nowhere_else():
    student = build_student(with_end_of_text(), seed=0, dtype=torch.float64)
    rollouts = rollouts_of(student, prompts_of(), LIMITS)
    batch = pack_rollouts(rollouts, seq_len=34)
    assert batch.expert_ids.shape == (*batch.tokens.shape, 4, 2)
    assert batch.expert_ids.dtype == torch.uint8
    is_known = (batch.expert_ids != 255).all(dim=(2, 3))
    assert torch.equal(is_known, (batch.expert_ids != 255).any(dim=3).any(dim=2))
    last = torch.zeros_like(is_known)
    last[:, :-1] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    last[:, -1] = True
    assert torch.equal(is_known, (batch.document_ids >= 0) & ~last)
    assert not is_known.all() and (batch.document_ids < 0).any()
    assert not (is_known.logical_not() & (batch.span_ids != 0)).any()  # no label without experts
    inputs = {"tokens": batch.tokens, "positions": batch.positions}
    own = own_choices(student, **inputs, document_ids=batch.document_ids)
    assert torch.equal(batch.expert_ids[is_known], own[is_known])
    assert batch.rows(1, 2).expert_ids.shape[0] == 1
    assert batch.to("cpu").expert_ids is not None


def test_rollouts_without_experts_let_the_trainer_choose():
    student = build_student(with_end_of_text(), seed=0, dtype=torch.float64)
    rollouts = rollouts_of(student, prompts_of(), LIMITS)
    bare = [replace(rollout, expert_ids=None) for rollout in rollouts]
    assert pack_rollouts(bare, seq_len=34).expert_ids is None
    mixed = pack_rollouts([*rollouts[:1], *bare[1:]], seq_len=34)
    assert int((mixed.expert_ids != 255).any(dim=3).any(dim=2).sum()) == len(rollouts[0].expert_ids)


def test_the_buffer_gives_experts_back_after_a_restart():
    student = build_student(with_end_of_text(), seed=0, dtype=torch.float64)
    rollouts = rollouts_of(student, prompts_of(), LIMITS)
    first, second = (RolloutBuffer(capacity=9, max_staleness_steps=0) for _ in range(2))
    first.put(rollouts)
    second.load_state(first.state())
    before, after = (pack_rollouts(b.take(6), seq_len=34).expert_ids for b in (first, second))
    assert torch.equal(before, after)
    old = {name: value for name, value in vars(rollouts[0]).items() if name != "expert_ids"}
    second.load_state({"num_dropped": 0, "rollouts": [old]})  # written before there were any
    assert second.take(1)[0].expert_ids is None


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 0.02), (torch.bfloat16, 0.1)])
def test_replay_closes_the_gap_between_sampler_and_trainer(dtype, close):
    """40 random layers: what is as small as rounding flips near ties, unless experts are given.

    Routers are moved by a five-hundredth: some processors round alike in both passes.
    """
    moe = {**TREE["moe"], "num_experts": 16, "num_experts_per_token": 4, "expert_hidden": 16}
    config = with_end_of_text(
        num_layers=40,
        hidden_size=64,
        head_dim=16,
        dense_hidden=64,
        init_std=0.25,
        local_attention={"kind": "tpa", "window_size": 16},
        moe=moe,
    )
    student = build_student(config, seed=0, dtype=dtype)
    prompts = prompts_of((3, 20, 9, 31))
    rollouts = rollouts_of(student, prompts, [16] * 4, stop_tokens=())
    bare = [replace(rollout, expert_ids=None) for rollout in rollouts]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for router in student.routers():
            noise = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
            router.weight.mul_((1 + noise / 512).to(dtype))
    replayed, free = (
        require_sampler_equals_trainer(student, given, seq_len=64, tolerance_nats=9.0)
        for given in (rollouts, bare)
    )
    assert replayed < close
    assert free > 4 * replayed


def test_the_trainer_s_pass_takes_the_experts_of_its_batch():
    student = build_student(with_end_of_text(), seed=0, dtype=torch.float64)
    batch = pack_rollouts(rollouts_of(student, prompts_of(), LIMITS), seq_len=34)
    other = replace(batch, expert_ids=batch.expert_ids.flip(0, 1))
    inputs = {
        "tokens": batch.tokens,
        "positions": batch.positions,
        "document_ids": batch.document_ids,
    }
    for given in (batch, other, replace(batch, expert_ids=None)):
        found = run_student(student, given)[0].hidden
        wanted = student(**inputs, expert_ids=given.expert_ids).hidden.flatten(0, 1)
        assert torch.equal(found, wanted)
    free = student(**inputs).hidden.flatten(0, 1)
    assert torch.equal(run_student(student, batch)[0].hidden, free)  # its own choices
    assert not torch.allclose(run_student(student, other)[0].hidden, free)


def test_the_stage_replays_unless_told_otherwise():
    lengths = {"low": 6, "medium": 6, "high": 6}
    assert RolloutsConfig.model_validate({"per_step": 1, "max_new_tokens": lengths}).replay_routing
