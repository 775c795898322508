"""Byte equality with Megatron-Core's own builder, and refusal of everything damaged."""

import errno

import numpy as np
import pytest
import torch

from vpmoe.errors import DataError
from vpmoe.storage.indexed import IndexedReader, IndexedWriter

SEQUENCES = [[1, 2, 3], [201_087], [], [5] * 1_000, [7, 8]]


def _write(prefix, dtype=np.int32, sequences=SEQUENCES):
    with IndexedWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(np.array(sequence, dtype=dtype))
    return writer


def _megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint16, np.int64, np.float32])
def test_bytes_equal_megatrons_builder(tmp_path, dtype):
    megatron = _megatron()
    sequences = [np.array(s).astype(dtype) for s in SEQUENCES]
    _write(tmp_path / "ours", dtype, sequences)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=dtype)
    for sequence in sequences:
        builder.add_item(torch.from_numpy(sequence.astype(np.float64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"stock{suffix}").read_bytes()


def test_megatrons_reader_reads_ours(tmp_path):
    megatron = _megatron()
    _write(tmp_path / "x")
    stock = megatron.IndexedDataset(str(tmp_path / "x"))
    assert [stock[i].tolist() for i in range(len(stock))] == SEQUENCES
    assert stock.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert stock.index.dtype is np.int32


def test_ours_reads_ours_and_hashes_match(tmp_path):
    from vpmoe.storage.manifest import file_sha256

    writer = _write(tmp_path / "x")
    reader = IndexedReader(tmp_path / "x")
    assert [reader[i].tolist() for i in range(len(reader))] == SEQUENCES
    assert reader.offsets.tolist() == [0, 3, 4, 4, 1_004]
    assert writer.sha256 == {s: file_sha256(tmp_path / f"x{s}") for s in (".bin", ".idx")}


def test_many_at_once_equals_one_by_one(tmp_path):
    _write(tmp_path / "one")
    with IndexedWriter(tmp_path / "many", np.int32) as writer:
        writer.add_many(np.concatenate(SEQUENCES), np.array([len(s) for s in SEQUENCES]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_no_sequences_at_all(tmp_path):
    _write(tmp_path / "x", sequences=[])
    assert len(IndexedReader(tmp_path / "x")) == 0


def test_nothing_has_its_name_before_close(tmp_path):
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add(np.arange(3))
    assert not list(tmp_path.glob("x.bin")) and not list(tmp_path.glob("x.idx"))
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error_and_no_files(tmp_path, monkeypatch):
    from vpmoe.storage import atomic

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add(np.arange(3))
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match="no space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["cut", "grow", "remove"])
def test_damage_is_refused(tmp_path, suffix, damage):
    _write(tmp_path / "x")
    path = tmp_path / f"x{suffix}"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    with pytest.raises(DataError, match=rf"x\{suffix}"):
        IndexedReader(tmp_path / "x")


@pytest.mark.parametrize("position", [0, 9, 17])
def test_another_format_is_refused(tmp_path, position):
    _write(tmp_path / "x")
    content = bytearray((tmp_path / "x.idx").read_bytes())
    content[position] = 99
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(DataError, match="not an indexed dataset"):
        IndexedReader(tmp_path / "x")


def test_a_type_without_a_code_is_refused(tmp_path):
    with pytest.raises(DataError, match="float16"):
        IndexedWriter(tmp_path / "x", np.float16)
