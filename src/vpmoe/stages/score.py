"""Before stage 2: what a teacher thinks of a dataset's own answers, written once."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator, model_validator

from vpmoe.batch import ReasoningEffort
from vpmoe.config import Config, resolved
from vpmoe.data.dataset import Dataset, Document
from vpmoe.data.effort import with_effort
from vpmoe.data.harmony import RenderConfig
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.stages.label_ranking import label_ranking
from vpmoe.teachers import TeacherConfig
from vpmoe.teachers.ask import Said, checked, said_of
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TARGETS, Teacher, known_ids, num_known_ids
from vpmoe.teachers.codecs import Codec, CodecConfig, fitted
from vpmoe.teachers.codecs.logprob import LogprobConfig
from vpmoe.teachers.selection import Column, Pool, SelectionConfig, select
from vpmoe.teachers.shards import SampleTargets
from vpmoe.teachers.store import TargetStore, TargetWriter
from vpmoe.vocabulary import O200K_SHA256

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)

# Of one call to the teacher: how often progress is told. Servers name their own, larger number: at
# the end of a call they run dry.
_PIECE_TOKENS = 2**16
# Packed together: on a GPU a call costs a hundred launches, on a CPU so many still fit its caches.
_PACKED_PLACES = 2**13

# Config


class ScoreConfig(Config):
    """Which part of a dataset is scored, by whom, and where the answers go."""

    kind: Literal["score"] = "score"
    data: Path
    """Folder of a finished dataset."""
    split: Literal["train", "valid"] = "train"
    output: Path
    """Folder of the target store; an interrupted one is continued."""
    teacher: TeacherConfig
    """Who scores."""
    reasoning_effort: ReasoningEffort | None = None
    """Named in the teacher's system message; absent = the prompt as the dataset renders it."""
    selection: SelectionConfig = SelectionConfig()
    """Which samples."""
    codec: CodecConfig = LogprobConfig()
    """What is kept of the teacher's distributions, beside the log-prob of each trained token."""
    shard_tokens: int = Field(default=2**20, ge=1)
    """Tokens of the documents in one file; a killed run loses the file under way."""

    @field_validator("teacher")
    @classmethod
    def _can_score(cls, teacher: Any) -> Any:
        if ROLLOUT_LOGPROBS not in teacher.provides:
            raise ValueError(f"a {teacher.kind} teacher cannot score a dataset; use kind = local")
        return teacher

    @model_validator(mode="after")
    def _can_serve(self) -> Self:
        if self.codec.build().needs != "logprobs" and TARGETS not in self.teacher.provides:
            raise ValueError(
                f"a {self.teacher.kind} teacher gives log-probs alone, which is not enough for "
                f"codec {self.codec.kind}; use codec.kind = logprob"
            )
        return self


# Build


def run(
    config: ScoreConfig, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """The manifest of the target store that `config` describes, scored as far as it was not.

    Args:
        config: What to score.
        overwrite: Replace a store made with other settings.
        progress: Told (tokens done, tokens in all).

    Raises:
        DataError: If dataset or store are broken, or the store belongs to other settings.
        TeacherError: If the teacher cannot be loaded or answers nonsense.
    """
    dataset = Dataset(config.data, config.split)
    teacher = config.teacher.build()
    assert isinstance(teacher, Teacher)  # the config's validator saw to it
    return score_dataset(dataset, teacher, config, overwrite=overwrite, progress=progress)


def open_targets(path: Path, dataset: Dataset) -> TargetStore:
    """A finished target store, verified to speak of the samples of `dataset`.

    Raises:
        DataError: If the store is damaged, or was made for other data or another vocabulary.
    """
    store = TargetStore(path)
    store.require(
        split=dataset.split,  # first: another split's hash differs as well
        dataset_sha256=content_sha256(dataset),
        tokenizer_sha256=O200K_SHA256,
    )
    return store


# Step


@dataclass(frozen=True)
class Heard:
    """What a teacher said about some documents, not checked yet.

    Attributes:
        documents: Tokens and label-aligned spans.
        asked: What the teacher read of each, its own system message included.
        said: Its answer.
    """

    documents: Sequence[Document]
    asked: Sequence[np.ndarray]
    said: Said


def ask_about(
    dataset: Dataset,
    teacher: Teacher,
    codec: Codec,
    documents: Sequence[Document],
    *,
    reasoning_effort: ReasoningEffort | None = None,
) -> Heard:
    """What a teacher says about some documents.

    Args:
        dataset: Where the documents are from, for how they were rendered.
        teacher: Who is asked.
        codec: What of its distributions is wanted.
        documents: Tokens and label-aligned spans.
        reasoning_effort: For the teacher's system message; None leaves the document as it is.

    Raises:
        TeacherError: If the teacher cannot say what the codec keeps.
    """
    asked = [document.tokens[:-1] for document in documents]  # not about the end of the text
    if reasoning_effort is not None:
        render = dataset.render
        asked = [with_effort(tokens, reasoning_effort, render=render) for tokens in asked]
    return Heard(documents, asked, said_of(teacher, codec, asked))


def packed(heard: Heard, codec: Codec, device: torch.device | str = "cpu") -> list[SampleTargets]:
    """Answers as a store keeps them, checked on the way.

    Args:
        heard: What the teacher said.
        codec: How distributions are packed.
        device: Where they are packed; the bytes are the same everywhere, up to rounding.

    Raises:
        TeacherError: If an answer cannot be right.
    """
    places = np.array([len(sequence) - 1 for sequence in heard.asked])
    targets: list[SampleTargets] = []
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    with torch.cuda.stream(_packing_stream(device)) if on_gpu else nullcontext():
        for members in _cut(range(len(places)), places, _PACKED_PLACES):
            targets += _packed(heard, slice(members[0], members[-1] + 1), codec, device)
    return targets


@cache
def _packing_stream(device: torch.device) -> torch.cuda.Stream:
    """Work here waits for no forward of the teacher, and goes before it."""
    return torch.cuda.Stream(device, priority=-1)


def _packed(heard: Heard, rows: slice, codec: Codec, device: torch.device) -> list[SampleTargets]:
    """Some of the documents, packed in one go: no sample's bytes see another's.

    Where the teacher's system message names another effort than the dataset's, the labels move;
    the answer's tokens stay the same ones.
    """
    documents, asked, said = heard.documents[rows], heard.asked[rows], heard.said[rows]
    entries = checked(codec, asked, said, device=device, first=rows.start)
    trained = [
        np.flatnonzero(document.span_ids != Span.IGNORE) + len(sequence) - len(document.tokens) + 1
        for document, sequence in zip(documents, asked, strict=True)
    ]
    codes: list[dict[str, np.ndarray]] = [{} for _ in documents]
    if entries is not None:
        before = np.cumsum([0, *(len(sequence) - 1 for sequence in asked[:-1])])
        places = np.concatenate([t + n for t, n in zip(trained, before, strict=True)])
        chosen = entries.select(torch.from_numpy(places).to(device))
        columns = codec.encode(chosen, torch.tensor([len(t) for t in trained], device=device))
        for name, column in columns.items():
            ends = np.cumsum(column.sizes.cpu().numpy())
            parts = np.split(column.data.cpu().numpy(), ends[:-1])
            for code, part in zip(codes, parts, strict=True):
                code[name] = part
    logprobs = [one if isinstance(one, np.ndarray) else one.logprobs for one in said]
    return [
        SampleTargets(document.sample_id, document.span_ids, values[places], code)
        for document, values, places, code in zip(documents, logprobs, trained, codes, strict=True)
    ]


# Run


def score_dataset(
    dataset: Dataset,
    teacher: Teacher,
    config: ScoreConfig,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The manifest of a store that holds what the teacher says of the selected samples.

    Answers are checked and packed while the teacher reads the next piece. A codec that names ids
    by their rank gets the ranking of the dataset's own labels.
    Everything but `data`, `split` and `teacher` of `config` is used; those are given as objects.

    Raises:
        DataError: If the store cannot be written, or belongs to other settings.
        TeacherError: If the teacher answers nonsense.
    """
    config = config.model_copy(update={"codec": fitted(config.codec, num_known_ids(teacher))})
    codec, ranking = config.codec.build(), None
    if codec.by_rank:
        ranking = label_ranking(dataset, known_ids(teacher))
        codec = codec.ranked_by(ranking)
    pool = pool_of(dataset)
    chosen = select(pool, config.selection)
    if not len(chosen):
        raise DataError(
            f"no sample of {dataset.path} is selected",
            hint="relax selection, or raise its fraction",
        )
    slices = list(_cut(chosen.tolist(), dataset.lengths, config.shard_tokens))
    header = _header(dataset, teacher, config)
    with TargetWriter(config.output, header, ranking=ranking, overwrite=overwrite) as out:
        shards = _Shards(out, slices, dataset.lengths, progress)
        _fill(shards, dataset, teacher, codec, config)
        return out.finish(len(slices))


class _Shards:
    """Shards in the making: one is written as soon as its last sample is packed.

    Args:
        out: Where to.
        slices: Numbers of each shard's documents.
        lengths: Tokens of every document.
        progress: Told (tokens done, tokens in all).
    """

    def __init__(
        self,
        out: TargetWriter,
        slices: Sequence[Sequence[int]],
        lengths: np.ndarray,
        progress: Progress | None,
    ) -> None:
        self._out, self._slices, self._lengths = out, slices, lengths
        self._progress = progress or (lambda *_: None)
        self._packed: dict[int, SampleTargets] = {}
        self._total = sum(int(lengths[members].sum()) for members in slices)
        self._done = sum(int(lengths[slices[number]].sum()) for number in out.done)
        self._progress(self._done, self._total)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in range(len(self._slices)) if number not in self._out.done]

    def pieces(self, number: int, tokens: int) -> Iterator[list[int]]:
        """A shard's documents of each call to the teacher, of similar length: it pads little."""
        ordered = sorted(self._slices[number], key=lambda i: (-self._lengths[i], i))
        return _cut(ordered, self._lengths, tokens)

    def add(self, number: int, piece: Sequence[int], targets: Sequence[SampleTargets]) -> None:
        """Keep a piece of a shard; no piece of another comes before its last."""
        self._packed.update(zip(piece, targets, strict=True))
        members = self._slices[number]
        if len(self._packed) == len(members):
            self._out.write(number, [self._packed[index] for index in members])
            self._packed.clear()
        self._done += int(self._lengths[list(piece)].sum())
        self._progress(self._done, self._total)


def _fill(
    shards: _Shards, dataset: Dataset, teacher: Teacher, codec: Codec, config: ScoreConfig
) -> None:
    """Ask about every piece; the one before is checked and packed meanwhile.

    A shard is written before the next one is begun, so that a kill never costs two.
    """
    device = getattr(config.teacher, "device", "cpu")
    tokens = getattr(teacher, "call_tokens", _PIECE_TOKENS)

    def ask(piece: list[int]) -> Heard:
        documents = [dataset.conversation(index) for index in piece]
        effort = config.reasoning_effort
        return ask_about(dataset, teacher, codec, documents, reasoning_effort=effort)

    def keep(number: int, piece: list[int], heard: Heard) -> None:
        shards.add(number, piece, packed(heard, codec, device))

    with ThreadPoolExecutor(1) as packer:
        for number in shards.missing:
            waiting: Future[None] | None = None
            for piece in shards.pieces(number, tokens):
                try:
                    heard = ask(piece)
                finally:
                    if waiting is not None:
                        waiting.result()  # what was wrong before is told first
                waiting = packer.submit(keep, number, piece, heard)
            if waiting is not None:
                waiting.result()


def pool_of(dataset: Dataset) -> Pool:
    """What the selection needs to know of every sample, in the dataset's order."""
    table = dataset.samples.combine_chunks()
    return Pool(
        sample_ids=_column(table, "sample_id"),
        num_tokens=_column(table, "num_tokens").to_numpy(),
        num_reasoning=_column(table, "num_reasoning").to_numpy(),
        metadata={name: _column(table, name) for name in get_args(Column)},
    )


def _column(table: pa.Table, name: str) -> pa.Array:
    return pa.concat_arrays(table[name].chunks)


def content_sha256(dataset: Dataset) -> str:
    """Hash of a split's shards: names, counts and file hashes, whoever built them and where."""
    text = json.dumps(dataset.manifest["splits"][dataset.split], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cut(indices: Sequence[int], lengths: np.ndarray, tokens: int) -> Iterator[list[int]]:
    """`indices` in runs of at most `tokens` tokens; a longer document is a run of its own."""
    members: list[int] = []
    held = 0
    for index in indices:
        if members and held + lengths[index] > tokens:
            yield members
            members, held = [], 0
        members.append(index)
        held += int(lengths[index])
    if members:
        yield members


def _header(dataset: Dataset, teacher: Teacher, config: ScoreConfig) -> dict[str, Any]:
    render = RenderConfig(**dataset.manifest["config"]["render"])
    effort = config.reasoning_effort or (render.reasoning_effort if render.system else None)
    return {
        "teacher": teacher.identity.as_dict(),
        "tokenizer_sha256": O200K_SHA256,
        "dataset_sha256": content_sha256(dataset),
        "split": dataset.split,
        "reasoning_effort": effort,
        "codec": resolved(config.codec),
        "selection": resolved(config.selection),
        "shard_tokens": config.shard_tokens,
    }
