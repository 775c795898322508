"""Charts of what models write: well-formed or not, right or wrong, how long."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vpmoe.evals.report.runs import RunData
from vpmoe.evals.report.theme import Theme, name_rows, new_figure, percent_axis

FAILURE_TITLES = {
    "no_final": "no final",
    "no_end": "no end",
    "repetition": "repetition",
    "invalid_header": "bad header",
}
BAR_HEIGHT = 0.42
FAILURE_ALPHA = (0.55, 0.38, 0.26, 0.16)


def exact_match_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Exact match in total and per family, each with its 95 % interval: one panel per family."""
    scored = [(i, run) for i, run in enumerate(runs) if run.measured("exact_match", "total")]
    if not scored:
        return None
    families = sorted({f for _, run in scored for f in run.measured("exact_match", "families")})
    panels = [None, *families]
    columns = min(len(panels), 4 if len(panels) > 6 else 3)
    rows = -(-len(panels) // columns)
    height = rows * (0.95 + 0.27 * len(scored)) + 0.2
    figure, axes = new_figure(rows, columns, height=height, sharex=True, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place >= len(panels):
            ax.set_axis_off()
            continue
        family = panels[place]
        for row, (index, run) in enumerate(scored):
            path = ("total",) if family is None else ("families", family)
            score = run.measured("exact_match", *path)
            if score is not None:
                _interval(ax, row, score, color=theme.color(index), theme=theme)
        ax.set_title(family.replace("_", " ") if family else "all families")
        name_rows(ax, [(run.name, theme.color(i)) for i, run in scored], named=place % columns == 0)
        percent_axis(ax)
        ax.set_xlim(-0.02, 1.16)
        ax.set_xticks([0, 0.5, 1.0])
        ax.tick_params(labelbottom=True)
    return figure


def _interval(ax: Axes, row: int, score: dict[str, Any], *, color: str, theme: Theme) -> None:
    """One dot at the share, its interval as a line, its value beside it."""
    ax.plot([score["low"], score["high"]], [row, row], color=color, linewidth=2.6, alpha=0.35)
    ax.plot(score["share"], row, "o", color=color, markersize=6)
    ax.annotate(
        f"{score['share'] * 100:.0f}", (score["high"], row), xytext=(6, 0),
        textcoords="offset points", va="center", fontsize=8.5, color=theme.ink,
    )  # fmt: skip


def validity_chart(runs: Sequence[RunData], theme: Theme) -> Figure | None:
    """Share of well-formed completions, what broke the others, and how long channels are."""
    sampled = [(i, run) for i, run in enumerate(runs) if run.measured("format", "valid")]
    if not sampled:
        return None
    figure, axes = new_figure(1, 2, height=1.5 + 0.46 * len(sampled))
    _draw_validity(axes[0, 0], sampled, theme)
    _draw_lengths(axes[0, 1], sampled, theme)
    return figure


def _draw_validity(ax: Axes, sampled: Sequence[tuple[int, RunData]], theme: Theme) -> None:
    for row, (index, run) in enumerate(sampled):
        count = run.measured("format", "num_completions")
        share = run.measured("format", "valid", "share")
        ax.barh(row, share, height=BAR_HEIGHT, color=theme.color(index))
        left, notes = share, []
        failures = run.measured("format", "failures") or {}
        for alpha, (kind, title) in zip(FAILURE_ALPHA, FAILURE_TITLES.items(), strict=True):
            part = failures.get(kind, 0) / count
            ax.barh(row, part, left=left, height=BAR_HEIGHT, color=theme.muted, alpha=alpha)
            left += part
            if part > 0:
                notes.append(f"{title} {f'{part * 100:.0f}' if part >= 0.005 else '< 1'} %")
        text = f"{share * 100:.1f} %" + (f"   {', '.join(notes)}" if notes else "")
        ax.annotate(
            text, (0, row - BAR_HEIGHT / 2), xytext=(0, 3), textcoords="offset points",
            fontsize=8, color=theme.muted, va="bottom",
        )  # fmt: skip
    ax.set_title("well-formed Harmony")
    name_rows(ax, [(run.name, theme.color(i)) for i, run in sampled])
    ax.set_ylim(len(sampled) - 0.5, -0.8)
    percent_axis(ax)


def _draw_lengths(ax: Axes, sampled: Sequence[tuple[int, RunData]], theme: Theme) -> None:
    for row, (index, run) in enumerate(sampled):
        for offset, channel in ((-0.15, "reasoning"), (0.15, "final")):
            length = run.measured("lengths", channel)
            if not length or not length["count"]:
                continue
            color, y = theme.color(index), row + offset
            alpha = 1.0 if channel == "reasoning" else 0.55
            ax.plot([length["p50"], length["p95"]], [y, y], color=color, alpha=0.4 * alpha)
            ax.plot(length["p50"], y, "o", color=color, markersize=5, alpha=alpha)
            ax.plot(length["p95"], y, "|", color=color, markersize=7, alpha=alpha)
            ax.annotate(
                channel, (length["p95"], y), xytext=(5, 0), textcoords="offset points",
                fontsize=7.8, color=theme.muted, va="center",
            )  # fmt: skip
    ax.set_title("tokens per channel, median to p95")
    name_rows(ax, [(run.name, theme.color(i)) for i, run in sampled])
    ax.set_xlim(left=0, right=ax.get_xlim()[1] * 1.12)
    ax.grid(visible=True, axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("tokens")
