"""What runs beside the loop: evaluations that add numbers, observers that read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vpmoe.models.student import Student

Row = Mapping[str, float | int]


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        tokens_seen: Tokens of documents trained on, over all ranks.
    """

    step: int = 0
    tokens_seen: int = 0

    def after(self, num_tokens: int) -> "Position":
        """One step of `num_tokens` further."""
        return Position(step=self.step + 1, tokens_seen=self.tokens_seen + num_tokens)


@runtime_checkable
class Hook(Protocol):
    """An evaluation inside the loop.

    Attributes:
        every_steps: It runs after each multiple of this many steps and after the last; 0: never.
    """

    every_steps: int

    def __call__(self, student: Student, position: Position) -> Row:
        """Numbers to log with the step, namespaced (`valid/loss/final`); called on every rank.

        It must leave the student and the random state as they were.
        """
        ...


@runtime_checkable
class Observer(Protocol):
    """A reader of the stream of numbers: a progress bar, a tracker. Rank 0 only."""

    def start(self, run_dir: Path, config: Mapping[str, Any], *, step: int, num_steps: int) -> None:
        """Called once, before the first step; `step` is where the run goes on."""
        ...

    def row(self, step: int, values: Row) -> None:
        """One line of `metrics.jsonl`, after it has been written."""
        ...

    def close(self) -> None:
        """Called once, however the run ends."""
        ...


def is_due(every_steps: int, step: int, num_steps: int) -> bool:
    """True after each multiple of `every_steps` (0: none) and after the last step."""
    return step == num_steps or (every_steps > 0 and step % every_steps == 0)


def run_hooks(
    hooks: Sequence[Hook], student: Student, position: Position, num_steps: int
) -> dict[str, float | int]:
    """The numbers of every hook that is due."""
    rows: dict[str, float | int] = {}
    for hook in hooks:
        if is_due(hook.every_steps, position.step, num_steps):
            rows |= hook(student, position)
    return rows


class ProgressBar:
    """A bar with the losses beside it, on a terminal; silent elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

    def start(self, run_dir: Path, config: Mapping[str, Any], *, step: int, num_steps: int) -> None:
        """Show the bar at `step`."""
        del config
        self._bar.start()
        self._task = self._bar.add_task(run_dir.name, total=num_steps, completed=step, losses="")

    def row(self, step: int, values: Row) -> None:
        """Advance to `step` and show its losses."""
        losses = [f"{k.split('/')[-1]} {v:.3f}" for k, v in values.items() if _is_loss(k)]
        self._bar.update(self._task, completed=step, losses="  ".join(losses))

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.stop()


def _is_loss(name: str) -> bool:
    return name.startswith("train/loss/")
