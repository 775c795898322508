"""Order and packing of documents as pure functions of (seed, epoch, index)."""

from bisect import bisect_left, insort

import numpy as np

_ROUNDS = 6
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)  # an odd 64-bit mixing constant (splitmix64)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def permuted(indices: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where each index of 0..size-1 goes in the seeded permutation of this epoch.

    A Feistel network on the next even number of bits, walked until it lands inside: any part of
    the permutation is computed without the rest, so that a position needs no stored state.

    References:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): cycle walking.

    Example:
        >>> sorted(permuted(np.arange(5), 5, seed=1, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [
        np.uint64((_GOLDEN * (_ROUNDS * (epoch + 1) + r + 1) ^ (seed * 2 + 1) * _GOLDEN) & _MASK)
        for r in range(_ROUNDS)
    ]
    values = _feistel(np.asarray(indices, dtype=np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIER
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIER
    return values ^ (values >> np.uint64(31))


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Documents packed into rows of `capacity` tokens, none split, longest first, tightest fit.

    Args:
        lengths: Tokens of each document, none over `capacity`.
        capacity: Tokens of a row.

    Returns:
        For each row the documents in it, in the order given; rows in the order of their opening.

    References:
        Johnson, "Near-Optimal Bin Packing Algorithms" (1973): best fit decreasing.

    Example:
        >>> best_fit(np.array([3, 5, 2, 4, 1]), 8)
        [[0, 1], [2, 3, 4]]
    """
    order = np.argsort(-lengths, kind="stable")
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    rows: list[list[int]] = []
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        insort(open_rows, (room - length, row))
    return [sorted(row) for row in rows]
