"""Which config class a file is for."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from vpmoe.config import Config, Tree, apply_overrides, read_tree, validate
from vpmoe.errors import ConfigError


def config_classes() -> dict[str, type[Config]]:
    """Every class that a file can be written for, by its `kind`."""
    from vpmoe.data.build import DataConfig
    from vpmoe.models.student import StudentConfig
    from vpmoe.stages import STAGE_CONFIGS

    return {kind: cls for cls in (DataConfig, StudentConfig, *STAGE_CONFIGS) for kind in kinds(cls)}


def kinds(cls: type[Config]) -> tuple[Any, ...]:
    """The values that `kind` may have in a file for `cls`."""
    return get_args(cls.model_fields["kind"].annotation)


def load_any(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a file of any kind, validated.

    A file without `kind` is of the kind that knows most of its keys.

    Raises:
        ConfigError: If no kind fits, or the settings are wrong.
    """
    tree = apply_overrides(read_tree(path), overrides)
    return validate(_class_of(tree, path), tree, source=str(path))


def _class_of(tree: Tree, path: Path) -> type[Config]:
    classes = config_classes()
    if "kind" in tree:
        kind = str(tree["kind"])
        if kind in classes:
            return classes[kind]
        near = difflib.get_close_matches(kind, classes, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"kinds: {', '.join(classes)}"
        raise ConfigError([(f"{path}: there is no kind {kind!r}", hint)])
    known = {kind: len(tree.keys() & cls.model_fields.keys()) for kind, cls in classes.items()}
    best = max(known.values())
    likely = [kind for kind, count in known.items() if count == best]
    if best == 0 or len(likely) > 1:
        hint = f"add kind = ..., one of: {', '.join(classes)}"
        raise ConfigError([(f"{path} does not say its kind", hint)])
    return classes[likely[0]]
