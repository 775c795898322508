"""The split of a row is a fixed function of its id."""

import hashlib

from vpmoe.data.split import id_hash, split_of, valid_parts

KNOWN = [
    3743,
    4497,
    4612,
    5018,
    6603,
    6793,
    6814,
    6861,
    7172,
    8185,
    8438,
    9051,
    10991,
    12498,
    12648,
    13475,
    14167,
    14368,
    14607,
    15255,
    16245,
    16383,
    16838,
    18440,
    18480,
    18511,
    19141,
    19441,
]


def test_the_rule_by_hand():
    digest = hashlib.blake2b("größe-1".encode(), digest_size=8).digest()
    assert id_hash("größe-1") == int.from_bytes(digest, "big")
    assert split_of(999_999, valid_parts(0.001)) == "train"
    assert split_of(5_000_999, valid_parts(0.001)) == "valid"
    assert split_of(5_001_000, valid_parts(0.001)) == "train"


def test_known_ids_stay_where_they_are():
    """A changed hash would move held-out rows into training."""
    held_out = [i for i in range(20_000) if split_of(id_hash(f"synth-{i}"), 1_000) == "valid"]
    assert held_out == KNOWN


def test_the_ends_of_the_range():
    hashes = [id_hash(f"x{i}") for i in range(1_000)]
    assert {split_of(h, valid_parts(0.0)) for h in hashes} == {"train"}
    assert {split_of(h, valid_parts(1.0)) for h in hashes} == {"valid"}


def test_a_larger_share_keeps_the_rows_of_a_smaller_one():
    hashes = [id_hash(f"x{i}") for i in range(5_000)]
    small = {h for h in hashes if split_of(h, valid_parts(0.01)) == "valid"}
    large = {h for h in hashes if split_of(h, valid_parts(0.05)) == "valid"}
    assert small < large


def test_shares_are_the_decimals_they_are_written_as():
    assert valid_parts(0.07) == 70_000  # 0.07 * 10**6 is a little more in binary
    assert valid_parts(1e-7) == 1  # the remainder 0 lies below any share
