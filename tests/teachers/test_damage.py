"""Damaged stores: whatever is done to their bytes, they are refused or read as they were."""

import base64
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.teachers.codecs.made import distributions
from tests.teachers.codecs.test_sampled import drawn
from vpmoe.config import resolved
from vpmoe.errors import DataError
from vpmoe.teachers.codecs import CodecConfig, Entries
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import Codec
from vpmoe.teachers.codecs.distillkit import DistillKitConfig
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.sampled import SampledConfig
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig
from vpmoe.teachers.shards import SampleTargets
from vpmoe.teachers.store import TargetStore, TargetWriter

TEACHER = distributions(20, seed=4)
GOLDEN = Path(__file__).parent / "golden_codes.json"
CODECS = (
    TopKConfig(k=8),
    SetCodedConfig(k=8),
    AdaptiveConfig(k=24, worth_nats=1e-2),
    SampledConfig(draws=20),
    DistillKitConfig(k=24, exact_k=4, polynomial_terms=(0, 1, "sqrt")),
)


RANKING = Ranking(torch.arange(0, 200_000, 201).flip(0))


def built(config: CodecConfig) -> Codec:
    return config.build().ranked_by(RANKING)


def said(config: CodecConfig) -> Entries:
    codec = config.build()
    sampled = codec.needs == "draws"
    return drawn(TEACHER.logprobs, codec.asked) if sampled else TEACHER.top(codec.asked)


def write_store(path: Path, config: CodecConfig) -> None:
    codec, entries, samples = built(config), said(config), []
    for number, (begin, end) in enumerate(((0, 7), (7, 12), (12, 20))):
        part = entries.select(torch.arange(begin, end))
        columns = codec.encode(part, torch.tensor([end - begin]))
        spans = np.array([0, 0, *[1] * (end - begin), 0], dtype=np.uint8)
        codes = {name: column.data.numpy() for name, column in columns.items()}
        logprobs = -np.arange(end - begin) / 8
        samples.append(SampleTargets(f"s{number}", spans, logprobs, codes))
    header = {"teacher": {"name": "t"}, "codec": resolved(config)}
    with TargetWriter(path, header, ranking=RANKING if codec.by_rank else None) as writer:
        writer.write(0, samples[:2])
        writer.write(1, samples[2:])
        writer.finish(2)


def read(path: Path) -> list:
    store = TargetStore(path)
    out = []
    for name in sorted(store):
        entries = store.aligned_entries(name)
        out += [name, store[name].tobytes(), store.span_ids(name).tobytes()]
        out += [t.numpy().tobytes() for t in (entries.ids, entries.logprobs, entries.tail)]
    return out


def damage(content: bytes, rng: random.Random) -> bytes:
    data, place = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        return bytes(data[:place])
    elif kind == 2:
        return bytes(data) + rng.randbytes(rng.randint(1, 64))
    elif kind == 3:
        length = min(rng.randint(1, 256), len(data) - place)
        data[place : place + length] = rng.randbytes(length)
    else:
        other = rng.randrange(len(data))
        data[place : place + 8], data[other : other + 8] = (
            data[other : other + 8],
            data[place : place + 8],
        )
    return bytes(data)


def refused_or_equal(tmp_path: Path, rounds: int) -> None:
    rng, refused = random.Random(rounds), 0
    for config in CODECS:
        path = tmp_path / config.kind
        write_store(path, config)
        good, files = read(path), sorted(f for f in path.iterdir() if f.name != ".lock")
        for _ in range(rounds // len(CODECS)):
            file = rng.choice(files)
            content = file.read_bytes()
            file.write_bytes(damage(content, rng))
            try:
                assert read(path) == good
            except DataError:
                refused += 1
            file.write_bytes(content)
        shutil.rmtree(path)
    assert refused > 0.6 * rounds  # the others changed a word of the manifest that is for people


def test_a_damaged_store_is_refused_or_read_as_it_was(tmp_path):
    refused_or_equal(tmp_path, 500)


@pytest.mark.slow
def test_ten_thousand_damaged_stores(tmp_path):
    refused_or_equal(tmp_path, 10_000)


@pytest.mark.parametrize("config", CODECS, ids=lambda config: config.kind)
def test_bytes_of_earlier_versions_are_still_read(config):
    """Golden codes: written once by `rewrite_golden`, read for ever after."""
    stored = json.loads(GOLDEN.read_text())[config.kind]
    codec = built(config)
    columns = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in stored["columns"].items()
    }
    out = codec.decode(columns, torch.tensor(stored["places"]))
    assert out.ids.tolist() == stored["ids"]
    logprobs = torch.tensor(
        [[-torch.inf if v is None else v for v in r] for r in stored["logprobs"]]
    )
    torch.testing.assert_close(out.logprobs, logprobs, atol=2e-5, rtol=1e-5)
    again = codec.encode(said(config), torch.tensor(stored["places"]))
    if math.isinf(codec.rounding_nats):  # a fit, whose last bits are the processor's
        out = codec.decode({n: c.data for n, c in again.items()}, torch.tensor(stored["places"]))
        assert out.ids.tolist() == stored["ids"]
        torch.testing.assert_close(out.logprobs, logprobs, atol=0.02, rtol=0)
        return
    assert {n: base64.b64encode(c.data.numpy()).decode() for n, c in again.items()} == stored[
        "columns"
    ]


def rewrite_golden() -> None:
    """python -c "from tests.teachers.test_damage import rewrite_golden as r; r()"."""
    golden = {}
    for config in CODECS:
        codec, places = built(config), [5, 0, 15]
        columns = codec.encode(said(config), torch.tensor(places))
        out = codec.decode({n: c.data for n, c in columns.items()}, torch.tensor(places))
        golden[config.kind] = {
            "places": places,
            "columns": {n: base64.b64encode(c.data.numpy()).decode() for n, c in columns.items()},
            "ids": out.ids.tolist(),
            "logprobs": [
                [None if v == -torch.inf else round(v, 6) for v in row]
                for row in out.logprobs.tolist()
            ],
        }
    GOLDEN.write_text(json.dumps(golden, sort_keys=True) + "\n")
