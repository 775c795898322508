"""Manifests: what an artefact is, from what it was made, and by which code."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import vpmoe
from vpmoe.errors import DataError
from vpmoe.storage.atomic import atomic_path

MANIFEST_NAME = "manifest.json"
_PACKAGE = Path(vpmoe.__file__).resolve().parent
_CHUNK_BYTES = 1 << 20


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` as JSON to the file `path`, whole or not at all; keys keep their order.

    Raises:
        DataError: If the file cannot be written.
    """
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in the file `path`.

    Raises:
        DataError: If the file is missing, unreadable or not a JSON object.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path.parent} has no {path.name}: it is unfinished or not made by vpmoe",
            hint="run the command that makes it again; it goes on where it stopped",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="check its permissions") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}", hint="restore it or rebuild") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path} does not hold a JSON object", hint="restore it or rebuild")
    return manifest


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes.

    Raises:
        DataError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", hint="check that it is there and readable"
        ) from error
    return digest.hexdigest()


def provenance() -> dict[str, str]:
    """Version and git commit of the code that is running; the commit of an install is "unknown"."""
    return {"vpmoe_version": vpmoe.__version__, "git_sha": _git_sha()}


@cache
def _git_sha() -> str:
    root = _PACKAGE.parents[1]
    # A copy installed under site-packages may lie inside somebody else's checkout.
    if not (root / ".git").exists() or root / "src" / "vpmoe" != _PACKAGE:
        return "unknown"
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
