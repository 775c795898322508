"""Scored rollouts to training batches: spans by channel, several rollouts in a row."""

from collections.abc import Sequence

import numpy as np
import torch

from vpmoe.batch import PADDING_DOCUMENT, Batch, Rollout
from vpmoe.errors import RunError
from vpmoe.spans import Span
from vpmoe.vocabulary import CHANNEL, END_OF_TEXT, FINAL, START


def completion_spans(completion: np.ndarray) -> np.ndarray:
    """The `Span` of each sampled token, uint8.

    A completion is cut into messages at every `<|start|>`, which belongs to the message it opens.
    A message is `FINAL` when its channel is final and `REASONING` otherwise, so that malformed
    completions are trained on too: that is where the student most needs the teacher's opinion.
    """
    message = np.cumsum(completion == START)  # (tokens,) which message a token belongs to
    after_channel = np.flatnonzero(completion[:-1] == CHANNEL) + 1
    final_messages = message[after_channel[completion[after_channel] == FINAL]]
    return np.where(np.isin(message, final_messages), Span.FINAL, Span.REASONING).astype(np.uint8)


def pack_rollouts(rollouts: Sequence[Rollout], *, seq_len: int) -> Batch:
    """One batch of rows, each holding whole rollouts, in their order (first fit).

    Only sampled tokens are trained on: neither the prompt, nor the header the prompt ends with,
    nor the end of the document. Experts are those that the sampler used, prompts included.

    Raises:
        RunError: If a rollout is longer than `seq_len`, or unscored.
    """
    rows: list[list[Rollout]] = []
    room: list[int] = []
    for rollout in rollouts:
        length = len(rollout.prompt) + len(rollout.completion)
        if length > seq_len:
            raise RunError(
                f"a rollout of {length} tokens does not fit seq_len {seq_len}",
                hint="lower max_new_tokens or raise batch.seq_len",
            )
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([])
            room.append(seq_len)
            place = len(rows) - 1
        rows[place].append(rollout)
        room[place] -= length
    return _fill(rows, width=seq_len - min(room, default=0))


def _fill(rows: list[list[Rollout]], *, width: int) -> Batch:
    shape = (len(rows), width)
    tokens = np.full(shape, END_OF_TEXT, dtype=np.int64)
    labels = np.full(shape, END_OF_TEXT, dtype=np.int64)
    span_ids = np.zeros(shape, dtype=np.uint8)
    documents = np.full(shape, PADDING_DOCUMENT, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    logprobs = np.zeros((2, *shape), dtype=np.float32)
    experts = _no_experts(rows, shape)
    for r, row in enumerate(rows):
        begin = 0
        for number, rollout in enumerate(row):
            ids = np.concatenate([rollout.prompt, rollout.completion])
            here = slice(begin, begin + len(ids))
            first = begin + len(rollout.prompt) - 1  # predicts the first sampled token
            sampled = slice(first, first + len(rollout.completion))
            tokens[r, here] = ids
            labels[r, begin : here.stop - 1] = ids[1:]
            span_ids[r, sampled] = completion_spans(rollout.completion)
            documents[r, here] = number
            positions[r, here] = np.arange(len(ids))
            logprobs[0, r, sampled] = rollout.rollout_logprobs
            logprobs[1, r, sampled] = rollout.teacher_logprobs
            if experts is not None and rollout.expert_ids is not None:
                experts[r, begin : here.stop - 1] = rollout.expert_ids
            begin = here.stop
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        span_ids=torch.from_numpy(span_ids),
        document_ids=torch.from_numpy(documents),
        positions=torch.from_numpy(positions),
        rollout_logprobs=torch.from_numpy(logprobs[0]),
        teacher_logprobs=torch.from_numpy(logprobs[1]),
        expert_ids=None if experts is None else torch.from_numpy(experts),
        sample_ids=tuple(tuple(rollout.sample_id for rollout in row) for row in rows),
    )


def _no_experts(rows: list[list[Rollout]], shape: tuple[int, int]) -> np.ndarray | None:
    """Room for the experts of every token, all bits set; None if no rollout names any."""
    named = (rollout.expert_ids for row in rows for rollout in row)
    first = next((ids for ids in named if ids is not None), None)
    if first is None:
        return None
    return ~np.zeros((*shape, *first.shape[1:]), dtype=first.dtype)
