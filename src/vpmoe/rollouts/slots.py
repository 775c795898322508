"""Slots in which conversations are written, a token each per step, without asking the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vpmoe.models.decode import ReferenceDecoder
from vpmoe.models.student import Student
from vpmoe.rollouts.draw import Draw, choose, stream_of, uniforms


@dataclass(frozen=True)
class Written:
    """What a slot has written so far.

    Attributes:
        tokens: o200k ids; the stop token included.
        logprobs: Of each token under the model itself (temperature 1, nothing cut), nats, float32.
        behavior_logprobs: Of each token under the distribution it was drawn from; 0 when greedy.
        has_stopped: Whether a stop token ended it.
        expert_ids: Experts of the prompt's tokens and of the written ones but the last, in every
            mixture layer: (tokens, mixture layers, A); None if they are not kept.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    behavior_logprobs: np.ndarray
    has_stopped: bool
    expert_ids: np.ndarray | None


class Slots:
    """Conversations side by side: what they are, and what they have said so far.

    On a decoder with static shapes a step is captured in a CUDA graph at its second run; the graph
    reads the parameters where they lie and goes when the slots go.

    Args:
        student: Who writes.
        draw: How a token is chosen.
        stops: Ids that end a completion.
        slots: Conversations at a time.
        capacity: Tokens of the longest conversation.
        keeps_experts: Keep the experts of every token, for whoever reads the tokens again.
    """

    def __init__(
        self,
        student: Student,
        draw: Draw,
        stops: Sequence[int],
        *,
        slots: int,
        capacity: int,
        keeps_experts: bool = False,
    ) -> None:
        self.student = student
        self.draw = draw
        self.decoder = student.kernels.decoder(
            student, slots=slots, capacity=capacity, keeps_experts=keeps_experts
        )
        device = self.decoder.hidden.device
        self._stop_list = list(stops)
        self._stops = torch.tensor(self._stop_list, dtype=torch.int64, device=device)
        self._streams, self._limits, self._places, self._written = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)
        )
        self._active, self._stopped = (
            torch.zeros(slots, dtype=torch.bool, device=device) for _ in range(2)
        )
        # Slots that have ended go on writing into their next column, which is never read.
        self._tokens = torch.zeros(slots, capacity + 1, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(slots, capacity + 1, device=device)
        self._behavior = torch.zeros(slots, capacity + 1, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    def serves(self, draw: Draw, stops: Sequence[int], *, slots: int, capacity: int) -> bool:
        """Whether these slots, as they are, can write such completions."""
        same = (draw.temperature, draw.top_p) == (self.draw.temperature, self.draw.top_p)
        is_large = slots <= self.decoder.slots and capacity <= self.decoder.capacity
        return self.decoder.is_static and same and is_large and list(stops) == self._stop_list

    def renew(self, draw: Draw) -> None:
        """Begin again, with the parameters and the seed of the moment."""
        self.draw = draw
        self._active.fill_(False)
        self.decoder.refresh()

    @property
    def stride(self) -> int:
        """Steps between two looks at what has ended: a look makes a GPU wait."""
        return 8 if self.decoder.is_static else 1

    def admit(
        self,
        slots: Sequence[int],
        prompts: Sequence[np.ndarray],
        requests: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        """Begin conversations in these slots, whatever was there."""
        self.decoder.admit(prompts, slots)
        seed = self.draw.seed
        values = np.array(
            [
                [stream_of(seed, request) for request in requests],
                limits,
                [len(prompt) for prompt in prompts],
            ],
            dtype=np.int64,
        )
        into = torch.as_tensor(slots, device=self._places.device)
        streams, limits_, places = torch.from_numpy(values).to(self._places.device)
        self._streams[into] = streams
        self._limits[into] = limits_
        self._places[into] = places
        self._written[into] = 0
        self._active[into] = True
        self._stopped[into] = False

    def advance(self, steps: int) -> Bool[np.ndarray, " slots"]:
        """Write so many tokens in every slot; which slots are still under way."""
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            elif self._is_warm and self.decoder.is_static:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()
                self._graph.replay()
            else:
                self._step()
                self._is_warm = True
        return self._active.cpu().numpy()

    def _step(self) -> None:
        logits = self.student.logits(self.decoder.hidden)
        draw, kernel = self.draw, self.student.kernels.draw
        if kernel is not None and (draw.top_p == 1 or draw.temperature == 0):
            chosen = kernel(logits, self._streams, self._written, temperature=draw.temperature)
        else:
            chosen = choose(logits, uniforms(self._streams, self._written), draw=draw)
        rows, own, behavior = chosen
        tokens = self.student.ids_of(rows)
        column = self._written[:, None]
        self._tokens.scatter_(1, column, tokens[:, None])
        self._logprobs.scatter_(1, column, own[:, None].float())
        self._behavior.scatter_(1, column, behavior[:, None].float())
        self._written += self._active
        stops = self._active & (tokens[:, None] == self._stops).any(dim=1)
        self._stopped |= stops
        self.decoder.read(rows, self._places)
        self._active &= ~(stops | (self._written >= self._limits))
        self._places += self._active

    def take(self, slots: Sequence[int]) -> list[Written]:
        """What each of these slots has written."""
        at = torch.as_tensor(slots, device=self._places.device)
        parts = (self._tokens, self._logprobs, self._behavior, self._stopped)
        written, places = torch.stack((self._written[at], self._places[at])).tolist()
        tokens, own, behavior, stopped = (part[at].cpu().numpy() for part in parts)
        experts: list[np.ndarray | None] = [None] * len(slots)
        kept = self.decoder.cache.expert_ids
        if kept is not None:
            # A slot that has ended goes on in its last place: what lies there is no longer its own.
            whole = kept[at, : max(places)].cpu().numpy()
            experts = [whole[i, :place].copy() for i, place in enumerate(places)]
        return [
            Written(tokens[i, :n], own[i, :n], behavior[i, :n], bool(stopped[i]), experts[i])
            for i, n in enumerate(written)
        ]

    def keep(self, slots: Sequence[int]) -> None:
        """Give up all slots but these, where shapes are not static."""
        assert isinstance(self.decoder, ReferenceDecoder)
        at = torch.as_tensor(slots, device=self._places.device)
        self.decoder.keep(at)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "_stops":
                setattr(self, name, value[at])
