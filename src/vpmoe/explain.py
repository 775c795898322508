"""What pydantic found wrong in a config, in a user's words."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from vpmoe.errors import VpmoeError

_EXPECTED = {
    "model_type": "expected a table of settings",
    "model_attributes_type": "expected a table of settings",
    "dict_type": "expected a table of settings",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected a string",
    "path_type": "expected a path",
}


def explain(cls: type[BaseModel], error: Any, *, source: str) -> tuple[str, str]:
    """One pydantic error as (message, hint): dotted path, value seen, remedy.

    Union tags are left out of the path, as they are not in the file either, and a table is never
    printed whole.
    """
    models, path = _walk(cls, error["loc"])
    key = ".".join(path) or "config"
    kind, seen = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        owner = f" of {seen_kind}" if (seen_kind := _only_kind(models)) else ""
        return f"{source}: {key} is not a setting{owner}", _near(path[-1], known, "known here")
    if kind == "missing":
        is_table = any(True for _ in _owned(models, path))
        return f"{source}: {key} is missing", f"add [{key}]" if is_table else f"add {key} = ..."
    if kind == "union_tag_not_found":
        kinds = sorted(str(k) for model in _owned(models, path) for k in _kinds(model))
        return f"{source}: {key}.kind is missing", f"kinds: {', '.join(kinds)}"
    if kind == "union_tag_invalid":
        tag, kinds = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{source}: {key}.kind: there is no kind {tag!r}", _near(tag, kinds, "kinds")
    if kind == "literal_error":
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{source}: {key}: {seen!r} is not a choice", _near(str(seen), choices, "choices")
    if kind == "value_error":
        cause = error["ctx"]["error"]
        return f"{source}: {key}: {cause}", cause.hint if isinstance(cause, VpmoeError) else ""
    said = _EXPECTED.get(kind) or error["msg"][0].lower() + error["msg"][1:]
    shown = "" if isinstance(seen, dict | list) else f" (got {seen!r})"
    said = said.replace("input should", "must").replace(" should ", " must ")
    return f"{source}: {key}: {said}{shown}", _meaning(models, path)


def _meaning(models: Sequence[type[BaseModel]], path: Sequence[str]) -> str:
    """What the setting stands for, from its docstring."""
    fields = [model.model_fields.get(path[-1]) for model in models] if path else []
    said = [field.description for field in fields if field and field.description]
    return f"{path[-1]}: {' '.join(said[0].split())}" if said else ""


def _near(word: str, known: Sequence[str], label: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"{label}: {', '.join(known)}"


def _only_kind(models: Sequence[type[BaseModel]]) -> str:
    kinds = [str(kind) for model in models for kind in _kinds(model)]
    return kinds[0] if len(kinds) == 1 else ""


def _walk(
    cls: type[BaseModel], loc: Sequence[int | str]
) -> tuple[list[type[BaseModel]], list[str]]:
    """The models that may own the last key of `loc`, and `loc` without union tags."""
    models: list[type[BaseModel]] = [cls]
    path: list[str] = []
    for index, part in enumerate(loc):
        tagged = [m for m in models if part in _kinds(m)]
        if tagged and len(models) > 1:
            models = tagged
            continue
        path.append(str(part))
        if index < len(loc) - 1:
            models = list(_owned(models, path)) or models
    return models, path


def _owned(models: Iterable[type[BaseModel]], path: Sequence[str]) -> Iterator[type[BaseModel]]:
    """The models that the field named last in `path` may hold."""
    for model in models:
        field = model.model_fields.get(path[-1])
        if field:
            yield from _models_in(field.annotation)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from _models_in(argument)
