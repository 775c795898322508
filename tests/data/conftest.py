"""Small inputs made on the spot, and the real sample where it is there."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.source import read_rows

WORDS = (
    *("the", "sum", "of", "two", "odd", "numbers", "is", "even,", "since"),
    *("(2a+1)+(2b+1)=2(a+b+1).", "Größe", "Ω", "漢字", "🙂\n"),
)


DEFAULTS = {"seq_len": 512, "valid_fraction": 0.2, "oracle_rows": 4}


def conversation(query, reasoning, answer, sample_id="a", **metadata):
    return Conversation(
        sample_id,
        (
            Message("user", None, query),
            Message("assistant", "analysis", reasoning),
            Message("assistant", "final", answer),
        ),
        metadata,
    )


def text(seed, size):
    """`size` words that differ with the seed, several scripts among them."""
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(size))


def rows(count, first=0):
    """Made-up rows in SYNTH's schema."""
    return [
        {
            "synth_id": f"row-{i}",
            "query": text(i, 5 + i % 7),
            "synthetic_reasoning": text(i + 1, 20 + i % 31),
            "synthetic_answer": text(i + 2, 4 + i % 5),
            "language": ("en", "de")[i % 2],
            "exercise": None if i % 3 else "math",
        }
        for i in range(first, first + count)
    ]


def write_parquet(path, content, **options):
    pq.write_table(pa.Table.from_pylist(content), path, **options)
    return path


def build(folder, input_path, **settings):
    """Build a dataset in `folder` from `input_path`; returns its path."""
    build_dataset(DataConfig(input=str(input_path), output=folder, **{**DEFAULTS, **settings}))
    return folder


@pytest.fixture(scope="session")
def small_parquet(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", rows(120))


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory, small_parquet) -> Path:
    return build(tmp_path_factory.mktemp("data") / "small", small_parquet, shards=3)


@pytest.fixture(scope="session")
def synth_sample(shared_dir) -> Path:
    return shared_dir / "synth" / "synth_sample.parquet"


@pytest.fixture(scope="session")
def sample_conversations(synth_sample):
    table = pq.read_table(synth_sample).to_pylist()
    return [
        conversation(r["query"], r["synthetic_reasoning"], r["synthetic_answer"], r["synth_id"])
        for r in table
    ]


def first_batch(inputs, count=10_000):
    return next(iter(read_rows(inputs, 0, count, batch_size=count)))[1]
