"""Settings that every stage of training shares."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vpmoe.config import Config
from vpmoe.errors import RunError
from vpmoe.models.kernels import KernelsName
from vpmoe.optim import CosineConfig, NorMuonConfig, OptimizerConfig, ScheduleConfig
from vpmoe.train.trackers import TrackerConfig

# What may differ between a run and its resumption: none of these changes a number that is learnt.
FREE_KEYS = (
    "run",
    "log_every",
    "trackers",
    "checkpoint",
    "valid",
    "gates",
    "stop",
    "peak_tflops",
)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class BatchConfig(Config):
    """How many packed sequences a step sees."""

    global_batch_size: Positive
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Positive
    """Sequences per rank and forward; any value gives the same gradient."""
    seq_len: Annotated[int, Field(gt=1)]
    """Tokens per packed sequence."""


class BudgetConfig(Config):
    """How long to train; exactly one of the two."""

    tokens: NotNegative = 0
    """Student tokens, padding left out."""
    steps: NotNegative = 0
    """Optimizer steps."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.tokens > 0) == (self.steps > 0):
            raise ValueError("set exactly one of tokens and steps")
        return self

    def num_steps(self, tokens_per_step: float) -> int:
        """Optimizer steps of the budget; a token budget is rounded up to whole steps."""
        return self.steps or max(1, -int(-self.tokens // tokens_per_step))


class SpanWeightsConfig(Config):
    """What each span's mean loss counts for."""

    reasoning: float = Field(default=1.0, ge=0)
    """Weight of the mean over analysis tokens."""
    final: float = Field(default=1.0, ge=0)
    """Weight of the mean over the answer's tokens."""


class CheckpointConfig(Config):
    """When to write checkpoints."""

    every_steps: NotNegative = 0
    """Steps between checkpoints; 0: only after the last step."""
    last: bool = True
    """Write one after the last step."""
    keep: NotNegative = 2
    """How many to leave on disk, the newest ones; 0: all."""


class TrainConfig(Config):
    """What a stage's config begins with."""

    run: str = ""
    """Folder of the run."""
    seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and sampling."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; "cuda" takes one GPU per process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 weights have float32 masters in the optimizer."""
    threads: NotNegative = 0
    """CPU threads of torch; 0 leaves torch's choice. Results on a CPU depend on it in the last
    bits."""
    activation_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their states: slower, smaller."""
    kernels: KernelsName = "reference"
    """Implementation of the student's hot paths; fused ones need an NVIDIA GPU and bfloat16.
    `grouped` is the reference with its experts in one product, a second opinion in less time."""
    cuda_graph: bool = False
    """Replay the student's forward and backward passes as CUDA graphs: no gaps between kernels, and
    their memory is held; for fused kernels only."""
    batch: BatchConfig
    budget: BudgetConfig
    optimizer: OptimizerConfig = NorMuonConfig()  # pyright: ignore[reportCallIssue]
    schedule: ScheduleConfig = CosineConfig()  # pyright: ignore[reportCallIssue]
    span_weights: SpanWeightsConfig = SpanWeightsConfig()
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl; the last step is always logged."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Further readers of the metrics stream."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Dense peak of one device in the training dtype, for model FLOPs utilization; 0: not
    logged."""

    @property
    def run_dir(self) -> Path:
        """The run's folder.

        Raises:
            RunError: If the config does not say it.
        """
        if not self.run:
            raise RunError("run is not set", hint="say where: run = FOLDER, or --run NAME")
        return Path(self.run)

    @model_validator(mode="after")
    def _graphs_need_fused_kernels(self) -> Self:
        if self.cuda_graph and (self.device != "cuda" or self.kernels != "fused"):
            raise ValueError(
                f'cuda_graph = true needs device = "cuda" and kernels = "fused", found '
                f'"{self.device}" and "{self.kernels}": others read numbers back on their way'
            )
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.span_weights.reasoning == self.span_weights.final == 0:
            raise ValueError("span_weights are all 0: there is nothing to learn")
        return self


def rows_of_rank(config: BatchConfig, *, rank: int, num_ranks: int) -> range:
    """Which sequences of the global batch belong to a rank; sizes differ by one at most."""
    total = config.global_batch_size
    if total < num_ranks:
        raise RunError(
            f"batch.global_batch_size {total} is smaller than the {num_ranks} processes",
            hint="raise it, or start fewer processes",
        )
    return range(total * rank // num_ranks, total * (rank + 1) // num_ranks)
