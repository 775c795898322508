"""Form, correctness, lengths and teacher gap of hand-written completions."""

import numpy as np
import pytest

from vpmoe.batch import Rollout
from vpmoe.data.harmony import Renderer, encode
from vpmoe.data.problems import generate
from vpmoe.errors import TeacherError
from vpmoe.evals.exact_match import exact_match
from vpmoe.evals.harmony_format import format_validity
from vpmoe.evals.lengths import channel_lengths
from vpmoe.evals.teacher_gap import teacher_gap
from vpmoe.rollouts.scoring import with_teacher
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    FINAL,
    MESSAGE,
    RETURN,
    START,
)

ANALYSIS_HEADER = [CHANNEL, ANALYSIS, MESSAGE]
FINAL_HEADER = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE]


def completion(reasoning: str, final: str) -> list[int]:
    return [
        *ANALYSIS_HEADER, *encode(reasoning).tolist(), END,
        *FINAL_HEADER, *encode(final).tolist(), RETURN,
    ]  # fmt: skip


def rollout(tokens, *, student=None, teacher=None, stop="stop", prompt=(1, 2, 3)) -> Rollout:
    logprobs = np.zeros(len(tokens)) if student is None else np.asarray(student)
    return Rollout(
        sample_id="x",
        prompt=np.asarray(prompt, dtype=np.int64),
        completion=np.asarray(tokens, dtype=np.int64),
        rollout_logprobs=logprobs.astype(np.float32),
        policy_version=0,
        reasoning_effort="medium",
        stop_reason=stop,
        teacher_logprobs=None if teacher is None else np.asarray(teacher, dtype=np.float32),
    )


def test_each_failure_is_counted_once_under_its_class():
    good = completion("Think.", "4")
    looping = [*ANALYSIS_HEADER, *encode(" so").tolist() * 64]
    rollouts = [
        rollout(good),
        rollout([*ANALYSIS_HEADER, *encode("Hm").tolist(), RETURN]),
        rollout(good[:-1], stop="length"),
        rollout(looping, stop="length"),
        rollout([*encode("4").tolist(), RETURN]),
    ]
    report = format_validity(rollouts)
    assert report.failures == {"no_final": 1, "no_end": 1, "repetition": 1, "invalid_header": 1}
    assert (report.num_completions, report.valid.correct, report.valid.share) == (5, 1, 0.2)


def test_right_answers_count_only_in_well_formed_completions():
    problems = list(generate(12, seed=3, split="held-out"))
    answers = [completion("Steps.", p.solution) for p in problems]
    assert exact_match(problems, [rollout(a) for a in answers]).total.share == 1.0
    answers[0] = completion("Steps.", problems[0].solution + " or so")
    answers[1] = answers[1][:-1]  # right, but it never ends
    report = exact_match(problems, [rollout(a) for a in answers])
    assert report.total.correct == 10
    assert sum(share.count for share in report.families.values()) == 12
    assert (
        report.families[problems[0].family].correct == report.families[problems[0].family].count - 1
    )


def test_lengths_are_per_channel_with_headers_and_ends():
    short, long = completion("a", "b"), completion("a " * 7, "b")
    lengths = channel_lengths([rollout(short), rollout(long), rollout([CHANNEL], stop="length")])
    reasoning = [4 + len(encode("a")), 4 + len(encode("a " * 7)), 1]
    assert lengths.reasoning.mean == pytest.approx(np.mean(reasoning))
    assert lengths.reasoning.p50 == sorted(reasoning)[1]
    assert (lengths.final.count, lengths.final.mean) == (2, 7.0)
    assert lengths.completion.p95 == pytest.approx(np.percentile([len(short), len(long), 1], 95))
    assert (lengths.truncated.correct, lengths.truncated.count) == (1, 3)


def test_gap_estimates_by_hand():
    tokens = [*ANALYSIS_HEADER, 50, END, *FINAL_HEADER, 51, RETURN]
    student = np.linspace(-2, -0.1, len(tokens))
    teacher = np.linspace(-1, -0.5, len(tokens))
    gap = teacher_gap([rollout(tokens, student=student, teacher=teacher)])
    d = student.astype(np.float32).astype(np.float64) - teacher.astype(np.float32)
    assert gap.k1.all == pytest.approx(d.mean())
    assert gap.k1.reasoning == pytest.approx(d[:5].mean())
    assert gap.k3.final == pytest.approx((np.exp(-d[5:]) - 1 + d[5:]).mean())
    assert gap.token_counts == {"reasoning": 5, "final": 7, "all": 12}


def test_both_estimates_have_the_exact_kl_as_expectation():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    exact = float((p * np.log(p / q)).sum())
    k1 = k3 = 0.0
    for token in range(3):
        one = [rollout([CHANNEL], student=[np.log(p[token])], teacher=[np.log(q[token])])]
        gap = teacher_gap(one)
        k1 += p[token] * gap.k1.all
        k3 += p[token] * gap.k3.all
    assert k1 == pytest.approx(exact, rel=1e-5)
    assert k3 == pytest.approx(exact, rel=1e-5)


def test_teacher_scores_line_up_with_the_sampled_tokens():
    class Positions:
        """Answers with the place of the token it is asked about."""

        def score(self, sequences):
            return [-np.arange(1, len(s), dtype=np.float32) for s in sequences]

    (scored,) = with_teacher([rollout([7, 8], prompt=(1, 2, 3))], Positions())
    assert scored.teacher_logprobs.tolist() == [-3.0, -4.0]
    with pytest.raises(TeacherError, match="not scored"):
        teacher_gap([rollout([7, 8])])


def test_prompts_of_problems_end_in_the_header():
    from vpmoe.data.harmony import RenderConfig
    from vpmoe.evals.sampling import problem_prompts

    problems = list(generate(3, seed=0, split="held-out"))
    prompts = problem_prompts(problems, Renderer(RenderConfig(system=False)))
    assert all(p.tokens[-2:].tolist() == [START, ASSISTANT] for p in prompts)
