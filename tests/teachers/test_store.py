"""Target stores: aligned, whole or absent, and indifferent to how often they were interrupted."""

import json
import random
import time

import numpy as np
import pyarrow as pa
import pytest

from tests.teachers.tiny import run_and_kill
from vpmoe.errors import DataError
from vpmoe.storage.manifest import file_sha256
from vpmoe.teachers import RecordedTeacherConfig
from vpmoe.teachers.shards import SampleTargets, shard_files
from vpmoe.teachers.store import TargetStore, TargetWriter

HEADER = {"teacher": {"name": "t", "dtype": "float32"}, "dataset_sha256": "d", "fraction": 0.5}
SPANS = np.array([0, 0, 1, 1, 1, 2, 2, 0], dtype=np.uint8)


def sample(index: int) -> SampleTargets:
    rng = np.random.default_rng(index)
    spans = rng.choice(3, size=rng.integers(4, 40), p=[0.4, 0.4, 0.2]).astype(np.uint8)
    spans[0] = 1
    return SampleTargets(f"s{index}", spans, -rng.exponential(2, (spans > 0).sum()))


def slices(count: int, size: int = 3) -> list[list[SampleTargets]]:
    return [[sample(size * i + k) for k in range(size)] for i in range(count)]


def write_all(path, parts, header=HEADER, **options):
    with TargetWriter(path, header, **options) as writer:
        for index, part in enumerate(parts):
            if index not in writer.done:
                writer.write(index, part)
        return writer.finish(len(parts))


def contents(path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix in (".arrow", ".json")}


def test_log_probs_come_back_where_they_belong(tmp_path):
    two_turns = np.array([0, 2, 2, 0, 0, 1, 2, 2, 0], dtype=np.uint8)
    parts = [
        [SampleTargets("a", SPANS, np.array([-1.0, -2, -3, -4, -5]))],
        [
            SampleTargets("b", two_turns, np.array([-0.5, -0.25, -8, -16, -32])),
            SampleTargets("ü", SPANS, np.zeros(5)),
        ],
    ]
    write_all(tmp_path, parts)
    store = TargetStore(tmp_path)
    assert dict(store).keys() == {"a", "b", "ü"}
    assert len(store) == 3 and "a" in store and "z" not in store
    assert store["a"].dtype == np.float16
    assert store["a"].tolist() == [0, 0, -1, -2, -3, -4, -5, 0]
    assert store["b"].tolist() == [0, -0.5, -0.25, 0, 0, -8, -16, -32, 0]
    assert store["ü"].tolist() == [0] * 8
    np.testing.assert_array_equal(store.span_ids("a"), SPANS)
    np.testing.assert_array_equal(store.span_ids("b"), two_turns)
    with pytest.raises(KeyError):
        store["z"]


def test_many_samples_survive_the_round_trip(tmp_path):
    parts = slices(20)
    write_all(tmp_path, parts)
    store = TargetStore(tmp_path)
    for part in parts:
        for target in part:
            expected = np.zeros(len(target.span_ids), dtype=np.float16)
            expected[target.span_ids > 0] = target.logprobs
            np.testing.assert_array_equal(store[target.sample_id], expected)
            np.testing.assert_array_equal(store.span_ids(target.sample_id), target.span_ids)


def test_values_beyond_float16_are_clipped_to_its_ends(tmp_path):
    write_all(tmp_path, [[SampleTargets("a", SPANS, np.array([-1e6, 1e-7, -1e-9, 0, -1]))]])
    assert TargetStore(tmp_path)["a"].tolist() == [0, 0, -65504, 0, 0, 0, -1, 0]


def test_statistics_are_exact(tmp_path):
    parts = slices(10)
    statistics = write_all(tmp_path, parts)["teacher_logprobs"]
    flat = [t for part in parts for t in part]
    for span, name in ((1, "reasoning"), (2, "final")):
        values = np.concatenate([t.logprobs[t.span_ids[t.span_ids > 0] == span] for t in flat])
        values = np.sort(values.astype(np.float16).astype(np.float64))
        assert statistics[name]["labels"] == len(values)
        assert statistics[name]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert statistics[name]["q0.05"] == values[int(np.ceil(0.05 * len(values))) - 1]
        assert statistics[name]["q0.5"] == values[int(np.ceil(0.5 * len(values))) - 1]
    means = [t.logprobs.astype(np.float16).astype(np.float64).mean() for t in flat]
    assert statistics["sample_mean"]["q0.25"] == pytest.approx(np.quantile(means, 0.25))


def test_labels_and_spans_must_match(tmp_path):
    with pytest.raises(DataError, match="sample a has 5 trained labels and 4 log-probs"):
        write_all(tmp_path, [[SampleTargets("a", SPANS, np.zeros(4))]])
    assert not shard_files(tmp_path)


def write_slowly(store, parts, log):
    with TargetWriter(store, HEADER) as writer:
        for index, part in enumerate(parts):
            if index not in writer.done:
                with log.open("a") as lines:
                    lines.write(f"{index}\n")
                time.sleep(0.01)
                writer.write(index, part)
        writer.finish(len(parts))


def test_a_killed_writer_loses_one_slice_at_most(tmp_path):
    """Real processes, killed with SIGKILL at random moments; the bytes end up the same."""
    parts = slices(20)
    write_all(tmp_path / "whole", parts)
    store, log = tmp_path / "killed", tmp_path / "scored.log"
    rng, kills, finished = random.Random(7), 0, False
    while not finished:
        kills += run_and_kill(lambda: write_slowly(store, parts, log), log, rng)
        finished = (store / "manifest.json").exists()
        if not finished:
            with pytest.raises(DataError, match="has no manifest"):
                TargetStore(store)
    assert kills >= 3
    scored = [int(line) for line in log.read_text().split()]
    assert set(scored) == set(range(20))
    assert len(scored) - 20 <= kills  # each kill costs the slice under way and no other
    killed, whole = contents(store), contents(tmp_path / "whole")
    assert killed == whole


def test_a_half_written_shard_is_never_read(tmp_path):
    parts = slices(3)
    with TargetWriter(tmp_path, HEADER) as writer:
        writer.write(0, parts[0])
    whole = next(tmp_path.glob("*.arrow")).read_bytes()
    torn = tmp_path / "targets-00001.arrow.tmp"
    torn.write_bytes(whole[: len(whole) // 2])
    with TargetWriter(tmp_path, HEADER) as writer:
        assert writer.done == {0}
        assert not torn.exists()
    write_all(tmp_path, parts)
    assert len(TargetStore(tmp_path)) == 9


def test_a_changed_byte_is_found_by_reader_and_writer(tmp_path):
    parts = slices(3)
    write_all(tmp_path, parts)
    victim = shard_files(tmp_path)[1]
    good = victim.read_bytes()
    for place in (20, len(good) // 2, len(good) - 5):
        bad = bytearray(good)
        bad[place] ^= 1
        victim.write_bytes(bad)
        with pytest.raises(DataError, match=rf"{victim.name} is damaged") as caught:
            TargetStore(tmp_path)
        assert "the other shards are kept" in caught.value.hint
        with pytest.raises(DataError, match="is damaged"):
            TargetWriter(tmp_path, HEADER)
    victim.unlink()
    with pytest.raises(DataError, match=rf"lacks {victim.name}"):
        TargetStore(tmp_path)
    with TargetWriter(tmp_path, HEADER) as writer:  # what the hint says
        assert writer.done == {0, 2} and not writer.finished
    write_all(tmp_path, parts)
    assert victim.read_bytes() == good


def test_a_shard_of_another_store_under_the_right_name_is_refused(tmp_path):
    write_all(tmp_path / "a", slices(2))
    write_all(tmp_path / "b", slices(2), {**HEADER, "fraction": 0.9})
    mine, foreign = (shard_files(tmp_path / name)[1] for name in "ab")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["shards"][1]["file"] = foreign.name
    mine.unlink()
    foreign.rename(tmp_path / "a" / foreign.name)
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not the shard that the manifest names"):
        TargetStore(tmp_path / "a")


def test_other_settings_are_refused_with_the_difference(tmp_path):
    write_all(tmp_path, slices(2))
    other = {**HEADER, "fraction": 0.9}
    with pytest.raises(DataError, match=r"other settings: fraction: 0\.5 → 0\.9"):
        TargetWriter(tmp_path, other)
    with TargetWriter(tmp_path, other, overwrite=True) as writer:
        assert writer.done == set() and not writer.finished
    with TargetWriter(tmp_path, HEADER) as writer:
        assert writer.done == set()


def test_a_finished_store_stays_finished(tmp_path):
    write_all(tmp_path, slices(2))
    with TargetWriter(tmp_path, HEADER) as writer:
        assert writer.finished and writer.done == {0, 1}


@pytest.mark.parametrize("text", ["{torn", "[]", '{"shards": [1]}', '{"shards": 3}', "{}"])
def test_a_manifest_that_cannot_be_made_out_is_written_again(tmp_path, text):
    write_all(tmp_path, slices(2))
    good = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        TargetStore(tmp_path)
    with TargetWriter(tmp_path, HEADER) as writer:
        assert writer.done == {0, 1} and not writer.finished
        writer.finish(2)
    assert (tmp_path / "manifest.json").read_bytes() == good


def test_a_manifest_without_names_of_shards_is_refused(tmp_path):
    write_all(tmp_path, slices(2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": [1]}))
    with pytest.raises(DataError, match="lacks the names of its shards"):
        TargetStore(tmp_path)


def test_shards_of_another_version_give_way_to_overwrite(tmp_path):
    write_all(tmp_path, slices(2))
    for index, file in shard_files(tmp_path).items():
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all().drop_columns(["run_spans"])
        table = table.replace_schema_metadata({"vpmoe": json.dumps({"codec": {"kind": "old"}})})
        file.unlink()
        with pa.ipc.new_file(str(tmp_path / "old"), table.schema) as sink:
            sink.write_table(table)
        digest = file_sha256(tmp_path / "old")[:16]
        (tmp_path / "old").rename(tmp_path / f"targets-{index:05d}-{digest}.arrow")
    with pytest.raises(DataError, match="scored with other settings"):
        TargetWriter(tmp_path, HEADER)
    with TargetWriter(tmp_path, HEADER, overwrite=True) as writer:
        assert writer.done == set()


def test_files_of_somebody_else_are_left_alone(tmp_path):
    write_all(tmp_path, slices(2))
    for name in ("targets-old-copy.arrow", "targets-00001-backup.arrow"):
        (tmp_path / name).write_bytes(b"")
    with TargetWriter(tmp_path, HEADER) as writer:
        assert writer.finished and writer.done == {0, 1}
    assert len(TargetStore(tmp_path)) == 6 and (tmp_path / "targets-old-copy.arrow").exists()


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        TargetWriter(tmp_path, HEADER),
        pytest.raises(DataError, match="another process is writing"),
    ):
        TargetWriter(tmp_path, HEADER)
    TargetWriter(tmp_path, HEADER).close()


def test_finish_wants_every_slice(tmp_path):
    with TargetWriter(tmp_path, HEADER) as writer:
        writer.write(1, slices(2)[1])
        with pytest.raises(DataError, match="has 1 of 2 shards"):
            writer.finish(2)


def test_a_store_for_another_dataset_is_refused(tmp_path):
    write_all(tmp_path, slices(1))
    store = RecordedTeacherConfig(path=tmp_path).build()
    store.require(dataset_sha256="d")
    with pytest.raises(DataError, match="made with dataset_sha256 = d, here it is e"):
        store.require(dataset_sha256="e")


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(DataError, match="has no manifest"):
        TargetStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": "vpmoe_dataset_v1"}')
    with pytest.raises(DataError, match="schema 'vpmoe_dataset_v1'"):
        TargetStore(tmp_path)
    with pytest.raises(DataError, match="cannot write"):
        TargetWriter(tmp_path / "manifest.json" / "x", HEADER)
