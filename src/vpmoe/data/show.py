"""One stored example in colour, as a rich renderable."""

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from vpmoe.data.dataset import Dataset
from vpmoe.data.o200k import o200k
from vpmoe.spans import Span
from vpmoe.vocabulary import FIRST_SPECIAL

# A token's style by the span that it is trained in; special tokens are reversed on top.
_STYLES = {Span.IGNORE: "dim", Span.REASONING: "cyan", Span.FINAL: "bold green"}
_NAMES = {Span.IGNORE: "prompt", Span.REASONING: "reasoning", Span.FINAL: "final"}


class Example:
    """One conversation: its text coloured by span, then its counts and how its masks run.

    Args:
        dataset: Where it is stored.
        index: Which one.

    Raises:
        DataError: If the dataset has no such example.
    """

    def __init__(self, dataset: Dataset, index: int) -> None:
        self.document = dataset.conversation(index)
        self.index = index
        self.split = dataset.split
        row = dataset.samples.slice(index, 1).to_pylist()[0]
        self.facts = {name: value for name, value in row.items() if value is not None}

    @property
    def token_spans(self) -> np.ndarray:
        """`Span` of each token: stored spans speak of the token after theirs."""
        spans = np.zeros_like(self.document.span_ids)
        spans[1:] = self.document.span_ids[:-1]
        return spans

    def text(self) -> Text:
        """The whole conversation, every token in its span's style."""
        tokens, spans = self.document.tokens, self.token_spans
        special = tokens >= FIRST_SPECIAL
        # Tokens may end inside a character, so runs of one style are decoded together.
        changes = np.flatnonzero((np.diff(spans) != 0) | (np.diff(special) != 0)) + 1
        text = Text()
        for begin, end in zip([0, *changes], [*changes, tokens.size], strict=True):
            style = _STYLES[Span(int(spans[begin]))] + (" reverse" if special[begin] else "")
            text.append(o200k().decode(tokens[begin:end].tolist()), style=style)
        return text

    def counts(self) -> Table:
        """Tokens of each span, and the label positions they are trained at."""
        table = Table(title=f"{self.split} example {self.index}: {self.document.sample_id}")
        for column in ("span", "tokens", "share", "label positions"):
            table.add_column(column, justify="left" if column == "span" else "right")
        labels = self.document.span_ids
        for span, name in _NAMES.items():
            where = np.flatnonzero(labels == span)
            share = f"{where.size / labels.size:.0%}"
            table.add_row(f"[{_STYLES[span]}]{name}[/]", str(where.size), share, _ranges(where))
        table.add_row("all", str(labels.size), "100%", "")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text()
        yield Text()
        yield self.counts()
        shown = ("language", "exercise", "model", "truncated")
        facts = "  ".join(f"{k}: {self.facts[k]}" for k in shown if k in self.facts)
        yield Text(facts, style="dim")


def _ranges(places: np.ndarray) -> str:
    """Sorted places as "0-3, 7-9"."""
    if not places.size:
        return "none"
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" for run in runs)
