"""What is shown is the example: its text in order, its spans in colour, its counts right."""

import io

import numpy as np
import pytest
from rich.console import Console

from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import decode
from vpmoe.data.show import Example
from vpmoe.errors import DataError


def test_the_text_and_the_styles(small_dataset):
    dataset = Dataset(small_dataset)
    example = Example(dataset, 4)
    text = example.text()
    assert text.plain == decode(dataset.tokens(4))
    styled = {span.style: text.plain[span.start : span.end] for span in text.spans}
    reasoning = "".join(text.plain[s.start : s.end] for s in text.spans if "cyan" in s.style)
    assert reasoning.startswith("<|start|>assistant<|channel|>analysis<|message|>")
    assert reasoning.endswith("<|end|>")
    final = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in s.style)
    assert final.startswith("<|start|>assistant<|channel|>final") and final.endswith("<|return|>")
    assert "dim" in styled


def test_the_counts(small_dataset):
    dataset = Dataset(small_dataset)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(Example(dataset, 0))
    shown = console.export_text()
    for span in (0, 1, 2):
        assert f" {int((dataset.span_ids(0) == span).sum())} " in shown
    where = np.flatnonzero(dataset.span_ids(0) == 1)
    assert f"{where[0]}-{where[-1]}" in shown
    assert dataset.sample_ids[0] in shown and "language" in shown


def test_an_example_that_is_not_there(small_dataset):
    with pytest.raises(DataError, match="no example 9999"):
        Example(Dataset(small_dataset), 9_999)
