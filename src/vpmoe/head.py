"""Hidden states to log-probabilities of chosen tokens, a chunk of rows at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ROWS = 1_024


@torch.no_grad()
def token_logprobs(
    hidden: Float[Tensor, "rows dim"],
    head_weight: Float[Tensor, "vocab dim"],
    token_ids: Int[Tensor, " rows"],
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> Float[Tensor, " rows"]:
    """Natural-log probability of one token per row, in float32 or wider.

    The logits of at most `chunk_rows` rows exist at a time: [rows, vocab] never does.

    Args:
        hidden: Final normed states.
        head_weight: Output embedding, one row per token id.
        token_ids: The token asked about in each row.
        chunk_rows: Rows whose logits are held together; any value gives the same result.

    Returns:
        Log-probabilities in nats, float64 for float64 states and float32 otherwise.

    References:
        own; spec of the chunked head in docs/losses.md.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    for begin in range(0, hidden.shape[0], chunk_rows):
        rows = slice(begin, begin + chunk_rows)
        logits = (hidden[rows] @ head_weight.T).to(wide)  # (chunk, V)
        chosen = logits.gather(1, token_ids[rows, None].long()).squeeze(1)
        out[rows] = chosen - logits.logsumexp(dim=1)
    return out
