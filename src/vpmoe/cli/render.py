"""What the verbs print: facts, tables, JSON and progress bars."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe.errors import CheckFailedError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]  # (done, total); total 0 = unknown

WIDE = 160  # columns of a table that goes to a file or a pipe
_POWERS = ("", " k", " M", " B", " T")


def console(*, stderr: bool = False) -> "Console":
    """Where to print: colors only on a terminal, and never when NO_COLOR is set."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write `value` to stdout as indented JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print one `label  text` line for each fact, the texts aligned."""
    from rich.text import Text

    width = max(len(label) for label, _ in facts)
    out = console()
    for label, text in facts:
        out.print(Text(f"{label:<{width}}  ", style="bold cyan") + Text(text, style="default"))


def print_heading(text: str, *, first: bool) -> None:
    """Print a line above a block of facts, set apart from the block before it."""
    from rich.text import Text

    console().print(Text(text if first else f"\n{text}", style="bold"))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table whose first column is words and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = console()
    if not out.is_terminal:
        out.width = WIDE  # print's own width may narrow a console, not widen it
    out.print(table)


def say_checked(report: Any, path: Path, *, hint: str, as_json: bool) -> None:
    """Say what a verification found: as JSON, or a line for each problem.

    Args:
        report: A dataclass with `ok` and `problems`.
        path: What was verified.
        hint: What to do about problems.
        as_json: Whether to print JSON.

    Raises:
        CheckFailedError: If anything was found.
    """
    if as_json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        for problem in report.problems:
            console().print(problem, markup=False)
    if not report.ok:
        raise CheckFailedError(f"{path}: {len(report.problems)} problems found", hint=hint)


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar on stderr that is fed (done, total); silent when stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    out = console(stderr=True)
    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def short(number: float) -> str:
    """A count as people say it: 6.02 B, 131 k, 7."""
    scaled, power = float(number), 0
    while abs(scaled) >= 999.5 and power < len(_POWERS) - 1:
        scaled, power = scaled / 1_000, power + 1
    return f"{scaled:.3g}{_POWERS[power]}"


def gib(num_bytes: float) -> str:
    """Bytes as GiB, or as MiB when there are few."""
    mib = num_bytes / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`a.b`, text) for each leaf of nested tables."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:,}" if type(value) is int else str(value)
