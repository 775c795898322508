"""Which samples a teacher should score when it cannot score them all."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vpmoe.config import Config

Column = Literal["language", "exercise", "model", "constraints", "seed_license"]


class SelectionConfig(Config):
    """A share of a dataset's tokens: longer reasoning preferred, languages and exercises balanced.

    The choice is a pure function of these settings and the samples' own counts.
    """

    fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the split's tokens; 1 takes every sample."""
    longer_reasoning: float = Field(default=1.0, ge=0, le=4)
    """A sample is drawn in proportion to its reasoning tokens to this power; 0 ignores length."""
    balance: tuple[Column, ...] = ("language", "exercise")
    """Metadata columns whose values share the tokens equally, as far as each has enough."""
    languages: tuple[str, ...] = ()
    """Only these; empty takes all."""
    exercises: tuple[str, ...] = ()
    """Only these; empty takes all."""
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """What the selection sees of a sample.

    Attributes:
        sample_id: Its row in the dataset.
        num_tokens: Of the whole document.
        num_reasoning: Labels of the reasoning span.
        metadata: `language`, `exercise` and the like; a missing one counts as a value of its own.
    """

    sample_id: str
    num_tokens: int
    num_reasoning: int
    metadata: dict[str, Any]


def select(candidates: Sequence[Candidate], config: SelectionConfig) -> list[int]:
    """Indices of the chosen samples, ascending.

    Groups of equal metadata get equal budgets; what a small group cannot use goes to the others.
    Inside a group, samples come in the order of exponential clocks whose rates are
    `num_reasoning ** longer_reasoning`, which is weighted sampling without replacement. The clocks
    hash the sample ids, so that the order of the samples plays no part.

    Args:
        candidates: The samples of one split.
        config: What to prefer.

    Returns:
        Places in `candidates`. Their tokens differ from the budget by less than one sample.

    References:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006),
        doi:10.1016/j.ipl.2005.11.003. Difference: hashes take the place of random numbers.
    """
    allowed = [i for i, c in enumerate(candidates) if _allowed(c, config)]
    if config.fraction == 1.0:
        return allowed
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for index in allowed:
        key = tuple(str(candidates[index].metadata.get(name)) for name in config.balance)
        groups.setdefault(key, []).append(index)
    sizes = {key: sum(candidates[i].num_tokens for i in found) for key, found in groups.items()}
    budget = config.fraction * sum(c.num_tokens for c in candidates)
    chosen: list[int] = []
    # Smallest first: whatever a group leaves unused is shared by those still to come.
    for place, key in enumerate(sorted(groups, key=lambda k: (sizes[k], k))):
        share = budget / (len(groups) - place)
        for index in sorted(groups[key], key=lambda i: _clock(candidates[i], config)):
            tokens = candidates[index].num_tokens
            if share < tokens / 2:
                break
            share -= tokens
            budget -= tokens
            chosen.append(index)
    return sorted(chosen)


def _allowed(candidate: Candidate, config: SelectionConfig) -> bool:
    wanted = (("language", config.languages), ("exercise", config.exercises))
    return all(not values or candidate.metadata.get(name) in values for name, values in wanted)


def _clock(candidate: Candidate, config: SelectionConfig) -> tuple[float, str]:
    """When the sample's clock rings: exponential with rate = its weight."""
    text = f"{config.seed} {candidate.sample_id}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    weight = max(candidate.num_reasoning, 1) ** config.longer_reasoning
    return -float(np.log(uniform)) / weight, candidate.sample_id
