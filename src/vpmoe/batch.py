"""The things that travel between rooms, with their shapes.

Axis letters, used in comments everywhere: B batch, T sequence, D model, N query heads,
K key/value heads, H head dimension, V vocabulary, E experts, A experts per token, F expert
width, L layers, S spans.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Integer, UInt8
from torch import Tensor

from vpmoe.spans import NUM_SPANS, Span
from vpmoe.vocabulary import CALL, END, MESSAGE, RETURN, START

PADDING_DOCUMENT = -1

ReasoningEffort = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Batch:
    """Packed sequences, aligned to labels: position t of every array speaks of `labels[t]`.

    Attributes:
        tokens: o200k ids fed to the model.
        labels: `tokens` shifted by one inside each document; `END_OF_TEXT` where there is none.
        span_ids: `Span` of each label.
        document_ids: Which conversation of the row a token belongs to, counted from 0;
            `PADDING_DOCUMENT` for padding. Attention never crosses documents.
        positions: Place of the token in its document, from 0.
        teacher_logprobs: log p of the label under the teacher, nats; 0 where the span is ignored.
        rollout_logprobs: log p of the label under the student as it was when it sampled.
        target_ids: o200k ids that a teacher's stored distribution of the label names; 0 in unused
            places, which `target_logprobs` marks.
        target_logprobs: Their log-probs (or log-weights of drawn ids), nats; -inf in unused places.
        target_tail: Log of the teacher's mass on all other ids; -inf where nothing is left.
        teacher_hidden: Final normed states of a teacher at the token, for its own head.
        teacher_states: States of some of a teacher's layers at the token.
        row_weights: Factor of the label's loss; absent = 1.
        expert_ids: Experts that each mixture layer sent the token to when it was sampled, best
            first, uint8 or a wider integer; all bits set (255, -1) in all A places where that is
            not known: padding, and the last token of a completion, which no label follows.
        sample_ids: For each row the ids of its documents, in order.
    """

    tokens: Int64[Tensor, "batch seq"]
    labels: Int64[Tensor, "batch seq"]
    span_ids: UInt8[Tensor, "batch seq"]
    document_ids: Int64[Tensor, "batch seq"]
    positions: Int64[Tensor, "batch seq"]
    teacher_logprobs: Float32[Tensor, "batch seq"] | None = None
    rollout_logprobs: Float32[Tensor, "batch seq"] | None = None
    target_ids: Int64[Tensor, "batch seq entries"] | None = None
    target_logprobs: Float32[Tensor, "batch seq entries"] | None = None
    target_tail: Float32[Tensor, "batch seq"] | None = None
    teacher_hidden: Float[Tensor, "batch seq teacher_dim"] | None = None
    teacher_states: Float[Tensor, "batch seq layers teacher_dim"] | None = None
    row_weights: Float32[Tensor, "batch seq"] | None = None
    expert_ids: Integer[Tensor, "batch seq moe_layers chosen"] | None = None
    sample_ids: tuple[tuple[str, ...], ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def rows(self, begin: int, end: int) -> "Batch":
        """Rows `begin` to `end` as a batch of their own."""
        cut = {k: v[begin:end] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **cut, sample_ids=self.sample_ids[begin:end])

    @property
    def span_counts(self) -> Int64[Tensor, " span"]:
        """How many labels each span holds, indexed by `Span`."""
        return torch.bincount(self.span_ids.reshape(-1).long(), minlength=NUM_SPANS)

    @property
    def num_documents(self) -> int:
        """Documents in the batch, padding left out."""
        return int((self.document_ids.amax(dim=1) + 1).clamp_min(0).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, padding left out: what a token budget counts."""
        return int((self.document_ids != PADDING_DOCUMENT).sum())

    @property
    def content_mask(self) -> Bool[Tensor, "batch seq"]:
        """True where the label is trained and is message content, not a header or an end token."""
        return content_mask(self.tokens, self.labels, self.span_ids)


def content_mask(
    tokens: Int64[Tensor, "batch seq"],
    labels: Int64[Tensor, "batch seq"],
    span_ids: UInt8[Tensor, "batch seq"],
) -> Bool[Tensor, "batch seq"]:
    """True where a trained label is the text of a message, not its header or its end.

    A header runs from `<|start|>` to `<|message|>`, so a position is inside one when the latest of
    the two at or before it is a start. Every document opens with a start, which also ends whatever
    a malformed document before it left open.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    last_start = torch.where(tokens == START, place, -1).cummax(dim=1).values
    last_message = torch.where(tokens == MESSAGE, place, -1).cummax(dim=1).values
    marker = (labels == START) | (labels == END) | (labels == RETURN) | (labels == CALL)
    return (last_start <= last_message) & ~marker & (span_ids != Span.IGNORE)


@dataclass(frozen=True)
class Rollout:
    """One completion that a student sampled, and what the teacher thinks of it.

    Attributes:
        sample_id: The dataset row whose prompt it answers.
        prompt: o200k ids up to and including the assistant's header.
        completion: Sampled ids; ends in a stop token unless it was cut.
        rollout_logprobs: Of each sampled id under the sampling student, nats, float32.
        teacher_logprobs: Of each sampled id under the teacher, nats, float32; None until scored.
        policy_version: Optimizer step of the weights that sampled it.
        reasoning_effort: Set in the teacher's and the student's system message.
        stop_reason: "stop" or "length".
        expert_ids: Experts of every token but the last, prompt included, in every mixture layer,
            best first: (tokens - 1, mixture layers, A), uint8 or wider; None if not recorded.
    """

    sample_id: str
    prompt: np.ndarray
    completion: np.ndarray
    rollout_logprobs: np.ndarray
    policy_version: int
    reasoning_effort: ReasoningEffort
    stop_reason: Literal["stop", "length"]
    teacher_logprobs: np.ndarray | None = None
    expert_ids: np.ndarray | None = None
