"""Sampled reverse KL, on the student's own tokens: the objective of stage 3."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import TOKENS, LossInputs
from vpmoe.losses.rows import LabelLoss

Importance = Literal["none", "plain", "truncated"]


class SampledReverseKLConfig(Config):
    """Policy gradient of KL(student || teacher) on sampled tokens."""

    kind: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"
    importance: Importance = "none"
    """Correction for tokens sampled by an older student: none, its ratio, or the ratio capped."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Largest ratio under `truncated`."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Largest size of an advantage in nats; absent = no clipping."""
    chunk_rows: int = Field(default=CHUNK_ROWS, gt=0)
    """Rows whose logits are held together; any value gives the same result."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logprobs", "rollout_logprobs"})

    def build(self) -> "SampledReverseKL":
        """The loss, no step seen yet."""
        return SampledReverseKL(self)


def sampled_reverse_kl(
    student_logprobs: Float[Tensor, " rows"],
    teacher_logprobs: Float[Tensor, " rows"],
    rollout_logprobs: Float[Tensor, " rows"] | None = None,
    *,
    importance: Importance = "none",
    importance_cap: float = 2.0,
    advantage_clip: float | None = None,
) -> Float[Tensor, " rows"]:
    r"""Policy-gradient surrogate of KL(student || teacher), one value per sampled token.

    For a token y drawn from the student p, with teacher q and stop-gradient sg, the surrogate is
    :math:`-A \log p(y)`, :math:`A = \mathrm{sg}[\log q(y) - \log p(y)]`. Its *gradient* is an
    unbiased estimate of the reverse KL's gradient at that position; its *value* means nothing, so
    log `reverse_kl` from the metrics instead. The KL of later positions is not credited to
    earlier tokens (discount 0), and nothing is subtracted as a baseline.

    Tokens that an older student b sampled need the ratio :math:`\rho = p(y) / b(y)`: `plain`
    gives :math:`-\rho A` with grad through the ratio (unbiased, unbounded variance), `truncated`
    gives :math:`-\mathrm{sg}[\min(\rho, cap)] \, A \log p(y)` (biased where the cap bites).

    Args:
        student_logprobs: log p of the sampled tokens under the current student, nats, with grad.
        teacher_logprobs: log q of the same tokens, nats, no grad, temperature 1.
        rollout_logprobs: log b of the same tokens under the distribution they were drawn from.
        importance: Which correction.
        importance_cap: Largest ratio under `truncated`.
        advantage_clip: Largest size of A, nats; None = no clipping.

    Returns:
        One value per token, nats, neither averaged nor summed.

    Raises:
        ValueError: If `teacher_logprobs` carries grad, or a correction lacks `rollout_logprobs`.

    References:
        Lu and Thinking Machines Lab, "On-Policy Distillation" (2025),
        https://thinkingmachines.ai/blog/on-policy-distillation. Difference: per-span sums.
        Agarwal et al., "On-Policy Distillation of Language Models" (ICLR 2024), arXiv:2306.13649.
        Ionides, "Truncated Importance Sampling" (JCGS 2008).

    Example:
        >>> from torch import tensor
        >>> sampled_reverse_kl(tensor([-1.0, -2.0]), tensor([-0.5, -2.0])).tolist()
        [0.5, 0.0]
    """
    if teacher_logprobs.requires_grad:
        raise ValueError("teacher_logprobs carries grad; score the teacher under torch.no_grad()")
    advantages = teacher_logprobs - student_logprobs.detach()  # > 0: the teacher likes it more
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    if importance == "none":
        return -advantages * student_logprobs
    if rollout_logprobs is None:
        raise ValueError(f"importance {importance!r} needs rollout_logprobs")
    importance_ratio = (student_logprobs - rollout_logprobs).exp()
    if importance == "plain":
        return -importance_ratio * advantages
    return -importance_ratio.detach().clamp_max(importance_cap) * advantages * student_logprobs


def effective_sample_share(
    ratios: Float[Tensor, " span"], ratios_squared: Float[Tensor, " span"], count: float
) -> float:
    """Effective sample size of importance ratios over their number, in 0..1; 1 for none.

    NaN where a ratio is too large to be squared.

    Args:
        ratios: Sums of the ratios, whose own sum is taken.
        ratios_squared: Sums of their squares, likewise.
        count: How many ratios there are.

    References:
        Kong, "A note on importance sampling using standardized weights" (1992).
    """
    return float(ratios.sum() ** 2 / (count * ratios_squared.sum())) if count else 1.0


class SampledReverseKL(LabelLoss):
    """`sampled_reverse_kl` of each sampled label.

    Args:
        config: Which importance correction and clips.

    Attributes:
        sample_share: `effective_sample_share` of the latest step's tokens, over all ranks.
    """

    needs = SampledReverseKLConfig.needs

    def __init__(self, config: SampledReverseKLConfig) -> None:
        super().__init__(chunk_rows=config.chunk_rows)
        self.config = config
        self.sample_share = 1.0

    def row_losses(
        self, student_logprobs: Float[Tensor, " rows"], rows: LossInputs
    ) -> Float[Tensor, " rows"]:
        """The surrogate of each label."""
        assert rows.teacher_logprobs is not None  # `needs` was checked
        return sampled_reverse_kl(
            student_logprobs,
            rows.teacher_logprobs,
            rows.rollout_logprobs,
            importance=self.config.importance,
            importance_cap=self.config.importance_cap,
            advantage_clip=self.config.advantage_clip,
        )

    def row_metrics(
        self,
        student_logprobs: Float[Tensor, " rows"],
        extras: dict[str, Tensor],
        rows: LossInputs,
    ) -> dict[str, Tensor]:
        """Estimates of the reverse KL, and how far the sampling student has been left behind."""
        assert rows.teacher_logprobs is not None and rows.rollout_logprobs is not None
        advantages = rows.teacher_logprobs - student_logprobs
        ratio = (student_logprobs - rows.rollout_logprobs).exp()
        metrics = {
            "reverse_kl": -advantages,  # k1: unbiased, may be negative
            "reverse_kl_k3": advantages.exp() - 1 - advantages,  # never negative
            "importance_ratio": ratio,
            "importance_ratio_squared": ratio.double().square(),  # effective sample size
        }
        if self.config.importance == "truncated":
            metrics["importance_truncated"] = (ratio > self.config.importance_cap).double()
        if self.config.advantage_clip is not None:
            metrics["advantage_clipped"] = (advantages.abs() > self.config.advantage_clip).double()
        return metrics

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Note how much this global batch's importance ratios are worth."""
        ratios, squares = sums["importance_ratio"], sums["importance_ratio_squared"]
        self.sample_share = effective_sample_share(ratios, squares, float(sums[TOKENS].sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """The latest step's sample share."""
        return {"sample_share": torch.tensor(self.sample_share, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back the sample share."""
        self.sample_share = float(state["sample_share"])
