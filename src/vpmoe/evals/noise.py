"""The noise floor beside a KL: what it would be if student and teacher were the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.errors import RunError

NOISE_FILE = "noise.json"
NOISE_SCHEMA = "vpmoe_noise_v1"


@dataclass(frozen=True)
class NoiseFloors:
    """What `vpmoe teacher noise` measured.

    Attributes:
        floors: Loss, path, dtype and nats of each measurement.
    """

    floors: tuple[Mapping[str, Any], ...]

    def of(self, loss: str) -> float | None:
        """The largest floor of a loss over all paths and dtypes; None where none was measured."""
        found = [abs(float(floor["nats"])) for floor in self.floors if floor["loss"] == loss]
        return max(found) if found else None


def read_noise(folder: Path, config: Mapping[str, Any]) -> NoiseFloors | None:
    """The floors noted in a run's folder, or beside the targets that it was trained on.

    Args:
        folder: Of the run.
        config: Its resolved settings.

    Raises:
        RunError: If there is a file of noise floors that cannot be read.
    """
    targets = (config.get("targets") or {}).get("path") or ""
    places = [folder / NOISE_FILE, *([Path(targets) / NOISE_FILE] if targets else [])]
    for path in places:
        if path.is_file():
            return _read(path)
    return None


def _read(path: Path) -> NoiseFloors:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}", hint="restore or delete the file") from error
    if not isinstance(content, dict) or content.get("schema") != NOISE_SCHEMA:
        raise RunError(
            f"{path} holds no noise floors", hint="make it with: vpmoe teacher noise CONFIG"
        )
    return NoiseFloors(tuple(content["floors"]))
