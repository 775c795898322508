"""From final states to what a teacher thinks of each place, a chunk of places at a time.

Logits of `chunk_rows` places exist at once, in float32 whatever the states are: bfloat16 logits
near 20 are 1/8 apart. A [tokens, vocabulary] tensor never does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from vpmoe.errors import TeacherError

BLOCK = 128  # neighbouring ids whose largest logit speaks for them in the search of the likeliest
_ORDERED = 0x7FFF_FFFF  # flips a negative float's bits into an order of integers


@dataclass(frozen=True)
class Head:
    """A teacher's output embedding, and how many logits may exist at a time.

    Attributes:
        weight: One row per known id, float32.
        chunk_rows: Places whose logits are held together; any number gives the same results.
    """

    weight: Float[Tensor, "vocab dim"]
    chunk_rows: int

    def logprobs(
        self, hidden: Float[Tensor, "rows dim"], tokens: Int64[Tensor, " rows"]
    ) -> Float32[Tensor, " rows"]:
        """Natural-log probability of one token per place.

        References:
            own; spec of the chunked head in docs/losses.md.
        """
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for rows, logits in self._chunks(hidden):
            out[rows], _ = self._read(logits, tokens[rows])
        return out

    def top(
        self, hidden: Float[Tensor, "rows dim"], tokens: Int64[Tensor, " rows"], k: int
    ) -> tuple[Float32[Tensor, " rows"], Int64[Tensor, "rows top"], Float32[Tensor, "rows top"]]:
        """Log-probability of one token per place, and the K likeliest tokens with theirs.

        Args:
            hidden: Final normed states.
            tokens: Row of `weight` asked about at each place.
            k: How many; among equal logits the lower rows of `weight` come first.

        Returns:
            Log-probabilities of `tokens`, rows of `weight` from the likeliest on, and their
            log-probabilities under the whole distribution, in nats.

        References:
            own; see `likeliest`.
        """
        count = hidden.shape[0]
        out = hidden.new_empty(count, dtype=torch.float32)
        ids = torch.empty((count, k), dtype=torch.int64, device=hidden.device)
        top = hidden.new_empty((count, k), dtype=torch.float32)
        for rows, logits in self._chunks(hidden):
            out[rows], ids[rows], top[rows] = self._read_top(logits, tokens[rows], k)
        return out, ids, top

    def drawn(
        self,
        hidden: Float[Tensor, "rows dim"],
        tokens: Int64[Tensor, " rows"],
        uniforms: Float64[Tensor, "rows draws"],
        *,
        power: float,
    ) -> tuple[
        Float32[Tensor, " rows"], Int64[Tensor, "rows draws"], Float32[Tensor, "rows draws"]
    ]:
        """Log-probability of one token per place, and tokens drawn from p to the `power`.

        Args:
            hidden: Final normed states.
            tokens: Row of `weight` asked about at each place.
            uniforms: In [0, 1), ascending along each place.
            power: Of the probabilities that are drawn from, renormalised.

        Returns:
            Log-probabilities of `tokens`, drawn rows of `weight` in ascending order, and their
            log-probabilities at power 1.

        References:
            Anshumann et al., "Sparse Logit Sampling" (ACL 2025), arXiv:2503.16870. Difference: the
            uniform numbers come from outside and the distribution function is inverted, so that a
            rounding error of a logit hardly ever changes a draw.
        """
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        ids = torch.empty(uniforms.shape, dtype=torch.int64, device=hidden.device)
        logprobs = hidden.new_empty(uniforms.shape, dtype=torch.float32)
        for rows, logits in self._chunks(hidden):
            out[rows], norm = self._read(logits, tokens[rows])
            ids[rows] = invert((logits - norm[:, None]).mul_(power).exp_(), uniforms[rows])
            logprobs[rows] = logits.gather(1, ids[rows]) - norm[:, None]
        return out, ids, logprobs

    def _chunks(
        self, hidden: Float[Tensor, "rows dim"]
    ) -> Iterator[tuple[slice, Float32[Tensor, "chunk vocab"]]]:
        for begin in range(0, hidden.shape[0], self.chunk_rows):
            rows = slice(begin, min(begin + self.chunk_rows, hidden.shape[0]))
            yield rows, self._logits(hidden[rows])

    def _logits(self, hidden: Float[Tensor, "rows dim"]) -> Float32[Tensor, "rows vocab"]:
        return hidden.float() @ self.weight.T

    def _read(
        self, logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens, and log-sum-exps."""
        norm = logits.logsumexp(dim=1)
        return logits.gather(1, tokens[:, None]).squeeze(1) - norm, norm

    def _read_top(
        self, logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"], k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the tokens, the likeliest, and theirs."""
        logprobs, norm = self._read(logits, tokens)
        ids = likeliest(logits, k)
        return logprobs, ids, logits.gather(1, ids) - norm[:, None]


def likeliest(logits: Float32[Tensor, "rows vocab"], k: int) -> Int64[Tensor, "rows top"]:
    """Columns of the K largest logits of each row, largest first; equal ones by column.

    Blocks of columns are ranked by their largest logit, equal ones by place. The K first blocks
    hold all that is asked for: what lies in another block comes after the largest logit of each.

    Raises:
        TeacherError: If K is not between 1 and the number of columns.

    References:
        own.
    """
    vocab = logits.shape[1]
    require_k(k, vocab)
    blocks = -(-vocab // BLOCK)
    if blocks <= k:
        return _first(logits, torch.arange(vocab, device=logits.device).expand_as(logits), k)
    whole = vocab // BLOCK
    peaks = logits[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(dim=2)
    if whole < blocks:
        peaks = torch.cat([peaks, logits[:, whole * BLOCK :].amax(dim=1, keepdim=True)], dim=1)
    chosen = _first(peaks, torch.arange(blocks, device=logits.device).expand_as(peaks), k)
    columns = chosen[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    columns = columns.flatten(1)  # (rows, K * BLOCK)
    found = logits.gather(1, columns.clamp_max(vocab - 1))
    return _first(found.masked_fill_(columns >= vocab, -torch.inf), columns, k)


def require_k(k: int, vocab: int) -> None:
    """Refuse to name no token, or more than there are.

    Raises:
        TeacherError: Naming both numbers.
    """
    if not 1 <= k <= vocab:
        raise TeacherError(
            f"asked for the {k} likeliest of {vocab:,} tokens", hint=f"give 1..{vocab}"
        )


def _first(
    values: Float32[Tensor, "rows n"], columns: Int64[Tensor, "rows n"], k: int
) -> Int64[Tensor, "rows top"]:
    """The columns of the K largest values; each value and its column become one ordered integer."""
    bits = (values + 0.0).view(torch.int32)  # minus zero becomes zero
    order = torch.where(bits < 0, bits ^ _ORDERED, bits).long()
    keys = (order << 32) | (2**32 - 1 - columns)
    return 2**32 - 1 - (keys.topk(k, dim=1).values & (2**32 - 1))


def invert(
    chances: Float32[Tensor, "rows vocab"], uniforms: Float64[Tensor, "rows draws"]
) -> Int64[Tensor, "rows draws"]:
    """Where the cumulative distribution passes each uniform number.

    A number finds its block of columns among the sums of the blocks, and then its column among the
    few of the block: the sums over all columns are never made.

    Args:
        chances: Of each column, up to a factor.
        uniforms: In [0, 1).

    References:
        own.
    """
    vocab = chances.shape[1]
    whole = vocab // BLOCK * BLOCK
    sums = chances[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(dim=2)
    if whole < vocab:
        sums = torch.cat([sums, chances[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    below = sums.double().cumsum(dim=1)
    total = below[:, -1:]
    target = (uniforms * total).minimum(total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(below, target, right=True)  # the first that ends above the target
    before = below.gather(1, (block - 1).clamp_min(0)).masked_fill_(block == 0, 0.0)
    share = (target - before) / sums.gather(1, block)
    columns = block[..., None] * BLOCK + torch.arange(BLOCK, device=chances.device)
    found = chances.gather(1, columns.clamp_max(vocab - 1).flatten(1)).view(columns.shape)
    inside = found.double().masked_fill_(columns >= vocab, 0.0).cumsum(dim=2)
    place = (inside <= share[..., None] * inside[..., -1:]).sum(dim=2)
    last = (inside < inside[..., -1:]).sum(dim=2)  # the last column of the block with a chance
    return block * BLOCK + place.minimum(last)
