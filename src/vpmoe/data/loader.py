"""Batches from a dataset: packed or sliced, each a pure function of one integer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vpmoe.batch import PADDING_DOCUMENT, Batch
from vpmoe.data.dataset import Dataset
from vpmoe.data.pack import best_fit, permuted
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.vocabulary import END_OF_TEXT

BLOCK_DOCUMENTS = 1_024  # how far packing looks ahead
_FILL_BLOCKS = 64
_KEPT_BLOCKS = 8
_ENTRIES_STEP = 8  # widths of a batch's targets are multiples of it, so that few shapes occur

Mode = Literal["pack", "slice"]


@dataclass(frozen=True)
class Piece:
    """Part of a document in a row: all of it when packing.

    Attributes:
        document: Index in the dataset.
        begin: First token taken.
        end: One past the last token taken.
    """

    document: int
    begin: int
    end: int


class TargetSource(Protocol):
    """Stored distributions, as a target store gives them."""

    @property
    def max_entries(self) -> int:
        """The most ids that a label can have."""
        ...

    def entries(self, sample_ids: Sequence[str]) -> Any:
        """`ids`, `logprobs` and `tail` at the trained labels of documents, one after another."""
        ...


class PackedLoader:
    """An endless stream of rows; row number k is the same whoever asks, whenever.

    The stream runs through epochs. An epoch is a seeded permutation of the documents, cut into
    blocks of `BLOCK_DOCUMENTS`; each block is packed by itself and its rows are shuffled.

    Args:
        dataset: Where the documents are.
        seq_len: Tokens of a row.
        seed: Of the order of documents and rows.
        mode: "pack" never splits a document and pads; "slice" lays the documents end to end and
            cuts every `seq_len` tokens, losing less than one row an epoch.
        scores: sample_id -> teacher log-probs of the document's labels, one per token.
        targets: Distributions of the same samples; batches then hold them too.
        only: Use only documents with these ids.

    Attributes:
        num_documents: Documents in an epoch.

    Raises:
        DataError: If a document does not fit a row, or scores or ids are missing.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_len: int,
        seed: int,
        mode: Mode = "pack",
        scores: Mapping[str, np.ndarray] | None = None,
        targets: TargetSource | None = None,
        only: frozenset[str] | None = None,
    ) -> None:
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.mode: Mode = mode
        self._scores = scores
        self._targets = targets
        self._indices = _chosen(dataset, only)
        self.num_documents = int(self._indices.size)
        self._num_blocks = -(-self.num_documents // BLOCK_DOCUMENTS)
        # Per epoch, rows (pack) or tokens (slice) before each block; grows as far as was asked for.
        self._before: dict[int, list[int]] = {}
        self._block_rows = lru_cache(_KEPT_BLOCKS)(self._pack_block)
        self._block_order = lru_cache(_KEPT_BLOCKS)(self._permute_block)
        self._require_fit()
        self._require_scores()

    def batch(self, start: int, count: int) -> Batch:
        """Rows `start` to `start + count` of the stream.

        Args:
            start: Rows consumed so far, over all ranks and epochs: the loader's whole state.
            count: Rows of the batch; ranks take slices of it themselves.
        """
        return self._assemble([self.row(k) for k in range(start, start + count)])

    def row(self, number: int) -> list[Piece]:
        """What row `number` of the stream is made of."""
        epoch, place = self._epoch_and_place(number)
        return self._packed(epoch, place) if self.mode == "pack" else self._sliced(epoch, place)

    def epoch_of(self, number: int) -> int:
        """The epoch that row `number` belongs to, from 0."""
        return self._epoch_and_place(number)[0]

    def rows_in_epoch(self, epoch: int) -> int:
        """How many rows this epoch has; when packing, it takes a pass over all lengths."""
        total = self._total_before(epoch, self._num_blocks)
        return total if self.mode == "pack" else max(total // self.seq_len, 1)

    @property
    def fill_rate(self) -> float:
        """Share of the first epoch's row tokens that belong to documents, over its first blocks."""
        if self.mode == "slice":
            return 1.0
        blocks = min(_FILL_BLOCKS, self._num_blocks)
        used = sum(int(self._lengths(0, block).sum()) for block in range(blocks))
        return used / (self._total_before(0, blocks) * self.seq_len)

    def _epoch_and_place(self, number: int) -> tuple[int, int]:
        if number < 0:
            raise DataError(f"there is no row {number}")
        if self.mode == "slice":
            return divmod(number, self.rows_in_epoch(0))
        epoch = 0
        while number >= (rows := self._rows_up_to(epoch, number)):
            number -= rows
            epoch += 1
        return epoch, number

    def _rows_up_to(self, epoch: int, number: int) -> int:
        """Rows of the epoch, counted no further than needed to hold row `number`."""
        before = self._before.setdefault(epoch, [0])
        while before[-1] <= number and len(before) <= self._num_blocks:
            self._total_before(epoch, len(before))
        return before[-1]

    def _total_before(self, epoch: int, block: int) -> int:
        """Rows (pack) or tokens (slice) of the epoch before `block`."""
        before = self._before.setdefault(epoch, [0])
        while len(before) <= block:
            new = len(before) - 1
            pack = self.mode == "pack"
            size = len(self._block_rows(epoch, new)) if pack else self._lengths(epoch, new).sum()
            before.append(before[-1] + int(size))
        return before[block]

    def _packed(self, epoch: int, place: int) -> list[Piece]:
        self._rows_up_to(epoch, place)
        block = int(np.searchsorted(self._before[epoch], place, side="right")) - 1
        documents = self._block_rows(epoch, block)[place - self._before[epoch][block]]
        return [Piece(d, 0, int(self.dataset.lengths[d])) for d in documents]

    def _sliced(self, epoch: int, place: int) -> list[Piece]:
        self._total_before(epoch, self._num_blocks)
        at, stop = place * self.seq_len, (place + 1) * self.seq_len
        block = int(np.searchsorted(self._before[epoch], at, side="right")) - 1
        pieces: list[Piece] = []
        while at < stop and block < self._num_blocks:
            ends = self._before[epoch][block] + np.cumsum(self._lengths(epoch, block))
            place = int(np.searchsorted(ends, at, side="right"))
            for end, document in zip(ends[place:], self._block_order(epoch, block)[place:]):  # noqa: B905
                first = int(end) - int(self.dataset.lengths[document])
                pieces.append(Piece(int(document), at - first, min(int(end), stop) - first))
                at = min(int(end), stop)
                if at == stop:
                    break
            block += 1
        return pieces

    def _permute_block(self, epoch: int, block: int) -> np.ndarray:
        """Dataset indices of a block of the epoch's permutation."""
        begin = block * BLOCK_DOCUMENTS
        places = np.arange(begin, min(begin + BLOCK_DOCUMENTS, self.num_documents))
        order = permuted(places, self.num_documents, seed=self.seed, epoch=epoch)
        return self._indices[order]

    def _lengths(self, epoch: int, block: int) -> np.ndarray:
        return self.dataset.lengths[self._block_order(epoch, block)]

    def _pack_block(self, epoch: int, block: int) -> list[list[int]]:
        """The block's rows as dataset indices, shuffled: packing opens rows by length."""
        documents = self._block_order(epoch, block)
        rows = best_fit(self.dataset.lengths[documents], self.seq_len)
        order = permuted(np.arange(len(rows)), len(rows), seed=self.seed + block + 1, epoch=epoch)
        return [documents[rows[i]].tolist() for i in order.tolist()]

    def _assemble(self, rows: list[list[Piece]]) -> Batch:
        shape = (len(rows), self.seq_len)
        tokens = np.full(shape, END_OF_TEXT, dtype=np.int64)
        labels = np.full(shape, END_OF_TEXT, dtype=np.int64)
        span_ids = np.zeros(shape, dtype=np.uint8)
        document_ids = np.full(shape, PADDING_DOCUMENT, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        scores = None if self._scores is None else np.zeros(shape, dtype=np.float32)
        for row, pieces in enumerate(rows):
            at = 0
            for number, piece in enumerate(pieces):
                stored = self.dataset.tokens(piece.document)
                where = (row, slice(at, at + piece.end - piece.begin))
                following = stored[piece.begin + 1 : piece.end + 1]
                tokens[where] = stored[piece.begin : piece.end]
                labels[row, at : at + following.size] = following
                span_ids[where] = self.dataset.span_ids(piece.document)[piece.begin : piece.end]
                document_ids[where] = number
                positions[where] = np.arange(piece.end - piece.begin)
                if scores is not None:
                    scores[where] = self._document_scores(piece)
                at += piece.end - piece.begin
        if scores is not None:
            scores[span_ids == Span.IGNORE] = 0
        sample_id = self.dataset.sample_id
        trained = torch.from_numpy(span_ids != Span.IGNORE)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            span_ids=torch.from_numpy(span_ids),
            document_ids=torch.from_numpy(document_ids),
            positions=torch.from_numpy(positions),
            teacher_logprobs=None if scores is None else torch.from_numpy(scores),
            sample_ids=tuple(tuple(sample_id(p.document) for p in pieces) for pieces in rows),
            **self._target_fields(rows, trained),
        )

    def _target_fields(self, rows: list[list[Piece]], trained: Tensor) -> dict[str, Tensor]:
        """Stored distributions at the trained labels of the rows, which follow one another alike.

        As wide as the fullest label of the batch needs, or a little wider.
        """
        if self._targets is None:
            return {}
        pieces = [piece for row in rows for piece in row]
        found = self._targets.entries([self.dataset.sample_id(p.document) for p in pieces])
        kept = torch.from_numpy(np.concatenate([self._trained_inside(p) for p in pieces]))
        if len(kept) != len(found.ids):
            raise DataError(
                f"{len(kept)} trained labels, and targets for {len(found.ids)}",
                hint="score the dataset again",
            )
        needed = found.ids.shape[1]
        width = min(-(-needed // _ENTRIES_STEP) * _ENTRIES_STEP, self._targets.max_entries)
        ids = torch.zeros(*trained.shape, width, dtype=torch.int64)
        logprobs = torch.full(ids.shape, -torch.inf)
        tail = torch.full(trained.shape, -torch.inf)
        place = trained.nonzero(as_tuple=True)
        ids[*place, :needed] = found.ids[kept]
        logprobs[*place, :needed] = found.logprobs[kept]
        tail[place] = found.tail[kept]
        return {"target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}

    def _trained_inside(self, piece: Piece) -> np.ndarray:
        """For each trained label of the piece's document, whether the piece holds it."""
        place = np.flatnonzero(self.dataset.span_ids(piece.document) != Span.IGNORE)
        return (piece.begin <= place) & (place < piece.end)

    def _document_scores(self, piece: Piece) -> np.ndarray:
        if self._scores is None:
            raise DataError("the loader was made without scores")
        sample_id = self.dataset.sample_id(piece.document)
        found = np.asarray(self._scores[sample_id])
        expected = int(self.dataset.lengths[piece.document])
        if found.shape != (expected,):
            raise DataError(
                f"sample {sample_id} has {expected} labels and scores of shape {found.shape}",
                hint="score the dataset again",
            )
        trained = self.dataset.span_ids(piece.document) != Span.IGNORE
        if not np.isfinite(found[trained]).all():
            raise DataError(
                f"sample {sample_id} has scores that are not finite", hint="score it again"
            )
        return found[piece.begin : piece.end]

    def _require_fit(self) -> None:
        lengths = self.dataset.lengths[self._indices]
        longest = int(lengths.argmax())
        if self.mode == "pack" and lengths[longest] > self.seq_len:
            raise DataError(
                f"a conversation of {lengths[longest]} tokens does not fit rows of {self.seq_len}",
                hint="raise seq_len, rebuild the data with this seq_len, or use mode slice",
            )
        if self.mode == "slice" and lengths.sum() < self.seq_len:
            raise DataError(
                f"{lengths.sum()} tokens in all do not fill one row of {self.seq_len}",
                hint="lower seq_len, or use mode pack",
            )

    def _require_scores(self) -> None:
        if self._scores is None:
            return
        ids = self.dataset.sample_ids
        missing = [ids[i] for i in self._indices.tolist() if ids[i] not in self._scores]
        if missing:
            raise DataError(
                f"{len(missing)} of {self.num_documents} samples have no teacher scores, "
                f"first {missing[0]}",
                hint="finish scoring, or give the loader the scored ids only",
            )


def _chosen(dataset: Dataset, only: frozenset[str] | None) -> np.ndarray:
    if only is None:
        return np.arange(len(dataset))
    chosen = [i for i, sample_id in enumerate(dataset.sample_ids) if sample_id in only]
    if len(chosen) < len(only):
        missing = sorted(only - set(dataset.sample_ids))
        raise DataError(
            f"{len(missing)} of {len(only)} ids are not in {dataset.path}, "
            f"first {missing[0] if missing else 'none'}",
            hint="the list of ids belongs to another dataset or split",
        )
    if not chosen:
        raise DataError("an empty set of ids leaves nothing to load", hint="give at least one id")
    return np.array(chosen, dtype=np.int64)
