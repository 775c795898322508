"""Charts of how runs trained: loss, speed, where the time went, which experts worked."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vpmoe.evals.report.runs import RunData
from vpmoe.evals.report.theme import (
    Theme,
    label_line_ends,
    name_rows,
    new_figure,
    short_number,
    smoothed,
    token_axis,
)

SPANS = ("reasoning", "final")
SMOOTHING_SHARE = 30  # the running mean covers one thirtieth of a run
SETTLED_QUANTILE = 0.85
TIME_BAR_HEIGHT = 0.34
LEAST_NAMED_SHARE = 0.03  # of the longest step: thinner parts go without a name
LETTER_SHARE = 0.016  # of the longest step, that a letter of a name covers
TIME_ALPHA = (1.0, 0.72, 0.5, 0.34, 0.22, 0.14)
MAX_LOAD_SHOWN = 4.0  # times the uniform share; more is one color


def loss_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Training loss (line) and held-out loss (dots) of both spans, over student tokens."""
    trained = [(i, run) for i, run in enumerate(runs) if run.metrics]
    if not trained:
        return None
    figure, axes = new_figure(1, 2, height=4.0)
    for ax, span in zip(axes[0], SPANS, strict=True):
        ends, top = [], []
        for index, run in trained:
            ends += _draw_loss(ax, run, span, color=theme.color(index))
            top += _starts_settled(run, span)
        ax.set_title(f"{span} span")
        ax.set_ylabel("loss, nats per token" if span == SPANS[0] else "")
        _loss_limits(ax, top)
        _draw_unigram(ax, _unigram(runs, span), theme)
        token_axis(ax)
        label_line_ends(ax, ends)
    return figure


def _draw_loss(
    ax: Axes, run: RunData, span: str, *, color: str
) -> list[tuple[float, float, str, str]]:
    x, y = run.series(f"train/loss/{span}")
    held = heldout_series(run, span)
    end: list[tuple[float, float, str, str]] = []
    if run.config.get("kind") == "on_policy":  # its loss is a surrogate: the value means nothing
        ax.plot(*held, color=color)
        end = [(held[0][-1], held[1][-1], run.name, color)] if held[0] else []
    elif x:
        smooth = smoothed(y, window=max(1, len(y) // SMOOTHING_SHARE))
        ax.plot(x, y, color=color, linewidth=0.6, alpha=0.22)
        ax.plot(x, smooth, color=color)
        end = [(x[-1], smooth[-1], run.name, color)]
    ax.plot(*held, "o", color=color, markersize=4.2, markeredgecolor=ax.get_facecolor())
    return end


def heldout_series(run: RunData, span: str) -> tuple[list[float], list[float]]:
    """Tokens seen and held-out loss: from the stream, else from the evaluation files."""
    x, y = run.series(f"valid/loss/{span}", f"eval/loss/{span}", f"eval/heldout/loss/{span}")
    if x:
        return x, y
    points = [
        (float(report["model"]["tokens_seen"]), float(report["heldout"]["loss"][span]))
        for report in run.evals
        if report.get("heldout") and report.get("model", {}).get("tokens_seen") is not None
    ]
    return [p[0] for p in points], [p[1] for p in points]


def _starts_settled(run: RunData, span: str) -> list[float]:
    """What the smoothed loss stays below for most of the run: the frame leaves out the drop."""
    _, y = run.series(f"train/loss/{span}")
    smooth = smoothed(y, window=max(1, len(y) // SMOOTHING_SHARE))
    return [1.2 * float(np.quantile(smooth, SETTLED_QUANTILE))] if y else []


def _unigram(runs: Sequence[RunData], span: str) -> float | None:
    found = [run.measured("heldout", "unigram_loss", span) for run in runs]
    return next((float(value) for value in found if value is not None), None)


def _loss_limits(ax: Axes, top: list[float]) -> None:
    if top:
        ax.set_ylim(0, max(top) * 1.1)
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _draw_unigram(ax: Axes, unigram: float | None, theme: Theme) -> None:
    """The unigram baseline as a dashed line, or as a note where it lies above the frame."""
    if unigram is None:
        return
    top = ax.get_ylim()[1]
    inside = unigram < top
    if inside:
        ax.axhline(unigram, color=theme.muted, linewidth=1.1, linestyle=(0, (4, 3)))
    ax.annotate(
        f"unigram baseline {unigram:.2f}{'' if inside else ' ↑'}",
        (0.995, unigram if inside else top), xycoords=("axes fraction", "data"),
        xytext=(0, 3 if inside else -4), textcoords="offset points", ha="right",
        va="bottom" if inside else "top", color=theme.muted, fontsize=8.5,
    )  # fmt: skip


def throughput_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Tokens per second over the run, and where a mean step's time went."""
    shares = [(i, run, time_shares(run)) for i, run in enumerate(runs)]
    shares = [item for item in shares if item[2]]
    speeds = [(i, run, *run.series(*SPEED_NAMES)) for i, run in enumerate(runs)]
    speeds = [item for item in speeds if item[2]]
    if not shares and not speeds:
        return None
    height = max(3.0, 1.3 + 0.62 * len(shares))
    figure, axes = new_figure(1, 2, height=height)
    speed_ax, time_ax = axes[0]
    ends = []
    for index, run, x, y in speeds:
        smooth = smoothed(y, window=max(1, len(y) // SMOOTHING_SHARE))
        speed_ax.plot(x, smooth, color=theme.color(index))
        ends.append((x[-1], smooth[-1], run.name, theme.color(index)))
    speed_ax.set_title("speed")
    speed_ax.set_ylabel("student tokens per second")
    speed_ax.set_ylim(bottom=0)
    speed_ax.yaxis.set_major_formatter(FuncFormatter(short_number))
    token_axis(speed_ax)
    _draw_time(time_ax, shares, theme)
    label_line_ends(speed_ax, ends)
    return figure


SPEED_NAMES = ("train/tokens_per_s", "tokens_per_s")


def time_shares(run: RunData) -> dict[str, float]:
    """Seconds of a mean step by part, largest first; what no timer saw is "other"."""
    totals: dict[str, float] = {}
    for row in run.metrics:
        for key, value in row.items():
            if key.startswith("time/") and key.endswith("_s") and isinstance(value, int | float):
                part = key[len("time/") : -len("_s")].replace("_", " ")
                totals[part] = totals.get(part, 0.0) + float(value)
    step = totals.pop("step", None)
    if not totals and step is None:
        return {}
    steps = len(run.metrics)
    known = sum(totals.values())
    if step is not None and step > known:
        totals["other"] = step - known
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return {part: seconds / steps for part, seconds in ordered if seconds > 0}


def _draw_time(ax: Axes, shares: list[tuple[int, RunData, dict[str, float]]], theme: Theme) -> None:
    ax.set_title("seconds of a mean step")
    longest = max((sum(parts.values()) for _, _, parts in shares), default=1.0)
    for row, (index, _, parts) in enumerate(shares):
        left, free = 0.0, 0.0  # `free`: where the last name ends
        for rank, (part, seconds) in enumerate(parts.items()):
            alpha = TIME_ALPHA[min(rank, len(TIME_ALPHA) - 1)]
            ax.barh(
                row, seconds, left=left, height=TIME_BAR_HEIGHT, color=theme.color(index),
                alpha=alpha,
            )  # fmt: skip
            text = f"{part} {seconds:.2g}"
            if left >= free and seconds > LEAST_NAMED_SHARE * longest:
                ax.annotate(
                    text, (left, row - TIME_BAR_HEIGHT / 2), xytext=(0, 3),
                    textcoords="offset points", fontsize=7.8, color=theme.muted, va="bottom",
                )  # fmt: skip
                free = left + LETTER_SHARE * len(text) * longest
            left += seconds
    name_rows(ax, [(run.name, theme.color(index)) for index, run, _ in shares])
    ax.set_ylim(len(shares) - 0.45, -0.75)
    ax.grid(visible=True, axis="x")
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("seconds")


def router_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Load of every expert of every layer at the newest evaluation, relative to an even load."""
    loads = [(i, run, expert_loads(run)) for i, run in enumerate(runs)]
    loads = [(i, run, load) for i, run, load in loads if load is not None]
    if not loads:
        return None
    columns = len(loads) if len(loads) <= 4 else 3
    rows = -(-len(loads) // columns)
    layers = max(load.shape[0] for _, _, load in loads)
    height = rows * (1.5 + 0.16 * min(layers, 24))
    figure, axes = new_figure(rows, columns, height=height)
    heat = LinearSegmentedColormap.from_list("load", list(theme.heat))
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MAX_LOAD_SHOWN)
    for place, ax in enumerate(axes.flat):
        if place >= len(loads):
            ax.set_axis_off()
            continue
        index, run, load = loads[place]
        ax.imshow(load, cmap=heat, norm=norm, aspect="auto", interpolation="nearest")
        dead = int((load == 0).sum())
        ax.set_title(run.name, color=theme.color(index))
        ax.set_xlabel(f"expert  ·  {dead} of {load.size} idle")
        ax.set_ylabel("layer" if place % columns == 0 else "")
        names = run.measured("router", "layers") or list(range(1, load.shape[0] + 1))
        every = max(1, load.shape[0] // 8)
        ax.set_yticks(range(0, load.shape[0], every), [str(n) for n in names[::every]])
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(visible=False)
    bar = figure.colorbar(ScalarMappable(norm, heat), ax=axes, shrink=0.9, aspect=18, pad=0.015)
    bar.set_ticks([0, 0.5, 1, 2, 4], labels=["0", "½", "even", "2×", "≥ 4×"])
    bar.outline.set_visible(False)
    return figure


def expert_loads(run: RunData) -> np.ndarray | None:
    """Layers x experts: each expert's share of the layer's tokens over the even share."""
    counts = run.measured("router", "expert_counts")
    if not counts:
        return None
    table = np.asarray(counts, dtype=np.float64)
    return table / np.maximum(table.mean(axis=1, keepdims=True), 1e-12)


def health_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Router health over the run: spread of the load, heaviest expert, idle experts."""
    panels = (
        ("spread of the load", "std over mean, %", ("router/cv_pct", "router/cv_pct_mean")),
        ("heaviest expert", "share of tokens, %", ("router/max_load_pct",)),
        ("idle experts", "count, all layers", ("router/dead_experts", "router/dead_experts_sum")),
    )
    drawn = [
        (title, unit, [(i, run, *run.series(*names)) for i, run in enumerate(runs)])
        for title, unit, names in panels
    ]
    drawn = [
        (title, unit, [line for line in lines if line[2]])
        for title, unit, lines in drawn
    ]  # fmt: skip
    drawn = [panel for panel in drawn if panel[2]]
    if not drawn:
        return None
    figure, axes = new_figure(1, len(drawn), height=2.9)
    for ax, (title, unit, lines) in zip(axes[0], drawn, strict=True):
        ends = []
        for index, run, x, y in lines:
            smooth = smoothed(y, window=max(1, len(y) // SMOOTHING_SHARE))
            ax.plot(x, smooth, color=theme.color(index), linewidth=1.5)
            ends.append((x[-1], smooth[-1], run.name, theme.color(index)))
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        token_axis(ax)
        label_line_ends(ax, ends)
    return figure
