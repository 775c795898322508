"""A run's folder: who holds it, its settings, its stream of numbers."""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vpmoe.errors import RunError
from vpmoe.storage.atomic import atomic_path, write_error

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"

Row = dict[str, Any]


class RunDir:
    """The folder of one run, held by this process until closed.

    The lock belongs to the open file, so the kernel frees it however the process ends.

    Args:
        path: Made if it is not there.

    Raises:
        RunError: If another process holds the folder, or it cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_FILE).open("a+")
        except OSError as error:
            raise RunError(
                f"cannot use run folder {self.path}: {error.strerror}", hint="choose another run"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise RunError(
                f"{self.path} is in use by process {holder}",
                hint="wait for it to end, or start a new run with another name",
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        self._open_metrics()

    def _open_metrics(self) -> None:
        # Unbuffered: what a full disk refuses must not come up again when the file is closed.
        self._metrics = (self.path / METRICS_FILE).open("ab", buffering=0)

    def close(self) -> None:
        """Let go of the folder."""
        self._metrics.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Keep the resolved settings, whole or not at all."""
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        with atomic_path(self.path / CONFIG_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append one flat line for `step`; it survives this process once the call returns.

        Raises:
            DataError: If the disk is full or the folder has gone.
        """
        line = json.dumps({"step": step, **{k: _plain(v) for k, v in values.items()}})
        data = (line + "\n").encode()
        try:
            if self._metrics.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise write_error(self.path / METRICS_FILE, error) from error

    def truncate_metrics(self, step: int) -> None:
        """Drop every line beyond `step`, and a torn last line, in one rename."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._metrics.close()
        target = self.path / METRICS_FILE
        with atomic_path(target) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        self._open_metrics()


def _plain(value: float | int | str) -> float | int | str | None:
    """JSON knows no NaN and no infinity: such a value is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_config(path: Path | str) -> dict[str, Any] | None:
    """The resolved settings a run was started with; None if it never got that far."""
    file = Path(path) / CONFIG_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_metrics(path: Path | str) -> Iterator[Row]:
    """The lines of a run's `metrics.jsonl` in order; a last line cut by a crash is left out."""
    file = Path(path) / METRICS_FILE
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
