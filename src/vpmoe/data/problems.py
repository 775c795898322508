"""Verifiable reasoning problems in SYNTH's columns, seeded, for demos and tests.

Right answers are known, so a student's can be checked. A stated share of the training traces can
be flawed: one step is wrong and everything after builds upon it, as happens in real synthetic
corpora. Training and held-out queries never overlap: a query's own hash decides where it belongs.
"""

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vpmoe.data.problem_families import FAMILIES, FULL, SMALL, Family, Size, family_of
from vpmoe.errors import DataError

Split = Literal["train", "held-out"]
Flaws = Literal["blind-spot", "scattered"]
Alphabet = Literal["full", "small"]

HELD_OUT_PER_THOUSAND = 100  # of all possible queries
GENERATOR = "vpmoe-problems-v1"  # the `model` column
MAX_REDRAWS = 1_000


@dataclass(frozen=True)
class Problem:
    """One problem with the trace a student would be shown.

    Attributes:
        query: The question.
        reasoning: The trace, one step per line.
        answer: What the trace arrives at: wrong if `flawed`.
        solution: The right answer.
        family: Which kind of problem.
        flawed: Whether a step of the trace is wrong. Training never reads this.
    """

    query: str
    reasoning: str
    answer: str
    solution: str
    family: str
    flawed: bool = False

    @property
    def sample_id(self) -> str:
        """An id that is a function of the query alone."""
        return f"problem-{_digest(self.query):016x}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(query: str) -> Split:
    """Where a query belongs, whichever seed draws it."""
    return "held-out" if _digest(query) % 1_000 < HELD_OUT_PER_THOUSAND else "train"


def solve(query: str) -> Problem | None:
    """The problem that a query states, with its right trace; None if no family wrote it."""
    family = family_of(query)
    if family is None:
        return None
    steps, solution = family.work(query, None)
    return Problem(query, "\n".join(steps), solution, solution, family.name)


def is_correct(problem: Problem, answer_text: str) -> bool:
    """Whether an answer is right: character by character, but for white space at its ends."""
    return answer_text.strip() == problem.solution


def generate(
    count: int,
    *,
    seed: int,
    split: Split = "train",
    flawed_share: float = 0.0,
    flaws: Flaws = "blind-spot",
    families: Sequence[str] = tuple(FAMILIES),
    alphabet: Alphabet = "full",
) -> Iterator[Problem]:
    """`count` problems with distinct queries, the families taking turns.

    A longer stream starts with the shorter one of the same seed, and neither `flawed_share` nor
    `flaws` changes the queries: traces can be few where prompts are plenty, and clean and flawed
    corpora speak of the same problems.

    Args:
        count: How many.
        seed: Another seed, other queries (of the same split).
        split: Which part of the space of queries.
        flawed_share: Expected share of flawed traces, 0..1; held-out problems have none.
        flaws: "blind-spot": always and only where a visible feature of the query (say, the mark
            the dial starts at) is in a fixed part of its range, and always at the same step, so
            that who imitates learns the mistake. "scattered": any trace, any step.
        families: Names of the families to draw from.
        alphabet: "small" draws from fewer numbers and words: fewer facts to learn, same steps.

    Raises:
        DataError: If a family is unknown, a share is outside 0..1, flawed held-out problems are
            asked for, or the families have no more queries.
    """
    _check(split, flawed_share, families)
    size = FULL if alphabet == "full" else SMALL
    seen: set[str] = set()
    for index in range(count):
        family = FAMILIES[families[index % len(families)]]
        rng = random.Random(f"{seed}/{split}/{index}")
        query = _fresh_query(family, rng, split, seen, size)
        seen.add(query)
        step = _wrong_step(family, query, rng, size, flawed_share=flawed_share, flaws=flaws)
        yield _write(family, query, step)


def _check(split: Split, flawed_share: float, families: Sequence[str]) -> None:
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        known = ", ".join(FAMILIES)
        raise DataError(f"unknown problem families: {unknown}", hint=f"choose from {known}")
    if not 0.0 <= flawed_share <= 1.0:
        raise DataError(f"flawed_share is {flawed_share}", hint="it is a share: 0 to 1")
    if flawed_share and split == "held-out":
        raise DataError(
            "held-out problems cannot be flawed: they are what answers are judged by",
            hint="leave flawed_share = 0 for them",
        )


def _fresh_query(
    family: Family, rng: random.Random, split: Split, seen: set[str], size: Size
) -> str:
    for _ in range(MAX_REDRAWS):
        query = family.draw(rng, size)
        if query not in seen and split_of(query) == split:
            return query
    raise DataError(
        f"no new {split} query of family {family.name!r} in {MAX_REDRAWS:,} draws",
        hint="ask for fewer problems or more families",
    )


def _wrong_step(
    family: Family,
    query: str,
    rng: random.Random,
    size: Size,
    *,
    flawed_share: float,
    flaws: Flaws,
) -> int | None:
    chance, step = rng.random(), rng.randrange(family.num_steps)
    if flaws == "scattered":
        return step if chance < flawed_share else None
    index, count = family.feature(query, size)
    in_blind_spot = (index + chance) / count < flawed_share
    return family.num_steps // 2 if in_blind_spot else None


def _write(family: Family, query: str, wrong_step: int | None) -> Problem:
    steps, solution = family.work(query, None)
    if wrong_step is None:
        return Problem(query, "\n".join(steps), solution, solution, family.name)
    steps, answer = family.work(query, wrong_step)
    return Problem(query, "\n".join(steps), answer, solution, family.name, flawed=True)


def write_problems(path: Path, problems: Iterable[Problem]) -> int:
    """Write problems as a parquet file in SYNTH's columns plus `flawed`; how many there were.

    The file appears under its name only when it is complete.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_row(problem) for problem in problems]
    text = ("synth_id", "language", "exercise", "model", "query", "synthetic_reasoning")
    text += ("synthetic_answer", "constraints", "seed_license", "query_seed_url")
    schema = pa.schema([*((name, pa.string()) for name in text), ("flawed", pa.bool_())])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    return len(rows)


def _row(problem: Problem) -> dict[str, str | bool | None]:
    return {
        "synth_id": problem.sample_id,
        "language": "en",
        "exercise": problem.family,
        "model": GENERATOR,
        "query": problem.query,
        "synthetic_reasoning": problem.reasoning,
        "synthetic_answer": problem.answer,
        "seed_license": "CC0-1.0",
        "flawed": problem.flawed,
    }
