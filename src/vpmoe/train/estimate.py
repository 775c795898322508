"""Memory and speed of a training run, told from its config before anything is spent."""

from dataclasses import asdict, dataclass
from typing import Any

from vpmoe.models.config import StudentConfig
from vpmoe.models.count import ROUTED, CountReport, count
from vpmoe.train.config import TrainConfig

# Shares of the dense peak that products reach, and passes over memory: fitted to kernel times of
# the fused path on one H200 (docs/performance.md); `vpmoe profile` holds them against what it sees.
PRODUCT_SHARE = 0.62  # dense layers
EXPERT_SHARE = 0.21  # narrow experts are bound by the rows they stream
HEAD_SHARE = 0.60
ATTENTION_SHARE = 0.27
POLAR_SHARE = 0.27
LAYER_BYTES_FACTOR = 9.3  # passes over what a layer keeps, norms, heads and router in them
BYTES_PER_FLOP = 4.3e12 / 989e12  # memory bandwidth of the device per dense FLOP
OPTIMIZER_BYTES = 66  # per parameter and step, clipping and sums of gradients included
POLAR_PRODUCTS = 5  # of a matrix with its own width, per step


@dataclass(frozen=True)
class Estimate:
    """What a run will take on each process.

    Attributes:
        weights_gib: Weights in the training dtype.
        gradients_gib: float32 sums.
        optimizer_gib: Moments and float32 copies of bfloat16 weights.
        activations_gib: What one micro-batch keeps for its backward pass.
        step_s: One optimizer step; None where nothing is known of the device or its kernels.
        tokens_per_s: Of packed rows, the optimizer's time included.
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    step_s: float | None
    tokens_per_s: float | None

    @property
    def total_gib(self) -> float:
        """All of it."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "total_gib": self.total_gib}


def estimate(config: TrainConfig, student: StudentConfig) -> Estimate:
    """Memory of one process that trains alone, and the speed of the fused kernels.

    Args:
        config: The stage's settings.
        student: What it trains.

    References:
        own.
    """
    size = count(student, seq_len=config.batch.seq_len)
    is_half = config.dtype == "bfloat16"
    weights = size.weight_bytes if is_half else 4 * size.total
    optimizer = size.optimizer_bytes + (size.master_bytes if is_half else 0)
    if getattr(config.optimizer, "momentum_dtype", "float32") == "bfloat16":
        optimizer -= 2 * _matrix_numbers(size)
    rows = config.batch.micro_batch_size * config.batch.seq_len
    per_token = size.activation_bytes_per_token * (1 if is_half else 2)
    if config.activation_checkpointing:  # the stream between layers, and one layer whole
        between = 2 * student.num_layers * student.hidden_size * (1 if is_half else 2)
        per_token = between + per_token // student.num_layers
    slots = config.batch.global_batch_size * config.batch.seq_len
    seconds = None
    if config.kernels == "fused" and config.peak_tflops:
        seconds = _step_seconds(size, student, slots, config)
    return Estimate(
        weights_gib=weights / 2**30,
        gradients_gib=size.gradient_bytes / 2**30,
        optimizer_gib=optimizer / 2**30,
        activations_gib=per_token * rows / 2**30,
        step_s=seconds,
        tokens_per_s=slots / seconds if seconds else None,
    )


def _step_seconds(
    size: CountReport, student: StudentConfig, slots: int, config: TrainConfig
) -> float:
    peak = config.peak_tflops * 1e12
    bandwidth = peak * BYTES_PER_FLOP
    routed = sum(item.active for item in size.items if item.name == ROUTED)
    head = student.num_rows * student.hidden_size
    dense = size.active - routed - 2 * head
    attention = size.forward_flops_per_token - 2.0 * (dense + routed + head)
    flops = (
        2.0 * dense / PRODUCT_SHARE
        + 2.0 * routed / EXPERT_SHARE
        + 2.0 * head / HEAD_SHARE
        + max(attention, 0.0) / ATTENTION_SHARE
    )
    per_token = 3 * flops / peak + LAYER_BYTES_FACTOR * size.activation_bytes_per_token / bandwidth
    if config.activation_checkpointing:
        per_token *= 4 / 3
    matrices = _matrix_numbers(size)
    width = min(student.hidden_size, student.moe.expert_hidden if student.moe else 2**30)
    polar = POLAR_PRODUCTS * 2.0 * matrices * width / (POLAR_SHARE * peak)
    return slots * per_token + polar + OPTIMIZER_BYTES * size.total / bandwidth


def _matrix_numbers(size: CountReport) -> int:
    """Parameters that NorMuon moves."""
    others = ("embedding", "head", "routers")
    return sum(item.total for item in size.items if item.name not in others)
