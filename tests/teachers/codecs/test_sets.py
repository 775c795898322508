"""Sets of ids: every set comes back, in the bytes that were promised, and no other bytes pass."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs.sets import HIGH, LOW, decode_sets, encode_sets
from vpmoe.vocabulary import VOCAB_SIZE

any_set = st.sets(st.integers(0, VOCAB_SIZE - 1) | st.sampled_from([0, 1, 2, VOCAB_SIZE - 1]))


def both_ways(sets, places):
    counts = torch.tensor([len(one) for one in sets], dtype=torch.int64)
    flat = torch.tensor([i for one in sets for i in sorted(one)], dtype=torch.int64)
    split = torch.tensor(places, dtype=torch.int64)
    columns = encode_sets(flat, counts, split)
    out = decode_sets(columns[LOW].data, columns[HIGH].data, counts, split)
    assert out.tolist() == flat.tolist()
    return columns


@settings(max_examples=150, deadline=None)
@given(st.lists(any_set, max_size=8), st.integers(0, 8))
def test_any_sets_come_back(sets, cut):
    cut = min(cut, len(sets))
    together = both_ways(sets, [cut, len(sets) - cut])
    first, second = both_ways(sets[:cut], [cut]), both_ways(sets[cut:], [len(sets) - cut])
    for name in (LOW, HIGH):  # a sample's bytes do not depend on its neighbours
        apart = first[name].data.tolist() + second[name].data.tolist()
        assert together[name].data.tolist() == apart


@pytest.mark.parametrize(("count", "bits"), [(1, 19), (2, 37), (12, 192), (64, 866), (128, 1604)])
def test_size_is_near_the_logarithm_of_the_number_of_sets(count, bits):
    rng = random.Random(count)
    sets = [set(rng.sample(range(VOCAB_SIZE), count)) for _ in range(40)]
    columns = both_ways(sets, [40])
    found = 8 * sum(len(column.data) for column in columns.values())
    assert abs(found - 40 * bits) <= 16
    least = math.log2(math.comb(VOCAB_SIZE, count))
    assert least <= bits < 1.06 * least + 2


def test_bytes_of_no_set_are_refused():
    """One changed bit gives another set or a refusal, never an id that is not one."""
    rng = random.Random(0)
    sets = [set(rng.sample(range(VOCAB_SIZE), n)) for n in (1, 5, 64, 3)]
    columns = both_ways(sets, [4])
    counts, places = torch.tensor([1, 5, 64, 3]), torch.tensor([4])
    refused = 0
    for name in (LOW, HIGH):
        good = {key: column.data for key, column in columns.items()}
        for _ in range(200):
            bad = good[name].clone()
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            try:
                ids = decode_sets(
                    *({**good, name: bad}[key] for key in (LOW, HIGH)), counts, places
                )
            except DataError:
                refused += 1
                continue
            assert int(ids.min()) >= 0 and int(ids.max()) < VOCAB_SIZE
            for part in ids.split(counts.tolist()):
                assert (part.diff() > 0).all()
        with pytest.raises(DataError, match="bytes of"):
            cut = {**good, name: good[name][:-1]}
            decode_sets(cut[LOW], cut[HIGH], counts, places)
    assert refused > 150
