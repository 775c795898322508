"""A GPU writes the bytes that a CPU writes, and reads them as a CPU does."""

import pytest
import torch

from tests.teachers.codecs.made import distributions
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig

CONFIGS = [
    TopKConfig(),
    SetCodedConfig(),
    AdaptiveConfig(),
    AdaptiveConfig(worth_nats=3e-4, fine_bits=3),
    AdaptiveConfig(top_p=0.9),
    AdaptiveConfig(tail="prior", worth_nats=3e-3),
]
FIRST = torch.arange(0, 200_000, 3).flip(0)
RANKING = Ranking(FIRST, torch.arange(len(FIRST)).flip(0) // 1_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_gpu_writes_and_reads_the_same_bytes(config):
    codec = config.build().ranked_by(RANKING)
    top, places = distributions(60, seed=9).top(codec.asked), torch.tensor([20, 0, 40])
    here = codec.encode(top, places)
    there = codec.encode(top.to("cuda"), places.cuda())
    for name, column in here.items():
        assert torch.equal(column.data, there[name].data.cpu()), name
        assert torch.equal(column.sizes, there[name].sizes.cpu())
    columns = {name: column.data for name, column in here.items()}
    ours = codec.decode(columns, places)
    theirs = codec.decode({n: d.cuda() for n, d in columns.items()}, places.cuda()).to("cpu")
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.tail, theirs.tail, atol=1e-5, rtol=0)
