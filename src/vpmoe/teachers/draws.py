"""Random draws that belong to a sequence, and how often each id came up among them."""

import hashlib

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor


def uniforms(sequence: np.ndarray, *, num_draws: int, seed: int) -> np.ndarray:
    """Where to look up a distribution at each place that a token follows: [n - 1, draws], float64.

    Draw i lies at random in part i of `num_draws` equal parts of [0, 1), so that they ascend. The
    numbers follow from `seed` and the sequence, whatever else is drawn before or beside it.
    """
    content = np.ascontiguousarray(sequence, dtype="<i8").tobytes()
    digest = hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    inside = random.random((len(sequence) - 1, num_draws))
    return (np.arange(num_draws) + inside) / num_draws


def weighted(
    ids: Int64[Tensor, "places draws"], logprobs: Float32[Tensor, "places draws"], *, power: float
) -> tuple[Int64[Tensor, "places draws"], Float32[Tensor, "places draws"]]:
    """Each drawn id once, and the log of its weight: how often it came up, times p over p^power.

    Args:
        ids: Ascending along each place.
        logprobs: Of the ids at power 1.
        power: Of the probabilities that they were drawn from.

    Returns:
        Ids at the front, then 0; log-weights that add up to one, then -inf.

    References:
        Anshumann et al., "Sparse Logit Sampling" (ACL 2025), arXiv:2503.16870.
    """
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    entry = first.cumsum(dim=1) - 1  # which of the different ids each draw is
    once = torch.zeros_like(ids).scatter_(1, entry, ids)
    zeros = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    counts = zeros.scatter_add(1, entry, torch.ones_like(zeros))
    theirs = zeros.scatter(1, entry, logprobs.double())
    log_weights = counts.log() + (1 - power) * theirs
    log_weights -= log_weights.logsumexp(dim=1, keepdim=True)
    return once, log_weights.float()
