"""The mixture-of-experts layer: router, routed experts, shared expert and its weight."""

from typing import Annotated, Literal

from jaxtyping import Float, Int, Integer
from pydantic import Field
from torch import Tensor, nn

from vpmoe.config import Config
from vpmoe.models.experts import Experts
from vpmoe.models.kernels import Kernels
from vpmoe.models.mlp import Activation, Mlp
from vpmoe.models.router import (
    DeepseekV3Config,
    MoeStatistics,
    Router,
    RouterConfig,
    Segments,
)


class ConstantWeight(Config):
    """The shared expert counts in full, always."""

    kind: Literal["constant"] = "constant"


class WarmupWeight(Config):
    """The shared expert's weight grows from 0 to 1."""

    kind: Literal["warmup"] = "warmup"
    tokens: int = Field(gt=0)
    """Training tokens until it counts in full."""


class AnnealWeight(Config):
    """The shared expert's weight falls from 1 to `final`."""

    kind: Literal["anneal"] = "anneal"
    begin_tokens: int = Field(default=0, ge=0)
    """Training tokens before the fall begins."""
    tokens: int = Field(gt=0)
    """Training tokens that the fall takes."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Weight that stays."""


SharedWeightConfig = Annotated[
    ConstantWeight | WarmupWeight | AnnealWeight, Field(discriminator="kind")
]


class MoeConfig(Config):
    """Routed experts, of which each token uses a few, and an always-on shared expert."""

    num_experts: int = Field(default=256, gt=1)
    """Routed experts per layer."""
    num_experts_per_token: int = Field(default=4, gt=0)
    """Routed experts that a token uses."""
    expert_hidden: int = Field(default=128, gt=0)
    """Width of a routed expert."""
    shared_expert_hidden: int = Field(default=512, ge=0)
    """Width of the shared expert; 0 for none."""
    shared_expert_weight: SharedWeightConfig = ConstantWeight()
    """How the shared expert's output is weighted as training goes on."""
    router: RouterConfig = DeepseekV3Config()
    """How experts are chosen."""


def shared_expert_weight(schedule: SharedWeightConfig, *, tokens_seen: int) -> float:
    """What multiplies the shared expert's output after so many training tokens.

    References:
        own: linear ramps.
    """
    match schedule:
        case WarmupWeight(tokens=tokens):
            return min(tokens_seen / tokens, 1.0)
        case AnnealWeight(begin_tokens=begin, tokens=tokens, final=final):
            done = min(max(tokens_seen - begin, 0) / tokens, 1.0)
            return 1.0 - done * (1.0 - final)
        case _:
            return 1.0


class Moe(nn.Module):
    """A feed-forward layer of routed experts and a shared one."""

    def __init__(
        self,
        config: MoeConfig,
        *,
        hidden_size: int,
        activation: Activation,
        bias: bool,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.kernels = kernels
        self.router = Router(
            config.router,
            hidden_size=hidden_size,
            num_experts=config.num_experts,
            num_experts_per_token=config.num_experts_per_token,
        )
        self.experts = Experts(
            config.num_experts,
            hidden_size=hidden_size,
            width=config.expert_hidden,
            activation=activation,
            bias=bias,
        )
        self.shared = None
        if config.shared_expert_hidden:
            self.shared = Mlp(
                hidden_size, config.shared_expert_hidden, activation=activation, bias=bias
            )

    def add_shared(
        self,
        stream: Float[Tensor, "batch seq dim"],
        hidden: Float[Tensor, "batch seq dim"],
        shared_weight: Float[Tensor, ""] | None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The residual stream with the shared expert's output for the normed states."""
        if self.shared is None:
            return stream
        shared = self.shared(hidden)
        return stream + (shared if shared_weight is None else shared * shared_weight.to(stream))

    def add_routed(
        self,
        stream: Float[Tensor, "batch seq dim"],
        for_router: Float[Tensor, "batch seq dim"],
        hidden: Float[Tensor, "batch seq dim"],
        segments: Segments | None,
        given: Integer[Tensor, "batch seq chosen"] | None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Int[Tensor, "rows chosen"], MoeStatistics | None]:
        """The residual stream with the routed experts' outputs, and where the tokens went.

        Router and experts read the same states, given twice so that a kernel may add up their
        gradients. Experts that are given are not chosen anew.
        """
        expert_ids, expert_weights, statistics = self.kernels.route(
            self.router,
            for_router.flatten(0, 1),
            segments,
            None if given is None else given.flatten(0, 1),
        )
        out = self.kernels.moe(
            hidden.flatten(0, 1),
            expert_ids,
            expert_weights,
            self.experts.weights,
            activation=self.activation,
            residual=stream.flatten(0, 1),
        )
        return out.view_as(hidden), expert_ids, statistics
