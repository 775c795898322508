"""Ways for tokens to look at one another; `AttentionConfig` names them all."""

from typing import Annotated

from pydantic import Field

from vpmoe.models.attention.gqa import GqaConfig
from vpmoe.models.attention.tpa import TpaConfig

AttentionConfig = Annotated[GqaConfig | TpaConfig, Field(discriminator="kind")]
