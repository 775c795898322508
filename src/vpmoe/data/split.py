"""Which rows are held out: a function of the row's own id and nothing else."""

import hashlib
import math
from fractions import Fraction
from typing import Literal

Split = Literal["train", "valid"]

SPLITS: tuple[Split, Split] = ("train", "valid")
SPLIT_RULE = "valid if blake2b-8(synth_id), big-endian, mod 10^6 < valid_fraction * 10^6"
_PARTS = 1_000_000


def id_hash(sample_id: str) -> int:
    """64-bit blake2b of the id's UTF-8 bytes, read big-endian."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big")


def valid_parts(valid_fraction: float) -> int:
    """How many millionths of the hash range are held out: remainders below the fraction's share."""
    return math.ceil(Fraction(str(valid_fraction)) * _PARTS)  # the decimal as it is written


def split_of(hashed_id: int, parts: int) -> Split:
    """The split of a row, from `id_hash` and `valid_parts`."""
    return "valid" if hashed_id % _PARTS < parts else "train"
