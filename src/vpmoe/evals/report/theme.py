"""Colors, type and small drawing habits that every chart of a report shares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

DOTS_PER_INCH = 200
COLUMN_INCHES = 10.4  # a chart fills the page's column; type is sized for that


@dataclass(frozen=True)
class Theme:
    """One color scheme; the page shows the reader's."""

    name: str
    paper: str
    ink: str
    muted: str
    hairline: str
    runs: tuple[str, ...]
    heat: tuple[str, ...]  # from empty to uniform to overloaded

    def color(self, index: int) -> str:
        """The color of the run at `index`; the page repeats it wherever the run appears."""
        return self.runs[index % len(self.runs)]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1d2126",
    muted="#6a727d",
    hairline="#e3e6ea",
    runs=(
        "#3565c4", "#c7522a", "#0f8f7e", "#8a4fbf", "#b58a08", "#c23b6e", "#2b8fb8", "#5b6472",
    ),
    heat=("#1f4e8c", "#8fb3da", "#f4f4f1", "#e8a26a", "#b5431c"),
)  # fmt: skip
DARK = Theme(
    name="dark",
    paper="#16191d",
    ink="#e8eaed",
    muted="#949ca8",
    hairline="#2b3037",
    runs=(
        "#7ea6f4", "#ef8a62", "#45c5b0", "#bd93e8", "#e0bb4a", "#ee7fa8", "#6cc4e4", "#a4acb8",
    ),
    heat=("#7db4f0", "#35587f", "#23272d", "#8a5530", "#f0925a"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Draw under `theme`: no frame, hairline grid, quiet ticks."""
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.edgecolor": theme.hairline,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.hairline,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(settings):
        yield


def new_figure(rows: int, columns: int, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of the column's width and its axes as a rows x columns array."""
    figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.10, wspace=0.04, hspace=0.06)  # type: ignore[union-attr]
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def short_number(value: float, _position: int | None = None) -> str:
    """12,500,000 as 12.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def token_axis(ax: Axes, *, label: str = "student tokens") -> None:
    """Mark the horizontal axis as tokens, in thousands, millions or billions."""
    ax.xaxis.set_major_formatter(FuncFormatter(short_number))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    ax.set_xlabel(label)


def percent_axis(ax: Axes) -> None:
    """Mark the horizontal axis as a share from 0 to 100 %."""
    ax.set_xlim(0, 1.0)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:.0f} %"))
    ax.grid(visible=True, axis="x")
    ax.grid(visible=False, axis="y")


def name_rows(ax: Axes, rows: Sequence[tuple[str, str]], *, named: bool = True) -> None:
    """Name the rows of a horizontal chart after (name, color), first on top."""
    ax.set_yticks([])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    for row, (name, color) in enumerate(rows if named else ()):
        ax.annotate(
            name, (0, row), xycoords=("axes fraction", "data"), xytext=(-9, 0),
            textcoords="offset points", ha="right", va="center", color=color, fontsize=9.5,
        )  # fmt: skip


def label_line_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name in the right margin at the height where it ends.

    Names that would collide are moved apart; lines that end early get a dot at their end.

    Args:
        ax: Axes whose limits are final.
        ends: (x, y, text, color) of each line's last point.
    """
    if not ends:
        return
    cast(
        Figure, ax.figure
    ).draw_without_rendering()  # settles the layout, so that pixels mean something
    gap = 13.0 * ax.figure.dpi / 72
    bottom, top = ax.bbox.y0, ax.bbox.y1
    pixels = [min(max(ax.transData.transform((x, y))[1], bottom), top) for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: pixels[i])
    placed: list[float] = []
    for index in order:
        placed.append(max(pixels[index], placed[-1] + gap) if placed else pixels[index])
    shift = max(0.0, placed[-1] - max(top, pixels[order[-1]]))
    for rank, index in enumerate(order):
        x, y, text, color = ends[index]
        ax.plot([x], [y], "o", color=color, markersize=3.2, zorder=4)
        ax.annotate(
            text, (1.0, (placed[rank] - shift - bottom) / (top - bottom)),
            xycoords="axes fraction", xytext=(8, 0), textcoords="offset points", color=color,
            va="center", ha="left", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def smoothed(values: Sequence[float], *, window: int) -> list[float]:
    """Running mean over the last `window` values; the first ones average what there is."""
    total, out = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        out.append(total / min(index + 1, window))
    return out
