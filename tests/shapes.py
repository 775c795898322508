"""Shape checks: in tests, every annotated tensor function verifies its arguments and result."""

from pathlib import Path

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

SOURCES = Path(__file__).resolve().parents[1] / "src"

# beartype cannot read `Self` in the class methods of pydantic models, so those files are left out.
MODULES = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in sorted(SOURCES.rglob("*.py"))
    if "from jaxtyping import" in (text := path.read_text(encoding="utf-8")) and "Self" not in text
]
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is welcome where a float is due


def install() -> None:
    """Check the modules with tensors from their import on, where nothing is compiled for a GPU."""
    if torch.cuda.is_available():
        return  # a compiler cannot read the checks
    install_import_hook(MODULES, "tests.shapes.check")
