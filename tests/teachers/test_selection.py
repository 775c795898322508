"""What gets scored when not everything can be."""

import numpy as np
import pytest

from vpmoe.teachers.selection import Candidate, SelectionConfig, select


def corpus(count: int = 4_000, seed: int = 0) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        tokens = int(rng.integers(50, 500))
        language = rng.choice(["en", "de", "ja"], p=[0.9, 0.08, 0.02])
        exercise = rng.choice(["math", "memory"])
        metadata = {"language": str(language), "exercise": str(exercise)}
        out.append(Candidate(f"s{i}", tokens, tokens * 2 // 3, metadata))
    return out


def tokens_of(candidates, chosen) -> int:
    return sum(candidates[i].num_tokens for i in chosen)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.9])
def test_the_budget_is_met_within_one_sample(fraction):
    candidates = corpus()
    chosen = select(candidates, SelectionConfig(fraction=fraction))
    total = sum(c.num_tokens for c in candidates)
    assert abs(tokens_of(candidates, chosen) - fraction * total) < 500
    assert chosen == sorted(set(chosen))


def test_groups_share_equally_as_far_as_they_can():
    candidates = corpus()
    chosen = select(candidates, SelectionConfig(fraction=0.1, balance=("language",)))
    total = sum(c.num_tokens for c in candidates)
    share = {}
    for i in chosen:
        key = candidates[i].metadata["language"]
        share[key] = share.get(key, 0) + candidates[i].num_tokens
    everything_japanese = sum(c.num_tokens for c in candidates if c.metadata["language"] == "ja")
    assert everything_japanese < 0.1 * total / 3
    assert share["ja"] == everything_japanese  # all of the smallest group
    assert abs(share["en"] - share["de"]) < 1_000  # and the rest in halves


def test_longer_reasoning_is_preferred_but_not_alone():
    candidates = corpus()

    def mean_length(power):
        chosen = select(
            candidates, SelectionConfig(fraction=0.1, longer_reasoning=power, balance=())
        )
        return np.mean([candidates[i].num_reasoning for i in chosen])

    overall = np.mean([c.num_reasoning for c in candidates])
    assert mean_length(0) == pytest.approx(overall, rel=0.05)
    squares = np.mean([c.num_reasoning**2 for c in candidates])
    assert mean_length(1) == pytest.approx(squares / overall, rel=0.08)  # size-biased mean
    assert mean_length(4) > mean_length(1) > mean_length(0)


def test_the_choice_belongs_to_the_samples_and_not_to_their_order():
    candidates = corpus()
    config = SelectionConfig(fraction=0.1)
    chosen = {candidates[i].sample_id for i in select(candidates, config)}
    backwards = candidates[::-1]
    assert {backwards[i].sample_id for i in select(backwards, config)} == chosen
    other = {candidates[i].sample_id for i in select(candidates, SelectionConfig(seed=1))}
    assert other != chosen


def test_a_larger_fraction_keeps_the_smaller_choice():
    candidates = corpus()
    small, large = (
        set(select(candidates, SelectionConfig(fraction=f, balance=()))) for f in (0.1, 0.2)
    )
    assert len(small - large) <= 1  # the last sample of a budget may fit one and not the other


def test_categories_and_everything():
    candidates = corpus(500)
    assert select(candidates, SelectionConfig(fraction=1)) == list(range(500))
    chosen = select(candidates, SelectionConfig(fraction=1, exercises=("math",)))
    assert {candidates[i].metadata["exercise"] for i in chosen} == {"math"}
    chosen = select(candidates, SelectionConfig(fraction=0.2, languages=("de", "ja")))
    assert {candidates[i].metadata["language"] for i in chosen} == {"de", "ja"}


def test_rows_without_metadata_form_a_group():
    candidates = [Candidate(f"s{i}", 10, 5, {}) for i in range(100)]
    assert len(select(candidates, SelectionConfig(fraction=0.25))) == 25
