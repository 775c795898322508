"""Stage 1: the student learns SYNTH's answers by cross-entropy, and with them Harmony."""

from collections.abc import Sequence
from typing import Any, Literal

from vpmoe.batch import Batch
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.losses.base import Loss
from vpmoe.losses.cross_entropy import CrossEntropyConfig
from vpmoe.stages.base import (
    Prepared,
    StageConfig,
    open_student,
    rank_batches,
    run_stage,
)
from vpmoe.stages.stop import StopConfig, stop_report
from vpmoe.storage.runs import read_metrics
from vpmoe.train.device import World
from vpmoe.train.hooks import Observer
from vpmoe.train.plan import Plan

# Config


class WarmStartConfig(StageConfig):
    """Stage 1: cross-entropy on the dataset's own answers."""

    kind: Literal["warm_start"] = "warm_start"
    loss: CrossEntropyConfig = CrossEntropyConfig()  # pyright: ignore[reportCallIssue]
    stop: StopConfig = StopConfig()
    """What the end of the run is judged by."""


# Build


class WarmStart(Plan):
    """Packed batches of the train split in the loader's order; the step is all there is to keep.

    Args:
        config: The stage's settings.
        inputs: Where the student comes from, for manifests.
        ranks: The ranks that train together.
    """

    def __init__(self, config: WarmStartConfig, inputs: dict[str, Any], ranks: World) -> None:
        dataset = Dataset(config.data, "train")
        self.inputs = {**inputs, "data": dataset.identity}
        self._loader = PackedLoader(dataset, seq_len=config.batch.seq_len, seed=config.seed)
        self._loss = config.loss.build()
        self._batch = config.batch
        self._ranks = ranks
        slots = config.batch.global_batch_size * config.batch.seq_len
        self.num_steps = config.budget.num_steps(slots * self._loader.fill_rate)

    # Step

    def micro_batches(self, step: int) -> tuple[Sequence[Batch], Loss]:
        """The rank's rows of global batch number `step`."""
        start = step * self._batch.global_batch_size
        return rank_batches(self._loader, start, self._batch, self._ranks), self._loss


def prepare(config: WarmStartConfig, ranks: World) -> Prepared:
    """The student and the plan, before the first step."""
    student, inputs = open_student(config, ranks.device)
    plan = WarmStart(config, inputs, ranks)

    def stopped() -> dict[str, Any]:
        return {"stop": stop_report(list(read_metrics(config.run_dir)), config.stop)}

    return Prepared(student, plan, at_end=stopped)


# Run


def run(
    config: WarmStartConfig, *, resume: bool = False, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """What the run came to; checkpoints and metrics are in its folder.

    Args:
        config: What to train, on what, for how long.
        resume: Go on from the newest checkpoint of the run's folder.
        observers: Readers of the metrics stream, e.g. a progress bar.
    """
    return run_stage(config, prepare, resume=resume, observers=observers)
