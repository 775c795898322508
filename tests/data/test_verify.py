"""Every single damage to a finished dataset is found."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from vpmoe.data.verify import verify_dataset
from vpmoe.errors import DataError
from vpmoe.storage.manifest import file_sha256, read_manifest, write_manifest


@pytest.fixture
def dataset(tmp_path, small_dataset):
    return shutil.copytree(small_dataset, tmp_path / "d")


def problems(folder):
    return " | ".join(verify_dataset(folder).problems)


def with_right_hashes(folder):
    """Make the manifest agree with the files, so that only their content can give them away."""
    manifest = read_manifest(folder / "manifest.json")
    for split, shards in manifest["splits"].items():
        for shard in shards:
            for name, facts in shard["files"].items():
                facts["sha256"] = file_sha256(folder / split / name)
    manifest["rejects_sha256"] = file_sha256(folder / "rejects.parquet")
    write_manifest(folder / "manifest.json", manifest)


def poke(folder, name, place, value, dtype):
    path = folder / "train" / name
    content = np.fromfile(path, dtype=dtype)
    content[place] = value
    content.tofile(path)
    with_right_hashes(folder)


def test_a_sound_dataset(small_dataset):
    seen = []
    report = verify_dataset(small_dataset, progress=lambda done, total: seen.append((done, total)))
    assert report.ok and report.files == 2 * 3 * 7 + 1
    assert report.rows == read_manifest(small_dataset / "manifest.json")["rows"]
    assert seen[-1] == (120, 120)


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(DataError, match="no dataset at"):
        verify_dataset(tmp_path / "x")
    with pytest.raises(DataError, match="unfinished"):
        verify_dataset(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add"])
def test_a_file_that_is_not_the_one_built(dataset, damage):
    path = dataset / "valid" / "shard_01_tokens.bin"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[5] ^= 1
        path.write_bytes(content)
        assert "shard_01_tokens.bin is not the file" in problems(dataset)
    elif damage == "cut":
        path.write_bytes(content[:-4])
        assert "shard_01_tokens.bin is not the file" in problems(dataset)
    elif damage == "remove":
        path.unlink()
        assert "shard_01_tokens.bin is missing" in problems(dataset)
    else:
        (dataset / "valid" / "shard_09_tokens.bin").touch()
        assert "shard_09_tokens.bin is not in the manifest" in problems(dataset)


@pytest.mark.parametrize(
    ("name", "place", "value", "dtype", "what"),
    [
        ("shard_00_span.bin", 0, 1, np.uint8, "span ids do not follow from the tokens"),
        ("shard_00_span.bin", 0, 7, np.uint8, "span ids do not follow from the tokens"),
        ("shard_00_lossmask.bin", 0, 1, np.uint8, "lossmask is not 1 exactly where"),
        ("shard_00_tokens.bin", 0, 19, np.int32, "does not begin with a message"),
        ("shard_00_tokens.bin", 9, 200_006, np.int32, "out of order"),
        ("shard_00_tokens.bin", 9, 201_088, np.int32, "outside the vocabulary"),
        ("shard_02_tokens.bin", -1, 19, np.int32, "end of text"),
    ],
)
def test_content_that_is_wrong_with_the_right_hash(dataset, name, place, value, dtype, what):
    poke(dataset, name, place, value, dtype)
    assert what in problems(dataset)


def test_boundaries_that_differ_between_arrays(dataset):
    path = dataset / "train" / "shard_00_span.idx"
    index = bytearray(path.read_bytes())
    lengths = np.frombuffer(index, dtype=np.int32, count=2, offset=34).copy()
    index[34:42] = (lengths + np.array([1, -1])).astype(np.int32).tobytes()
    path.write_bytes(index)
    with_right_hashes(dataset)
    assert "other sequence boundaries" in problems(dataset)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rows", {"train": 1, "valid": 1}),
        ("span_labels", {}),
        ("rejects", {"null_query": 1}),
        ("lengths", {}),
        ("tokens", {"train": 5, "valid": 5}),
        ("num_input_rows", 119),
        ("fingerprint", "0" * 12),
    ],
)
def test_a_manifest_that_miscounts(dataset, key, change):
    manifest = read_manifest(dataset / "manifest.json")
    write_manifest(dataset / "manifest.json", {**manifest, key: change})
    assert problems(dataset)


def test_a_row_in_the_wrong_split(dataset):
    manifest = read_manifest(dataset / "manifest.json")
    manifest["config"]["valid_fraction"] = 0.9
    write_manifest(dataset / "manifest.json", manifest)
    assert "does not belong in train" in problems(dataset)


def test_an_id_that_occurs_twice(dataset):
    path = dataset / "train" / "shard_00_samples.parquet"
    table = pq.read_table(path)
    ids = table.column("sample_id").to_pylist()
    place = table.schema.get_field_index("sample_id")
    pq.write_table(table.set_column(place, "sample_id", [[ids[1], *ids[1:]]]), path)
    with_right_hashes(dataset)
    assert "occurs twice" in problems(dataset)


def test_another_schema_or_tokenizer(dataset):
    manifest = read_manifest(dataset / "manifest.json")
    path = dataset / "manifest.json"
    path.write_text(json.dumps({**manifest, "schema_version": "older"}))
    with pytest.raises(DataError, match="'older'"):
        verify_dataset(dataset)
    other = {**manifest["tokenizer"], "sha256": "f" * 64}
    path.write_text(json.dumps({**manifest, "tokenizer": other}))
    with pytest.raises(DataError, match="built with tokenizer"):
        verify_dataset(dataset)
