"""Keys and values of conversations under way; layers with a window keep a ring of that size.

A cache may remember as well which experts each token went to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor


def ring_places(lengths: Int[Tensor, " batch"], size: int) -> Int[Tensor, "batch slots"]:
    """Which place of its sequence each slot of a ring holds; negative where it holds none.

    Place p lies in slot p mod size, and the newest `size` places win.

    References:
        own.
    """
    slots = torch.arange(size, device=lengths.device)
    newest = lengths[:, None] - 1
    return newest - (newest - slots) % size


@dataclass
class LayerCache:
    """One layer's part of a cache.

    Attributes:
        keys: After QK-norm and rotation; slots of the ring.
        values: After the value residual.
        step: What the forward pass under way writes.
        expert_ids: Experts of the token at each place, where they are remembered.
    """

    keys: Float[Tensor, "batch slots kv_heads dim"]
    values: Float[Tensor, "batch slots kv_heads dim"]
    step: "CacheStep"
    expert_ids: Integer[Tensor, "batch places chosen"] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; what the new queries attend over."""
        if self.step.is_prefill:
            places = ring_places(self.step.lengths, self.keys.shape[1]).clamp(0, keys.shape[1] - 1)
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            self.keys.copy_(keys[rows, places])
            self.values.copy_(values[rows, places])
            return keys, values
        rows = torch.arange(keys.shape[0], device=keys.device)
        slots = (self.step.lengths - 1) % self.keys.shape[1]
        self.keys[rows, slots] = keys[:, 0]
        self.values[rows, slots] = values[:, 0]
        used = min(self.step.max_length, self.keys.shape[1])
        return self.keys[:, :used], self.values[:, :used]

    def note(self, expert_ids: Int[Tensor, "rows chosen"]) -> None:
        """Remember the experts of the new tokens, if this layer's are to be remembered."""
        if self.expert_ids is None:
            return
        batch = self.expert_ids.shape[0]
        ids = expert_ids.unflatten(0, (batch, -1)).to(self.expert_ids.dtype)
        if self.step.is_prefill:
            self.expert_ids[:, : ids.shape[1]] = ids
        else:
            rows = torch.arange(batch, device=ids.device)
            self.expert_ids[rows, self.step.lengths - 1] = ids[:, 0]


@dataclass
class CacheStep:
    """The forward pass under way: lengths count its tokens already."""

    lengths: Int[Tensor, " batch"]
    max_length: int
    is_prefill: bool


class KeyValueCache:
    """Room for a batch of conversations.

    The first forward pass fills it from prompts of any lengths, padded at the end; every later one
    brings one token per conversation.

    Args:
        windows: Window of each layer, None for layers that see everything.
        batch: Conversations.
        capacity: Tokens of the longest conversation, prompt and completion together.
        like: A tensor whose device and dtype keys take, of shape (kv_heads, head_dim).

    Attributes:
        expert_ids: Experts of the token at each place in every mixture layer, best first, all bits
            set where there was none yet; None unless `remember_experts` was called.
    """

    expert_ids: Integer[Tensor, "batch places moe_layers chosen"] | None = None

    def __init__(
        self, windows: tuple[int | None, ...], *, batch: int, capacity: int, like: Tensor
    ) -> None:
        self.capacity = capacity
        self.step = CacheStep(
            torch.zeros(batch, dtype=torch.int64, device=like.device), 0, is_prefill=True
        )
        self.layers = []
        for window in windows:
            slots = capacity if window is None else min(window, capacity)
            room = like.new_zeros((batch, slots, *like.shape))
            self.layers.append(LayerCache(room, torch.zeros_like(room), self.step))

    def remember_experts(self, layers: Sequence[int], *, chosen: int, dtype: torch.dtype) -> None:
        """Keep the experts of every token from now on.

        Args:
            layers: Indices of the mixture layers.
            chosen: Experts per token.
            dtype: Of the ids.
        """
        keys = self.layers[0].keys
        shape = (keys.shape[0], self.capacity, len(layers), chosen)
        self.expert_ids = torch.zeros(shape, dtype=dtype, device=keys.device).bitwise_not_()
        for number, layer in enumerate(layers):
            self.layers[layer].expert_ids = self.expert_ids[:, :, number]

    def begin(self, document_ids: Int[Tensor, "batch seq"]) -> None:
        """Announce a forward pass: its tokens count as held from here on.

        Raises:
            ValueError: If there is no room, or a filled cache is given more than one token each.
        """
        seq = document_ids.shape[1]
        self.step.is_prefill = self.step.max_length == 0
        if not self.step.is_prefill and seq != 1:
            raise ValueError(f"a filled cache takes one token at a time, got {seq}")
        if self.step.max_length + seq > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and is full")
        self.step.lengths = self.step.lengths + (document_ids >= 0).sum(dim=1)
        self.step.max_length += seq

    def key_places(self, window: int | None) -> Int[Tensor, "batch slots"] | None:
        """Places of the keys that layers with this window attend over; None in the prompt pass."""
        if self.step.is_prefill:
            return None
        size = self.capacity if window is None else min(window, self.capacity)
        return ring_places(self.step.lengths, size)[:, : min(self.step.max_length, size)]

    def resume(self, places: Int[Tensor, " batch"]) -> None:
        """Say how many tokens each conversation holds: the places of the tokens that come next."""
        self.step.lengths = places
        self.step.max_length = int(places.max())

    def insert(self, rows: Int[Tensor, " fresh"], prompts: "KeyValueCache") -> None:
        """Put conversations that another cache has just read into these rows.

        Place p lies in the same slot of both: the other ring is shorter only where no place reaches
        its end.
        """
        for layer, other in zip(self.layers, prompts.layers, strict=True):
            size = min(layer.keys.shape[1], other.keys.shape[1])
            layer.keys[rows, :size] = other.keys[: len(rows), :size]
            layer.values[rows, :size] = other.values[: len(rows), :size]
        if self.expert_ids is not None and prompts.expert_ids is not None:
            size = min(self.capacity, prompts.capacity)
            self.expert_ids[rows, :size] = prompts.expert_ids[: len(rows), :size]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Drop all conversations but these."""
        self.step.lengths = self.step.lengths[rows]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if self.expert_ids is not None:
            self.expert_ids = self.expert_ids[rows]
            mixtures = [layer for layer in self.layers if layer.expert_ids is not None]
            for number, layer in enumerate(mixtures):
                layer.expert_ids = self.expert_ids[:, :, number]
