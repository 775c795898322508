"""What the stages of training share: a student, a dataset, held-out measurements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from vpmoe.batch import Batch
from vpmoe.config import Config, difference, resolved
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.data.prompts import Prompt
from vpmoe.errors import CheckpointError, RunError
from vpmoe.evals.harmony_format import format_validity
from vpmoe.evals.heldout import HeldoutHook, documents_of
from vpmoe.evals.sampling import dataset_prompts, sample
from vpmoe.models.student import Student, StudentConfig, build_student
from vpmoe.storage.manifest import provenance, write_manifest
from vpmoe.train.config import BatchConfig, TrainConfig, rows_of_rank
from vpmoe.train.device import World, world
from vpmoe.train.hooks import Hook, Observer, Position, Row
from vpmoe.train.loop import train
from vpmoe.train.plan import Plan
from vpmoe.train.state import load_student

SUMMARY_FILE = "summary.json"
NotNegative = Annotated[int, Field(ge=0)]


class ValidConfig(Config):
    """What is measured on the held-out split while training; always once after the last step."""

    every_steps: NotNegative = 0
    """Steps between measurements; 0: only after the last step."""
    documents: NotNegative = 64
    """Conversations to read the loss of; 0: none."""
    prompts: NotNegative = 0
    """Prompts to answer greedily, for the share of well-formed completions; 0: none."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    """Tokens after which an answer is cut."""


class StageConfig(TrainConfig):
    """What the config of a stage of training begins with."""

    init: str = ""
    """Checkpoint, or run whose newest one, the student starts from; empty: fresh weights."""
    student: StudentConfig | None = None
    """What to train; may be left out where init says it."""
    data: str
    """Folder of a finished dataset."""
    valid: ValidConfig = ValidConfig()

    @model_validator(mode="after")
    def _says_what_to_train(self) -> Self:
        if self.student is None and not self.init:
            raise ValueError("there is nothing to train: give a [student] table or init")
        return self


def open_student(config: StageConfig, device: torch.device) -> tuple[Student, dict[str, Any]]:
    """The student a stage starts from, and where its weights come from, for manifests.

    Raises:
        CheckpointError: If `init` is no checkpoint, or holds another student than the config's.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    if not config.init:
        if config.student is None:
            raise RunError("there is nothing to train", hint="give a [student] table or init")
        student = build_student(
            config.student, seed=config.seed, device=device, dtype=dtype, kernels=config.kernels
        )
        return student, {"init": None}
    student, manifest = load_student(
        Path(config.init), device=device, dtype=dtype, kernels=config.kernels
    )
    if config.student is not None and config.student != student.config:
        changed = difference(resolved(student.config), resolved(config.student))
        lines = "\n".join(f"  {line}" for line in changed)
        raise CheckpointError(
            f"{config.init} holds another student than the config's\n{lines}",
            hint="leave the [student] table out, or start from another checkpoint",
        )
    origin = {key: manifest[key] for key in ("step", "tokens_seen", "fingerprint", "inputs")}
    return student, {"init": {"path": config.init, **origin}}


@dataclass(frozen=True)
class Prepared:
    """A stage that is ready to train.

    Attributes:
        student: On the world's device.
        plan: Batches and loss of each step.
        findings: What was measured on the way, for the run's summary.
        at_end: What is to be said besides, once the run is over.
    """

    student: Student
    plan: Plan
    findings: dict[str, Any] = field(default_factory=dict)
    at_end: Callable[[], dict[str, Any]] = dict


def rank_batches(
    loader: PackedLoader, start: int, batch: BatchConfig, world: World
) -> Sequence[Batch]:
    """This rank's micro-batches of the global batch that begins at row `start` of the stream."""
    rows = rows_of_rank(batch, rank=world.rank, num_ranks=world.size)
    whole = loader.batch(start + rows.start, len(rows))
    size = batch.micro_batch_size
    return [whole.rows(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]


def valid_hooks(config: StageConfig) -> list[Hook]:
    """The measurements that the config asks for."""
    asked, hooks = config.valid, []
    if not asked.documents and not asked.prompts:
        return []
    dataset = Dataset(config.data, "valid")
    if asked.documents:
        documents = documents_of(dataset, limit=asked.documents)
        hooks.append(HeldoutHook(documents, every_steps=asked.every_steps))
    if asked.prompts:
        prompts = dataset_prompts(dataset, limit=asked.prompts)
        hooks.append(FormatHook(prompts, asked))
    return hooks


class FormatHook:
    """Share of well-formed greedy completions inside a training loop, as `valid/format_valid_pct`.

    Args:
        prompts: What to answer, each time the same.
        config: How often and how long.
    """

    def __init__(self, prompts: Sequence[Prompt], config: ValidConfig) -> None:
        self.every_steps = config.every_steps
        self._prompts = prompts
        self._config = config

    def __call__(self, student: Student, position: Position) -> Row:
        """The numbers to log."""
        del position
        length = self._config.max_new_tokens
        answers = sample(student, self._prompts, max_new_tokens=length, temperature=0.0, seed=0)
        report = format_validity(answers)
        count = max(report.num_completions, 1)
        rows = {f"valid/format_{name}_pct": 100 * n / count for name, n in report.failures.items()}
        rows["valid/format_valid_pct"] = 100 * (1 - sum(report.failures.values()) / count)
        rows["valid/completion_tokens"] = sum(len(a.completion) for a in answers) / count
        return rows


def run_stage(
    config: Any,
    prepare: Callable[[Any, World], Prepared],
    *,
    resume: bool,
    observers: Sequence[Observer],
) -> dict[str, Any]:
    """What a run came to; checkpoints and metrics are in its folder.

    Args:
        config: The stage's.
        prepare: Makes its student and plan on a world.
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
        return finish(config, end, ranks, {**ready.findings, **ready.at_end()})


def finish(
    config: StageConfig, end: Position, world: World, findings: dict[str, Any]
) -> dict[str, Any]:
    """What a run came to, kept as `summary.json` in its folder."""
    summary = {
        "kind": resolved(config)["kind"],
        "run": config.run,
        "step": end.step,
        "tokens_seen": end.tokens_seen,
        **provenance(),
        **findings,
    }
    if world.is_first:
        write_manifest(config.run_dir / SUMMARY_FILE, summary)
    return summary
