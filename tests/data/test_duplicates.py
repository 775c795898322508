"""The first of equal ids stays, whatever the number of passes."""

import pytest

from tests.data.conftest import rows, write_parquet
from vpmoe.data import duplicates
from vpmoe.data.duplicates import duplicate_rows
from vpmoe.data.source import find_inputs

IDS = ["a", "b", "a", None, "c", None, "b", "a", "d"]


@pytest.mark.parametrize("at_once", [1, 2, 1_000])
def test_all_but_the_first(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(duplicates, "_HASHES_AT_ONCE", at_once)
    content = [{**row, "synth_id": i} for row, i in zip(rows(len(IDS)), IDS, strict=True)]
    inputs = find_inputs(str(write_parquet(tmp_path / "x.parquet", content)))
    assert duplicate_rows(inputs, 9).tolist() == [2, 6, 7]
    assert duplicate_rows(inputs, 6).tolist() == [2]
    assert duplicate_rows(inputs, 2).tolist() == []


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "id_hash", lambda sample_id: 5)
    inputs = find_inputs(str(write_parquet(tmp_path / "x.parquet", rows(5))))
    assert duplicate_rows(inputs, 5).tolist() == []
