"""Names and units of what a step logs: one flat dict, `train/loss/final`, units in the name."""

import importlib.util
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from vpmoe.losses.base import CONTENT_TOKENS, TOKENS, span_means
from vpmoe.models.router import aggregate_health
from vpmoe.spans import TRAINED_SPANS

GIB = 2**30
_LONG_NAMES = {
    "dead": "dead_experts",
    "experts_active": "active_experts",
    "experts_active_mean": "active_experts_mean",
}


class Stopwatch:
    """Seconds spent in the named parts of a step.

    Args:
        device: A GPU is waited for at both ends of a part, as its work is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float | int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time spent inside to `part`."""
        begin = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - begin

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def metrics(self) -> dict[str, float | int]:
        """`time/<part>_s` of every part so far."""
        return {f"time/{part}_s": seconds for part, seconds in self.seconds.items()}


def loss_metrics(sums: Mapping[str, Tensor], scales: Tensor) -> dict[str, float | int]:
    """Means per span of one step's global sums; a span without tokens is left out.

    Args:
        sums: `LossOutput.sums`, added up over micro-batches and ranks.
        scales: What one token of each span counted for, w_c / N_c.
    """
    rows: dict[str, float | int] = {}
    means = {name: value.tolist() for name, value in span_means(sums).items()}
    means["content_loss"] = means.pop("content_nll")
    tokens, content = sums[TOKENS].tolist(), sums[CONTENT_TOKENS].tolist()
    for span in TRAINED_SPANS:
        name = span.name.lower()
        rows[f"train/tokens/{name}"] = int(tokens[span])
        if tokens[span] == 0:
            continue
        rows[f"train/scale/{name}"] = float(scales[span])
        for metric, value in means.items():
            if content[span] or not metric.startswith("content_"):
                rows[f"train/{metric}/{name}"] = value[span]
    return rows


def router_metrics(health: Mapping[str, Mapping[str, float | int]]) -> dict[str, float | int]:
    """Load of the experts over all layers, and of each (`router/cv_pct/layer_02`).

    Args:
        health: `router_health` of each router, by its dotted name in the student.
    """
    if not health:
        return {}
    total = aggregate_health([dict(values) for values in health.values()])
    rows = {f"router/{_LONG_NAMES.get(name, name)}": value for name, value in total.items()}
    for path, values in health.items():
        layer = int(re.findall(r"\d+", path)[0]) + 1  # modules count from 0, layers from 1
        for name, value in values.items():
            rows[f"router/{_LONG_NAMES.get(name, name)}/layer_{layer:02d}"] = value
    return rows


def memory_metrics(device: torch.device) -> dict[str, float | int]:
    """Memory of this process, and of its GPU with the headroom that is left."""
    rows = {"memory/host_gib": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        rows["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        rows["memory/gpu_free_gib"] = free / GIB
        rows["memory/gpu_headroom_pct"] = 100 * free / total
        if importlib.util.find_spec("pynvml"):  # torch reads the driver's counter through it
            rows["gpu/utilization_pct"] = float(torch.cuda.utilization(device))
    return rows
