"""Questions for a student to answer: from a dataset, or from rows that have no answers at all."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.batch import ReasoningEffort
from vpmoe.data.dataset import Dataset
from vpmoe.data.effort import with_effort
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.pack import permuted
from vpmoe.data.source import ID_COLUMN
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.vocabulary import COMPLETION_HEADER

QUERY_COLUMN = "query"


@dataclass(frozen=True)
class Prompt:
    """A question as tokens.

    Attributes:
        sample_id: The row it comes from.
        tokens: o200k ids, int64, ending in the assistant's header.
    """

    sample_id: str
    tokens: np.ndarray


class PromptPool(Protocol):
    """Numbered questions."""

    def __len__(self) -> int: ...

    def prompt(self, index: int, effort: ReasoningEffort | None) -> Prompt:
        """Question `index`; `effort` is named in its system message, None leaves it as it is."""
        ...


class DatasetPrompts:
    """The questions of a dataset's conversations, exactly as they are stored.

    Args:
        dataset: One split.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._render = RenderConfig(**dataset.manifest["config"]["render"])

    def __len__(self) -> int:
        return len(self._dataset)

    def prompt(self, index: int, effort: ReasoningEffort | None) -> Prompt:
        """Question `index`."""
        document = self._dataset.conversation(index)
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        # Label t speaks of token t + 1: the first trained label is the assistant's start token.
        tokens = document.tokens[: int(trained[0]) + 1 + len(COMPLETION_HEADER)]
        if effort is not None:
            tokens = with_effort(tokens, effort, render=self._render)
        return Prompt(document.sample_id, tokens.astype(np.int64))


class QueryPrompts:
    """The questions of a parquet file with columns `synth_id` and `query`.

    Args:
        path: The file.
        render: What stands before a question.

    Raises:
        DataError: If the file cannot be read, lacks a column, or is empty.
    """

    def __init__(self, path: str, render: RenderConfig) -> None:
        try:
            table = pq.read_table(path, columns=[ID_COLUMN, QUERY_COLUMN])
        except (OSError, pa.ArrowException) as error:
            first = str(error).splitlines()[0]
            raise DataError(
                f"cannot read prompts from {path}: {first}",
                hint=f"give a parquet file with columns {ID_COLUMN} and {QUERY_COLUMN}",
            ) from error
        if table.num_columns != 2 or table.num_rows == 0:
            raise DataError(f"{path} holds no prompts", hint="it needs at least one row")
        self._table = table.combine_chunks()
        self._renderer = Renderer(render)

    def __len__(self) -> int:
        return self._table.num_rows

    def prompt(self, index: int, effort: ReasoningEffort | None) -> Prompt:
        """Question `index`."""
        sample_id, query = (column[index].as_py() for column in self._table.columns)
        if not isinstance(query, str) or not query:
            raise DataError(f"prompt {sample_id!r} is {query!r}", hint="drop the row")
        return Prompt(str(sample_id), self._renderer.prompt(query, effort).astype(np.int64))


def shuffled_index(number: int, size: int, *, seed: int) -> int:
    """Which question comes as the `number`-th of an endless, seeded, shuffled stream of `size`."""
    epoch, place = divmod(number, size)
    return int(permuted(np.array([place]), size, seed=seed, epoch=epoch)[0])
