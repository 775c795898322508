"""Rows are whole documents, labels never cross them, and one integer is all the state."""

import shutil

import numpy as np
import pytest
import torch

from tests.data.conftest import build, rows, write_parquet
from vpmoe.batch import PADDING_DOCUMENT
from vpmoe.data import loader as module
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.errors import DataError
from vpmoe.vocabulary import END_OF_TEXT

SEQ_LEN = 512


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return Dataset(small_dataset, "train")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 16)


def loader(dataset, **settings):
    return PackedLoader(dataset, **{"seq_len": SEQ_LEN, "seed": 1, **settings})


def same(a, b):
    assert a.sample_ids == b.sample_ids
    for name in ("tokens", "labels", "span_ids", "document_ids", "positions"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_rows_hold_whole_documents_with_their_labels(dataset):
    batch = loader(dataset).batch(0, 8)
    for row, ids in enumerate(batch.sample_ids):
        at = 0
        for number, sample_id in enumerate(ids):
            stored = dataset.conversation(dataset.index_of[sample_id])
            size = stored.tokens.size
            part = slice(at, at + size)
            assert batch.tokens[row, part].tolist() == stored.tokens.tolist()
            assert batch.labels[row, part].tolist() == [*stored.tokens[1:].tolist(), END_OF_TEXT]
            assert batch.span_ids[row, part].tolist() == stored.span_ids.tolist()
            assert batch.positions[row, part].tolist() == list(range(size))
            assert set(batch.document_ids[row, part].tolist()) == {number}
            at += size
        assert set(batch.tokens[row, at:].tolist()) <= {END_OF_TEXT}
        assert set(batch.labels[row, at:].tolist()) <= {END_OF_TEXT}
        assert set(batch.document_ids[row, at:].tolist()) <= {PADDING_DOCUMENT}
        assert batch.span_ids[row, at:].sum() == batch.positions[row, at:].sum() == 0


@pytest.mark.parametrize("mode", ["pack", "slice"])
def test_any_row_is_the_same_however_it_is_reached(dataset, mode):
    total = loader(dataset, mode=mode).rows_in_epoch(0) * 2 + 5
    straight = loader(dataset, mode=mode).batch(0, total)
    for start, count in ((0, 3), (7, 2), (total - 4, 4), (total // 2, 1)):
        same(loader(dataset, mode=mode).batch(start, count), straight.rows(start, start + count))
    parts = loader(dataset, mode=mode)
    backwards = [parts.batch(k, 1) for k in reversed(range(total))][::-1]
    for k in (0, 1, total // 2, total - 1):
        same(backwards[k], straight.rows(k, k + 1))


def test_an_epoch_is_every_document_once(dataset):
    packed = loader(dataset)
    first, second = packed.rows_in_epoch(0), packed.rows_in_epoch(1)
    ids = [i for row in packed.batch(0, first).sample_ids for i in row]
    again = [i for row in packed.batch(first, second).sample_ids for i in row]
    assert sorted(ids) == sorted(again) == sorted(dataset.sample_ids)
    assert ids != again
    assert [packed.epoch_of(k) for k in (0, first - 1, first, first + second)] == [0, 0, 1, 2]


def test_slices_are_the_documents_end_to_end(dataset):
    sliced = loader(dataset, mode="slice", seq_len=100)
    count = sliced.rows_in_epoch(0)
    assert count == dataset.lengths.sum() // 100
    batch = sliced.batch(0, count)
    assert (batch.document_ids >= 0).all()
    stream = batch.tokens.reshape(-1).numpy()
    order = list(dict.fromkeys(i for row in batch.sample_ids for i in row))
    documents = [dataset.conversation(dataset.index_of[i]) for i in order]
    assert np.array_equal(stream, np.concatenate([d.tokens for d in documents])[: stream.size])
    spans = np.concatenate([d.span_ids for d in documents])[: stream.size]
    assert np.array_equal(batch.span_ids.reshape(-1).numpy(), spans)
    trained = batch.span_ids.reshape(-1)[:-1] > 0
    # A trained label at the edge of a row is the first token of the next one.
    assert torch.equal(
        batch.labels.reshape(-1)[:-1][trained], batch.tokens.reshape(-1)[1:][trained]
    )
    starts = batch.document_ids.diff(dim=1, prepend=torch.full((count, 1), -1)) != 0
    assert (batch.positions[starts] == 0).all()
    assert (batch.positions.diff(dim=1)[~starts[:, 1:]] == 1).all()


def test_seeds_give_other_orders(dataset):
    assert loader(dataset).batch(0, 4).sample_ids != loader(dataset, seed=2).batch(0, 4).sample_ids


def test_only_some_documents(dataset):
    chosen = frozenset(dataset.sample_ids[3:20:2])
    packed = loader(dataset, only=chosen)
    ids = [i for row in packed.batch(0, packed.rows_in_epoch(0)).sample_ids for i in row]
    assert sorted(ids) == sorted(chosen) and packed.num_documents == len(chosen)
    with pytest.raises(DataError, match=r"1 of 1 ids are not in .*first row-x"):
        loader(dataset, only=frozenset({"row-x"}))
    with pytest.raises(DataError, match="empty set"):
        loader(dataset, only=frozenset())


def made_up_scores(dataset, dtype=np.float16):
    return {
        sample_id: -np.arange(dataset.lengths[i], dtype=dtype) - i % 7
        for i, sample_id in enumerate(dataset.sample_ids)
    }


@pytest.mark.parametrize("mode", ["pack", "slice"])
def test_scores_stay_with_their_labels(dataset, mode):
    scores = made_up_scores(dataset)
    batch = loader(dataset, scores=scores, mode=mode, seq_len=300).batch(0, 10)
    assert batch.teacher_logprobs.dtype == torch.float32
    for row, ids in enumerate(batch.sample_ids):
        for number, sample_id in enumerate(ids):
            index = dataset.index_of[sample_id]
            mine = batch.document_ids[row] == number
            tokens = batch.tokens[row, mine].numpy()
            stored = dataset.tokens(index)
            windows = np.lib.stride_tricks.sliding_window_view(stored, tokens.size)
            begin = int(np.flatnonzero((windows == tokens).all(axis=1))[0])
            expected = scores[sample_id][begin : begin + tokens.size].astype(np.float32)
            expected[dataset.span_ids(index)[begin : begin + tokens.size] == 0] = 0
            assert batch.teacher_logprobs[row, mine].tolist() == expected.tolist()


def test_scores_that_are_missing_or_misfit(dataset):
    scores = made_up_scores(dataset)
    first = dataset.sample_ids[0]
    with pytest.raises(DataError, match=f"1 of {len(dataset)} samples have no teacher .*{first}"):
        loader(dataset, scores={k: v for k, v in scores.items() if k != first})
    short = loader(dataset, scores={**scores, first: scores[first][:-1]})
    with pytest.raises(DataError, match=f"sample {first} has .* labels and scores of shape"):
        short.batch(0, short.rows_in_epoch(0))
    wrong = loader(dataset, scores={**scores, first: scores[first] * np.nan})
    with pytest.raises(DataError, match="not finite"):
        wrong.batch(0, wrong.rows_in_epoch(0))


def test_packing_fills_rows_well(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 1_024)
    path = write_parquet(tmp_path / "x.parquet", rows(600))
    folder = build(tmp_path / "d", path, valid_fraction=0.0)
    packed = PackedLoader(Dataset(folder), seq_len=1024, seed=0)
    count = packed.rows_in_epoch(0)
    batch = packed.batch(0, count)
    assert packed.fill_rate == pytest.approx(batch.num_tokens / (count * 1024))
    assert packed.fill_rate > 0.95


def test_documents_that_do_not_fit_are_refused(dataset):
    with pytest.raises(DataError, match="does not fit rows of 100"):
        loader(dataset, seq_len=100)
    with pytest.raises(DataError, match="do not fill one row"):
        loader(dataset, seq_len=10**9, mode="slice")


def test_negative_rows_are_refused(dataset):
    with pytest.raises(DataError, match="no row -1"):
        loader(dataset).batch(-1, 1)


def test_opening_refuses_what_is_not_there(tmp_path, small_parquet, small_dataset):
    folder = build(tmp_path / "d", small_parquet, valid_fraction=0.0)
    with pytest.raises(DataError, match="no conversations in its valid split"):
        Dataset(folder, "valid")
    with pytest.raises(DataError, match="no example 1000"):
        Dataset(folder).conversation(1_000)


def test_opening_refuses_arrays_that_do_not_fit(tmp_path, small_dataset):
    folder = shutil.copytree(small_dataset, tmp_path / "d")
    for suffix in (".bin", ".idx"):
        source = folder / "train" / f"shard_01_span{suffix}"
        shutil.copy(source, folder / "train" / f"shard_00_span{suffix}")
    with pytest.raises(DataError, match="the manifest says"):
        Dataset(folder)


def test_a_loss_mask_that_contradicts_the_spans_is_refused(tmp_path, small_dataset):
    folder = shutil.copytree(small_dataset, tmp_path / "d")
    path = folder / "train" / "shard_00_lossmask.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    dataset = Dataset(folder)
    with pytest.raises(DataError, match="lossmask of sequence 0 does not fit"):
        dataset.conversation(0)
    dataset.conversation(1)
