"""Conversations in slots, each a token further per step: what every sampler stands on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.batch import PADDING_DOCUMENT

if TYPE_CHECKING:
    from vpmoe.models.student import Student


class Decoder(ABC):
    """A student with room for `slots` conversations.

    Args:
        student: Whose weights are read, those of the moment.
        slots: Conversations under way at a time.
        capacity: Tokens of the longest conversation, prompt and completion together.
        keeps_experts: Remember in `cache.expert_ids` which experts every token went to.

    Attributes:
        hidden: Final normed state of each slot's newest token.
        is_static: `read` neither allocates nor waits for the host, so a CUDA graph can hold it.
        prompt_tokens: Tokens, padding included, that one prompt pass takes at most.
    """

    hidden: Float[Tensor, "slots dim"]
    is_static = False
    prompt_tokens = 16_384

    def __init__(
        self, student: "Student", *, slots: int, capacity: int, keeps_experts: bool = False
    ) -> None:
        self.student = student
        self.slots = slots
        self.capacity = capacity
        self.cache = student.new_cache(batch=slots, capacity=capacity, keeps_experts=keeps_experts)
        self.hidden = student.embedding.weight.detach().new_zeros(slots, student.config.hidden_size)

    @abstractmethod
    def refresh(self) -> None:
        """Take in that the student's parameters have changed."""

    @abstractmethod
    def read(self, rows: Int[Tensor, " slots"], places: Int[Tensor, " slots"]) -> None:
        """One more token per slot: embedding row and place. Overwrites `hidden`."""

    def admit(self, prompts: Sequence[np.ndarray], slots: Sequence[int]) -> None:
        """Read prompts into slots, in passes of at most `prompt_tokens`; fills their `hidden`."""
        width = self._rounded_width(max(len(prompt) for prompt in prompts))
        most = max(1, self.prompt_tokens // width)
        for begin in range(0, len(prompts), most):
            part = slice(begin, begin + most)
            self._admit(prompts[part], slots[part], width=width, most=most)

    def _rounded_width(self, longest: int) -> int:
        return longest

    def _rounded_rows(self, rows: int, most: int) -> int:
        del most
        return rows

    def _admit(
        self, prompts: Sequence[np.ndarray], slots: Sequence[int], *, width: int, most: int
    ) -> None:
        rows = self._rounded_rows(len(prompts), most)
        tokens = np.full((rows, width), prompts[0][0], dtype=np.int64)  # any known id pads
        placed = np.empty((2, rows), dtype=np.int64)
        for row in range(rows):
            number = row if row < len(prompts) else 0  # spare rows are copies of the first
            tokens[row, : len(prompts[number])] = prompts[number]
            placed[:, row] = len(prompts[number]), slots[number]
        device = self.hidden.device
        self._read_prompts(torch.from_numpy(tokens).to(device), torch.from_numpy(placed).to(device))

    def _read_prompts(
        self, tokens: Int[Tensor, "rows width"], placed: Int[Tensor, "2 rows"]
    ) -> None:
        """Prompts padded at their end, with their lengths and slots."""
        lengths, slots = placed
        rows, width = tokens.shape
        place = torch.arange(width, device=tokens.device).expand(rows, -1)
        keeps_experts = self.cache.expert_ids is not None
        fresh = self.student.new_cache(batch=rows, capacity=width, keeps_experts=keeps_experts)
        states = self.student(
            tokens,
            positions=place.contiguous(),
            document_ids=torch.where(place < lengths[:, None], 0, PADDING_DOCUMENT),
            cache=fresh,
        ).hidden
        self.hidden[slots] = states[torch.arange(rows, device=tokens.device), lengths - 1]
        self.cache.insert(slots, fresh)


class ReferenceDecoder(Decoder):
    """The student's own forward pass, a token at a time."""

    def refresh(self) -> None:
        """Nothing to do: the parameters are read where they are."""

    def read(self, rows: Int[Tensor, " slots"], places: Int[Tensor, " slots"]) -> None:
        """One more token per slot."""
        self.cache.resume(places)
        self.hidden = self.student(
            self.student.ids_of(rows)[:, None],
            positions=places[:, None],
            document_ids=torch.zeros_like(rows)[:, None],
            cache=self.cache,
        ).hidden[:, 0]

    def keep(self, slots: Int[Tensor, " kept"]) -> None:
        """Give up all slots but these."""
        self.slots = len(slots)
        self.cache.keep(slots)
        self.hidden = self.hidden[slots]
