"""Objectives: each file holds one, its config, its maths and its `build`."""

from typing import Annotated

from pydantic import Field

from vpmoe.losses.base import Loss, LossInputs, LossOutput, span_means, span_scales
from vpmoe.losses.confidence_weighted import ConfidenceWeightedConfig
from vpmoe.losses.cross_entropy import CrossEntropyConfig
from vpmoe.losses.load_balance import load_balance_loss
from vpmoe.losses.reverse_kl import SampledReverseKLConfig

LossConfig = Annotated[
    CrossEntropyConfig | ConfidenceWeightedConfig | SampledReverseKLConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "ConfidenceWeightedConfig",
    "CrossEntropyConfig",
    "Loss",
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "SampledReverseKLConfig",
    "load_balance_loss",
    "span_means",
    "span_scales",
]
