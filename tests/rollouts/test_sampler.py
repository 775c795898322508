"""Sampling: greedy parity, reproducible draws, truncation, exact distributions."""

import numpy as np
import pytest
import torch

from tests.models.test_student import TREE
from vpmoe.config import validate
from vpmoe.errors import UsageError
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.rollouts.draw import Draw, choose, nucleus, stream_of, uniforms
from vpmoe.rollouts.sampler import Sampler


@pytest.fixture(scope="module")
def student():
    return build_student(validate(StudentConfig, TREE, source="t"), seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, size=n) for n in (3, 11, 1, 7, 5, 9)]


@torch.no_grad()
def logprobs_after(student, sequence):
    tokens = torch.from_numpy(np.asarray(sequence))[None]
    positions = torch.arange(tokens.shape[1])[None]
    output = student(tokens, positions=positions, document_ids=torch.zeros_like(tokens))
    return student.logits(output.hidden)[0].log_softmax(-1)


def test_greedy_equals_the_uncached_reference(student, prompts):
    done = Sampler(student, max_batch=4).generate(prompts, max_new_tokens=12, temperature=0.0)
    for prompt, completion in zip(prompts, done, strict=True):
        sequence = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            last = logprobs_after(student, sequence)[-1]
            assert token == int(last.argmax())
            assert logprob == pytest.approx(last.max().item(), abs=1e-5)
            sequence.append(token)
        assert completion.behavior_logprobs.tolist() == [0] * 12
        assert completion.stop_reason == "length"


def test_logprobs_equal_the_full_pass(student, prompts):
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8)):
        done = Sampler(student, max_batch=6).generate(
            prompts, max_new_tokens=10, temperature=temperature, top_p=top_p, seed=3
        )
        for prompt, completion in zip(prompts, done, strict=True):
            sequence = np.concatenate([prompt, completion.tokens])
            after = logprobs_after(student, sequence)[len(prompt) - 1 : -1]
            chosen = torch.from_numpy(completion.tokens)[:, None]
            own = after.gather(1, chosen)[:, 0].numpy()
            np.testing.assert_allclose(completion.logprobs, own, atol=1e-5)
            cut = nucleus(after / temperature, top_p=top_p).log_softmax(-1)
            drawn_from = cut.gather(1, chosen)[:, 0].numpy()
            np.testing.assert_allclose(completion.behavior_logprobs, drawn_from, atol=1e-5)


def test_completions_do_not_depend_on_their_batch(student, prompts):
    together = Sampler(student, max_batch=6).generate(prompts, max_new_tokens=15, seed=5)
    apart = Sampler(student, max_batch=1).generate(prompts, max_new_tokens=15, seed=5)
    shorter = Sampler(student, max_batch=2).generate(prompts[:3], max_new_tokens=15, seed=5)
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(together, shorter, strict=False))
    other_seed = Sampler(student, max_batch=6).generate(prompts, max_new_tokens=15, seed=6)
    assert not any(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(together, other_seed, strict=True)
    )


def test_equal_prompts_get_different_completions(student, prompts):
    twice = Sampler(student, max_batch=2).generate([prompts[0]] * 2, max_new_tokens=15)
    assert not np.array_equal(twice[0].tokens, twice[1].tokens)


def test_stop_tokens_end_a_completion_and_belong_to_it(student, prompts):
    stops = tuple(range(0, 97, 3))
    free = Sampler(student, max_batch=6).generate(
        prompts, max_new_tokens=20, seed=1, stop_tokens=()
    )
    for batch in (1, 4, 6):  # with and without conversations leaving the batch
        stopped = Sampler(student, max_batch=batch).generate(
            prompts, max_new_tokens=20, seed=1, stop_tokens=stops
        )
        for whole, completion in zip(free, stopped, strict=True):
            first = np.flatnonzero(np.isin(whole.tokens, stops))
            end = first[0] + 1 if first.size else 20
            assert np.array_equal(completion.tokens, whole.tokens[:end])
            assert len(completion.logprobs) == len(completion.behavior_logprobs) == end
            assert completion.stop_reason == ("stop" if first.size else "length")


@pytest.mark.parametrize("max_batch", [1, 2, 3, 9])
def test_conversations_enter_and_leave_without_a_trace(student, prompts, max_batch):
    # Uneven prompts and limits, windows of 4 that wrap around, stops at once, a single token.
    many = [*prompts, *prompts[::-1], np.arange(30)]
    limits = [1, 25, 3, 17, 2, 9, 8, 1, 13, 4, 30, 6, 11]
    stops = tuple(range(0, 97, 9))
    done = Sampler(student, max_batch=max_batch).generate(
        many, max_new_tokens=limits, temperature=0.0, stop_tokens=stops
    )
    for prompt, limit, completion in zip(many, limits, done, strict=True):
        sequence = list(prompt)
        while True:
            sequence.append(int(logprobs_after(student, sequence)[-1].argmax()))
            written = len(sequence) - len(prompt)
            if sequence[-1] in stops or written == limit:
                break
        assert completion.tokens.tolist() == sequence[len(prompt) :]
        assert completion.stop_reason == ("stop" if sequence[-1] in stops else "length")
        after = logprobs_after(student, sequence)[len(prompt) - 1 : -1].max(dim=-1).values
        np.testing.assert_allclose(completion.logprobs, after.numpy(), atol=1e-5)


def test_a_stop_token_at_once_ends_a_completion(student, prompts):
    every = Sampler(student, max_batch=2).generate(
        prompts, max_new_tokens=9, stop_tokens=tuple(range(97))
    )
    assert [len(completion.tokens) for completion in every] == [1] * len(prompts)
    assert {completion.stop_reason for completion in every} == {"stop"}


def test_streamed_tokens_are_those_of_the_batch(student, prompts):
    done = Sampler(student, max_batch=6).generate(prompts, max_new_tokens=12, seed=4, top_p=0.9)
    for request, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        tokens = Sampler(student, max_batch=1).stream(
            prompt, max_new_tokens=12, draw=Draw(1.0, 0.9, 4), request=request
        )
        assert list(tokens) == completion.tokens.tolist()


def test_no_prompts_no_completions(student):
    assert Sampler(student, max_batch=2).generate([], max_new_tokens=3) == []


def test_sampler_leaves_the_student_as_it_was(student, prompts):
    student.train()
    before = [router.local_tokens_per_expert.clone() for router in student.routers()]
    Sampler(student, max_batch=6).generate(prompts, max_new_tokens=3)
    for router, counts in zip(student.routers(), before, strict=True):
        assert torch.equal(router.local_tokens_per_expert, counts)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    kept = [
        nucleus(logits, top_p=p).isfinite()[0].nonzero().flatten().tolist()
        for p in (0.01, 0.5, 0.51, 0.75, 0.8, 1.0)
    ]
    assert kept == [[1], [1], [1, 3], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_inverse_of_the_distribution_is_exact():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(100, -1)
    grid = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    rows, logprobs, _ = choose(logits, grid, draw=Draw(1.0, 1.0, 0))
    assert rows.bincount().tolist() == [10, 50, 15, 25]
    torch.testing.assert_close(logprobs.double().exp(), logits.double().exp()[0][rows])
    halves, _, behavior = choose(logits, grid, draw=Draw(0.5, 0.9, 0))
    shares = torch.tensor([0, 0.8, 0, 0.2])  # squared, the two likeliest, renormalised
    torch.testing.assert_close(behavior.exp(), shares[halves])
    assert halves.bincount().tolist() == [0, 80, 0, 20]


def numbers_of(seed, size):
    streams = torch.tensor([stream_of(seed, request) for request in range(size)])
    places = torch.arange(size).repeat(size)
    return uniforms(streams.repeat_interleave(size), places).view(size, size).numpy()


def test_uniforms_are_uniform_and_independent():
    grid = numbers_of(7, 300)
    numbers = grid.ravel()
    assert np.array_equal(grid, numbers_of(7, 300))
    assert np.unique(numbers).size == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 160  # chi-square with 99 degrees of freedom
    for other in (np.roll(grid, 1, 0), np.roll(grid, 1, 1), numbers_of(8, 300)):
        correlation = np.corrcoef(numbers, other.ravel())[0, 1]
        assert abs(correlation) < 4 / 300  # four standard errors


def test_uniforms_are_splitmix():
    mask = (1 << 64) - 1

    def scrambled(word):
        word = (word + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    for seed, request, place in ((0, 0, 0), (7, 3, 2), ((1 << 63) + 5, 1 << 20, 999)):
        word = scrambled(scrambled(scrambled(seed) ^ request) ^ place)
        stream = torch.tensor([stream_of(seed, request)])
        assert uniforms(stream, torch.tensor([place])).item() == (word >> 11) / 2**53


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_senseless_settings_are_refused(student, prompts, settings, said):
    with pytest.raises(UsageError, match=said):
        Sampler(student, max_batch=2).generate(prompts, **{"max_new_tokens": 3, **settings})


def test_empty_prompts_are_refused(student):
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        Sampler(student, max_batch=2).generate([np.array([], dtype=np.int64)], max_new_tokens=1)
