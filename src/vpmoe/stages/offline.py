"""Stage 2: a loss against a teacher's opinion, stored or live, mixed with plain cross-entropy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.config import Config
from vpmoe.data.analysis_weights import AnalysisWeightsConfig, weighted
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.data.mixture import anchors_before, uses_anchor
from vpmoe.errors import DataError
from vpmoe.losses import (
    ConfidenceWeightedConfig,
    CrossEntropyConfig,
    Loss,
    LossInputs,
    LossOutput,
    OfflineLossConfig,
)
from vpmoe.losses.base import WrappedLoss
from vpmoe.losses.states import StateMatch, StateMatchConfig
from vpmoe.models.student import Student
from vpmoe.stages.base import (
    Prepared,
    StageConfig,
    open_student,
    rank_batches,
    run_stage,
)
from vpmoe.stages.live import TaughtLoss
from vpmoe.stages.score import open_targets
from vpmoe.storage.manifest import MANIFEST_NAME
from vpmoe.teachers.base import TARGETS, TEACHER_HIDDEN
from vpmoe.teachers.codecs import Codec
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.teachers.shards import codec_of
from vpmoe.teachers.store import TargetStore, read_store_manifest
from vpmoe.train.device import World
from vpmoe.train.hooks import Observer
from vpmoe.train.plan import Plan

# Config


class StoreConfig(Config):
    """One of several teachers that follow one another."""

    path: str
    """Folder that `vpmoe score` wrote, for the same dataset."""
    until_tokens: int = Field(default=0, ge=0)
    """Tokens of this stage after which the next store takes over; 0 = the last one, to the end."""


class TargetsConfig(Config):
    """A teacher's stored scores, or those of several teachers in turn."""

    path: str = ""
    """Folder that `vpmoe score` wrote, for the same dataset."""
    stores: tuple[StoreConfig, ...] = ()
    """In place of path: stores in the order of their use, a small teacher's first, say."""
    share: float = Field(default=0.7, gt=0, le=1)
    """Share of batches that the teacher speaks of; the others are plain cross-entropy on all."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.path and self.stores:
            raise ValueError("path and stores both say where the scores are; give one of them")
        limits = [store.until_tokens for store in self.stores]
        if limits and (limits[-1] or limits[:-1] != sorted(set(limits[:-1]) - {0})):
            raise ValueError(
                f"stores end after {limits} tokens; each but the last needs an until_tokens above "
                "the one before it, and the last none"
            )
        return self

    @property
    def in_turn(self) -> tuple[StoreConfig, ...]:
        """All stores, the first one first."""
        return (StoreConfig(path=self.path),) if self.path else self.stores


class OfflineConfig(StageConfig):
    """Stage 2: distillation on given text, from stored scores or a teacher beside the student."""

    kind: Literal["offline"] = "offline"
    loss: OfflineLossConfig = ConfidenceWeightedConfig()
    """Of batches that the teacher speaks of."""
    plain_loss: CrossEntropyConfig = CrossEntropyConfig()
    """Of the other batches."""
    targets: TargetsConfig = TargetsConfig()
    teacher: LocalTeacherConfig | None = None
    """Read beside the student, for its states; what is stored it is not asked for."""
    states: StateMatchConfig | None = None
    """Layers of the student that are drawn towards the teacher's, beside the loss."""
    analysis_weights: AnalysisWeightsConfig | None = None
    """Weights by what chunks of the reasoning look like, for both kinds of batches."""

    @model_validator(mode="after")
    def _has_what_the_loss_needs(self) -> Self:
        live, kind = TEACHER_HIDDEN in self.loss.needs, self.loss.kind
        asked = "states" if self.states else f"loss {kind}" if live else ""
        if asked and self.teacher is None:
            raise ValueError(
                f"{asked} needs the states of a teacher beside the student; add a [teacher] "
                "table, or leave out what is against them"
            )
        if not asked and self.teacher is not None:
            raise ValueError(
                f"loss {kind} reads stored targets and would never ask [teacher]; "
                "leave the table out, or set loss.against = hidden"
            )
        if live and self.targets.in_turn:
            raise ValueError(
                f"loss {kind} is against a live teacher's states and reads no store; "
                "leave targets.path out, or set loss.against = targets"
            )
        if not live and not self.targets.in_turn:
            raise ValueError(f"loss {kind} reads a teacher's stored scores; give targets.path")
        return self


# Build


@dataclass(frozen=True)
class Stream:
    """Batches that one teacher speaks of.

    Attributes:
        loader: Of their rows.
        loss: What is learned from them; its state belongs to this teacher.
        first_step: The stage's step from which on this stream has the teacher's turns.
    """

    loader: PackedLoader
    loss: Loss
    first_step: int


class Offline(Plan):
    """Streams of packed batches, taught and plain, that take turns by the step's number.

    Args:
        config: The stage's settings.
        student: Who learns.
        inputs: Where the student comes from, for manifests.
        ranks: The ranks that train together.
    """

    def __init__(
        self, config: OfflineConfig, student: Student, inputs: dict[str, Any], ranks: World
    ) -> None:
        self._dataset = Dataset(config.data, "train")
        self._config = config
        self._batch = config.batch
        self._share = config.targets.share
        self._ranks = ranks
        self._plain = self._loader()
        self._plain_loss = config.plain_loss.build()
        self._teacher = config.teacher.build() if config.teacher else None
        self.inputs = {**inputs, "data": self._dataset.identity}
        if self._teacher is not None:
            self.inputs["teacher"] = self._teacher.identity.as_dict()
        if config.targets.in_turn:
            self._streams, self.inputs["targets"] = self._stored(student)
        else:
            self._streams = [Stream(self._loader(), self._loss(student), 0)]
        fills = [stream.loader.fill_rate for stream in self._streams]
        self.num_steps = config.budget.num_steps(self._tokens_a_step(sum(fills) / len(fills)))

    def _loss(self, student: Student) -> Loss:
        """A loss of its own for one teacher, which may be asked as batches come."""
        loss, matched = self._config.loss.build(), self._config.states
        if self._teacher is None:
            return loss
        if matched is not None:
            loss = StateMatch(
                loss,
                matched,
                student_dim=student.config.hidden_size,
                teacher_dim=self._teacher.width,
                seed=self._config.seed,
            )
        return TaughtLoss(loss, self._teacher, student)

    def _stored(self, student: Student) -> tuple[list[Stream], Any]:
        """A stream for each store, and what the stores say of themselves."""
        streams, headers, first_step, before = [], [], 0, 0
        for given in self._config.targets.in_turn:
            store = open_targets(Path(given.path), self._dataset)
            targets = _distributions(store, self._config.loss.build())
            loader = self._loader(scores=store, targets=targets, only=frozenset(store))
            loss = self._loss(student)
            if targets is not None and targets.codec.tail == "prior":
                loss = SharedTail(loss, targets.codec, student)
            streams.append(Stream(loader, loss, first_step))
            headers.append(store.header)
            a_step = self._tokens_a_step(loader.fill_rate)
            first_step += math.ceil((given.until_tokens - before) / a_step)
            before = given.until_tokens
        return streams, headers[0] if len(headers) == 1 else headers

    def _loader(self, **scored: Any) -> PackedLoader:
        config = self._config
        return PackedLoader(self._dataset, seq_len=config.batch.seq_len, seed=config.seed, **scored)

    def _tokens_a_step(self, fill: float) -> float:
        """Tokens of documents in a step, on average over both kinds of batches."""
        slots = self._batch.global_batch_size * self._batch.seq_len
        return slots * (self._share * fill + (1 - self._share) * self._plain.fill_rate)

    # Step

    def micro_batches(self, step: int) -> tuple[Sequence[Batch], Loss]:
        """The rank's rows of global batch number `step`, from the stream whose turn it is."""
        taught_before = anchors_before(step, self._share)
        if uses_anchor(step, self._share):
            stream = [stream for stream in self._streams if stream.first_step <= step][-1]
            loader, loss = stream.loader, stream.loss
            turn = taught_before - anchors_before(stream.first_step, self._share)
        else:
            loader, turn, loss = self._plain, step - taught_before, self._plain_loss
        start = turn * self._batch.global_batch_size
        batches = rank_batches(loader, start, self._batch, self._ranks)
        if self._config.analysis_weights is None:
            return batches, loss
        return [weighted(batch, self._config.analysis_weights) for batch in batches], loss

    def state(self) -> dict[str, Any]:
        """What the losses remember, such as running means that center weights, by stream."""
        return {"losses": [stream.loss.state_dict() for stream in self._streams]}

    def load_state(self, state: Any) -> None:
        """Put back what `state` gave."""
        for stream, kept in zip(self._streams, state["losses"], strict=True):
            stream.loss.load_state_dict(kept)


class SharedTail(WrappedLoss):
    """A loss whose rows are told by which prior the ids without an entry share the tail.

    Args:
        loss: Reads `target_prior`.
        codec: Of the store, which knows it.
        student: Whose vocabulary it is cut to.
    """

    def __init__(self, loss: Loss, codec: Codec, student: Student) -> None:
        super().__init__(loss)
        rows = torch.arange(student.config.num_rows, device=student.head_weight.device)
        ids = student.ids_of(rows)
        prior = codec.prior(ids.device)
        assert prior is not None  # its tail is the prior's
        self._prior = prior[ids].log_softmax(dim=0)

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        # Ids without an entry may be likelier than those with one: no cap is known.
        given = replace(inputs, target_prior=self._prior.to(inputs.hidden.device), target_cap=None)
        return super().__call__(given, span_scales)


def _distributions(store: TargetStore, loss: Loss) -> TargetStore | None:
    """The store, where the loss reads distributions from it.

    Raises:
        DataError: If the store has none of the kind that the loss reads.
    """
    _require_served(store.path, store.codec, loss)
    return store if TARGETS in loss.needs else None


def _require_served(path: Path, codec: Codec, loss: Loss) -> None:
    """Refuse a store that has no distributions, or drawn ids in place of the likeliest.

    Raises:
        DataError: Saying what the loss needs and what the store holds.
    """
    if TARGETS not in loss.needs:
        return
    reads_prior = "target_prior" in loss.needs
    again = "adaptive and codec.tail = prior" if reads_prior else "set_coded"
    if not codec.max_entries:
        raise DataError(
            f"the loss needs distributions, and target store {path} holds log-probs alone",
            hint=f"score again with codec.kind = {again}, or choose another loss",
        )
    if codec.tail == "prior" and not reads_prior:
        raise DataError(
            f"target store {path} names what departs from its prior alone, and the loss reads none",
            hint="set loss.kind = forward_kl and loss.tail = prior, or score again with "
            "codec.tail = even",
        )
    if reads_prior and codec.tail != "prior":
        raise DataError(
            f"loss.tail = prior, and target store {path} has no prior",
            hint=f"score again with codec.kind = {again}, or leave loss.tail out",
        )
    drawn = codec.needs == "draws"
    if drawn != getattr(loss, "drawn", False):
        held, needed = ("drawn", "the likeliest") if drawn else ("the likeliest", "drawn")
        raise DataError(
            f"the loss needs {needed} ids, and target store {path} holds {held} ones",
            hint="loss.kind = random_sampling reads drawn ids, all other losses the likeliest",
        )


def store_lines(config: OfflineConfig) -> list[str]:
    """Each store in a line, for `vpmoe check`; one that is not there yet is none to complain of.

    Raises:
        DataError: If a store is there and lacks what the loss reads.
    """
    lines, loss = [], config.loss.build()
    for given in config.targets.in_turn:
        said, manifest = "not scored yet", Path(given.path) / MANIFEST_NAME
        if manifest.exists():
            header = read_store_manifest(Path(given.path))["header"]
            codec = codec_of(header)
            _require_served(Path(given.path), codec, loss)
            kind = header.get("codec", {}).get("kind", "logprob")
            said = f"{kind} targets of {header['teacher']['name']}"
        until = f", for {given.until_tokens:,} tokens" if given.until_tokens else ""
        lines.append(f"{given.path}  {said}{until}")
    return lines


def prepare(config: OfflineConfig, ranks: World) -> Prepared:
    """The student and the plan, before the first step."""
    student, inputs = open_student(config, ranks.device)
    return Prepared(student, Offline(config, student, inputs, ranks))


# Run


def run(
    config: OfflineConfig, *, resume: bool = False, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """What the run came to; checkpoints and metrics are in its folder.

    Args:
        config: What to train, on what, for how long.
        resume: Go on from the newest checkpoint of the run's folder.
        observers: Readers of the metrics stream, e.g. a progress bar.
    """
    return run_stage(config, prepare, resume=resume, observers=observers)
