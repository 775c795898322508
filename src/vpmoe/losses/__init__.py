"""Objectives: each file holds one, its config, its maths and its `build`."""

from typing import Annotated

from pydantic import Field

from vpmoe.losses.base import Loss, LossInputs, LossOutput, span_means, span_scales
from vpmoe.losses.confidence_weighted import ConfidenceWeightedConfig
from vpmoe.losses.cross_entropy import CrossEntropyConfig
from vpmoe.losses.forward_kl import ForwardKLConfig
from vpmoe.losses.jsd import GeneralizedJSDConfig
from vpmoe.losses.load_balance import load_balance_loss
from vpmoe.losses.random_sampling import RandomSamplingConfig
from vpmoe.losses.reverse_kl import ReverseKLConfig
from vpmoe.losses.sampled_reverse_kl import SampledReverseKLConfig
from vpmoe.losses.skewed_kl import SkewedForwardKLConfig, SkewedReverseKLConfig

OfflineLossConfig = Annotated[
    CrossEntropyConfig
    | ConfidenceWeightedConfig
    | ForwardKLConfig
    | ReverseKLConfig
    | GeneralizedJSDConfig
    | SkewedForwardKLConfig
    | SkewedReverseKLConfig
    | RandomSamplingConfig,
    Field(discriminator="kind"),
]
"""Losses on given text."""

LossConfig = Annotated[OfflineLossConfig | SampledReverseKLConfig, Field(discriminator="kind")]

__all__ = [
    "ConfidenceWeightedConfig",
    "CrossEntropyConfig",
    "ForwardKLConfig",
    "GeneralizedJSDConfig",
    "Loss",
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "OfflineLossConfig",
    "RandomSamplingConfig",
    "ReverseKLConfig",
    "SampledReverseKLConfig",
    "SkewedForwardKLConfig",
    "SkewedReverseKLConfig",
    "load_balance_loss",
    "span_means",
    "span_scales",
]
