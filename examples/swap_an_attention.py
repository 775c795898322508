"""Another attention: keys that are also the values, which halves what a cache has to keep.

An attention is one file: a config with its `kind`, and a module that makes queries, keys, values.
In the package it would lie in `src/vpmoe/models/attention/`; the one line to add is its config in
the union of `attention/__init__.py`. All that is around the projections comes from the base class.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from vpmoe.config import Config, load
from vpmoe.models.attention.base import Attention, AttentionShape, Projection
from vpmoe.models.attention.gqa import GqaConfig
from vpmoe.models.mlp import Linear
from vpmoe.models.positions import GrapeAConfig, PositionConfig
from vpmoe.models.student import StudentConfig, build_student

TINY = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny.toml"


class SharedConfig(Config):
    """Grouped-query attention without a projection for values."""

    kind: Literal["shared"] = "shared"
    position: PositionConfig = GrapeAConfig()
    window_size: int | None = None

    def build(self, shape: AttentionShape) -> Attention:
        """The layer's module."""
        return Shared(shape)


class Shared(Attention):
    """Queries by one linear map; keys and values by another."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        dim, bias = shape.hidden_size, shape.bias
        self.q_proj = Linear(dim, shape.num_heads * shape.head_dim, bias=bias)
        self.k_proj = Linear(dim, shape.num_kv_heads * shape.head_dim, bias=bias)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Where they come from, for kernels that make all three at once."""
        keys = Projection(self.k_proj, self.k_proj.bias)
        return Projection(self.q_proj, self.q_proj.bias), keys, keys

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of each token."""
        per_head = (-1, self.shape.head_dim)
        keys = self.k_proj(hidden).unflatten(-1, per_head)
        return self.q_proj(hidden).unflatten(-1, per_head), keys, keys


class WiderStudentConfig(StudentConfig):
    """What the line in the union would do: global layers may be of either kind."""

    global_attention: GqaConfig | SharedConfig = Field(GqaConfig(), discriminator="kind")


if __name__ == "__main__":
    for kind in ("gqa", "shared"):
        words = [f"global_attention.kind={kind}", "vocab_size=200000"]
        student = build_student(load(TINY, WiderStudentConfig, words), seed=0)
        tokens = torch.arange(12)[None]
        output = student(tokens, positions=tokens, document_ids=torch.zeros_like(tokens))
        output.hidden.square().mean().backward()
        size = sum(p.numel() for n, p in student.named_parameters() if ".attention." in n)
        print(f"{kind}: {size:,} parameters of attention, hidden {tuple(output.hidden.shape)}")
