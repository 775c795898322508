"""Sums over all ranks: each is taken in one collective, before anything is divided."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.spans import NUM_SPANS


def add_sums(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name-wise sum of the micro-batches' sums."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def all_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name-wise sum over all ranks, in float64; every rank must hold the same names."""
    names = sorted(sums)
    if not names:
        return {}
    flat = torch.cat([sums[name].detach().double().reshape(-1) for name in names])
    dist.all_reduce(flat)
    pieces = flat.split([sums[name].numel() for name in names])
    return {name: p.reshape(sums[name].shape) for name, p in zip(names, pieces, strict=True)}


def global_counts(batches: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """What the next step divides by, over all micro-batches and ranks.

    Counts depend on labels alone, so they are known before the first forward.

    Returns:
        "spans": labels per span; "documents", "tokens" (padding left out) and "slots" (padding
        included): one number each.
    """
    spans = torch.zeros(NUM_SPANS, dtype=torch.float64)
    documents = tokens = slots = 0
    for batch in batches:
        spans += batch.span_counts.cpu()
        documents += batch.num_documents
        tokens += batch.num_tokens
        slots += batch.tokens.numel()
    rest = torch.tensor([documents, tokens, slots], dtype=torch.float64)
    total = all_sums({"spans": spans.to(device), "rest": rest.to(device)})
    names = ("documents", "tokens", "slots")
    return {"spans": total["spans"], **dict(zip(names, total["rest"].unbind(), strict=True))}
