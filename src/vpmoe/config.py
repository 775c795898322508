"""Configs: frozen, strict, read from TOML or YAML, with overrides spelled as in the file."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vpmoe.errors import ConfigError, UsageError
from vpmoe.explain import explain

Tree = dict[str, Any]
EXTENDS = "extends"


class Config(BaseModel):
    """Immutable, strict and self-documenting settings: an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_literally(cls, tree: Any) -> Any:
        """A table without `kind` is of its field's default kind: `optimizer.lr=1` needs no more.

        Numbers and flags are taken as written.
        """
        if not isinstance(tree, dict):
            return tree
        filled = dict(tree)
        for name, field in cls.model_fields.items():
            table, kind = tree.get(name), getattr(field.default, "kind", None)
            if isinstance(table, dict) and kind is not None:
                filled[name] = {"kind": kind, **table}
            elif name in tree:
                filled[name] = _as_written(table, field.annotation)
        return filled


class _Misfit:
    """A flag or text where a number is due, in a wrapping that pydantic does not guess through.

    Left as it is, `limit: yes` in YAML would be taken for one row.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _as_written(value: Any, annotation: Any) -> Any:
    kinds = _plain_kinds(annotation)
    if not kinds or str in kinds or not isinstance(value, bool | int | float | str):
        return value
    fits = type(value) in kinds or (type(value) in (int, float) and kinds != (bool,))
    return value if fits else _Misfit(value)


def _plain_kinds(annotation: Any) -> tuple[type, ...]:
    """Which of bool, int, float and str a field takes; none if it takes anything else too."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    plain = tuple(kind for kind in kinds if kind is not type(None))
    return plain if set(plain) <= {bool, int, float, str} else ()


C = TypeVar("C", bound=Config)


def load(path: Path, cls: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a config file, apply `key=value` overrides and validate the result.

    Raises:
        ConfigError: Listing everything that is wrong, each with its dotted path.
        UsageError: If an override is not of the form `key=value`.
    """
    return validate(cls, apply_overrides(read_tree(path), overrides), source=str(path))


def read_tree(path: Path) -> Tree:
    """The file as nested dicts, with every `extends` resolved.

    A table with `extends = "other.toml"` starts from that file's content (looked up beside the
    file that names it) and its own keys win, table by table.

    Raises:
        ConfigError: If a file is missing, cannot be parsed, or extends itself.
    """
    return _read(Path(path), ())


def _read(path: Path, parents: tuple[Path, ...]) -> Tree:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError([(f"{path} extends itself", "break the circle of `extends`")])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([(f"cannot read config {path}: {reason}", "check the path")]) from error
    return _resolve(_parse(text, path), path, (*parents, resolved))


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key stands once, as in TOML: the last one would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != _MERGE_TAG:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_MERGE_TAG = "tag:yaml.org,2002:merge"


def _parse(text: str, path: Path) -> Tree:
    try:
        if path.suffix in {".yaml", ".yml"}:
            tree = yaml.load(text, _UniqueKeys)
        elif path.suffix == ".toml":
            tree = tomllib.loads(text)
        else:
            hint = "configs end in .toml, .yaml or .yml"
            raise ConfigError([(f"{path}: unknown config format {path.suffix!r}", hint)])
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise ConfigError([(f"{path}: {first}", "mend the syntax at that place")]) from error
    if not isinstance(tree, dict):
        raise ConfigError([(f"{path} holds no settings", "write key = value lines")])
    return tree


def _resolve(tree: Tree, path: Path, parents: tuple[Path, ...]) -> Tree:
    own = {k: _resolve(v, path, parents) if isinstance(v, dict) else v for k, v in tree.items()}
    base = own.pop(EXTENDS, None)
    return own if base is None else merge(_read(path.parent / str(base), parents), own)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`base` with the keys of `over` on top, table by table.

    Where both tables carry another `kind`, `over`'s table replaces `base`'s whole: the settings of
    one kind mean nothing to another.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return new.get("kind", old.get("kind")) == old.get("kind")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """`tree` with `a.b=value` overrides on top; values are TOML, or else plain strings.

    Raises:
        UsageError: If an override has no `=` or an empty key.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(
                f"override {override!r} is not of the form key=value", hint="e.g. seq_len=4096"
            )
        node: Any = _toml_value(text)
        for part in reversed(key.split(".")):
            node = {part: node}
        tree = merge(tree, node)
    return tree


def _toml_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text  # a date


def validate(cls: type[C], tree: Tree, *, source: str) -> C:
    """`tree` as a `cls`; every error is reported at once, with a suggestion where one is near.

    Raises:
        ConfigError: With one problem per wrong setting.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([explain(cls, e, source=source) for e in error.errors()]) from None


def resolved(config: Config) -> Tree:
    """Every setting with its value, ready for JSON."""
    return config.model_dump(mode="json")


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Twelve hex digits that change when any resolved setting does."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One `path: old → new` line for each setting that changed."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key, 'absent')} → {after.get(key, 'absent')}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
