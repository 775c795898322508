"""The picture of a profile: a step by region, and memory through it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, Theme, drawing, name_rows, new_figure
from vpmoe.storage.atomic import atomic_path


def draw_profile(summary: Mapping[str, Any], path: Path, *, theme: Theme = LIGHT) -> None:
    """Write the picture of a profile's summary as a PNG file.

    Args:
        summary: What `stages.profile.run` gives.
        path: The file.
        theme: Its colors.
    """
    with drawing(theme):
        figure, axes = new_figure(1, 2, height=4.4, width_ratios=[3, 2])
        _regions(axes[0][0], summary, theme)
        _memory(axes[0][1], summary, theme)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")


def _regions(ax: Axes, summary: Mapping[str, Any], theme: Theme) -> None:
    regions = [(name, ms) for name, ms in summary["regions_ms"].items() if ms > 0]
    total = sum(ms for _, ms in regions)
    name_rows(ax, [(name, theme.ink) for name, _ in regions])
    colors = [theme.hairline if name == "idle" else theme.color(0) for name, _ in regions]
    ax.barh(range(len(regions)), [ms for _, ms in regions], color=colors, height=0.62)
    for row, (_, ms) in enumerate(regions):
        ax.annotate(
            f"{ms:,.1f} ms  {100 * ms / total:.0f} %", (ms, row), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=theme.muted,
        )  # fmt: skip
    ax.set_xlim(0, 1.28 * max(ms for _, ms in regions))
    ax.grid(visible=True, axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("milliseconds of one step")
    ax.set_title(
        f"{summary['student']}, {summary['tokens_per_step']:,.0f} tokens a step: "
        f"{summary['step_ms']:,.0f} ms, {summary['tokens_per_s']:,.0f} tokens/s"
    )


def _memory(ax: Axes, summary: Mapping[str, Any], theme: Theme) -> None:
    timeline = summary["memory"]["timeline"]
    x, y = [ms for ms, _ in timeline], [gib for _, gib in timeline]
    ax.fill_between(x, y, color=theme.color(1), alpha=0.25, linewidth=0)
    ax.plot(x, y, color=theme.color(1))
    ax.set_ylim(0, 1.15 * max(max(y), summary["memory"]["peak_gib"]))
    peak = summary["memory"]["peak_gib"]
    ax.axhline(peak, color=theme.muted, linewidth=0.8)
    ax.annotate(f"peak {peak:.1f} GiB", (x[-1], peak), xytext=(0, 4), ha="right",
                textcoords="offset points", fontsize=8.5, color=theme.muted)  # fmt: skip
    ax.set_title(f"memory, GiB ({summary['device']})")
    ax.set_xlabel("milliseconds, as the layers are launched")
