"""The student writes: batched sampling with a key/value cache.

What is sampled for a prompt is a function of the seed, the prompt's number and the token's place
alone: neither the batch it shares nor the order of work changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.batch import PADDING_DOCUMENT
from vpmoe.errors import UsageError
from vpmoe.models.cache import KeyValueCache
from vpmoe.models.student import Student
from vpmoe.vocabulary import STOP_TOKENS

COMPACT_BELOW = 0.85  # share of unfinished conversations under which the finished ones leave


@dataclass(frozen=True)
class Completion:
    """What the student wrote after a prompt.

    Attributes:
        tokens: o200k ids; the stop token included.
        logprobs: Of each token under the model itself (temperature 1, nothing cut), nats, float32.
        behavior_logprobs: Of each token under the distribution it was drawn from; 0 when greedy.
        stop_reason: "stop" at a stop token, "length" when it was cut.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    behavior_logprobs: np.ndarray
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Draw:
    """How a token is chosen.

    Attributes:
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_p: Only the likeliest tokens that together reach this probability are drawn from.
        seed: Root of all randomness.
    """

    temperature: float
    top_p: float
    seed: int


def uniforms(
    seed: int, prompts: Int[np.ndarray, " batch"], places: Int[np.ndarray, " batch"]
) -> Float[np.ndarray, " batch"]:
    """One number in [0, 1) for each (seed, prompt, place), float64; equal arguments, equal number.

    References:
        Steele et al., "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014): its finishing
        function, chained over the three words.
    """
    state = _scrambled(np.full(prompts.shape, seed & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64))
    state = _scrambled(state ^ prompts.astype(np.uint64))
    state = _scrambled(state ^ places.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scrambled(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))


def nucleus(logits: Float[Tensor, "batch rows"], *, top_p: float) -> Float[Tensor, "batch rows"]:
    """Logits with every token outside the nucleus at -inf.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`; it is
    never empty.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), arXiv:1904.09751.
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = ranked.softmax(dim=-1)
    outside = shares.cumsum(dim=-1) - shares >= top_p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)


def choose(
    logits: Float[Tensor, "batch rows"], uniform: Float[Tensor, " batch"], *, draw: Draw
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Rows chosen, their log-probs under the model, and under what they were drawn from.

    A draw inverts the cumulative distribution at `uniform`, in row order and float64.

    References:
        own.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    if draw.temperature == 0:
        rows = logits.argmax(dim=-1)
        return rows, _of(logprobs, rows), torch.zeros_like(uniform, dtype=torch.float32)
    behavior = logprobs
    if draw.temperature != 1 or draw.top_p < 1:
        tempered = logits / draw.temperature
        if draw.top_p < 1:
            tempered = nucleus(tempered, top_p=draw.top_p)
        behavior = tempered.log_softmax(dim=-1)
    heights = behavior.double().exp().cumsum(dim=-1)
    target = uniform.double()[:, None] * heights[:, -1:]
    rows = torch.searchsorted(heights, target, right=True).squeeze(1)
    rows = rows.clamp_max(logits.shape[1] - 1)
    return rows, _of(logprobs, rows), _of(behavior, rows)


def _of(logprobs: Tensor, rows: Tensor) -> Tensor:
    return logprobs.gather(1, rows[:, None]).squeeze(1)


class Sampler:
    """Writes completions with a student.

    Args:
        student: Put into evaluation mode while it writes, and back afterwards.
        max_batch: Conversations under way at a time.
    """

    def __init__(self, student: Student, *, max_batch: int) -> None:
        if max_batch < 1:
            raise UsageError(f"max_batch is {max_batch}", hint="at least 1")
        self.student = student
        self.max_batch = max_batch

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = STOP_TOKENS,
    ) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Args:
            prompts: o200k ids, each at least one.
            max_new_tokens: Tokens after which a completion is cut.
            temperature: 0 is greedy.
            top_p: In (0, 1].
            seed: Same seed and same prompts, same completions.
            stop_tokens: Ids that end a completion.

        Raises:
            UsageError: If a setting or a prompt makes no sense.
        """
        _require(prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        draw = Draw(temperature, top_p, seed)
        stops = np.asarray(stop_tokens, dtype=np.int64)
        was_training = self.student.training
        self.student.eval()
        done: list[Completion] = []
        try:
            for begin in range(0, len(prompts), self.max_batch):
                numbers = np.arange(begin, min(begin + self.max_batch, len(prompts)))
                wave = _Wave(self.student, prompts, numbers, max_new_tokens)
                done += wave.run(draw, stops)
        finally:
            self.student.train(was_training)
        return done


def _require(
    prompts: Sequence[np.ndarray], *, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", hint="at least 1")
    if not temperature >= 0:
        raise UsageError(f"temperature is {temperature}", hint="0 for greedy, or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}", hint="more than 0 and at most 1")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UsageError(f"prompt {number} is empty", hint="a prompt has at least one token")


class _Wave:
    """Conversations that are written side by side; those that end leave the batch."""

    def __init__(
        self,
        student: Student,
        prompts: Sequence[np.ndarray],
        numbers: Int[np.ndarray, " batch"],
        max_new_tokens: int,
    ) -> None:
        self.student = student
        self.device = student.head_weight.device
        self.prompts = [np.asarray(prompts[n], dtype=np.int64) for n in numbers]
        self.numbers = numbers
        self.limit = max_new_tokens
        self.lengths = np.array([len(prompt) for prompt in self.prompts])
        self.cache: KeyValueCache = student.new_cache(
            batch=len(numbers), capacity=int(self.lengths.max()) + max_new_tokens
        )

    def run(self, draw: Draw, stops: Int[np.ndarray, " stops"]) -> list[Completion]:
        """Write until every conversation has ended."""
        batch = len(self.numbers)
        tokens = np.zeros((batch, self.limit), dtype=np.int64)
        logprobs = np.zeros((2, batch, self.limit), dtype=np.float32)
        written = np.full(batch, self.limit)
        has_stopped = np.zeros(batch, dtype=bool)
        active = np.arange(batch)  # which conversations the rows of the batch are
        hidden = self._read_prompts()
        for place in range(self.limit):
            uniform = uniforms(draw.seed, self.numbers[active], np.full(active.shape, place))
            rows, own, behavior = choose(
                self.student.logits(hidden), torch.from_numpy(uniform).to(self.device), draw=draw
            )
            chosen = self.student.ids_of(rows)
            tokens[active, place] = chosen.cpu().numpy()
            logprobs[:, active, place] = torch.stack((own, behavior)).cpu().numpy()
            ends = np.isin(tokens[active, place], stops) & ~has_stopped[active]
            written[active[ends]] = place + 1
            has_stopped[active[ends]] = True
            going = np.flatnonzero(~has_stopped[active])
            if going.size == 0 or place == self.limit - 1:
                break
            if going.size < COMPACT_BELOW * active.size:
                active = active[going]
                kept = torch.from_numpy(going).to(self.device)
                chosen = chosen[kept]
                self.cache.keep(kept)
            hidden = self._read_tokens(chosen, self.lengths[active] + place)
        return [
            Completion(
                tokens=tokens[i, : written[i]],
                logprobs=logprobs[0, i, : written[i]],
                behavior_logprobs=logprobs[1, i, : written[i]],
                stop_reason="stop" if has_stopped[i] else "length",
            )
            for i in range(batch)
        ]

    def _read_prompts(self) -> Float[Tensor, "batch dim"]:
        """Last state of each prompt."""
        shape = (len(self.prompts), int(self.lengths.max()))
        tokens = np.full(shape, self.prompts[0][0])  # padding is masked; any known id does
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        place = np.arange(shape[1])
        documents = np.where(place < self.lengths[:, None], 0, PADDING_DOCUMENT)
        output = self.student(
            torch.from_numpy(tokens).to(self.device),
            positions=torch.from_numpy(np.broadcast_to(place, shape).copy()).to(self.device),
            document_ids=torch.from_numpy(documents).to(self.device),
            cache=self.cache,
        )
        rows = torch.arange(shape[0], device=self.device)
        return output.hidden[rows, torch.from_numpy(self.lengths - 1).to(self.device)]

    def _read_tokens(
        self, tokens: Int[Tensor, " batch"], places: Int[np.ndarray, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """States after one more token each."""
        output = self.student(
            tokens[:, None],
            positions=torch.from_numpy(places)[:, None].to(self.device),
            document_ids=torch.zeros_like(tokens)[:, None],
            cache=self.cache,
        )
        return output.hidden[:, 0]
