"""The student writes: continuous batching over a fixed number of slots.

What is sampled for a prompt is a function of the seed, the prompt's number and the token's place
alone: neither the batch it shares nor the order of work changes it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vpmoe.errors import UsageError
from vpmoe.models.student import Student
from vpmoe.rollouts.draw import Draw
from vpmoe.rollouts.slots import Slots, Written
from vpmoe.vocabulary import STOP_TOKENS

ADMIT_SHARE = 8  # prompts are read once this part of the slots is free, for a pass costs as a step
ROUNDED = 256  # capacities are multiples of this, so that slots serve more than one call
COMPACT_BELOW = 0.85  # share of slots in use under which the empty ones are given up


@dataclass(frozen=True)
class Completion:
    """What the student wrote after a prompt.

    Attributes:
        tokens: o200k ids; the stop token included.
        logprobs: Of each token under the model itself (temperature 1, nothing cut), nats, float32.
        behavior_logprobs: Of each token under the distribution it was drawn from; 0 when greedy.
        stop_reason: "stop" at a stop token, "length" when it was cut.
        expert_ids: Experts of the prompt's tokens and of the written ones but the last, in every
            mixture layer, best first: (tokens, mixture layers, A), uint8 or wider; None
            unless the sampler keeps them.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    behavior_logprobs: np.ndarray
    stop_reason: Literal["stop", "length"]
    expert_ids: np.ndarray | None = None


class Sampler:
    """Writes completions with a student.

    Args:
        student: Who writes.
        max_batch: Conversations under way at a time.
        keeps_experts: Say of every token which experts it went to.
    """

    def __init__(self, student: Student, *, max_batch: int, keeps_experts: bool = False) -> None:
        if max_batch < 1:
            raise UsageError(f"max_batch is {max_batch}", hint="at least 1")
        self.student = student
        self.max_batch = max_batch
        self.keeps_experts = keeps_experts
        self._slots: Slots | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = STOP_TOKENS,
    ) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Args:
            prompts: o200k ids, each at least one.
            max_new_tokens: Tokens after which a completion is cut, for all or for each.
            temperature: 0 is greedy.
            top_p: In (0, 1].
            seed: Same seed and same prompts, same completions.
            stop_tokens: Ids that end a completion.

        Raises:
            UsageError: If a setting or a prompt makes no sense.
        """
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        _require(prompts, max_new_tokens, temperature=temperature, top_p=top_p)
        if not prompts:
            return []
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        draw = Draw(temperature, top_p, seed)
        capacity = max(len(p) + n for p, n in zip(prompts, max_new_tokens, strict=True))
        slots = self._slots_for(
            draw, stop_tokens, slots=min(self.max_batch, len(prompts)), capacity=capacity
        )
        return _written(slots, prompts, max_new_tokens)

    def release(self) -> None:
        """Give back the memory of caches and graphs, which otherwise stay for the next call."""
        self._slots = None
        if self.student.head_weight.is_cuda:
            torch.cuda.empty_cache()

    def _slots_for(self, draw: Draw, stops: Sequence[int], *, slots: int, capacity: int) -> Slots:
        """The slots of the call before where they serve, others where not."""
        held = self._slots
        if held is not None and held.serves(draw, stops, slots=slots, capacity=capacity):
            held.renew(draw)
            return held
        self.release()
        capacity = -(-capacity // ROUNDED) * ROUNDED
        made = Slots(
            self.student,
            draw,
            stops,
            slots=slots,
            capacity=capacity,
            keeps_experts=self.keeps_experts,
        )
        if made.decoder.is_static:
            self._slots = made
        return made

    @torch.no_grad()
    def stream(
        self, prompt: np.ndarray, *, max_new_tokens: int, draw: Draw, request: int = 0
    ) -> Iterator[int]:
        """The tokens of one completion as they come.

        Args:
            prompt: o200k ids, at least one.
            max_new_tokens: Tokens after which it is cut.
            draw: How a token is chosen.
            request: Another number, other draws.

        Raises:
            UsageError: If a setting or the prompt makes no sense.
        """
        _require([prompt], [max_new_tokens], temperature=draw.temperature, top_p=draw.top_p)
        capacity = len(prompt) + max_new_tokens
        slots = self._slots_for(draw, STOP_TOKENS, slots=1, capacity=capacity)
        slots.admit([0], [np.asarray(prompt, dtype=np.int64)], [request], [max_new_tokens])
        is_going = True
        while is_going:
            is_going = bool(slots.advance(1)[0])
            yield int(slots.take([0])[0].tokens[-1])


def _written(
    slots: Slots, prompts: Sequence[np.ndarray], limits: Sequence[int]
) -> list[Completion]:
    """Every prompt's completion: finished ones leave their slots, new prompts enter."""
    waiting = deque(range(len(prompts)))
    owner = np.full(slots.decoder.slots, -1)  # which prompt a slot works on
    done: dict[int, Completion] = {}
    while waiting or (owner >= 0).any():
        free = np.flatnonzero(owner < 0)
        enough = min(len(waiting), -(-len(owner) // ADMIT_SHARE))
        if waiting and len(free) >= enough:
            entering = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            into = free[: len(entering)]
            owner[into] = entering
            slots.admit(
                into.tolist(),
                [prompts[number] for number in entering],
                entering,
                [limits[number] for number in entering],
            )
        is_active = slots.advance(slots.stride)
        leaving = np.flatnonzero(~is_active & (owner >= 0))
        if leaving.size:
            for number, own in zip(
                owner[leaving].tolist(), slots.take(leaving.tolist()), strict=True
            ):
                done[number] = _completion(own)
            owner[leaving] = -1
        going = np.flatnonzero(owner >= 0)
        is_shrinking = not waiting and 0 < going.size < COMPACT_BELOW * owner.size
        if is_shrinking and not slots.decoder.is_static:
            slots.keep(going.tolist())
            owner = owner[going]
    return [done[number] for number in range(len(prompts))]


def _completion(written: Written) -> Completion:
    return Completion(
        tokens=written.tokens,
        logprobs=written.logprobs,
        behavior_logprobs=written.behavior_logprobs,
        stop_reason="stop" if written.has_stopped else "length",
        expert_ids=written.expert_ids,
    )


def _require(
    prompts: Sequence[np.ndarray], limits: Sequence[int], *, temperature: float, top_p: float
) -> None:
    for limit in limits:
        if limit < 1:
            raise UsageError(f"max_new_tokens is {limit}", hint="at least 1")
    if not temperature >= 0:
        raise UsageError(f"temperature is {temperature}", hint="0 for greedy, or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}", hint="more than 0 and at most 1")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {number} is empty", hint="a prompt has at least one token")
