"""Which part of the student each operation of a step belongs to, for `vpmoe profile`.

Forward passes run inside named scopes. A backward operation carries the sequence number of the
forward operation that it differentiates, and so belongs to that one's scope.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from vpmoe.models.kernels import Kernels
from vpmoe.models.mlp import Mlp
from vpmoe.models.moe import Moe
from vpmoe.models.student import Layer, Student

PREFIX = "vpmoe/"
OTHER = "embedding and the rest"
ACCUMULATION = "gradient reduction"
# In the order of a report.
REGIONS = (
    "attention local",
    "attention global",
    "shared expert",
    "router",
    "experts",
    "head + loss",
    OTHER,
    ACCUMULATION,
    "optimizer",
    "data",
)


def scoped(region: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its operations counted as a region's.

    References:
        own.
    """

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + region):
            return function(*args, **kwargs)

    return inside


@contextmanager
def marked(student: Student) -> Iterator[None]:
    """Inside, every layer says which region it is in."""
    before: list[tuple[Layer | Moe, Kernels]] = []
    shared: list[tuple[Mlp, Callable[..., Any]]] = []
    for number, layer in enumerate(student.layers, start=1):
        kind = "global" if student.config.is_global(number) else "local"
        assert isinstance(layer, Layer)
        for module in (layer, layer.mlp):
            if isinstance(module, Layer | Moe):
                before.append((module, module.kernels))
                module.kernels = _marked_kernels(module.kernels, f"attention {kind}")
        if isinstance(layer.mlp, Moe) and layer.mlp.shared is not None:
            shared.append((layer.mlp.shared, layer.mlp.shared.forward))
            layer.mlp.shared.forward = _unless_compiled("shared expert", layer.mlp.shared.forward)
    try:
        yield
    finally:
        for module, kernels in before:
            module.kernels = kernels
        for mlp, forward in shared:
            mlp.forward = forward


def _unless_compiled(region: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Scoped where it runs as written; a compiler would stumble over the scope."""
    inside = scoped(region, function)

    def either(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else inside(*args)

    return either


def _marked_kernels(kernels: Kernels, region: str) -> Kernels:
    return replace(
        kernels,
        moe=scoped("experts", kernels.moe),
        route=scoped("router", kernels.route),
        region=lambda function: scoped(region, kernels.region(function)),
    )


@dataclass(frozen=True)
class Attribution:
    """Where one step's time went.

    Attributes:
        regions: Milliseconds of device time by region; on a CPU, of the operations themselves.
        kernels: (name, region, calls, milliseconds), the longest first.
        busy_ms: Time in which the device computed at all.
    """

    regions: Mapping[str, float]
    kernels: Sequence[tuple[str, str, int, float]]
    busy_ms: float


def attribute(events: Sequence[FunctionEvent], *, shared_width: int) -> Attribution:
    """Time of each region, from the events of one profiled step.

    A layer's dense part is one compiled region, so its shared expert is told apart by its kernels:
    products with the expert's width, and what the compiler named after the activation.

    Args:
        events: What `torch.profiler.profile.events()` gives, shapes recorded.
        shared_width: Width of the shared expert; 0 for none.

    References:
        own.
    """
    forward = _forward_regions(events)
    regions: defaultdict[str, float] = defaultdict(float)
    table: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    on_gpu = any(event.kernels for event in events)
    for event in events:
        parts = _times(event, on_gpu=on_gpu)
        if not parts:
            continue
        region = _region_of(event, forward)
        for name, ms in parts:
            part = region
            if on_gpu and region.startswith("attention") and _is_shared(event, name, shared_width):
                part = "shared expert"
            regions[part] += ms
            table[name, part].append(ms)
    for name, part, ms in _launched_alone(events):
        regions[part] += ms
        table[name, part].append(ms)
    rows = [(name, part, len(times), sum(times)) for (name, part), times in table.items()]
    rows.sort(key=lambda row: -row[3])
    busy = _busy_ms(events) if on_gpu else sum(regions.values())
    return Attribution(dict(regions), rows, busy)


def _times(event: FunctionEvent, *, on_gpu: bool) -> list[tuple[str, float]]:
    """(kernel, milliseconds) that this event launched; on a CPU the operation itself."""
    if on_gpu:
        return [(k.name, k.duration / 1e3) for k in event.kernels if not k.name.startswith(PREFIX)]
    if event.name.startswith(PREFIX) or event.self_cpu_time_total <= 0:
        return []
    return [(event.name, event.self_cpu_time_total / 1e3)]


def _launched_alone(events: Sequence[FunctionEvent]) -> Iterator[tuple[str, str, float]]:
    """(kernel, region, milliseconds) of kernels that no operation of PyTorch launched.

    Triton's launches outside of one, the optimizer's for example, are linked to nothing; the
    profiler draws each scope on the device as well, from its first kernel to its last.
    """
    linked = Counter((k.name, k.duration) for event in events for k in event.kernels)
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    scopes = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix(PREFIX))
        for event in on_device
        if event.name.startswith(PREFIX)
    )
    begins = [begin for begin, _, _ in scopes]
    for event in filter(_is_kernel, on_device):
        key = event.name, event.time_range.elapsed_us()
        if linked[key]:
            linked[key] -= 1
            continue
        at = event.time_range.start
        around = reversed(scopes[: bisect_right(begins, at)])  # the innermost one first
        region = next((name for _, end, name in around if at < end), OTHER)
        yield event.name, region, key[1] / 1e3


def _forward_regions(events: Sequence[FunctionEvent]) -> dict[int, str]:
    """Region of the forward operation behind each sequence number: the last one that bears it."""
    found: dict[int, tuple[float, str]] = {}
    for event in events:
        if event.sequence_nr < 0 or _is_backward(event):
            continue
        begin = event.time_range.start
        if event.sequence_nr not in found or found[event.sequence_nr][0] <= begin:
            region = _scope_of(event)
            if region:
                found[event.sequence_nr] = (begin, region)
    return {number: region for number, (_, region) in found.items()}


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent


def _is_backward(event: FunctionEvent) -> bool:
    return any(e.name.startswith("autograd::engine") for e in _ancestors(event))


def _scope_of(event: FunctionEvent) -> str | None:
    for ancestor in _ancestors(event):
        if ancestor.name.startswith(PREFIX):
            return ancestor.name.removeprefix(PREFIX)
    return None


def _region_of(event: FunctionEvent, forward: Mapping[int, str]) -> str:
    scope = None
    for ancestor in _ancestors(event):
        if ancestor.name.startswith("autograd::engine"):
            if "AccumulateGrad" in ancestor.name:
                return ACCUMULATION
            return forward.get(ancestor.sequence_nr, scope or OTHER)
        if scope is None and ancestor.name.startswith(PREFIX):
            scope = ancestor.name.removeprefix(PREFIX)
    return scope or OTHER


def _is_shared(event: FunctionEvent, kernel: str, width: int) -> bool:
    if not width:
        return False
    if "relu" in kernel or "relu" in event.name:
        return True
    shapes: Any = event.input_shapes or []
    is_product = event.name in ("aten::mm", "aten::addmm")
    return is_product and any(width in shape for shape in shapes if shape)


def _is_kernel(event: FunctionEvent) -> bool:
    """Not a scope, which the profiler draws on the device too: ours or a compiler's."""
    return event.device_type.name == "CUDA" and not event.is_user_annotation


def _busy_ms(events: Sequence[FunctionEvent]) -> float:
    """Length of the union of all kernels' intervals."""
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in events if _is_kernel(event)
    )
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e3
