"""What a report knows about a run: its config, its stream of numbers and its evaluations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vpmoe.errors import RunError
from vpmoe.evals.noise import NoiseFloors, read_noise
from vpmoe.storage.runs import CONFIG_FILE, METRICS_FILE

EVAL_GLOB = "eval-*.json"
MANIFEST_GLOB = "step-*/manifest.json"


@dataclass(frozen=True)
class RunData:
    """One run directory, read.

    Attributes:
        name: Folder name; what the page calls the run.
        config: The resolved settings, empty when the folder holds only evaluations (a teacher).
        metrics: One flat dict per logged step, in order.
        evals: Evaluation reports, oldest first.
        manifest: Provenance of the newest checkpoint, empty when there is none.
        noise: What a KL is when there is nothing to find; None where nobody measured it.
    """

    name: str
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    manifest: dict[str, Any]
    noise: NoiseFloors | None = None

    def series(self, *names: str) -> tuple[list[float], list[float]]:
        """Tokens seen and values of the first of `names` that the run logged.

        Entries without the metric are left out, so a series logged every tenth step stays exact.
        """
        for name in names:
            rows = [row for row in self.metrics if isinstance(row.get(name), int | float)]
            if rows:
                return [tokens_seen(row) for row in rows], [float(row[name]) for row in rows]
        return [], []

    @cached_property
    def latest_eval(self) -> dict[str, Any]:
        """All parts measured of the newest evaluated step; of two like parts the later file's."""
        merged: dict[str, Any] = {}
        for report in self.evals:
            if _eval_step(report) == _eval_step(self.evals[-1]):
                merged |= report
        return merged

    def measured(self, *path: str) -> Any:
        """A value of the newest evaluation by its keys, or None where it was not measured."""
        node: Any = self.latest_eval
        for key in path:
            if not isinstance(node, dict) or key not in node:
                return None
            node = node[key]
        return node


def tokens_seen(row: dict[str, Any]) -> float:
    """Where on the token axis a metrics line lies; its step where tokens were not logged."""
    return float(row.get("tokens_seen", row.get("step", 0)))


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Every run, in the order given, under names that tell them apart.

    Raises:
        RunError: If a folder is missing, holds nothing to report, or holds a broken file.
    """
    if not paths:
        raise RunError("no run to report on", hint="name one or more run directories")
    folders = [Path(path).resolve() for path in paths]
    names = _distinct_names(folders)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many parents before it as tell it from the others."""
    names = []
    for folder in folders:
        depth = 1
        while depth < len(folder.parts) and _name(folder, depth) in (
            _name(other, depth) for other in folders if other != folder
        ):
            depth += 1
        names.append(_name(folder, depth))
    return names


def _name(folder: Path, depth: int) -> str:
    return "/".join(folder.parts[-depth:])


def _read_run(folder: Path, name: str) -> RunData:
    if not folder.is_dir():
        raise RunError(f"no run directory at {folder}", hint="check the path")
    metrics_path, config_path = folder / METRICS_FILE, folder / CONFIG_FILE
    metrics = tuple(_read_lines(metrics_path)) if metrics_path.is_file() else ()
    evals = sorted((_read_json(path) for path in sorted(folder.glob(EVAL_GLOB))), key=_eval_step)
    if not metrics and not evals:
        raise RunError(
            f"{folder} holds neither {METRICS_FILE} nor {EVAL_GLOB}",
            hint="a report needs a run directory that was trained or evaluated",
        )
    manifests = sorted(folder.glob(MANIFEST_GLOB))
    config = _read_json(config_path) if config_path.is_file() else {}
    return RunData(
        name=name,
        config=config,
        metrics=metrics,
        evals=tuple(evals),
        manifest=_read_json(manifests[-1]) if manifests else {},
        noise=read_noise(folder, config),
    )


def _eval_step(report: dict[str, Any]) -> int:
    model = report.get("model")
    return int(model.get("step", 0)) if isinstance(model, dict) else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}", hint="restore or delete the file") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object", hint="restore or delete the file")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line without its newline is still being written."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}", hint="restore the file") from error
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(
                f"{path} line {number} is not JSON: {error}", hint="restore the file"
            ) from error
    return rows
