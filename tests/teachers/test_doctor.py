"""A healthy teacher passes every check; ten faults are each caught and named."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.teachers.tiny import SUBSET, WORDS, write_teacher
from vpmoe.config import validate
from vpmoe.errors import TeacherError
from vpmoe.teachers.base import TopScores
from vpmoe.teachers.doctor import CHECKS, examine
from vpmoe.teachers.examination import Examination
from vpmoe.teachers.local import LocalTeacher, LocalTeacherConfig
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    MESSAGE,
    RETURN,
    START,
    SYSTEM,
    USER,
    VOCAB_SIZE,
)

HIGH, LOW, MEDIUM = WORDS[0], WORDS[1], WORDS[2]
K = 6


def conversation(rng, effort: int) -> tuple[np.ndarray, int]:
    words = lambda n: rng.choice(WORDS[10:], size=n).tolist()  # noqa: E731
    system = [START, SYSTEM, MESSAGE, *WORDS[3:6], effort, END]
    prompt = [*system, START, USER, MESSAGE, *words(rng.integers(3, 9)), END, START, ASSISTANT]
    answer = [CHANNEL, ANALYSIS, MESSAGE, *words(rng.integers(8, 30)), RETURN]
    return np.array([*prompt, *answer], dtype=np.int32), len(prompt)


def conversations(effort: int, count: int = 12) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(5)
    return [conversation(rng, effort) for _ in range(count)]


class Wrapped:
    """A teacher in front of which something stands."""

    def __init__(self, teacher):
        self.teacher = teacher
        self.provides, self.identity = teacher.provides, teacher.identity

    def score(self, sequences):
        return [top.logprobs for top in self.score_top(sequences, 1)]

    def score_top(self, sequences, k):
        return self.teacher.score_top(sequences, k)


def moved(top: TopScores, by: int) -> TopScores:
    return TopScores(*(np.roll(part, by, axis=0) for part in dataclasses.astuple(top)))


class ShiftedByOne(Wrapped):
    def score_top(self, sequences, k):
        return [moved(top, 1) for top in super().score_top(sequences, k)]


class ShiftedBack(Wrapped):
    def score_top(self, sequences, k):
        return [moved(top, -1) for top in super().score_top(sequences, k)]


def behind_a_cut(teacher, sequences, k, cut: int) -> list[TopScores]:
    """Scores of sequences without their first tokens, for which the next value stands in."""
    scored = teacher.score_top([s[cut:] for s in sequences], k)
    repeated = [
        [np.concatenate([part[:1]] * cut + [part]) for part in dataclasses.astuple(top)]
        for top in scored
    ]
    return [TopScores(*parts) for parts in repeated]


class OtherRenderer(Wrapped):
    """Leaves out the system message that the student sees."""

    def score_top(self, sequences, k):
        return behind_a_cut(self.teacher, sequences, k, cut=8)


class DroppedFirstToken(Wrapped):
    def score_top(self, sequences, k):
        return behind_a_cut(self.teacher, sequences, k, cut=1)


class PaddedVocabulary(Wrapped):
    """As many rows of logit zero as the teacher has, in the softmax."""

    def score_top(self, sequences, k):
        states = self.teacher.hidden(sequences)
        lse = [torch.logsumexp(h @ self.teacher.head_weight.T, dim=1) for h in states]
        extra = np.log(len(SUBSET))
        lower = [torch.logaddexp(x, torch.full_like(x, extra)) - x for x in lse]
        return [
            TopScores(
                top.logprobs - low.numpy(), top.top_ids, top.top_logprobs - low.numpy()[:, None]
            )
            for top, low in zip(super().score_top(sequences, k), lower, strict=True)
        ]


class IdsOfPadding(Wrapped):
    def score_top(self, sequences, k):
        scored = super().score_top(sequences, k)
        scored[0].top_ids[3, -1] = VOCAB_SIZE + 2
        return scored


class StaleCache(Wrapped):
    """Remembers answers under the beginning of the text."""

    def __init__(self, teacher):
        super().__init__(teacher)
        self.known = {}

    def score_top(self, sequences, k):
        answers = []
        for sequence in sequences:
            key = (k, len(sequence), bytes(np.asarray(sequence[:18], dtype=np.int64)))
            if key not in self.known:
                self.known[key] = super().score_top([sequence], k)[0]
            answers.append(self.known[key])
        return answers


class Tempered(Wrapped):
    temperature = 1.5

    def score_top(self, sequences, k):
        out = []
        for sequence, states in zip(sequences, self.teacher.hidden(sequences), strict=True):
            logits = states @ self.teacher.head_weight.T / self.temperature
            logprobs = torch.log_softmax(logits, dim=1)
            rows = np.searchsorted(SUBSET, np.asarray(sequence)[1:])
            best = torch.topk(logprobs, k, dim=1)
            out.append(
                TopScores(
                    logprobs[torch.arange(len(rows)), torch.from_numpy(rows)].numpy(),
                    np.array(SUBSET, dtype=np.int32)[best.indices.numpy()],
                    best.values.numpy(),
                )
            )
        return out


class FewerIds(Wrapped):
    def score_top(self, sequences, k):
        return super().score_top(sequences, min(k, 4))


class FewerIdsPadded(Wrapped):
    def score_top(self, sequences, k):
        scored = super().score_top(sequences, k)
        for top in scored:
            top.top_logprobs[:, 4:] = -np.inf
            top.top_ids[:, 4:] = 0
        return scored


class OrderDependent(Wrapped):
    """Later members of a call are a little off, as from a prefix cache of other numbers."""

    def score_top(self, sequences, k):
        return [
            TopScores(t.logprobs - 0.02 * i, t.top_ids, t.top_logprobs - 0.02 * i)
            for i, t in enumerate(super().score_top(sequences, k))
        ]


class OneEffort(Wrapped):
    def score_top(self, sequences, k):
        reset = [np.where(np.isin(s, [HIGH, LOW]), MEDIUM, s) for s in sequences]
        return super().score_top(reset, k)


def eighth_bits(teacher: LocalTeacher) -> Wrapped:
    """The same network with weights of eight bits."""
    for weight in teacher._model.parameters():
        weight.data = weight.data.to(torch.float8_e4m3fn).to(weight.dtype)
    return Wrapped(teacher)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = write_teacher(tmp_path_factory.mktemp("doctor") / "teacher", sliding_window=64)
    tree = {"kind": "local", "path": path, "dtype": "float32"}
    return lambda: validate(LocalTeacherConfig, tree, source="test").build()


@pytest.fixture(scope="module")
def local(load):
    return load()


def case(teacher, reference=None, **changes) -> Examination:
    asked, lens = zip(*conversations(HIGH), strict=True)
    other = tuple(sequence for sequence, _ in conversations(LOW))
    settings = {"k": K, "tolerance_nats": 0.03, "other_effort": other}
    return Examination(teacher, reference, asked, lens, **(settings | changes))


def states_of(examination) -> dict[str, tuple[str, str]]:
    return {f.check: (f.state, f.detail) for f in examine(examination)}


def test_a_healthy_teacher_passes_every_check(local):
    found = states_of(case(Wrapped(local), local))
    assert list(found) == list(CHECKS)
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert found["reference"][1] == "0.0000 nats per token from the reference"


def test_without_a_reference_the_other_checks_still_run(local):
    found = states_of(case(local, other_effort=()))
    skipped = {check for check, (state, _) in found.items() if state == "skipped"}
    assert skipped == {"reference", "temperature", "vocabulary", "effort"}
    assert {state for state, _ in found.values()} == {"ok", "skipped"}


FAULTS = {
    "shifted by one": (ShiftedByOne, "position", "shifted by +1"),
    "shifted back": (ShiftedBack, "position", "shifted by -1"),
    "wrong renderer": (OtherRenderer, "prompt", "the beginning of the prompt"),
    "wrong vocabulary padding": (PaddedVocabulary, "vocabulary", "rows than the vocabulary's"),
    "ids of padding": (IdsOfPadding, "vocabulary", "id 201090 is among the likeliest"),
    "stale cache": (StaleCache, "freshness", "a cache is stale"),
    "temperature": (Tempered, "temperature", "a temperature of 1.5"),
    "truncated k": (FewerIds, "likeliest ids", "asked for 6 likeliest ids, got 4"),
    "truncated k, padded": (FewerIdsPadded, "likeliest ids", "fewer than 6 different ids"),
    "order dependence": (OrderDependent, "order and company", "in another order"),
    "effort mismatch": (OneEffort, "effort", "changes nothing"),
    "dropped first token": (DroppedFirstToken, "first token", "dropped before the model"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_injected_faults_are_caught_and_named(local, fault):
    wrap, check, words = FAULTS[fault]
    found = states_of(case(wrap(local), local))
    assert found[check][0] == "failed", found
    assert words in found[check][1], found[check]


@pytest.mark.parametrize("fault", ["shifted by one", "wrong renderer", "stale cache"])
def test_some_faults_need_no_reference(local, fault):
    wrap, check, words = FAULTS[fault]
    found = states_of(case(wrap(local)))
    assert found[check][0] == "failed" and words in found[check][1]


def test_weights_of_eight_bits_are_caught_and_named(load, local):
    found = states_of(case(eighth_bits(load()), local))
    assert found["reference"][0] == "failed"
    assert "a lower precision such as fp8" in found["reference"][1]
    others = {check: state for check, (state, _) in found.items() if check != "reference"}
    assert set(others.values()) == {"ok"}, found


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (ShiftedByOne, "if its answers are shifted by +1"),
        (ShiftedBack, "if its answers are shifted by -1"),
        (DroppedFirstToken, "if the first token is dropped"),
    ],
)
def test_the_comparison_says_what_would_explain_a_difference(local, wrap, words):
    found = states_of(case(wrap(local), local))
    assert words in found["reference"][1]


def test_another_effort_is_recognized_by_the_reference(local):
    class AlwaysLow(Wrapped):
        def score_top(self, sequences, k):
            return super().score_top([np.where(s == HIGH, LOW, s) for s in sequences], k)

    found = states_of(case(AlwaysLow(local), local, tolerance_nats=0.001))
    assert "if another effort is asked for" in found["reference"][1]
    assert found["effort"][0] == "failed"


def test_a_teacher_that_breaks_down_is_a_failed_check_not_a_traceback(local):
    class Silent(Wrapped):
        def score_top(self, sequences, k):
            raise TeacherError("the line is dead")

    found = states_of(case(Silent(local), local))
    assert found["form"] == ("failed", "the line is dead")
    assert {state for state, _ in found.values()} == {"failed"}


def test_nonsense_is_a_failed_check(local):
    class Nonsense(Wrapped):
        def score_top(self, sequences, k):
            scored = super().score_top(sequences, k)
            if len(scored) > 2:
                scored[2].logprobs[4] = np.nan
            return scored

    assert "sequence 2 is nan" in states_of(case(Nonsense(local)))["form"][1]


def test_noise_between_repetitions_hides_no_blindness(local):
    """A server whose numbers vary with its load answers never quite the same."""

    class NoisyAndBlind(OneEffort):
        rng = np.random.default_rng(0)

        def score_top(self, sequences, k):
            scored = behind_a_cut(self.teacher, sequences, k, cut=1)
            noise = [self.rng.uniform(-0.004, 0, t.logprobs.shape) for t in scored]
            return [
                TopScores((t.logprobs + n).astype(np.float32), t.top_ids, t.top_logprobs)
                for t, n in zip(scored, noise, strict=True)
            ]

    found = states_of(case(NoisyAndBlind(local)))
    assert found["first token"][0] == "failed"
    assert found["order and company"][0] == found["freshness"][0] == "ok"
