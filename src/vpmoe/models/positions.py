"""Positional encodings: RoPE, GRAPE-M and GRAPE-A, each a pure function with a small module.

Angles, sines and cosines are always float32 or wider: bfloat16 angles are wrong by radians.
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vpmoe.config import Config
from vpmoe.models.norm import widened


class Rotation(NamedTuple):
    """What queries and keys are turned by, and what it was made from.

    Attributes:
        cosines: Of every position's angles, float32 or wider.
        sines: The same.
        positions: Place of each token in its document.
        frequencies: Radians per token.
    """

    cosines: Float[Tensor, "batch seq half"]
    sines: Float[Tensor, "batch seq half"]
    positions: Int[Tensor, "batch seq"]
    frequencies: Float[Tensor, " half"]


class YarnConfig(Config):
    """Stretch rotations from a model's first context length to `factor` times it."""

    factor: float = Field(gt=1)
    """How many times longer the new context is."""
    original_length: int = Field(gt=0)
    """Context length, tokens, that the frequencies were trained for."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Planes that turn at least this often over the first context keep their frequency."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Planes that turn at most this often are slowed by `factor`."""


class RopeConfig(Config):
    """Fixed rotations of queries and keys."""

    kind: Literal["rope"] = "rope"
    base: float = Field(default=10_000.0, gt=1)
    """Frequencies are base^(-2i / head_dim)."""
    yarn: YarnConfig | None = None
    """Stretching to a longer context; absent for none."""


class GrapeMConfig(Config):
    """Rotations with learned frequencies, one vector for all layers and heads of a kind."""

    kind: Literal["grape_m"] = "grape_m"
    base: float = Field(default=10_000.0, gt=1)
    """RoPE base that the frequencies start from."""
    log_freq_scale: float = Field(default=16.0, gt=0)
    """The parameter is this times ln(frequency): it divides what one optimizer step moves."""


class GrapeAConfig(Config):
    """A fixed penalty on distance per head, added to the logits; no rotation."""

    kind: Literal["grape_a"] = "grape_a"


class NoPositionConfig(Config):
    """No positional encoding: order is visible through the causal mask alone."""

    kind: Literal["none"] = "none"


PositionConfig = Annotated[
    RopeConfig | GrapeMConfig | GrapeAConfig | NoPositionConfig, Field(discriminator="kind")
]


def rope_log_frequencies(head_dim: int, *, base: float) -> Float[Tensor, " half"]:
    """Natural logs of RoPE's frequencies, float64: ln(base^(-2i / head_dim)).

    References:
        Su et al., "RoFormer" (2021), arXiv:2104.09864.
    """
    plane = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return -plane / head_dim * math.log(base)


def grape_frequencies(
    log_freq: Float[Tensor, " half"], *, log_freq_scale: float
) -> Float[Tensor, " half"]:
    """Learned rotation rates, radians per token: exp(log_freq / log_freq_scale).

    References:
        Zhang et al., "Group Representational Position Encoding" (2025), arXiv:2512.07805.
        Difference: positive rotation sign, as in transformers, and one vector for all layers.
    """
    return torch.exp(widened(log_freq) / log_freq_scale)


def yarn_frequencies(
    frequencies: Float[Tensor, " half"], *, yarn: YarnConfig
) -> Float[Tensor, " half"]:
    """Rotation rates for the longer context: fast planes stay, slow ones are divided by the factor.

    The ramp between them is linear in the log of the turns over the original context, so it needs
    no base and serves learned frequencies too.

    References:
        Peng et al., "YaRN" (2023), arXiv:2309.00071. Difference: ramp in the log of the turns, not
        in the turns, which is what gpt-oss does (`truncate = false` in transformers).
    """
    turns = yarn.original_length * frequencies / (2 * math.pi)
    span = math.log(yarn.beta_fast) - math.log(yarn.beta_slow)
    ramp = ((math.log(yarn.beta_fast) - turns.log()) / span).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def yarn_attention_factor(factor: float) -> float:
    """What multiplies sines and cosines under YaRN: 0.1 ln(factor) + 1.

    References:
        Peng et al., "YaRN" (2023), arXiv:2309.00071.
    """
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rotation_of(
    positions: Int[Tensor, "batch seq"],
    frequencies: Float[Tensor, " half"],
    *,
    attention_factor: float = 1.0,
) -> Rotation:
    """Cosines and sines of every position's angles, float32 or wider.

    References:
        Su et al., "RoFormer" (2021), arXiv:2104.09864.
    """
    angles = positions[..., None].to(frequencies.dtype) * frequencies  # (B, T, H/2)
    cosines, sines = angles.cos() * attention_factor, angles.sin() * attention_factor
    return Rotation(cosines, sines, positions, frequencies)


def rotate(
    vectors: Float[Tensor, "batch seq heads dim"], rotation: Rotation
) -> Float[Tensor, "batch seq heads dim"]:
    """Vectors turned in the planes (i, i + dim/2) by their position's angles.

    References:
        Su et al., "RoFormer" (2021), arXiv:2104.09864. Difference: half-split pairs.
    """
    cosines, sines = (table[:, :, None] for table in rotation[:2])  # (B, T, 1, H/2)
    first, second = widened(vectors).chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(vectors.dtype)


def alibi_slopes(num_heads: int) -> Float[Tensor, " heads"]:
    """Penalty per token of distance and head, nats: 2^(-8 (h + 1) / heads), as float32.

    Head counts that are not powers of two take the slopes of the power below, then every second
    slope of the doubled count.

    References:
        Press et al., "Train Short, Test Long" (ICLR 2022), arXiv:2108.12409; as the additive form
        of Zhang et al. (2025), arXiv:2512.07805.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-8 * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def penalty_reach(slopes: Float[Tensor, " heads"], *, nats: float = 10.0) -> tuple[float, ...]:
    """How far back each head sees, tokens: where its penalty reaches `nats`.

    With normalised queries and keys a logit is at most sqrt(head_dim), so that what lies much
    further weighs nothing, however long the context is.

    References:
        own.
    """
    return tuple((nats / slopes).tolist())


class Position(nn.Module):
    """How one kind of layer sees order; this base sees none.

    Attributes:
        slopes: Penalty per token of distance for each head, or None.
    """

    slopes: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", None, persistent=False)

    def rotation(self, positions: Int[Tensor, "batch seq"]) -> Rotation | None:
        """What queries and keys at these positions are turned by, or None."""
        del positions
        return None


class Rope(Position):
    """Fixed rotations."""

    log_omega: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        log_omega = rope_log_frequencies(head_dim, base=config.base)
        self.attention_factor = 1.0
        if config.yarn is not None:
            log_omega = yarn_frequencies(log_omega.exp(), yarn=config.yarn).log()
            self.attention_factor = yarn_attention_factor(config.yarn.factor)
        self.register_buffer("log_omega", log_omega.float(), persistent=False)

    def rotation(self, positions: Int[Tensor, "batch seq"]) -> Rotation:
        """Cosines and sines at these positions."""
        omega = grape_frequencies(self.log_omega, log_freq_scale=1.0)
        return rotation_of(positions, omega, attention_factor=self.attention_factor)


class GrapeM(Position):
    """Rotations with learned frequencies."""

    def __init__(self, config: GrapeMConfig, head_dim: int) -> None:
        super().__init__()
        self.log_freq_scale = config.log_freq_scale
        start = config.log_freq_scale * rope_log_frequencies(head_dim, base=config.base)
        self.log_freq = nn.Parameter(start.float())

    def rotation(self, positions: Int[Tensor, "batch seq"]) -> Rotation:
        """Cosines and sines at these positions, with grad to the frequencies."""
        omega = grape_frequencies(self.log_freq, log_freq_scale=self.log_freq_scale)
        return rotation_of(positions, omega)


class GrapeA(Position):
    """A fixed penalty on distance."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(num_heads)


def build_position(config: PositionConfig, *, num_heads: int, head_dim: int) -> Position:
    """The module of a positional encoding.

    References:
        own; see the modules.
    """
    match config:
        case RopeConfig():
            return Rope(config, head_dim)
        case GrapeMConfig():
            return GrapeM(config, head_dim)
        case GrapeAConfig():
            return GrapeA(num_heads)
        case NoPositionConfig():
            return Position()
