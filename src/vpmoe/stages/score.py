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
from vpmoe.teachers.ask import Answer, Said, checked, said_of
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TARGETS, Teacher, num_known_ids
from vpmoe.teachers.codecs import Codec, CodecConfig, Entries, fitted
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


def answers_of(heard: Heard, codec: Codec) -> list[Answer]:
    """Checked answers at the documents' trained labels.

    Where the teacher's system message names another effort than the dataset's, the labels move;
    the answer's tokens stay the same ones.

    Raises:
        TeacherError: If an answer cannot be right.
    """
    answers = []
    for document, sequence, answer in zip(
        heard.documents, heard.asked, checked(codec, heard.asked, heard.said), strict=True
    ):
        shift = len(sequence) - (len(document.tokens) - 1)
        trained = np.flatnonzero(document.span_ids != Span.IGNORE) + shift
        entries = answer.entries and answer.entries.select(torch.from_numpy(trained))
        answers.append(Answer(answer.logprobs[trained], entries))
    return answers


def packed(heard: Heard, codec: Codec, device: torch.device | str = "cpu") -> list[SampleTargets]:
    """Answers as a store keeps them, checked on the way.

    Args:
        heard: What the teacher said.
        codec: How distributions are packed.
        device: Where they are packed; the bytes are the same everywhere, up to rounding.

    Raises:
        TeacherError: If an answer cannot be right.
    """
    documents, answers = heard.documents, answers_of(heard, codec)
    places = np.array([len(answer.logprobs) for answer in answers])
    targets = []
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    with torch.cuda.stream(_packing_stream(device)) if on_gpu else nullcontext():
        for members in _cut(range(len(documents)), places, _PACKED_PLACES):
            codes = _codes([answers[i].entries for i in members], codec, device)
            targets += [
                SampleTargets(
                    documents[i].sample_id, documents[i].span_ids, answers[i].logprobs, code
                )
                for i, code in zip(members, codes, strict=True)
            ]
    return targets


@cache
def _packing_stream(device: torch.device) -> torch.cuda.Stream:
    """Work here waits for no forward of the teacher, and goes before it."""
    return torch.cuda.Stream(device, priority=-1)


def _codes(
    entries: Sequence[Entries | None], codec: Codec, device: torch.device | str
) -> list[dict[str, np.ndarray]]:
    """The codec's columns of each document, packed in one go: no sample's bytes see another's."""
    held = [one for one in entries if one is not None]
    out: list[dict[str, np.ndarray]] = [{} for _ in entries]
    if not held:
        return out
    parts = ([one.ids for one in held], [one.logprobs for one in held], [one.tail for one in held])
    together = Entries(*(torch.cat(part) for part in parts)).to(device)
    columns = codec.encode(together, torch.tensor([len(one) for one in held], device=device))
    for name, column in columns.items():
        ends = np.cumsum(column.sizes.cpu().numpy())
        for codes, part in zip(out, np.split(column.data.cpu().numpy(), ends[:-1]), strict=True):
            codes[name] = part
    return out


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
        ranking = label_ranking(dataset)
        codec = codec.ranked_by(ranking)
    pool = pool_of(dataset)
    chosen = select(pool, config.selection)
    if not len(chosen):
        raise DataError(
            f"no sample of {dataset.path} is selected",
            hint="relax selection, or raise its fraction",
        )
    lengths = pool.num_tokens.astype(np.int64)
    slices = list(_cut(chosen.tolist(), lengths, config.shard_tokens))
    total, done = int(lengths[chosen].sum()), 0
    header = _header(dataset, teacher, config)
    with TargetWriter(config.output, header, ranking=ranking, overwrite=overwrite) as out:
        for number, members in enumerate(slices):
            if number not in out.done:
                targets: dict[int, SampleTargets] = {}
                for piece, scored in _scored(dataset, teacher, codec, config, members):
                    targets.update(zip(piece, scored, strict=True))
                    if progress:
                        progress(done + int(lengths[list(targets)].sum()), total)
                out.write(number, [targets[index] for index in members])
            done += int(lengths[members].sum())
            if progress:
                progress(done, total)
        return out.finish(len(slices))


def _scored(
    dataset: Dataset,
    teacher: Teacher,
    codec: Codec,
    config: ScoreConfig,
    members: Sequence[int],
) -> Iterator[tuple[list[int], list[SampleTargets]]]:
    """Documents in pieces of similar length, so that the teacher pads little; packed on the way."""
    lengths = dataset.lengths
    device = getattr(config.teacher, "device", "cpu")
    ordered = sorted(members, key=lambda i: (-lengths[i], i))
    waiting: tuple[list[int], Future[list[SampleTargets]]] | None = None
    with ThreadPoolExecutor(1) as packer:
        for piece in _cut(ordered, lengths, getattr(teacher, "call_tokens", _PIECE_TOKENS)):
            documents = [dataset.conversation(index) for index in piece]
            try:
                heard = ask_about(
                    dataset, teacher, codec, documents, reasoning_effort=config.reasoning_effort
                )
            except Exception:
                if waiting is not None:
                    waiting[1].result()  # what was wrong before is told first
                raise
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = piece, packer.submit(packed, heard, codec, device)
        if waiting is not None:
            yield waiting[0], waiting[1].result()


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
