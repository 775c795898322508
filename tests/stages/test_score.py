"""Scoring a dataset: the right numbers at the right labels, however often it is interrupted."""

import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.teachers.tiny import run_and_kill, write_teacher
from vpmoe.config import validate
from vpmoe.data.build import DataConfig, build_dataset
from vpmoe.data.conversation import Message
from vpmoe.data.dataset import Dataset
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.loader import PackedLoader
from vpmoe.data.synth import Conversation
from vpmoe.errors import ConfigError, DataError, TeacherError
from vpmoe.spans import Span
from vpmoe.stages.score import ScoreConfig, open_targets, pool_of, run, score_dataset
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TeacherIdentity
from vpmoe.teachers.selection import select
from vpmoe.teachers.store import TargetStore

IDENTITY = TeacherIdentity("prefix", "", "0", "float32", "none", "0")


def rows(count: int = 120) -> list[dict]:
    rng = random.Random(3)
    words = ["two", "plus", "seven", "is", "nine", "so", "carry", "one", "then", "über"]
    return [
        {
            "synth_id": f"row-{i}",
            "query": f"Problem {i}: " + " ".join(rng.choices(words, k=5)) + "?",
            "synthetic_reasoning": " ".join(rng.choices(words, k=rng.randint(3, 60))),
            "synthetic_answer": rng.choice(words),
            "language": rng.choice(["en", "en", "en", "de"]),
            "exercise": "math",
        }
        for i in range(count)
    ]


def build(folder, **changes) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows()), folder / "rows.parquet")
    tree = {"input": str(folder / "rows.parquet"), "output": str(folder / "data"), "seq_len": 512}
    config = validate(DataConfig, tree | {"valid_fraction": 0.0, "shards": 2} | changes, source="t")
    build_dataset(config)
    return Dataset(folder / "data")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return build(tmp_path_factory.mktemp("plain"))


class PrefixTeacher:
    """Answers that depend on every token so far, so that any shift or other prompt shows."""

    provides = frozenset({ROLLOUT_LOGPROBS})
    identity = IDENTITY

    def __init__(self, log=None, pause=0.0):
        self.log, self.pause, self.num_sequences = log, pause, 0

    def score(self, sequences):
        if self.log:
            with self.log.open("a") as lines:
                lines.writelines(f"{len(s)} {int(np.sum(s))}\n" for s in sequences)
        time.sleep(self.pause)
        self.num_sequences += len(sequences)
        return [prefix_logprobs(s) for s in sequences]


def prefix_logprobs(sequence) -> np.ndarray:
    running = np.cumsum(np.asarray(sequence, dtype=np.int64) * 31 + 7)
    return (-(running[1:] % 1009) / 64).astype(np.float32)


def config_for(folder, **changes) -> ScoreConfig:
    tree = {
        "data": "unused",
        "output": str(folder),
        "teacher": {"kind": "local", "path": "unused"},
        "selection": {"fraction": 0.4},
        "shard_tokens": 800,
    }
    return validate(ScoreConfig, tree | changes, source="test")


def expected(document) -> np.ndarray:
    out = np.zeros(len(document.tokens), dtype=np.float16)
    out[: len(out) - 1] = prefix_logprobs(document.tokens)
    out[document.span_ids == Span.IGNORE] = 0
    return out


def contents(path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix in (".arrow", ".json")}


def test_every_label_gets_the_log_prob_of_its_own_token(dataset, tmp_path):
    config, told = config_for(tmp_path), []
    manifest = score_dataset(
        dataset, PrefixTeacher(), config, progress=lambda done, total: told.append((done, total))
    )
    store = open_targets(tmp_path, dataset)
    chosen = select(pool_of(dataset), config.selection)
    assert set(store) == {dataset.sample_ids[i] for i in chosen}
    for index in chosen:
        document = dataset.conversation(index)
        np.testing.assert_array_equal(store[document.sample_id], expected(document))
        np.testing.assert_array_equal(store.span_ids(document.sample_id), document.span_ids)
        assert np.count_nonzero(document.span_ids) > 10
    tokens = int(dataset.lengths[chosen].sum())
    assert abs(tokens - 0.4 * dataset.lengths.sum()) < 120
    assert told[-1] == (tokens, tokens) and told == sorted(told)
    assert manifest["samples"] == len(chosen)
    assert manifest["labels"] == sum(np.count_nonzero(dataset.span_ids(i)) for i in chosen)
    assert len(manifest["shards"]) > 3
    header = manifest["header"]
    assert header["teacher"]["name"] == "prefix" and header["reasoning_effort"] == "medium"


def test_the_loader_puts_them_beside_the_labels(dataset, tmp_path):
    score_dataset(dataset, PrefixTeacher(), config_for(tmp_path))
    store = open_targets(tmp_path, dataset)
    loader = PackedLoader(dataset, seq_len=512, seed=0, scores=store, only=frozenset(store))
    batch = loader.batch(0, 4)
    assert batch.teacher_logprobs is not None
    for row, names in enumerate(batch.sample_ids):
        for document_id, name in enumerate(names):
            here = batch.document_ids[row] == document_id
            document = dataset.conversation(dataset.index_of[name])
            np.testing.assert_array_equal(batch.tokens[row][here], document.tokens)
            np.testing.assert_array_equal(batch.teacher_logprobs[row][here], expected(document))


@pytest.mark.parametrize("system", [True, False])
def test_another_effort_moves_the_prompt_and_scores_the_same_answer(tmp_path, system):
    dataset = build(tmp_path / "in", render={"system": system})
    out = tmp_path / "out"
    score_dataset(dataset, PrefixTeacher(), config_for(out, reasoning_effort="high"))
    store = open_targets(out, dataset)
    assert store.header["reasoning_effort"] == "high"
    renderer = Renderer(RenderConfig(reasoning_effort="high"))
    by_id = {row["synth_id"]: row for row in rows()}
    for name in store:
        row = by_id[name]
        messages = (
            Message("user", None, row["query"]),
            Message("assistant", "analysis", row["synthetic_reasoning"]),
            Message("assistant", "final", row["synthetic_answer"]),
        )
        tokens = renderer.render(Conversation(name, messages)).tokens
        document = dataset.conversation(dataset.index_of[name])
        trained = document.span_ids != Span.IGNORE
        answer = prefix_logprobs(tokens)[-np.count_nonzero(trained) :].astype(np.float16)
        np.testing.assert_array_equal(store[name][trained], answer)
        assert not store[name][~trained].any()


def test_kill_and_resume_gives_the_same_bytes_and_scores_nothing_twice(dataset, tmp_path):
    """Real processes, killed with SIGKILL at random moments."""
    whole, log = PrefixTeacher(), tmp_path / "scored.log"
    score_dataset(dataset, whole, config_for(tmp_path / "whole"))
    config, kills, rng = config_for(tmp_path / "killed"), 0, random.Random(11)
    while not (config.output / "manifest.json").exists():
        kills += run_and_kill(
            lambda: score_dataset(dataset, PrefixTeacher(log, pause=0.02), config), log, rng
        )
    assert kills >= 2
    assert contents(config.output) == contents(tmp_path / "whole")
    lines = log.read_text().splitlines()
    per_slice = max(entry["samples"] for entry in TargetStore(config.output).manifest["shards"])
    assert len(set(lines)) == whole.num_sequences
    assert len(lines) - whole.num_sequences <= kills * per_slice
    again = PrefixTeacher()
    assert score_dataset(dataset, again, config) == TargetStore(config.output).manifest
    assert again.num_sequences == 0


def test_the_store_does_not_depend_on_how_the_dataset_was_built(dataset, tmp_path):
    """Other workers, another folder: the same shards, so the same store serves both."""
    score_dataset(dataset, PrefixTeacher(), config_for(tmp_path / "out"))
    twin = build(tmp_path / "in", workers=2)
    assert (
        open_targets(tmp_path / "out", twin).keys()
        == open_targets(tmp_path / "out", dataset).keys()
    )


def test_a_store_for_other_data_is_refused(dataset, tmp_path):
    score_dataset(dataset, PrefixTeacher(), config_for(tmp_path / "out"))
    other = build(tmp_path / "in", render={"reasoning_effort": "low"})
    with pytest.raises(DataError, match="was made with dataset_sha256 = "):
        open_targets(tmp_path / "out", other)
    with pytest.raises(DataError, match=r"other settings: dataset_sha256: .* → "):
        score_dataset(other, PrefixTeacher(), config_for(tmp_path / "out"))
    manifest = score_dataset(other, PrefixTeacher(), config_for(tmp_path / "out"), overwrite=True)
    assert open_targets(tmp_path / "out", other).manifest == manifest


def test_another_effort_or_teacher_is_not_mixed_in(dataset, tmp_path):
    score_dataset(dataset, PrefixTeacher(), config_for(tmp_path))
    with pytest.raises(DataError, match="reasoning_effort: medium → low"):
        score_dataset(dataset, PrefixTeacher(), config_for(tmp_path, reasoning_effort="low"))
    stranger = PrefixTeacher()
    stranger.identity = TeacherIdentity("prefix", "", "1", "float32", "none", "0")
    with pytest.raises(DataError, match=r"teacher\.weights_sha256: 0 → 1"):
        score_dataset(dataset, stranger, config_for(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: np.where(np.arange(len(s)) == 5, np.nan, s), "token 6 of sequence 0 is nan"),
        (lambda s: s + 30, "token 1 of sequence 0 is"),
        (lambda s: s[1:], "answered an array of shape"),
    ],
)
def test_nonsense_from_the_teacher_stops_the_run(dataset, tmp_path, spoil, message):
    teacher = PrefixTeacher()
    teacher.score = lambda sequences: [spoil(prefix_logprobs(s)) for s in sequences]
    with pytest.raises(TeacherError, match=message):
        score_dataset(dataset, teacher, config_for(tmp_path))
    assert not list(tmp_path.glob("*.arrow"))


def test_run_with_a_real_model_of_the_whole_vocabulary(dataset, tmp_path):
    path = write_teacher(tmp_path / "teacher", None, hidden_size=16, num_hidden_layers=1)
    config = config_for(
        tmp_path / "out",
        data=str(dataset.path),
        teacher={"kind": "local", "path": path, "dtype": "float32"},
        selection={"fraction": 0.04},
    )
    manifest = run(config)
    store = open_targets(config.output, dataset)
    assert manifest["header"]["teacher"]["name"] == "teacher"
    teacher = config.teacher.build()
    for name in store:
        document = dataset.conversation(dataset.index_of[name])
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        alone = teacher.score([document.tokens])[0]
        np.testing.assert_allclose(store[name][trained], alone[trained], rtol=1e-3)


def test_configs_that_cannot_work_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, teacher={"kind": "recorded", "path": "x"}, shard_token=5)
    said = " | ".join(message for message, _ in caught.value.problems)
    assert "a recorded teacher cannot score a dataset" in said
    assert "shard_token is not a setting" in said


def test_an_empty_selection_is_an_error(dataset, tmp_path):
    config = config_for(tmp_path, selection={"fraction": 1.0, "languages": ["fr"]})
    with pytest.raises(DataError, match="no sample of"):
        score_dataset(dataset, PrefixTeacher(), config)
