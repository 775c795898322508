"""The page: one HTML file that needs nothing beside it, and the charts as PNG files."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vpmoe.errors import RunError
from vpmoe.evals.report import charts_behavior, charts_training, tables
from vpmoe.evals.report.runs import RunData, read_runs
from vpmoe.evals.report.theme import DARK, DOTS_PER_INCH, LIGHT, THEMES, Theme, drawing
from vpmoe.storage.atomic import atomic_path

PAGE_NAME = "index.html"
TITLE_SEPARATOR = ", "


@dataclass(frozen=True)
class ReportFiles:
    """What a report left on disk: the page, and each chart as a light PNG."""

    page: Path
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Chart:
    """A chart of the page: file name, heading, one sentence on how to read it, its drawing."""

    name: str
    title: str
    reading: str
    draw: Callable[[Sequence[RunData], Theme], Figure | None]


CHARTS = (
    Chart(
        "exact-match",
        "Right answers",
        "Share of held-out problems whose final answer equals the reference, greedy decoding; "
        "the line is the 95 % Wilson interval.",
        charts_behavior.exact_match_chart,
    ),
    Chart(
        "loss",
        "Loss",
        "Lines: training loss, a running mean over the faint raw values. Dots: held-out loss; "
        "of an on-policy run it alone is drawn, its training loss being a surrogate without "
        "meaning. Each span is a mean over its own tokens.",
        charts_training.loss_chart,
    ),
    Chart(
        "validity",
        "Form and length",
        "Colored: completions that parse as Harmony with a final message; gray: what broke the "
        "others. Right: how many tokens each channel holds.",
        charts_behavior.validity_chart,
    ),
    Chart(
        "router-load",
        "Which experts work",
        "One cell per expert and layer, on held-out text: blue works less than an even share, "
        "orange several times as much.",
        charts_training.router_chart,
    ),
    Chart(
        "router-health",
        "Router over the run",
        "Running means over all routed layers.",
        charts_training.health_chart,
    ),
    Chart(
        "speed",
        "Speed",
        "Left: tokens trained per second of wall time. Right: where a mean step spends it.",
        charts_training.throughput_chart,
    ),
)


def write_report(run_paths: Sequence[Path], out: Path, *, title: str = "") -> ReportFiles:
    """The page `out/index.html` and its charts as PNG files, from any number of run directories.

    A run directory holds `metrics.jsonl` and `config.json` (training), `eval-*.json`
    (evaluation), or both. What no run measured is left out of the page. Same input, same bytes.

    Raises:
        RunError: If a run cannot be read or `out` is a file.
    """
    runs = read_runs([Path(path) for path in run_paths])
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file", hint="name a folder for the report")
    out.mkdir(parents=True, exist_ok=True)
    charts, images = [], []
    for chart in CHARTS:
        pictures = {theme.name: _draw(chart, runs, theme) for theme in THEMES}
        light, dark = pictures[LIGHT.name], pictures[DARK.name]
        if light is None or dark is None:
            continue
        images.append(out / f"{chart.name}.png")
        _write(images[-1], light)
        charts.append({"chart": chart, "light": _inline(light), "dark": _inline(dark)})
    page = _render(runs, charts, title=title)
    _write(out / PAGE_NAME, page.encode())
    return ReportFiles(page=out / PAGE_NAME, images=tuple(images))


def _render(runs: Sequence[RunData], charts: list[dict[str, Any]], *, title: str) -> str:
    folder = resources.files("vpmoe.evals.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title or TITLE_SEPARATOR.join(run.name for run in runs),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        colors=[
            {"index": i, "light": LIGHT.color(i), "dark": DARK.color(i)} for i in range(len(runs))
        ],
        summary=tables.summary(runs),
        charts=charts,
        provenance=tables.provenance(runs),
        differing=tables.differing_settings(runs),
        names=[run.name for run in runs],
    )


def _draw(chart: Chart, runs: Sequence[RunData], theme: Theme) -> bytes | None:
    with drawing(theme):
        figure = chart.draw(runs, theme)
        if figure is None:
            return None
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
