"""A teacher's distributions at some places, kept in a file: what a measurement of codecs needs."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vpmoe.teachers.frontier import Reference, joined, reference_of

KEPT = 1_024  # likeliest ids of each place: as many as the widest codec may name
ROWS = 32  # whole float64 distributions at a time
_NARROW = {"ids": np.int32, "drawn_ids": np.int32, "logprobs": np.float32}


def recorded(hidden: Tensor, head: Tensor) -> Reference:
    """Whole distributions over all ids, from final states, on the device of these.

    Args:
        hidden: One row for each place.
        head: Output embedding, one row for each id of the vocabulary.
    """
    ids, parts = torch.arange(len(head), device=head.device), []
    for rows in hidden.split(ROWS):
        logprobs = (rows.float() @ head.float().T).double().log_softmax(1)
        values, columns = logprobs.topk(min(KEPT, len(head)), dim=1)
        whole = replace(reference_of(logprobs, ids), ids=ids[columns], logprobs=values)
        parts.append(_on_cpu(whole))
    return joined(parts)


def _on_cpu(reference: Reference) -> Reference:
    tensors = {k: v.cpu() for k, v in vars(reference).items() if isinstance(v, Tensor)}
    return replace(reference, **tensors)


def save(path: Path, panels: Mapping[str, Reference]) -> None:
    """Every panel in one file; likeliest ids with float32 log-probs, sums as they are."""
    arrays = {}
    for title, reference in panels.items():
        for field in fields(reference):
            array = np.asarray(getattr(reference, field.name))
            arrays[f"{title}/{field.name}"] = array.astype(_NARROW.get(field.name, array.dtype))
    np.savez_compressed(path, **arrays)


def load(path: Path) -> dict[str, Reference]:
    """The panels of a file by title, in their order."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            title, field = name.rsplit("/", 1)
            found.setdefault(title, {})[field] = arrays[name]
    return {title: _reference(fields_of) for title, fields_of in found.items()}


def _reference(found: Mapping[str, np.ndarray]) -> Reference:
    tensors = {k: torch.from_numpy(v) for k, v in found.items() if v.ndim}
    wide = {k: v.double() if v.is_floating_point() else v.long() for k, v in tensors.items()}
    return Reference(**wide, vocab=int(found["vocab"]), exact=bool(found["exact"]))
