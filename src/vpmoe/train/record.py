"""The stream of numbers of a run: rank 0 writes it, observers read it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from vpmoe.config import resolved
from vpmoe.storage.runs import RunDir
from vpmoe.train.config import TrainConfig
from vpmoe.train.device import World
from vpmoe.train.hooks import Observer, Position, is_due
from vpmoe.train.metrics import Stopwatch, memory_metrics


class Record:
    """One line of `metrics.jsonl` per logged step; does nothing on ranks other than 0.

    Args:
        run: The run's folder, closed at the end; None on ranks other than 0.
        config: The run's settings.
        world: The ranks that train together.
        observers: Readers of the lines.
        flops_per_token: Forward and backward of one token; 0 where it is not asked for.
    """

    def __init__(
        self,
        run: RunDir | None,
        config: TrainConfig,
        *,
        world: World,
        observers: Sequence[Observer] = (),
        flops_per_token: float = 0.0,
    ) -> None:
        self._run = run
        self._config = config
        self._world = world
        self._flops_per_token = flops_per_token
        self._observers: list[Observer] = list(observers) if run else []
        self._stack = ExitStack()
        self._last_save_s: dict[str, float | int] = {}
        self._num_steps = 0

    def __enter__(self) -> Self:
        if self._run:
            self._stack.callback(self._run.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def start(self, position: Position, num_steps: int) -> None:
        """Forget lines that a resumed run will write again, and tell the observers."""
        self._num_steps = num_steps
        if not self._run:
            return
        self._run.truncate_metrics(position.step)
        tree = resolved(self._config)
        for observer in self._observers:
            observer.start(self._run.path, tree, step=position.step, num_steps=num_steps)
            self._stack.callback(observer.close)

    def row(
        self, position: Position, parts: Iterable[Mapping[str, float | int]], watch: Stopwatch
    ) -> None:
        """Write the line of the step just done, if this step is logged."""
        if not self._run or not is_due(self._config.log_every, position.step, self._num_steps):
            return
        values: dict[str, float | int] = {"tokens_seen": position.tokens_seen}
        for part in parts:
            values |= part
        values |= watch.metrics() | self._last_save_s | memory_metrics(self._world.device)
        self._last_save_s = {}
        values |= self._speed(values["train/tokens"], watch.seconds["step"])
        self._run.log(position.step, values)
        for observer in self._observers:
            observer.row(position.step, values)

    def saved(self, watch: Stopwatch) -> None:
        """Keep the time of a checkpoint for the next line: this step's is written already."""
        self._last_save_s = {"time/checkpoint_s": watch.seconds["checkpoint"]}

    def _speed(self, tokens: float, seconds: float) -> dict[str, float | int]:
        rows = {"tokens_per_s": tokens / seconds}
        if self._config.peak_tflops and self._flops_per_token:
            peak = self._config.peak_tflops * 1e12 * self._world.size
            rows["mfu_pct"] = 100 * self._flops_per_token * tokens / seconds / peak
        return rows
