"""What gets scored when not everything can be."""

from typing import get_args

import numpy as np
import pyarrow as pa
import pytest

from vpmoe.teachers.selection import Column, Pool, SelectionConfig, select


def pool_from(rows: list[dict]) -> Pool:
    def column(name, kind):
        return pa.array([row.get(name) for row in rows], kind)

    return Pool(
        sample_ids=column("sample_id", pa.string()),
        num_tokens=column("num_tokens", pa.int32()).to_numpy(),
        num_reasoning=column("num_reasoning", pa.int32()).to_numpy(),
        metadata={name: column(name, pa.string()) for name in get_args(Column)},
    )


def corpus(count: int = 4_000, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        tokens = int(rng.integers(50, 500))
        language = str(rng.choice(["en", "de", "ja"], p=[0.9, 0.08, 0.02]))
        exercise = str(rng.choice(["math", "memory"]))
        sizes = {"num_tokens": tokens, "num_reasoning": tokens * 2 // 3}
        out.append({"sample_id": f"s{i}", "language": language, "exercise": exercise, **sizes})
    return out


def chosen_from(rows, **settings) -> list[int]:
    return select(pool_from(rows), SelectionConfig(**settings)).tolist()


def tokens_of(rows, chosen) -> int:
    return sum(rows[i]["num_tokens"] for i in chosen)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.9])
def test_the_budget_is_met_within_one_sample(fraction):
    rows = corpus()
    chosen = chosen_from(rows, fraction=fraction)
    total = sum(c["num_tokens"] for c in rows)
    assert abs(tokens_of(rows, chosen) - fraction * total) < 500
    assert chosen == sorted(set(chosen))


def test_groups_share_equally_as_far_as_they_can():
    rows = corpus()
    chosen = chosen_from(rows, fraction=0.1, balance=("language",))
    total = sum(c["num_tokens"] for c in rows)
    share = {}
    for i in chosen:
        key = rows[i]["language"]
        share[key] = share.get(key, 0) + rows[i]["num_tokens"]
    everything_japanese = sum(c["num_tokens"] for c in rows if c["language"] == "ja")
    assert everything_japanese < 0.1 * total / 3
    assert share["ja"] == everything_japanese  # all of the smallest group
    assert abs(share["en"] - share["de"]) < 1_000  # and the rest in halves


def test_longer_reasoning_is_preferred_but_not_alone():
    rows = corpus()

    def mean_length(power):
        chosen = chosen_from(rows, fraction=0.1, longer_reasoning=power, balance=())
        return np.mean([rows[i]["num_reasoning"] for i in chosen])

    overall = np.mean([c["num_reasoning"] for c in rows])
    assert mean_length(0) == pytest.approx(overall, rel=0.05)
    squares = np.mean([c["num_reasoning"] ** 2 for c in rows])
    assert mean_length(1) == pytest.approx(squares / overall, rel=0.08)  # size-biased mean
    assert mean_length(4) > mean_length(1) > mean_length(0)


def test_the_choice_belongs_to_the_samples_and_not_to_their_order():
    rows = corpus()
    chosen = {rows[i]["sample_id"] for i in chosen_from(rows, fraction=0.1)}
    backwards = rows[::-1]
    assert {backwards[i]["sample_id"] for i in chosen_from(backwards, fraction=0.1)} == chosen
    other = {rows[i]["sample_id"] for i in chosen_from(rows, seed=1)}
    assert other != chosen


def test_a_larger_fraction_keeps_the_smaller_choice():
    rows = corpus()
    small, large = (set(chosen_from(rows, fraction=f, balance=())) for f in (0.1, 0.2))
    assert len(small - large) <= 1  # the last sample of a budget may fit one and not the other


def test_categories_and_everything():
    rows = corpus(500)
    assert chosen_from(rows, fraction=1) == list(range(500))
    chosen = chosen_from(rows, fraction=1, exercises=("math",))
    assert {rows[i]["exercise"] for i in chosen} == {"math"}
    chosen = chosen_from(rows, fraction=0.2, languages=("de", "ja"))
    assert {rows[i]["language"] for i in chosen} == {"de", "ja"}


def test_rows_without_metadata_form_a_group():
    rows = [{"sample_id": f"s{i}", "num_tokens": 10, "num_reasoning": 5} for i in range(100)]
    assert len(chosen_from(rows, fraction=0.25)) == 25
    for row in rows[:50]:
        row["language"] = "en"
    chosen = chosen_from(rows, fraction=0.4)
    assert sum(i < 50 for i in chosen) == 20 == len(chosen) / 2  # no language: a group of its own
