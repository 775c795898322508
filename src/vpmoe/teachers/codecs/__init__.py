"""How a teacher's distributions are written down; `CodecConfig` is the list of ways."""

from typing import Annotated

from pydantic import Field

from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import Codec as Codec
from vpmoe.teachers.codecs.base import Entries as Entries
from vpmoe.teachers.codecs.distillkit import DistillKitConfig
from vpmoe.teachers.codecs.logprob import LogprobConfig
from vpmoe.teachers.codecs.sampled import SampledConfig
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig

CodecConfig = Annotated[
    LogprobConfig | TopKConfig | SetCodedConfig | AdaptiveConfig | SampledConfig | DistillKitConfig,
    Field(discriminator="kind"),
]


def fitted(config: CodecConfig, num_ids: int) -> CodecConfig:
    """A codec's settings for a teacher that knows so many ids: nothing is left open."""
    return config.of_teacher(num_ids) if isinstance(config, AdaptiveConfig) else config
