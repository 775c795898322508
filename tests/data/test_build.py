"""The builder end to end: bytes, counts, resumes, refusals, and what Megatron-Core makes of it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import DEFAULTS, build, conversation, rows, write_parquet
from vpmoe.config import load
from vpmoe.data import build as module
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.split import id_hash, split_of
from vpmoe.data.structure import align_to_labels
from vpmoe.data.verify import verify_dataset
from vpmoe.errors import DataError
from vpmoe.storage import atomic
from vpmoe.storage.indexed import IndexedReader
from vpmoe.storage.manifest import read_manifest
from vpmoe.vocabulary import END_OF_TEXT

REPOSITORY = Path(__file__).resolve().parents[2]


def files_of(folder):
    """Everything of a dataset that must not depend on how it was made."""
    paths = [
        p for p in folder.rglob("*") if p.is_file() and p.suffix in {".bin", ".idx", ".parquet"}
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_each_sequence_is_the_rendered_conversation_and_an_end_of_text(tmp_path):
    content = rows(12)
    path = write_parquet(tmp_path / "x.parquet", content)
    folder = build(tmp_path / "data", path, seq_len=4096, valid_fraction=0.0, oracle_rows=12)
    renderer = Renderer(RenderConfig())
    shard = {
        a: IndexedReader(folder / f"train/shard_00_{a}") for a in ("tokens", "lossmask", "span")
    }
    assert len(shard["tokens"]) == 12
    for index, row in enumerate(content):
        rendered = renderer.render(
            conversation(row["query"], row["synthetic_reasoning"], row["synthetic_answer"])
        )
        assert shard["tokens"][index].tolist() == [*rendered.tokens.tolist(), END_OF_TEXT]
        spans = np.append(rendered.span_ids, np.uint8(0))
        expected = align_to_labels(spans, np.array([spans.size]))
        assert shard["span"][index].tolist() == expected.tolist()
        assert shard["lossmask"][index].tolist() == (expected != 0).tolist()


def test_the_split_and_the_sample_tables(small_dataset):
    everything = [r["synth_id"] for r in rows(120)]
    held_out = [i for i in everything if split_of(id_hash(i), 200_000) == "valid"]
    train, valid = Dataset(small_dataset, "train"), Dataset(small_dataset, "valid")
    assert valid.sample_ids == held_out and 10 < len(held_out) < 40
    assert train.sample_ids == [i for i in everything if i not in held_out]
    table = train.samples
    assert table.column("num_tokens").to_pylist() == train.lengths.tolist()
    reasoning = [int((train.span_ids(i) == 1).sum()) for i in range(len(train))]
    assert table.column("num_reasoning").to_pylist() == reasoning
    assert set(table.column("language").to_pylist()) == {"en", "de"}
    assert set(table.column("exercise").to_pylist()) == {"math", None}


def test_megatron_reads_every_shard(small_dataset):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    train = Dataset(small_dataset, "train")
    first = 0
    for shard in read_manifest(small_dataset / "manifest.json")["splits"]["train"]:
        prefix = str(small_dataset / "train" / shard["name"])
        stock = {
            a: megatron.IndexedDataset(f"{prefix}_{a}") for a in ("tokens", "lossmask", "span")
        }
        assert [str(np.dtype(s.index.dtype)) for s in stock.values()] == ["int32", "uint8", "uint8"]
        count = len(stock["tokens"])
        assert stock["tokens"].document_indices.tolist() == list(range(count + 1))
        for i in range(count):
            assert stock["tokens"][i].tolist() == train.tokens(first + i).tolist()
            assert stock["span"][i].tolist() == train.span_ids(first + i).tolist()
            assert len(stock["lossmask"][i]) == len(stock["tokens"][i])
        first += count
    assert first == len(train)


def test_the_manifest_counts_everything(small_dataset):
    manifest = read_manifest(small_dataset / "manifest.json")
    train, valid = Dataset(small_dataset, "train"), Dataset(small_dataset, "valid")
    assert manifest["rows"] == {"train": len(train), "valid": len(valid)}
    assert manifest["tokens"]["train"] == train.lengths.sum()
    spans = np.concatenate([train.span_ids(i) for i in range(len(train))])
    counts = np.bincount(spans, minlength=3).tolist()
    assert list(manifest["span_labels"]["train"].values()) == counts
    assert manifest["inputs"][0]["num_rows"] == manifest["num_input_rows"] == 120
    assert manifest["oracle_rows"] == 3 * 4
    assert manifest["renderer"].startswith("oss-harmony==")
    histogram = [sum(b) for e in manifest["lengths"].values() for b in e.values()]
    assert sum(histogram) == 120


def test_workers_and_layout_of_the_input_change_no_byte(tmp_path, small_parquet, small_dataset):
    (tmp_path / "parts").mkdir()
    write_parquet(tmp_path / "parts" / "0.parquet", rows(50), row_group_size=9)
    write_parquet(tmp_path / "parts" / "1.parquet", rows(70, first=50))
    for name, source, workers in (("a", small_parquet, 2), ("b", tmp_path / "parts", 1)):
        seen = []
        config = DataConfig(
            input=str(source), output=tmp_path / name, shards=3, workers=workers, **DEFAULTS
        )
        build_dataset(config, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert files_of(tmp_path / name) == files_of(small_dataset)
        assert seen == sorted(seen) and seen[-1] == (120, 120)


def test_a_limit_takes_the_first_rows(tmp_path, small_parquet):
    folder = build(tmp_path / "d", small_parquet, limit=10, valid_fraction=0.0)
    assert Dataset(folder).sample_ids == [f"row-{i}" for i in range(10)]


def test_rejects_are_listed_and_counted(tmp_path):
    content = rows(20)
    content[3]["query"] = None
    content[5]["synthetic_answer"] = "so <|return|>"
    content[7]["synth_id"] = content[2]["synth_id"]
    content[9]["synth_id"] = None
    content[11]["synthetic_answer"] = "word " * 600
    content[13]["query"] = " " * 1_000_000 + "x"
    path = write_parquet(tmp_path / "x.parquet", content)
    folder = build(tmp_path / "d", path, valid_fraction=0.0, shards=2)
    listed = pq.read_table(folder / "rejects.parquet").to_pylist()
    expected = {
        3: ("row-3", "null_query"),
        5: ("row-5", "special_token_in_answer"),
        7: ("row-2", "duplicate_id"),
        9: (None, "null_id"),
        11: ("row-11", "final_too_long"),
        13: ("row-13", "untokenizable"),
    }
    assert {r["row"]: (r["sample_id"], r["reason"]) for r in listed} == expected
    manifest = read_manifest(folder / "manifest.json")
    assert sum(manifest["rejects"].values()) == 6 and manifest["rows"]["train"] == 14
    assert verify_dataset(folder).ok


def test_long_rows_are_cut_and_counted(tmp_path, small_parquet, small_dataset):
    median = int(np.median(Dataset(small_dataset).lengths))
    folder = build(tmp_path / "d", small_parquet, seq_len=median, valid_fraction=0.0)
    dataset = Dataset(folder)
    manifest = read_manifest(folder / "manifest.json")
    truncated = dataset.samples.column("truncated").to_pylist()
    assert 0 < manifest["cuts"]["rows"] == sum(truncated) < len(dataset)
    assert int(dataset.lengths.max()) == median
    assert verify_dataset(folder).ok


def test_rendered_conversations_are_an_input_too(tmp_path):
    import json

    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "channel": "analysis", "content": "old"},
        {"role": "assistant", "channel": "final", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "assistant", "channel": "analysis", "content": "new"},
        {"role": "assistant", "channel": "final", "content": "d"},
    ]
    content = [{"synth_id": "x", "messages_json": json.dumps({"messages": turns})}]
    path = write_parquet(tmp_path / "x.parquet", content)
    folder = build(tmp_path / "d", path, valid_fraction=0.0, render={"system": False})
    from vpmoe.data.harmony import decode

    assert decode(Dataset(folder).tokens(0)) == (
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>"
        "<|start|>user<|message|>c<|end|><|start|>assistant<|channel|>analysis<|message|>new<|end|>"
        "<|start|>assistant<|channel|>final<|message|>d<|return|><|endoftext|>"
    )


def test_an_id_among_the_metadata_will_do(tmp_path):
    import json

    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "channel": "analysis", "content": "b"},
        {"role": "assistant", "channel": "final", "content": "c"},
    ]
    ids = ({"synth_id": "x"}, {"synth_id": "x"}, {"synth_id": "y", "language": "fr"}, {}, None)
    rows = [{"messages_json": json.dumps(turns), "metadata_json": json.dumps(i)} for i in ids]
    path = write_parquet(tmp_path / "x.parquet", rows)
    folder = build(tmp_path / "d", path, valid_fraction=0.0)
    assert Dataset(folder).sample_ids == ["x", "y"]
    rejects = Dataset(folder).manifest["rejects"]
    assert rejects == {"duplicate_id": 1, "null_id": 2}


def test_a_finished_dataset_is_not_overwritten_unasked(tmp_path, small_parquet):
    folder = build(tmp_path / "d", small_parquet, limit=20)
    before = files_of(folder)
    with pytest.raises(DataError, match="finished dataset"):
        build(folder, small_parquet, limit=30)
    assert files_of(folder) == before
    config = DataConfig(input=str(small_parquet), output=folder, limit=30)
    assert build_dataset(config, overwrite=True)["num_input_rows"] == 30
    assert verify_dataset(folder).ok


def test_a_folder_with_something_else_in_it_is_refused(tmp_path, small_parquet):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"thesis\.tex"):
        build(tmp_path, small_parquet)


def test_two_builds_at_once_are_refused(tmp_path, small_parquet):
    with module._held(tmp_path / "d"), pytest.raises(DataError, match="another build"):
        build(tmp_path / "d", small_parquet)
    build(tmp_path / "d", small_parquet, limit=5)


def test_a_worker_s_error_is_the_build_s_and_makes_no_dataset(tmp_path, monkeypatch):
    first = write_parquet(tmp_path / "a.parquet", rows(40))
    second = write_parquet(tmp_path / "b.parquet", rows(40, first=40))
    content = bytearray(second.read_bytes())
    content[4:900] = b"\xff" * 896
    second.write_bytes(content)
    monkeypatch.setattr(module, "duplicate_rows", lambda i, n: np.empty(0, dtype=np.int64))
    with pytest.raises(DataError, match="not whole parquet"):
        build(tmp_path / "d", tmp_path / "*.parquet", shards=2, workers=2)
    with pytest.raises(DataError, match="unfinished"):
        Dataset(tmp_path / "d")
    assert not list((tmp_path / "d").rglob("*.tmp"))
    write_parquet(second, rows(40, first=40))
    with pytest.raises(DataError, match="other settings: inputs"):
        build(tmp_path / "d", tmp_path / "*.parquet", shards=2)
    assert first.exists()


def test_a_full_disk_is_one_clear_error(tmp_path, small_parquet, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(DataError, match="no space left") as caught:
            build(tmp_path / "d", small_parquet)
    assert "free some space" in caught.value.hint
    assert not list((tmp_path / "d").rglob("*.tmp"))
    assert not list((tmp_path / "d").rglob("shard_*.bin"))
    assert verify_dataset(build(tmp_path / "d", small_parquet)).ok


def test_a_disagreeing_oracle_ends_the_build(tmp_path, small_parquet, monkeypatch):
    honest = Renderer.oracle_tokens
    monkeypatch.setattr(Renderer, "oracle_tokens", lambda self, c: honest(self, c)[1:])
    with pytest.raises(DataError, match="renders other tokens from position 0"):
        build(tmp_path / "d", small_parquet)


def test_no_rows_and_no_good_rows(tmp_path):
    import pyarrow as pa

    schema = pa.Table.from_pylist(rows(1)).schema
    pq.write_table(schema.empty_table(), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="has no rows"):
        build(tmp_path / "d", tmp_path / "none.parquet")
    bad = write_parquet(tmp_path / "bad.parquet", [{**r, "query": ""} for r in rows(3)])
    with pytest.raises(DataError, match=r"every row .* empty_query \(3\)"):
        build(tmp_path / "e", bad)


def test_an_output_that_cannot_be_made(tmp_path, small_parquet):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        build(tmp_path / "file" / "d", small_parquet)


SCRIPT = """
import sys
from pathlib import Path
from vpmoe.data.build import DataConfig, build_dataset
build_dataset(DataConfig(
    input=sys.argv[1], output=Path(sys.argv[2]), shards=6, seq_len=512, valid_fraction=0.2,
    oracle_rows=4,
))
"""


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(tmp_path, small_parquet):
    whole = build(tmp_path / "whole", small_parquet, shards=6)
    folder = tmp_path / "killed"
    marker = folder / ".build" / "shard_02.json"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(small_parquet), str(folder)])
    deadline = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == 0:
        pytest.skip("the build was faster than the kill")
    with pytest.raises(DataError, match="unfinished"):
        Dataset(folder)
    kept = marker.stat().st_mtime_ns
    damaged = folder / "train" / "shard_01_span.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\2")  # a disk that lied is found out
    seen = []
    config = DataConfig(
        input=str(small_parquet),
        output=folder,
        shards=6,
        seq_len=512,
        valid_fraction=0.2,
        oracle_rows=4,
    )
    original = module.build_shard

    def noting(task, progress):
        seen.append((task.name, task.marker.exists() and task.marker.stat().st_mtime_ns == kept))
        return original(task, progress)

    module.build_shard = noting
    try:
        build_dataset(config)
    finally:
        module.build_shard = original
    assert ("shard_02", True) in seen
    assert files_of(folder) == files_of(whole)
    assert not (folder / ".build").exists()


def test_workers_die_with_a_killed_build(tmp_path):
    """Else an orphan would write into the shard that the resumed build is making."""
    path = write_parquet(tmp_path / "x.parquet", rows(20_000))
    script = SCRIPT.replace("shards=6", "shards=2, workers=2")
    main = f"if __name__ == '__main__':\n    {script.strip().replace(chr(10), chr(10) + '    ')}"
    (tmp_path / "build.py").write_text(main)
    command = [sys.executable, str(tmp_path / "build.py"), str(path), str(tmp_path / "d")]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("d/train/*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert workers and psutil.wait_procs(workers, timeout=20)[1] == []


def test_every_data_config_loads_and_the_real_sample_builds(tmp_path, synth_sample):
    for path in sorted((REPOSITORY / "configs" / "data").glob("*.toml")):
        load(path, DataConfig)
    config = load(
        REPOSITORY / "configs" / "data" / "synth-kd-v1.toml",
        DataConfig,
        [f"input={synth_sample}", f"output={tmp_path / 'd'}"],
    )
    manifest = build_dataset(config)
    assert manifest["rows"] == {"train": 887, "valid": 0}
    assert manifest["rejects"] == {"final_too_long": 1}
    assert verify_dataset(tmp_path / "d").ok


MEMORY = """
import sys
from pathlib import Path
from vpmoe.data.build import DataConfig, build_dataset
build_dataset(DataConfig(input=sys.argv[1], output=Path(sys.argv[2]), shards=1, seq_len=512))
status = Path("/proc/self/status").read_text()  # not ru_maxrss: that outlives an exec
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """One row group, one shard: the worst layout there is."""
    peaks = []
    for count in (2_000, 200_000):
        path = write_parquet(
            tmp_path / f"{count}.parquet", rows(count), row_group_size=count, compression="none"
        )
        output = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), str(tmp_path / str(count))],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(output.stdout) / 1024)
    assert peaks[1] < 1024, f"{peaks} MiB"
    assert peaks[1] - peaks[0] < 200, f"{peaks} MiB"
