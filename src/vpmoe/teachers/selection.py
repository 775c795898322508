"""Which samples a teacher should score when it cannot score them all."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from vpmoe.config import Config

_IDS_AT_ONCE = 1 << 16

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
class Pool:
    """What the selection sees of a split's samples, one entry of each array per sample.

    Attributes:
        sample_ids: Their rows in the dataset.
        num_tokens: Of the whole documents.
        num_reasoning: Labels of the reasoning spans.
        metadata: `Column` -> its values; a missing value counts as one of its own.
    """

    sample_ids: pa.Array
    num_tokens: np.ndarray
    num_reasoning: np.ndarray
    metadata: Mapping[Column, pa.Array]


def select(pool: Pool, config: SelectionConfig) -> np.ndarray:
    """Indices of the chosen samples, ascending.

    Groups of equal metadata get equal budgets; what a small group cannot use goes to the others.
    Inside a group, samples come in the order of exponential clocks whose rates are
    `num_reasoning ** longer_reasoning`, which is weighted sampling without replacement. The clocks
    hash the sample ids, so that the order of the samples plays no part.

    Args:
        pool: The samples of one split.
        config: What to prefer.

    Returns:
        Places in `pool`. Their tokens differ from the budget by less than one sample, where there
        are enough.

    References:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006),
        doi:10.1016/j.ipl.2005.11.003. Difference: hashes take the place of random numbers.
    """
    allowed = np.flatnonzero(_allowed(pool, config))
    if config.fraction == 1.0:
        return allowed
    groups, names = _groups(pool, config.balance, allowed)
    tokens = pool.num_tokens[allowed].astype(np.int64)
    order = np.lexsort((_clocks(pool, config, allowed), groups))
    bounds = np.searchsorted(groups[order], np.arange(len(names) + 1))
    sizes = np.bincount(groups, weights=tokens, minlength=len(names))
    budget = config.fraction * int(pool.num_tokens.sum(dtype=np.int64))
    chosen: list[np.ndarray] = []
    # Smallest first: whatever a group leaves unused is shared by those still to come.
    for place, group in enumerate(sorted(range(len(names)), key=lambda g: (sizes[g], names[g]))):
        members = order[bounds[group] : bounds[group + 1]]
        reached = np.cumsum(tokens[members])
        # A sample is taken while at least half of it fits, so that the budget is met on average.
        fits = reached - tokens[members] / 2 <= budget / (len(names) - place)
        count = len(members) if fits.all() else int(np.argmin(fits))
        budget -= int(reached[count - 1]) if count else 0
        chosen.append(members[:count])
    return allowed[np.sort(np.concatenate(chosen))] if chosen else allowed


def _allowed(pool: Pool, config: SelectionConfig) -> np.ndarray:
    """True where a sample is of a wanted language and exercise."""
    mask = np.ones(len(pool.num_tokens), dtype=bool)
    wanted: tuple[tuple[Column, tuple[str, ...]], ...] = (
        ("language", config.languages),
        ("exercise", config.exercises),
    )
    for column, values in wanted:
        if values:
            codes, labels = _encoded(pool.metadata[column])
            mask &= np.array([label in values for label in labels])[codes]
    return mask


def _groups(
    pool: Pool, columns: Sequence[Column], allowed: np.ndarray
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Number of the group of each allowed sample, and the metadata that each number stands for."""
    codes, values = np.zeros(len(allowed), dtype=np.int64), [()]
    for column in columns:
        here, labels = _encoded(pool.metadata[column])
        joint, codes = np.unique(codes * len(labels) + here[allowed], return_inverse=True)
        values = [(*values[j // len(labels)], labels[j % len(labels)]) for j in joint]
    return codes, values


def _encoded(column: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Each entry as a number, and what the numbers stand for; a missing value is "None"."""
    encoded = column.dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(), [str(value) for value in encoded.dictionary.to_pylist()]


def _clocks(pool: Pool, config: SelectionConfig, allowed: np.ndarray) -> np.ndarray:
    """When each allowed sample's clock rings: exponential with rate = its weight."""
    key = str(config.seed).encode()
    hashes = b"".join(
        hashlib.blake2b(sample_id.encode(), digest_size=8, key=key).digest()
        for batch in np.array_split(allowed, len(allowed) // _IDS_AT_ONCE + 1)
        for sample_id in pool.sample_ids.take(pa.array(batch)).to_pylist()
    )
    uniform = (np.frombuffer(hashes, dtype="<u8").astype(np.float64) + 1) / (2.0**64 + 1)
    weights = np.maximum(pool.num_reasoning[allowed], 1.0) ** config.longer_reasoning
    return -np.log(uniform) / weights
