"""Where a training step's time and memory go, measured on the stage's own steps."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity

from vpmoe.config import fingerprint, resolved
from vpmoe.evals.report.chart_profile import draw_profile
from vpmoe.models.count import count
from vpmoe.models.student import Student
from vpmoe.stages.base import Prepared, StageConfig
from vpmoe.storage.manifest import provenance, write_manifest
from vpmoe.train.device import world
from vpmoe.train.estimate import estimate
from vpmoe.train.graph import graph_stream
from vpmoe.train.metrics import GIB, Stopwatch
from vpmoe.train.parallel import Replica
from vpmoe.train.regions import ACCUMULATION, REGIONS, Attribution, attribute, marked, scoped
from vpmoe.train.step import take_step

Progress = Callable[[int, int], None]
SUMMARY_FILE, PICTURE_FILE, TRACE_FILE = "summary.json", "profile.png", "trace.json.gz"
KERNELS_KEPT = 60


@dataclass(frozen=True)
class ProfileSettings:
    """How long to look, and what to leave behind.

    Attributes:
        out: Folder of the results.
        warmup: Steps before the first measured one: compilation, caches, experts' balance.
        steps: Measured steps.
        with_trace: Keep the profiler's own trace, for chrome://tracing or Perfetto.
    """

    out: Path
    warmup: int = 5
    steps: int = 5
    with_trace: bool = False


def run(
    config: StageConfig, settings: ProfileSettings, *, progress: Progress | None = None
) -> dict[str, Any]:
    """What a step of the stage costs; also written to `settings.out`, with a picture.

    The steps are real ones, on the stage's own data, and move the student; nothing of them is kept.
    Times come from steps without a profiler, replayed where the config says so; one more step under
    it, launched kernel by kernel, says which kernel worked when.

    Args:
        config: A stage of training.
        settings: How long, and where to.
        progress: Told (steps done, steps in all).
    """
    prepare = sys.modules[type(config).__module__].prepare
    with world(config.device, threads=config.threads) as ranks, ExitStack() as stack:
        if config.cuda_graph:
            stack.enter_context(graph_stream(ranks.device))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        ready: Prepared = prepare(config, ranks)
        student = ready.student.train()
        student.activation_checkpointing = config.activation_checkpointing
        replica = Replica(student, config.optimizer, ranks, cuda_graph=config.cuda_graph)
        setup_s = time.perf_counter() - begin
        bench = _Bench(config, ready, replica, settings, progress)
        times = bench.times()
        replica.drop_graphs()  # what is replayed has no layers to look at
        memory = bench.memory()
        stack.enter_context(marked(student))
        found = bench.attribution()
        summary = _summary(config, student, bench, times, found)
        summary |= {"setup_s": setup_s, "memory": {**summary["memory"], "timeline": memory}}
    settings.out.mkdir(parents=True, exist_ok=True)
    write_manifest(settings.out / SUMMARY_FILE, summary)
    draw_profile(summary, settings.out / PICTURE_FILE)
    return summary


class _Bench:
    """The stage's steps, one after another."""

    def __init__(
        self,
        config: StageConfig,
        ready: Prepared,
        replica: Replica,
        settings: ProfileSettings,
        progress: Progress | None,
    ) -> None:
        self.config, self.settings, self.replica = config, settings, replica
        self.student, self.plan = ready.student, ready.plan
        self.device = replica.world.device
        self.tokens: list[int] = []
        self.seconds: list[dict[str, float | int]] = []
        self._step = 0
        self._progress = progress
        self._total = settings.warmup + settings.steps + 2

    def step(self) -> None:
        """One optimizer step; remembers its tokens and times."""
        watch = Stopwatch(self.device)
        with watch("step"):
            summed, _ = take_step(
                self.replica,
                self.plan,
                self.config,
                step=self._step % self.plan.num_steps,
                watch=watch,
            )
        self._step += 1
        self.tokens.append(summed.num_tokens)
        self.seconds.append(watch.seconds)
        if self._progress:
            self._progress(self._step, self._total)

    def times(self) -> list[dict[str, float | int]]:
        """Seconds of the parts of each measured step."""
        for _ in range(self.settings.warmup + self.settings.steps):
            self.step()
        return self.seconds[self.settings.warmup :]

    def memory(self) -> list[tuple[float, float]]:
        """(milliseconds, GiB) at every layer's forward and backward of one step."""
        samples: list[tuple[float, float]] = []
        begin = time.perf_counter()

        def sample(*_: Any) -> None:
            samples.append((1e3 * (time.perf_counter() - begin), _gib_in_use(self.device)))

        with _sampled(self.student, sample):
            sample()
            self.step()
            sample()
        return samples

    def attribution(self) -> Attribution:
        """Where the time of one more step goes."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        replica, plan = self.replica, self.plan
        replica.after_backward = scoped(ACCUMULATION, replica.after_backward)
        replica.finish_gradients = scoped(ACCUMULATION, replica.finish_gradients)
        replica.zero_gradients = scoped(ACCUMULATION, replica.zero_gradients)
        replica.gradient_norms = scoped("optimizer", replica.gradient_norms)
        replica.update = scoped("optimizer", replica.update)
        batches = plan.micro_batches
        plan.micro_batches = lambda step: _with_scoped_loss(*scoped("data", batches)(step))
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            self.step()
        if self.settings.with_trace:
            self.settings.out.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.settings.out / TRACE_FILE))
        moe = self.student.config.moe
        width = 0 if moe is None else moe.shared_expert_hidden
        return attribute(profiler.events() or [], shared_width=width)


def _with_scoped_loss(batches: Any, loss: Any) -> tuple[Any, Any]:
    return batches, _ScopedLoss(loss)


class _ScopedLoss:
    """A loss whose operations count as the head's."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __call__(self, *args: Any) -> Any:
        return scoped("head + loss", self._loss)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


@contextmanager
def _sampled(student: Student, sample: Callable[..., None]) -> Iterator[None]:
    """Inside, every layer's forward and backward take a sample."""

    def after(_module: Any, _args: Any, result: Any) -> None:
        sample()
        if result[0].requires_grad:
            result[0].register_hook(lambda _: sample())

    hooks = [layer.register_forward_hook(after) for layer in student.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gib_in_use(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def _summary(
    config: StageConfig,
    student: Student,
    bench: _Bench,
    times: list[dict[str, float | int]],
    found: Attribution,
) -> dict[str, Any]:
    settings, device = bench.settings, bench.device
    tokens = statistics.median(bench.tokens[settings.warmup : settings.warmup + settings.steps])
    steps = sorted(1e3 * part["step"] for part in times)
    step_ms = statistics.median(steps)
    flops = count(student.config, seq_len=config.batch.seq_len).training_flops_per_token
    speed, peak_flops = 1e3 * tokens / step_ms, 1e12 * config.peak_tflops
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else _gib_in_use(device)
    expected = estimate(config, student.config).as_dict()
    regions = {name: found.regions.get(name, 0.0) for name in REGIONS}
    if on_gpu:
        regions["idle"] = max(0.0, step_ms - found.busy_ms)
    return {
        "kind": "profile",
        "stage": resolved(config)["kind"],
        "student": student.config.name,
        "fingerprint": fingerprint(resolved(config)),
        "kernels_key": config.kernels,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        **provenance(),
        "slots_per_step": config.batch.global_batch_size * config.batch.seq_len,
        "tokens_per_step": tokens,
        "micro_batch_tokens": config.batch.micro_batch_size * config.batch.seq_len,
        "warmup": settings.warmup,
        "steps": settings.steps,
        "first_step_s": bench.seconds[0]["step"],
        "step_ms": step_ms,
        "spread_ms": steps[-1] - steps[0],
        "parts_ms": {
            name: statistics.median(1e3 * part[name] for part in times) for name in times[0]
        },
        "tokens_per_s": speed,
        "flops_per_token": flops,
        "mfu_pct": 100 * speed * flops / peak_flops if peak_flops else None,
        "predicted": expected,
        "regions_ms": regions,
        "memory": {"peak_gib": peak},
        "kernels": [
            {"kernel": name[:120], "region": region, "calls": calls, "ms": ms}
            for name, region, calls, ms in found.kernels[:KERNELS_KEPT]
        ],
    }
