"""Which config class a file is for."""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path

from vpmoe.config import Config, Tree, apply_overrides, read_tree, validate
from vpmoe.errors import ConfigError

# Named rather than imported: checking a dataset's config need not wait for torch.
CLASSES = {
    "data": "vpmoe.data.build:DataConfig",
    "student": "vpmoe.models.config:StudentConfig",
    "eval": "vpmoe.evals.suite:EvalConfig",
    "score": "vpmoe.stages.score:ScoreConfig",
    "warm_start": "vpmoe.stages.warm_start:WarmStartConfig",
    "offline": "vpmoe.stages.offline:OfflineConfig",
    "on_policy": "vpmoe.stages.on_policy:OnPolicyConfig",
    "demo": "vpmoe.stages.demo:DemoConfig",
    "local": "vpmoe.teachers.local:LocalTeacherConfig",
    "server": "vpmoe.teachers.server:ServerTeacherConfig",
}


def class_of(kind: str) -> type[Config]:
    """The config class of a kind, imported now."""
    module, _, name = CLASSES[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def load_any(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a file of any kind, validated.

    A file without `kind` is of the first kind that knows all of its keys, else of the one that
    knows most of them.

    Raises:
        ConfigError: If no kind fits, or the settings are wrong.
    """
    tree = apply_overrides(read_tree(path), overrides)
    return validate(class_of(_kind_of(tree, path)), tree, source=str(path))


def _kind_of(tree: Tree, path: Path) -> str:
    if "kind" in tree:
        kind = str(tree["kind"])
        if kind in CLASSES:
            return kind
        near = difflib.get_close_matches(kind, CLASSES, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"kinds: {', '.join(CLASSES)}"
        raise ConfigError([(f"{path}: there is no kind {kind!r}", hint)])
    known = {}
    for kind in CLASSES:
        known[kind] = len(tree.keys() & class_of(kind).model_fields.keys())
        if tree and known[kind] == len(tree):
            return kind  # knows every key: no need to import the heavier ones
    best = max(known.values())
    likely = [kind for kind, count in known.items() if count == best]
    if best == 0 or len(likely) > 1:
        hint = f"add kind = ..., one of: {', '.join(CLASSES)}"
        raise ConfigError([(f"{path} does not say its kind", hint)])
    return likely[0]
