"""Loss on conversations a student has not trained on, per span, beside a unigram baseline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8

from vpmoe.batch import PADDING_DOCUMENT, content_mask
from vpmoe.data.dataset import Dataset, Document
from vpmoe.evals.by_span import BySpan, tally
from vpmoe.head import token_logprobs
from vpmoe.models.student import Student
from vpmoe.spans import Span
from vpmoe.vocabulary import END_OF_TEXT, VOCAB_SIZE

BATCH_TOKENS = 8_192
LOGITS_AT_ONCE = 2**26  # 256 MiB in float32, whatever the vocabulary
UNIGRAM_DOCUMENTS = 20_000  # of the train split: far more than a unigram table needs
ADD_ONE = 1.0  # Laplace smoothing


@dataclass(frozen=True)
class Heldout:
    """Mean negative log-likelihood in nats per label, over every label of the documents.

    Attributes:
        num_documents: Conversations evaluated.
        token_counts: Labels behind each mean.
        loss: Of the student.
        content_loss: Of the student, headers and end tokens left out.
        unigram_loss: Of a table of token frequencies; None without a train split to count.
        unigram_content_loss: The same without headers and end tokens.
    """

    num_documents: int
    token_counts: dict[str, int]
    loss: BySpan
    content_loss: BySpan
    unigram_loss: BySpan | None = None
    unigram_content_loss: BySpan | None = None


@dataclass(frozen=True)
class Labels:
    """The trained labels of some documents, end to end.

    Attributes:
        ids: o200k ids.
        span_ids: `REASONING` or `FINAL`, never `IGNORE`.
        is_content: False for headers and end tokens.
    """

    ids: np.ndarray
    span_ids: UInt8[np.ndarray, " labels"]
    is_content: np.ndarray


def documents_of(dataset: Dataset, *, limit: int = 0) -> list[Document]:
    """The first `limit` documents of a split, or all of them (0)."""
    count = min(limit, len(dataset)) if limit else len(dataset)
    return [dataset.conversation(i) for i in range(count)]


def trained_labels(documents: Sequence[Document]) -> Labels:
    """The labels that training learns from, in order."""
    ids, spans, content = [], [], []
    for document in documents:
        tokens = torch.from_numpy(document.tokens.astype(np.int64))
        labels = tokens.roll(-1)
        labels[-1] = END_OF_TEXT
        span_ids = torch.from_numpy(np.array(document.span_ids, dtype=np.uint8))
        kept = (span_ids != Span.IGNORE).numpy()
        ids.append(labels.numpy()[kept])
        spans.append(span_ids.numpy()[kept])
        content.append(content_mask(tokens[None], labels[None], span_ids[None])[0].numpy()[kept])
    return Labels(np.concatenate(ids), np.concatenate(spans), np.concatenate(content))


def heldout_loss(
    student: Student,
    documents: Sequence[Document],
    *,
    train_documents: Sequence[Document] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> Heldout:
    """The student's loss on whole documents, each read once and alone.

    Means are over all labels of a span, whatever document they are in: long documents weigh more.
    The result does not depend on `batch_tokens` beyond rounding.

    Args:
        student: Evaluated as it is, and left in the mode it was in.
        documents: What it is judged by.
        train_documents: What the unigram baseline counts; none for no baseline.
        batch_tokens: Tokens of one forward, padding included; a longer document goes alone.
    """
    labels = trained_labels(documents)
    losses = -document_logprobs(student, documents, batch_tokens=batch_tokens)
    content = labels.is_content
    own = tally(losses, labels.span_ids)
    unigram = unigram_content = None
    if train_documents:
        table = unigram_logprobs(train_documents, student)
        baseline = -table[labels.ids]
        unigram = tally(baseline, labels.span_ids).means()
        unigram_content = tally(baseline[content], labels.span_ids[content]).means()
    return Heldout(
        num_documents=len(documents),
        token_counts=own.token_counts(),
        loss=own.means(),
        content_loss=tally(losses[content], labels.span_ids[content]).means(),
        unigram_loss=unigram,
        unigram_content_loss=unigram_content,
    )


def unigram_logprobs(documents: Sequence[Document], student: Student) -> np.ndarray:
    """Log-probability of each o200k id under add-one smoothed label frequencies.

    The baseline knows the same vocabulary as the student: ids that a vocabulary subset leaves out
    get minus infinity, as the student gives them.
    """
    counts = np.bincount(trained_labels(documents).ids, minlength=VOCAB_SIZE) + ADD_ONE
    subset = student.config.vocab_subset
    if subset is not None:
        known = np.zeros(VOCAB_SIZE, dtype=bool)
        known[list(subset)] = True
        counts = np.where(known, counts, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())


@torch.no_grad()
def document_logprobs(
    student: Student, documents: Sequence[Document], *, batch_tokens: int = BATCH_TOKENS
) -> Float[np.ndarray, " labels"]:
    """The student's log-probability of every trained label, in the order of `trained_labels`."""
    parts: dict[int, np.ndarray] = {}
    for members in _batches([len(d.tokens) for d in documents], batch_tokens):
        rows = [documents[i] for i in members]
        for index, logprobs in zip(members, _read(student, rows), strict=True):
            parts[index] = logprobs
    return np.concatenate([parts[i] for i in range(len(documents))])


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of documents of similar length whose padded batch stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _read(student: Student, documents: Sequence[Document]) -> list[np.ndarray]:
    """Log-probabilities of each document's trained labels, documents padded to one batch."""
    shape = (len(documents), max(len(d.tokens) for d in documents))
    tokens = np.full(shape, END_OF_TEXT, dtype=np.int64)
    spans = np.zeros(shape, dtype=np.uint8)
    place = np.arange(shape[1])
    lengths = np.array([len(d.tokens) for d in documents])
    for row, document in enumerate(documents):
        tokens[row, : lengths[row]] = document.tokens
        spans[row, : lengths[row]] = document.span_ids
    device = student.head_weight.device
    hidden = student(
        torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(np.broadcast_to(place, shape).copy()).to(device),
        document_ids=torch.from_numpy(np.where(place < lengths[:, None], 0, PADDING_DOCUMENT)).to(
            device
        ),
    ).hidden
    kept = torch.from_numpy(spans != Span.IGNORE).to(device)
    labels = torch.from_numpy(np.roll(tokens, -1, axis=1)).to(device)[kept]
    chunk_rows = max(1, LOGITS_AT_ONCE // student.head_weight.shape[0])
    logprobs = token_logprobs(
        hidden[kept], student.head_weight, student.rows_of(labels), chunk_rows=chunk_rows
    )
    counts = (spans != Span.IGNORE).sum(axis=1)
    return np.split(logprobs.cpu().numpy(), np.cumsum(counts)[:-1])


class HeldoutHook:
    """Held-out loss inside a training loop: `valid/loss/<span>` and `valid/content_loss/<span>`.

    Every rank reads the same documents, so the numbers are the same on each.

    Args:
        documents: What to read, each time the same.
        every_steps: Steps between evaluations; 0 for the last step alone.
    """

    def __init__(self, documents: Sequence[Document], *, every_steps: int) -> None:
        self.documents = documents
        self.every_steps = every_steps

    def __call__(self, student: Student, position: object) -> Mapping[str, float]:
        """The numbers to log."""
        del position
        found = heldout_loss(student, self.documents)
        rows: dict[str, float] = {}
        for name, means in (("loss", found.loss), ("content_loss", found.content_loss)):
            for span, value in vars(means).items():
                if value is not None and span != "all":
                    rows[f"valid/{name}/{span}"] = value
        return rows
