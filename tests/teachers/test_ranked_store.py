"""Stores whose codec names ids by rank: the ranking is in every shard, and no other will do."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.teachers.codecs.made import distributions
from vpmoe.config import resolved
from vpmoe.errors import DataError
from vpmoe.storage.atomic import publish
from vpmoe.storage.manifest import file_sha256
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.shards import SampleTargets, Shard, header_of
from vpmoe.teachers.store import SCHEMA, TargetStore, TargetWriter

CONFIG = AdaptiveConfig(k=24, worth_nats=1e-2)
OURS, OTHER = Ranking(torch.tensor([9, 8, 7])), Ranking(torch.tensor([9, 7, 8]))
TOP = distributions(6, seed=2).top(24)
HEADER = {"codec": resolved(CONFIG)}


def sample() -> SampleTargets:
    columns = CONFIG.build().ranked_by(OURS).encode(TOP, torch.tensor([6]))
    codes = {name: column.data.numpy() for name, column in columns.items()}
    return SampleTargets("s", np.ones(6, dtype=np.uint8), -np.ones(6), codes)


def write(path, ranking=OURS):
    with TargetWriter(path, HEADER, ranking=ranking) as writer:
        writer.write(0, [sample()])
        return writer.finish(1)


def with_metadata(path, change):
    """The shard again with other metadata, under a name that fits its bytes."""
    (file,) = path.glob("*.arrow")
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    metadata = change(dict(table.schema.metadata))
    file.unlink()
    temporary = path / "shard"
    with pa.OSFile(str(temporary), "wb") as sink:
        table = table.replace_schema_metadata(metadata)
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    out = path / f"targets-00000-{file_sha256(temporary)[:16]}.arrow"
    publish(temporary, out)
    return out


def test_a_shard_explains_its_own_ids(tmp_path):
    manifest = write(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    assert header_of(file)["ranking_sha256"] == OURS.sha256 == manifest["header"]["ranking_sha256"]
    assert manifest["ranking_bytes"] == Shard(file).ranking_bytes == 10
    found = TargetStore(tmp_path).entries(["s"])
    for row, count in enumerate(found.counts.tolist()):
        assert sorted(found.ids[row, :count].tolist()) == sorted(TOP.ids[row, :count].tolist())


def test_another_ranking_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="ranking_sha256"):
        TargetWriter(tmp_path, HEADER, ranking=OTHER)
    file = with_metadata(tmp_path, lambda m: {**m, b"ranking": OTHER.to_bytes()})
    with pytest.raises(DataError, match=f"{OURS.sha256} of the ids, and {OTHER.sha256} is beside"):
        Shard(file)


def test_a_missing_ranking_is_refused(tmp_path):
    with pytest.raises(DataError, match="need the ranking beside them"):
        write(tmp_path / "a", ranking=None)
    write(tmp_path / "b")
    file = with_metadata(tmp_path / "b", lambda m: {b"vpmoe": m[b"vpmoe"]})
    with pytest.raises(DataError, match="ranking"):
        Shard(file)


def test_shards_of_before_are_refused(tmp_path):
    """Six bits for each value and no ranking: settings that this version does not have."""
    old = {"codec": {"kind": "adaptive", "k": 24, "value_bits": 6}}
    with (
        pytest.raises(DataError, match="this version does not have"),
        TargetWriter(tmp_path, old) as w,
    ):
        w.write(0, [sample()])


def test_a_store_of_another_version_is_refused_and_says_what_to_do(tmp_path):
    """Its rankings are other bytes, of which some would look like ours."""
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(SCHEMA, "vpmoe_targets_v2"))
    with pytest.raises(DataError, match="has schema 'vpmoe_targets_v2'") as caught:
        TargetStore(tmp_path)
    assert "score again with this version" in caught.value.hint
