"""A checkpoint as a folder that transformers reads: weights, config, tokenizer, card, manifest."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from vpmoe.data.dataset import trained_render
from vpmoe.data.harmony import RenderConfig
from vpmoe.errors import DataError
from vpmoe.export.card import model_card
from vpmoe.export.modeling import VpmoeForCausalLM, quietly
from vpmoe.export.parity import Parity, check_parity
from vpmoe.export.tokenizer import PAD_ID, STOP_IDS, build_tokenizer
from vpmoe.models.student import Student
from vpmoe.storage.atomic import write_error
from vpmoe.storage.checkpoints import latest_checkpoint
from vpmoe.storage.manifest import (
    MANIFEST_NAME,
    file_sha256,
    provenance,
    read_manifest,
    write_manifest,
)
from vpmoe.train.state import load_student
from vpmoe.vocabulary import O200K_SHA256

# With trust_remote_code, transformers imports these files of the folder instead of this package.
SHIMS = {
    "configuration_vpmoe.py": "from vpmoe.export.modeling import VpmoeConfig  # noqa: F401\n",
    "modeling_vpmoe.py": "from vpmoe.export.modeling import VpmoeForCausalLM  # noqa: F401\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_vpmoe.VpmoeConfig",
    "AutoModelForCausalLM": "modeling_vpmoe.VpmoeForCausalLM",
}
FILE_MODE = 0o644
CARRIED = ("step", "tokens_seen", "fingerprint", "inputs", "parent")


@dataclass(frozen=True)
class ExportResult:
    """Where an export lies and how it compares with its checkpoint."""

    path: Path
    parity: Parity
    manifest: dict[str, Any]


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    render: RenderConfig | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """The folder `out`, complete and compared with its checkpoint, or nothing at all.

    Args:
        checkpoint: A checkpoint, or a run for its newest one.
        out: Folder to make.
        render: How the training data was rendered; from the checkpoint's manifest unless given.
        overwrite: Replace a folder that is there already.

    Raises:
        CheckpointError: If there is no complete checkpoint.
        DataError: If `out` is there already, cannot be written, or rendering is unknown.
        CheckFailedError: If the export's logits are not the checkpoint's.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    require_absent(out, overwrite=overwrite)
    student, manifest = load_student(checkpoint)
    step_dir = latest_checkpoint(checkpoint) or checkpoint
    evals: dict[str, Any] = {}
    for report in sorted(step_dir.parent.glob(f"eval-{step_dir.name}*.json")):
        evals |= read_manifest(report)
    return export_student(
        student,
        out,
        manifest=manifest,
        render=render or trained_render(manifest["inputs"]),
        evals=evals,
        overwrite=overwrite,
    )


def require_absent(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what was not meant.

    Raises:
        DataError: If `out` is there and may not be overwritten, or is no export.
    """
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out} is already there", hint="add --overwrite, or choose another --out")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
        raise DataError(f"{out} is not an export", hint="choose another --out")


def export_student(
    student: Student,
    out: Path,
    *,
    manifest: Mapping[str, Any],
    render: RenderConfig,
    evals: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """The same from a student in memory.

    Args:
        student: What to export; it is left as it is.
        out: Folder to make.
        manifest: Of its checkpoint.
        render: How the training data was rendered.
        evals: Its evaluation report, for the card.
        overwrite: Replace a folder that is there already.
    """
    out = Path(out)
    require_absent(out, overwrite=overwrite)
    temporary = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_model(student, temporary)
        build_tokenizer(render).save_pretrained(temporary)
        with quietly():
            parity = check_parity(student, temporary)
        own = {
            "kind": "export",
            "format": "hf",
            "name": student.config.name,
            "dtype": str(student.head_weight.dtype).removeprefix("torch."),
            "tokenizer_sha256": O200K_SHA256,
            **{key: manifest.get(key) for key in CARRIED},
            "checkpoint_code": {key: manifest.get(key) for key in provenance()},
            **provenance(),
            "render": render.model_dump(),
            "parity": asdict(parity),
        }
        card = model_card(student, own, evals or {})
        (temporary / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        own["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        }
        write_manifest(temporary / MANIFEST_NAME, own)
        _publish(temporary, out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ExportResult(out, parity, own)


def _write_model(student: Student, folder: Path) -> None:
    model = VpmoeForCausalLM.from_student(student)
    model.config.auto_map = AUTO_MAP
    model.generation_config = GenerationConfig(
        eos_token_id=list(STOP_IDS), pad_token_id=PAD_ID, max_new_tokens=1024, do_sample=False
    )
    state = model.state_dict()
    for name in state:
        if name.endswith("local_tokens_per_expert"):  # a tally of training, not of the model
            state[name] = state[name].new_zeros(state[name].shape)
    with quietly():
        model.save_pretrained(folder, state_dict=state)
    for name, text in SHIMS.items():
        (folder / name).write_text(text, encoding="utf-8")


def _publish(temporary: Path, out: Path) -> None:
    """Sync the finished folder and give it its name; the one it replaces goes last."""
    for path in temporary.iterdir():
        path.chmod(FILE_MODE)  # safetensors writes for its owner alone
    for path in (*temporary.iterdir(), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)
