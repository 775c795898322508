"""The frontier of target codecs: error against bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vpmoe.evals.report.theme import DOTS_PER_INCH, LIGHT, drawing, label_line_ends, new_figure
from vpmoe.teachers.frontier import RECOMMENDED, Point

_ORDER = ("adaptive, prior", "adaptive", "set-coded", "plain top-K", "DistillKit")


def draw_frontiers(panels: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """One panel per teacher: a line per family of codecs, a dot per codec.

    Args:
        panels: Title -> what was measured.
        path: Of the PNG file.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(LIGHT):
        figure, axes = new_figure(rows, columns, height=3.9 * rows)
        flat = list(axes.reshape(-1))
        for ax, (title, points) in zip(flat, panels.items(), strict=False):
            _panel(ax, title, points)
        for ax in flat[len(panels) :]:
            ax.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH * 0.7)
    return path


def _panel(ax, title: str, points: Sequence[Point]) -> None:  # noqa: ANN001
    ends = []
    ax.set_xscale("log")
    ax.set_yscale("log")
    for index, family in enumerate(_ORDER):
        found = [p for p in points if p.family == family and p.kl_nats is not None]
        if not found:
            continue
        color = LIGHT.color(index)
        shown = sorted((p.bytes_per_token, max(p.kl_nats or 0.0, 1e-6)) for p in found)
        x, y = [a for a, _ in shown], [b for _, b in shown]
        ax.plot(x, y, "o" if family == "DistillKit" else "o-", color=color, markersize=4)
        ends.append((x[-1], y[-1], family, color))
    for point in points:
        if point.name == RECOMMENDED and point.kl_nats:
            ax.axhline(point.kl_nats, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_title(title)
    ax.set_xlabel("bytes per token")
    ax.set_ylabel("KL(teacher ‖ rebuilt), nats")
    ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    label_line_ends(ax, [(x, y, text, color) for x, y, text, color in ends])
