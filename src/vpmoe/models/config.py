"""What a student is made of: a handful of dials, from which every layer follows."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vpmoe.config import Config
from vpmoe.errors import ConfigError
from vpmoe.models.attention import AttentionConfig
from vpmoe.models.attention.gqa import GqaConfig
from vpmoe.models.attention.tpa import TpaConfig
from vpmoe.models.mlp import Activation
from vpmoe.models.moe import MoeConfig
from vpmoe.models.positions import GrapeMConfig, RopeConfig
from vpmoe.models.router import DeepseekV3Config
from vpmoe.vocabulary import END_OF_TEXT, VOCAB_SIZE, VocabSubset


class StudentConfig(Config):
    """A decoder: every layer is an attention and a feed-forward network.

    Layers count from 1. A layer is global where its number divides by `global_every`, else local;
    its feed-forward network is dense up to `dense_layers`, else a mixture of experts.
    """

    kind: Literal["student"] = "student"
    name: str = Field(default="student", min_length=1)
    """What the model is called in reports and exports."""
    num_layers: int = Field(gt=0)
    """Layers, local and global together."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_heads: int = Field(gt=0)
    """Query heads of each layer."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads of each layer; must divide num_heads."""
    head_dim: int = Field(gt=0)
    """Width of a head."""
    vocab_size: int = Field(VOCAB_SIZE, gt=0, le=VOCAB_SIZE)
    """Token ids lie below this."""
    vocab_subset: tuple[int, ...] | None = None
    """The only o200k ids the model has embeddings for, ascending: a list, or the path of a JSON or
    text file with one. Absent for all."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    global_every: int = Field(default=4, ge=0)
    """Every this many layers one is global; 1 for all, 0 for none."""
    local_attention: AttentionConfig = TpaConfig()
    """The mixer of local layers."""
    global_attention: AttentionConfig = GqaConfig()
    """The mixer of global layers."""
    sinks: bool = True
    """Whether each head's softmax has a learned sink."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normalised per head."""
    value_residual: bool = True
    """Whether layers mix their values with the first layer's."""
    attention_bias: bool = True
    """Whether the projections of attention have biases."""
    activation: Activation = "relu2"
    """Hidden units of all feed-forward networks."""
    mlp_bias: bool = True
    """Whether feed-forward networks have biases."""
    dense_layers: int = Field(default=1, ge=0)
    """First layers with a dense feed-forward network; num_layers for a dense model."""
    dense_hidden: int = Field(default=512, gt=0)
    """Width of dense feed-forward networks."""
    moe: MoeConfig | None = None
    """The other layers' experts; absent in a dense model."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to mean squares before their root, everywhere."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of first weights."""
    embedding_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the embedding's first rows; absent: init_std. Layers read normed states
    and add to the stream what does not depend on its size: in a deep student the sum of many layers
    drowns small rows, and all tokens look alike to the last ones."""

    @field_validator("vocab_subset", mode="before")
    @classmethod
    def _read_subset(cls, value: Any) -> Any:
        return read_vocab_subset(Path(value)) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "StudentConfig":
        problems = [*self._vocabulary_problems(), *self._attention_problems()]
        if self.tie_embeddings and self.embedding_std is not None:
            problems.append("embedding_std with tie_embeddings: the head would begin as large")
        problems += self._expert_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _vocabulary_problems(self) -> list[str]:
        if self.vocab_subset is None:
            return []
        try:
            VocabSubset(self.vocab_subset)
        except ConfigError as error:
            return [f"vocab_subset: {error}"]
        if self.vocab_size != VOCAB_SIZE:
            return [f"vocab_subset selects from {VOCAB_SIZE} ids, but vocab_size is set too"]
        if END_OF_TEXT not in self.vocab_subset:
            return [f"vocab_subset lacks {END_OF_TEXT}, the id that pads every batch"]
        return []

    def _attention_problems(self) -> list[str]:
        problems = []
        if self.num_heads % self.num_kv_heads:
            heads = f"num_heads {self.num_heads}", f"num_kv_heads {self.num_kv_heads}"
            problems.append(f"{heads[0]} does not divide by {heads[1]}")
        for side in ("local_attention", "global_attention"):
            position = getattr(self, side).position
            if isinstance(position, RopeConfig | GrapeMConfig) and self.head_dim % 2:
                problems.append(f"{side} rotates pairs, but head_dim {self.head_dim} is odd")
        return problems

    def _expert_problems(self) -> list[str]:
        if self.dense_layers > self.num_layers:
            return [f"dense_layers {self.dense_layers} is more than num_layers {self.num_layers}"]
        is_dense = self.dense_layers == self.num_layers
        if self.moe is None:
            return [] if is_dense else ["layers beyond dense_layers need a [moe] table"]
        if is_dense:
            return ["all layers are dense, so the [moe] table would never be used: drop it"]
        return _choice_problems(self.moe)

    def is_global(self, layer: int) -> bool:
        """Whether a layer, counted from 1, is global."""
        return self.global_every > 0 and layer % self.global_every == 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer, counted from 1, has experts."""
        return layer > self.dense_layers

    def attention_of(self, layer: int) -> GqaConfig | TpaConfig:
        """The attention of a layer, counted from 1."""
        return self.global_attention if self.is_global(layer) else self.local_attention

    @property
    def attention_kinds(self) -> dict[str, GqaConfig | TpaConfig]:
        """The attentions in use, by kind of layer: local, global."""
        used = {self.is_global(n) for n in range(1, self.num_layers + 1)}
        kinds = {"local": self.local_attention, "global": self.global_attention}
        return {kind: config for kind, config in kinds.items() if (kind == "global") in used}

    @property
    def num_rows(self) -> int:
        """Rows of the embedding."""
        return self.vocab_size if self.vocab_subset is None else len(self.vocab_subset)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.dense_layers

    @property
    def init_settings(self) -> dict[str, Any]:
        """What `models.init.init_weights` is told."""
        return {
            "std": self.init_std,
            "num_layers": self.num_layers,
            "embedding_std": self.embedding_std,
        }

    @property
    def load_balance(self) -> float:
        """Coefficient of the sequence auxiliary loss; 0 without experts."""
        return 0.0 if self.moe is None else self.moe.router.load_balance


def _choice_problems(moe: MoeConfig) -> list[str]:
    experts, chosen = moe.num_experts, moe.num_experts_per_token
    if chosen > experts:
        return [f"moe: {chosen} experts per token of only {experts}"]
    router = moe.router
    if not isinstance(router, DeepseekV3Config):
        return []
    if experts % router.num_groups:
        return [f"moe: {experts} experts do not split into {router.num_groups} groups"]
    problems = []
    size = experts // router.num_groups
    if router.num_groups_kept > router.num_groups:
        problems.append(f"moe: keeps {router.num_groups_kept} of {router.num_groups} groups")
    elif chosen > router.num_groups_kept * size:
        reach = router.num_groups_kept * size
        problems.append(f"moe: {chosen} experts per token, but kept groups hold only {reach}")
    if router.group_score_topk > size:
        problems.append(f"moe: group_score_topk {router.group_score_topk} of groups of {size}")
    return problems


def read_vocab_subset(path: Path) -> tuple[int, ...]:
    """Ids from a file: a JSON list, or numbers apart by white space.

    Raises:
        ValueError: If the file cannot be read or holds anything else.

    References:
        own.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [int(n) for n in text.split()]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a list of token ids") from error
    if not isinstance(found, list) or not all(type(n) is int for n in found):
        raise ValueError(f"{path} is not a list of token ids")
    return tuple(found)
