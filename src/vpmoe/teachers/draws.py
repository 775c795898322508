"""Random draws that belong to a sequence, and how often each id came up among them."""

import hashlib

import numpy as np


def uniforms(sequence: np.ndarray, *, num_draws: int, seed: int) -> np.ndarray:
    """Where to look up a distribution at each place that a token follows: [n - 1, draws], float64.

    Draw i lies at random in part i of `num_draws` equal parts of [0, 1), so that they ascend. The
    numbers follow from `seed` and the sequence, whatever else is drawn before or beside it.
    """
    content = np.ascontiguousarray(sequence, dtype="<i8").tobytes()
    digest = hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    inside = random.random((len(sequence) - 1, num_draws))
    return (np.arange(num_draws) + inside) / num_draws


def weighted(
    ids: np.ndarray, logprobs: np.ndarray, *, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each drawn id once, and the log of its weight: how often it came up, times p over p^power.

    Args:
        ids: [places, draws], ascending along each place.
        logprobs: [places, draws], of the ids at power 1.
        power: Of the probabilities that they were drawn from.

    Returns:
        int32 and float32 [places, draws]: ids at the front, then 0; log-weights that add up to one,
        then -inf.
    """
    places, draws = ids.shape
    first = np.ones((places, draws), dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    row, column = np.nonzero(first)
    place = np.cumsum(first, axis=1)[row, column] - 1
    ends = np.append(column[1:], draws)
    ends[np.append(row[1:] != row[:-1], True)] = draws
    log_weights = np.full((places, draws), -np.inf)
    log_weights[row, place] = np.log(ends - column) + (1 - power) * logprobs[row, column]
    if draws:
        log_weights -= np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    once = np.zeros((places, draws), dtype=np.int32)
    once[row, place] = ids[row, column]
    return once, log_weights.astype(np.float32)
