"""A teacher's distributions at some places, kept in a file: what a measurement of codecs needs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vpmoe.teachers.frontier import Reference, joined, reference_of

KEPT = 1_024  # likeliest ids of each place: as many as the widest codec may name
ROWS = 32  # whole float64 distributions at a time


def recorded(hidden: Tensor, head: Tensor) -> Reference:
    """Whole distributions over all ids, from final states, on the device of these.

    Args:
        hidden: One row for each place.
        head: Output embedding, one row for each id of the vocabulary.
    """
    ids, parts = torch.arange(len(head), device=head.device), []
    for rows in hidden.split(ROWS):
        logprobs = (rows.float() @ head.float().T).double().log_softmax(1)
        parts.append(_on_cpu(reference_of(logprobs, ids, kept=KEPT)))
    return joined(parts)


def _on_cpu(reference: Reference) -> Reference:
    tensors = {k: v.cpu() for k, v in vars(reference).items() if isinstance(v, Tensor)}
    return replace(reference, **tensors)


def save(path: Path, reference: Reference) -> None:
    """In a file that `python -m benchmarks.target_codecs --captured` reads."""
    assert reference.rest_ids is not None
    held = {
        "entropy": reference.entropy,
        "squares": reference.squares,
        "top_ids": reference.ids.int(),
        "top_logprobs": reference.logprobs.float(),
        "drawn_ids": reference.drawn_ids.int(),
        "drawn_logprobs": reference.drawn_logprobs.float(),
        "rest_ids": reference.rest_ids.int(),
    }
    np.savez_compressed(path, allow_pickle=False, **{k: v.numpy() for k, v in held.items()})
