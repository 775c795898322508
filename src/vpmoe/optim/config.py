"""Settings of the optimizers: one learning rate per kind of rule, one multiplier per role."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.config import Config
from vpmoe.optim.groups import Role

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class AdamKeys(Config):
    """What AdamW reads, for the roles that it moves."""

    adam_betas: Betas = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of matrices, times their learning rate; no other role decays."""
    embed_lr_mult: float = Field(default=1.0, ge=0)
    """Learning rate of the input embedding, relative to AdamW's."""
    head_lr_mult: float = Field(default=1.0, ge=0)
    """Learning rate of the output embedding, relative to AdamW's."""
    router_lr_mult: float = Field(default=1.0, ge=0)
    """Learning rate of router matrices, relative to AdamW's."""
    vector_lr_mult: float = Field(default=1.0, ge=0)
    """Learning rate of norms, biases, sinks and frequencies, relative to AdamW's."""
    value_lambda_lr_mult: float = Field(default=5.0, ge=0)
    """Learning rate of value-residual mixing scalars, relative to AdamW's."""

    def decay_of(self, role: Role) -> float:
        """Decoupled weight decay of a role."""
        return self.weight_decay if role == "matrix" else 0.0


class NorMuonConfig(AdamKeys):
    """NorMuon for matrices, AdamW for everything else."""

    kind: Literal["normuon"] = "normuon"
    lr: float = Field(default=0.02, gt=0)
    """Learning rate of matrices."""
    adam_lr: float = Field(default=2e-3, gt=0)
    """Learning rate of AdamW, before the multipliers."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of gradients; the update looks ahead along it (Nesterov)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean square of each row of the orthogonalised update."""
    polar_steps: int = Field(default=5, ge=5, le=8)
    """Polar Express iterations."""
    polar_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the iterations; auto = bfloat16 on a GPU, the weights' on a CPU."""
    second_moment_axis: Literal["row", "long"] = "row"
    """What is normalised: output rows always, or whichever of rows and columns are more."""
    scale: Literal["fork", "rms"] = "fork"
    """Update size: fork = sqrt(max(1, rows/cols)); rms = .2 per entry, as AdamW's."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the momentum; it is computed in float32."""

    def lr_of(self, role: Role) -> float:
        """Learning rate of a role, before the schedule."""
        return self.lr if role == "matrix" else self.adam_lr * getattr(self, f"{role}_lr_mult")


class AdamWConfig(AdamKeys):
    """AdamW for every parameter: the baseline."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of matrices, and of the rest before the multipliers."""

    def lr_of(self, role: Role) -> float:
        """Learning rate of a role, before the schedule."""
        return self.lr if role == "matrix" else self.lr * getattr(self, f"{role}_lr_mult")


OptimizerConfig = Annotated[NorMuonConfig | AdamWConfig, Field(discriminator="kind")]
