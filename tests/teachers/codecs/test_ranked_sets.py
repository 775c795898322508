"""Sets of ranks: every set comes back, frequent members take few bits, no other bytes pass."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs.ragged import Ragged
from vpmoe.teachers.codecs.ranked_sets import HIGH, LOW, decode_ranks, encode_ranks
from vpmoe.vocabulary import VOCAB_SIZE

rank = st.integers(0, VOCAB_SIZE - 1) | st.integers(0, 99) | st.sampled_from([0, VOCAB_SIZE - 1])
any_set = st.sets(rank, min_size=1, max_size=256)


def shape_of(sets, places):
    return Ragged(torch.tensor([len(one) for one in sets]).long(), torch.tensor(places))


def both_ways(sets, places):
    flat = torch.tensor([i for one in sets for i in sorted(one)], dtype=torch.int64)
    shape = shape_of(sets, places)
    columns = encode_ranks(flat, shape)
    out = decode_ranks(columns[LOW].data, columns[HIGH].data, shape)
    assert out.tolist() == flat.tolist()
    return columns


@settings(max_examples=150, deadline=None)
@given(st.lists(any_set, max_size=8), st.integers(0, 8))
def test_any_sets_come_back(sets, cut):
    cut = min(cut, len(sets))
    together = both_ways(sets, [cut, 0, len(sets) - cut])
    first, second = both_ways(sets[:cut], [cut]), both_ways(sets[cut:], [len(sets) - cut])
    for name in (LOW, HIGH):  # a sample's bytes do not depend on its neighbours
        apart = first[name].data.tolist() + second[name].data.tolist()
        assert together[name].data.tolist() == apart


@pytest.mark.parametrize("number", range(0, VOCAB_SIZE, 9_001))
@pytest.mark.parametrize("count", [1, 16, 200])
def test_every_part_of_the_vocabulary_has_its_bucket(number, count):
    both_ways([set(range(number, min(number + count, VOCAB_SIZE)))], [1])


def test_one_rank_takes_an_elias_gamma_code():
    for number in (0, 1, 2, 5, 1_000, VOCAB_SIZE - 1):
        columns = both_ways([{number}] * 8, [8])
        exponent = math.floor(math.log2(number + 1))
        assert len(columns[HIGH].data) == exponent + 1
        assert len(columns[LOW].data) == exponent


@pytest.mark.parametrize(("count", "most"), [(4, 1.08), (16, 1.07), (64, 1.08), (256, 1.1)])
def test_sets_of_zipf_take_little_more_than_their_entropy(count, most):
    """Each rank is a member by itself, with a chance that falls as its inverse."""
    chance = count / (torch.arange(1, VOCAB_SIZE + 1).double() + 0.08 * count)
    chance = (chance * count / chance.sum()).clamp_max(1 - 1e-9)
    rng = torch.Generator().manual_seed(count)
    draws = torch.rand(200, VOCAB_SIZE, generator=rng)
    sets = [set(torch.nonzero(row < chance).flatten().tolist()) or {0} for row in draws]
    columns = both_ways(sets, [len(sets)])
    found = 8 * sum(len(column.data) for column in columns.values()) / len(sets)
    entropy = -(chance * chance.log2() + (1 - chance) * torch.log1p(-chance) / math.log(2)).sum()
    assert found < most * float(entropy)


def test_bytes_of_no_set_are_refused():
    """One changed bit gives another set or a refusal, never a rank that is not one."""
    rng = random.Random(0)
    sets = [set(rng.sample(range(VOCAB_SIZE), n)) for n in (1, 5, 64, 3)]
    columns = both_ways(sets, [4])
    shape, refused = shape_of(sets, [4]), 0
    for name in (LOW, HIGH):
        good = {key: column.data for key, column in columns.items()}
        for _ in range(200):
            bad = good[name].clone()
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            try:
                ranks = decode_ranks(*({**good, name: bad}[key] for key in (LOW, HIGH)), shape)
            except DataError:
                refused += 1
                continue
            assert int(ranks.min()) >= 0 and int(ranks.max()) < VOCAB_SIZE
            for part in ranks.split(shape.counts.tolist()):
                assert (part.diff() > 0).all()
        with pytest.raises(DataError, match=f"{name}"):
            cut = {**good, name: good[name][:-1]}
            decode_ranks(cut[LOW], cut[HIGH], shape)
    assert refused > 150
