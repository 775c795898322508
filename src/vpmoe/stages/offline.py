"""Stage 2: a loss against a teacher's stored opinion, mixed with plain cross-entropy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vpmoe.batch import Batch
from vpmoe.config import Config
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.data.mixture import anchors_before, uses_anchor
from vpmoe.errors import DataError
from vpmoe.losses import ConfidenceWeightedConfig, CrossEntropyConfig, Loss, OfflineLossConfig
from vpmoe.stages.base import (
    Prepared,
    StageConfig,
    finish,
    open_student,
    rank_batches,
    valid_hooks,
)
from vpmoe.stages.score import open_targets
from vpmoe.teachers.base import TARGETS
from vpmoe.teachers.store import TargetStore
from vpmoe.train.device import World, world
from vpmoe.train.hooks import Observer
from vpmoe.train.loop import train
from vpmoe.train.plan import Plan

# Config


class TargetsConfig(Config):
    """A teacher's stored scores."""

    path: str
    """Folder that `vpmoe score` wrote, for the same dataset."""
    share: float = Field(default=0.7, gt=0, le=1)
    """Share of batches drawn from the scored samples; the others are plain cross-entropy on all."""


class OfflineConfig(StageConfig):
    """Stage 2: offline distillation from stored teacher scores."""

    kind: Literal["offline"] = "offline"
    loss: OfflineLossConfig = ConfidenceWeightedConfig()
    """Of batches with scores."""
    plain_loss: CrossEntropyConfig = CrossEntropyConfig()
    """Of batches without."""
    targets: TargetsConfig


# Build


class Offline(Plan):
    """Two streams of packed batches, scored and plain, that take turns by the step's number.

    Args:
        config: The stage's settings.
        inputs: Where the student comes from, for manifests.
        ranks: The ranks that train together.
    """

    def __init__(self, config: OfflineConfig, inputs: dict[str, Any], ranks: World) -> None:
        dataset = Dataset(config.data, "train")
        store = open_targets(Path(config.targets.path), dataset)
        self.inputs = {**inputs, "data": dataset.identity, "targets": store.header}
        seq_len, seed = config.batch.seq_len, config.seed
        self._plain = PackedLoader(dataset, seq_len=seq_len, seed=seed)
        self._scored = PackedLoader(
            dataset,
            seq_len=seq_len,
            seed=seed,
            scores=store,
            targets=_distributions(store, config.loss.needs),
            only=frozenset(store),
        )
        self._plain_loss = config.plain_loss.build()
        self._scored_loss = config.loss.build()
        self._share = config.targets.share
        self._batch = config.batch
        self._ranks = ranks
        slots = config.batch.global_batch_size * config.batch.seq_len
        fill = self._share * self._scored.fill_rate + (1 - self._share) * self._plain.fill_rate
        self.num_steps = config.budget.num_steps(slots * fill)

    # Step

    def micro_batches(self, step: int) -> tuple[Sequence[Batch], Loss]:
        """The rank's rows of global batch number `step`, from the stream whose turn it is."""
        scored_before = anchors_before(step, self._share)
        if uses_anchor(step, self._share):
            loader, turn, loss = self._scored, scored_before, self._scored_loss
        else:
            loader, turn, loss = self._plain, step - scored_before, self._plain_loss
        start = turn * self._batch.global_batch_size
        return rank_batches(loader, start, self._batch, self._ranks), loss

    def state(self) -> dict[str, Any]:
        """The running means that center the weights."""
        return {"loss": self._scored_loss.state_dict()}

    def load_state(self, state: Any) -> None:
        """Put back what `state` gave."""
        self._scored_loss.load_state_dict(state["loss"])


def _distributions(store: TargetStore, needs: frozenset[str]) -> TargetStore | None:
    """The store, where the loss reads distributions from it.

    Raises:
        DataError: If the store has none.
    """
    if TARGETS not in needs:
        return None
    if not store.max_entries:
        raise DataError(
            f"the loss needs distributions, and target store {store.path} holds log-probs alone",
            hint="score again with codec.kind = set_coded, or choose another loss",
        )
    return store


def prepare(config: OfflineConfig, ranks: World) -> Prepared:
    """The student and the plan, before the first step."""
    student, inputs = open_student(config, ranks.device)
    return Prepared(student, Offline(config, inputs, ranks))


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
    with world(config.device, threads=config.threads) as ranks:
        ready = prepare(config, ranks)
        end = train(
            ready.student,
            ready.plan,
            config,
            world=ranks,
            resume=resume,
            hooks=valid_hooks(config),
            observers=observers,
        )
        return finish(config, end, ranks, {})
