"""A student from wherever it lies: a checkpoint, a run, or an export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpmoe.data.dataset import trained_render
from vpmoe.data.harmony import RenderConfig
from vpmoe.export.modeling import VpmoeForCausalLM, quietly
from vpmoe.models.student import Student
from vpmoe.storage.manifest import MANIFEST_NAME, read_manifest
from vpmoe.train.device import require_device
from vpmoe.train.state import load_student


@dataclass(frozen=True)
class OpenedModel:
    """A student with what its folder says about it.

    Attributes:
        student: On its device.
        render: How its training data was rendered, hence how to ask it.
        manifest: Of the checkpoint or the export.
    """

    student: Student
    render: RenderConfig
    manifest: dict[str, Any]


def open_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    render: RenderConfig | None = None,
) -> OpenedModel:
    """The student in a checkpoint, a run's newest checkpoint, or an export.

    Args:
        path: Its folder.
        device: Where to put it.
        render: How its training data was rendered; from the manifest unless given.

    Raises:
        CheckpointError: If there is no complete model.
        DataError: If rendering is unknown.
        RunError: If there is no such device.
    """
    require_device(device)
    path = Path(path)
    if is_export(path):
        manifest = read_manifest(path / MANIFEST_NAME)
        with quietly():
            student = VpmoeForCausalLM.from_pretrained(path).student.to(device)
        return OpenedModel(student, render or RenderConfig(**manifest["render"]), manifest)
    student, manifest = load_student(path, device=device)
    return OpenedModel(student, render or trained_render(manifest["inputs"]), manifest)


def is_export(path: Path) -> bool:
    """Whether the folder holds an export rather than a checkpoint."""
    manifest = Path(path) / MANIFEST_NAME
    return manifest.is_file() and read_manifest(manifest).get("kind") == "export"
