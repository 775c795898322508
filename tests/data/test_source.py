"""Inputs: found in order, streamed without loss, and refused with one clear line each."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conftest import rows, write_parquet
from vpmoe.data.source import find_inputs, read_rows
from vpmoe.errors import DataError
from vpmoe.storage.manifest import file_sha256


@pytest.fixture
def folder(tmp_path):
    write_parquet(tmp_path / "b.parquet", rows(70, first=50), row_group_size=20)
    write_parquet(tmp_path / "a.parquet", rows(50), row_group_size=7)
    (tmp_path / "notes.txt").write_text("not data")
    return tmp_path


def test_a_file_a_folder_and_a_glob(folder):
    assert [i.path for i in find_inputs(str(folder / "a.parquet"))] == [str(folder / "a.parquet")]
    for pattern in (str(folder), str(folder / "*.parquet"), f"{folder}/**/*.parquet"):
        found = find_inputs(pattern)
        assert [i.num_rows for i in found] == [50, 70]
        assert found[0].sha256 == file_sha256(folder / "a.parquet")


def test_a_url_through_fsspec(folder):
    found = find_inputs(f"file://{folder}/*.parquet")
    assert [i.num_rows for i in found] == [50, 70]
    assert sum(batch.num_rows for _, batch in read_rows(found, 0, 120)) == 120


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 120), (0, 1), (3, 9), (48, 52), (69, 71), (119, 120)]
)
@pytest.mark.parametrize("batch_size", [3, 512])
def test_any_range_gives_exactly_its_rows(folder, begin, end, batch_size):
    inputs = find_inputs(str(folder))
    got = [
        (first + i, sample_id)
        for first, batch in read_rows(inputs, begin, end, batch_size=batch_size)
        for i, sample_id in enumerate(batch.column("synth_id").to_pylist())
    ]
    assert got == [(i, f"row-{i}") for i in range(begin, end)]


def test_only_the_columns_asked_for(folder):
    _, batch = next(read_rows(find_inputs(str(folder)), 0, 5, columns=("synth_id",)))
    assert batch.schema.names == ["synth_id"]


def refused(path, what):
    with pytest.raises(DataError, match=what) as caught:
        find_inputs(str(path))
    assert caught.value.hint and "\n" not in caught.value.message


def test_nothing_there(tmp_path):
    refused(tmp_path, "no parquet files")
    refused(tmp_path / "x.parquet", "no parquet files")


@pytest.mark.parametrize("column", ["synth_id", "query", "synthetic_reasoning", "synthetic_answer"])
def test_a_missing_column(tmp_path, column):
    table = pa.Table.from_pylist(rows(3)).drop_columns([column])
    pq.write_table(table, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", f"has no column {column}")


@pytest.mark.parametrize("column", ["synth_id", "query", "language"])
def test_a_column_of_another_type(tmp_path, column):
    table = pa.Table.from_pylist([{**r, column: 5} for r in rows(3)])
    pq.write_table(table, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", f"column {column} holds int64")


def test_an_empty_file(tmp_path):
    (tmp_path / "x.parquet").touch()
    refused(tmp_path / "x.parquet", "empty")


def test_what_is_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_text("synth_id,query\n" * 100)
    refused(tmp_path / "x.parquet", "not whole parquet")


def test_a_truncated_file(folder):
    path = folder / "a.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, "not whole parquet")


def test_damaged_pages_behind_a_good_footer(folder):
    path = folder / "a.parquet"
    content = bytearray(path.read_bytes())
    content[10:2_000] = b"\xff" * 1_990
    path.write_bytes(content)
    with pytest.raises(DataError, match="not whole parquet"):
        list(read_rows(find_inputs(str(path)), 0, 50))


def test_a_file_that_changes_meanwhile(folder):
    inputs = find_inputs(str(folder / "a.parquet"))
    write_parquet(folder / "a.parquet", rows(10))
    with pytest.raises(DataError, match="changed during the build"):
        list(read_rows(inputs, 0, 50))


def test_a_file_that_goes_away(folder):
    inputs = find_inputs(str(folder / "a.parquet"))
    (folder / "a.parquet").unlink()
    with pytest.raises(DataError, match="cannot read"):
        list(read_rows(inputs, 0, 50))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder(folder):
    folder.chmod(0)
    try:
        refused(folder, "cannot read")
    finally:
        folder.chmod(0o700)


def test_an_unreadable_folder_for_every_user(folder, monkeypatch):
    from pathlib import Path

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    refused(folder, "cannot read .*Permission denied")
