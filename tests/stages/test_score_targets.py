"""Scoring with distributions: the right ids at the right labels, through store and loader."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.stages.test_score import (
    IDENTITY,
    build,
    config_for,
    contents,
    prefix_logprobs,
)
from tests.teachers.tiny import run_and_kill, write_teacher
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.errors import ConfigError, DataError, TeacherError
from vpmoe.spans import Span
from vpmoe.stages import score
from vpmoe.stages.examine_teacher import subject_of
from vpmoe.stages.label_ranking import label_ranking
from vpmoe.stages.score import ask_about, open_targets, packed, run, score_dataset
from vpmoe.teachers.base import ROLLOUT_LOGPROBS, TARGETS, TopScores
from vpmoe.teachers.store import TargetStore
from vpmoe.vocabulary import VOCAB_SIZE

K = 6
TOP_K = {"kind": "top_k", "k": K}
SET_CODED = {"kind": "set_coded", "k": K}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return build(tmp_path_factory.mktemp("plain"))


class TopPrefixTeacher:
    """Likeliest ids that depend on every token so far; the token itself is one of them."""

    provides = frozenset({ROLLOUT_LOGPROBS, TARGETS})
    identity = IDENTITY

    def __init__(self, log=None):
        self.log = log

    def score(self, sequences):
        return [prefix_logprobs(s) for s in sequences]

    def score_top(self, sequences, k):
        if self.log:
            with self.log.open("a") as lines:
                lines.writelines(f"{len(s)} {int(np.sum(s))}\n" for s in sequences)
        return [top_scores(s, k) for s in sequences]


def top_scores(sequence, k) -> TopScores:
    sequence = np.asarray(sequence, dtype=np.int64)
    running = np.cumsum(sequence * 31 + 7)[1:]
    step = 0.5 + (running % 7) / 4
    values = -0.4 * step[:, None] - step[:, None] * np.arange(k)
    values -= 0.05 + np.maximum(0, np.log(np.exp(values).sum(1, keepdims=True)))
    ids = (sequence[1:, None] + np.arange(k) * (1 + running % 11)[:, None] * 13) % VOCAB_SIZE
    top = values.astype(np.float32)
    return TopScores(top[:, 0].copy(), ids.astype(np.int32), top)


@pytest.mark.parametrize("codec", [TOP_K, SET_CODED])
@pytest.mark.parametrize("effort", [None, "high"])
def test_every_label_gets_the_entries_of_its_own_token(dataset, tmp_path, codec, effort):
    """Another effort moves the prompt: the first entry is still the label."""
    changes = {"reasoning_effort": effort} if effort else {}
    score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path, codec=codec, **changes))
    store = open_targets(tmp_path, dataset)
    assert store.header["codec"]["kind"] == codec["kind"]
    for name in store:
        document = dataset.conversation(dataset.index_of[name])
        trained = document.span_ids != Span.IGNORE
        found = store.aligned_entries(name).ranked()
        labels = np.append(document.tokens[1:], 0)
        np.testing.assert_array_equal(found.ids[trained, 0], labels[trained])
        np.testing.assert_allclose(found.logprobs[trained, 0], store[name][trained], atol=0.02)
        assert (found.logprobs[~trained] == -torch.inf).all()
        assert (found.tail[~trained] == -torch.inf).all() and not found.ids[~trained].any()
        if effort is None:
            top = top_scores(document.tokens[:-1], K)
            place = np.flatnonzero(trained)
            np.testing.assert_array_equal(found.ids[trained], top.top_ids[place])
            np.testing.assert_allclose(found.logprobs[trained], top.top_logprobs[place], atol=0.03)
            tail = np.log(1 - np.exp(top.top_logprobs[place].astype(np.float64)).sum(1))
            np.testing.assert_allclose(found.tail[trained], tail, atol=0.03)


@pytest.mark.parametrize("mode", ["pack", "slice"])
def test_batches_hold_them_beside_the_labels(dataset, tmp_path, mode):
    score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path, codec=SET_CODED))
    store = open_targets(tmp_path, dataset)
    settings = {"scores": store, "targets": store, "only": frozenset(store), "mode": mode}
    batch = PackedLoader(dataset, seq_len=300, seed=0, **settings).batch(1, 3)
    assert batch.target_ids is not None and batch.target_logprobs is not None
    assert batch.target_tail is not None and batch.target_ids.shape == (3, 300, K)
    trained = batch.span_ids != Span.IGNORE
    assert 100 < int(trained.sum()) < 900
    best = batch.target_logprobs.argmax(2, keepdim=True)
    assert torch.equal(batch.target_ids.gather(2, best)[..., 0][trained], batch.labels[trained])
    mass = batch.target_logprobs.double().exp().sum(2) + batch.target_tail.double().exp()
    torch.testing.assert_close(mass, trained.double(), atol=1e-6, rtol=0)
    assert not batch.target_ids[~trained].any()
    part = batch.rows(1, 2)
    assert torch.equal(part.target_ids, batch.target_ids[1:2])
    assert PackedLoader(dataset, seq_len=300, seed=0).batch(0, 1).target_ids is None


class Patient(random.Random):
    """Waits longer each time, so that a busy machine gets somewhere too."""

    patience = 1.0

    def uniform(self, a, b):
        self.patience *= 1.2
        return self.patience * super().uniform(a, b)


def test_kill_and_resume_gives_the_same_bytes_and_scores_nothing_twice(dataset, tmp_path):
    settings = {"codec": SET_CODED, "shard_tokens": 800}
    score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path / "whole", **settings))
    log, rng, kills = tmp_path / "scored.log", Patient(5), 0
    config = config_for(tmp_path / "killed", **settings)
    while not (config.output / "manifest.json").exists():
        kills += run_and_kill(
            lambda: score_dataset(dataset, TopPrefixTeacher(log), config), log, rng
        )
    assert contents(config.output) == contents(tmp_path / "whole")
    lines = log.read_text().splitlines()
    per_slice = max(entry["samples"] for entry in TargetStore(config.output).manifest["shards"])
    assert len(lines) - len(set(lines)) <= kills * per_slice


def test_another_codec_is_not_mixed_in(dataset, tmp_path):
    score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path, codec=TOP_K))
    with pytest.raises(DataError, match=r"codec\.kind: top_k → set_coded"):
        score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path, codec=SET_CODED))


def test_a_store_of_log_probs_alone_has_no_entries(dataset, tmp_path):
    score_dataset(dataset, TopPrefixTeacher(), config_for(tmp_path))
    store = open_targets(tmp_path, dataset)
    name = next(iter(store))
    assert store.max_entries == 0
    assert store.aligned_entries(name).ids.shape == (len(store[name]), 0)


def spoiled(change):
    teacher = TopPrefixTeacher()
    teacher.score_top = lambda sequences, k: [change(top_scores(s, k)) for s in sequences]
    return teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: TopScores(t.logprobs, t.top_ids[:, 1:], t.top_logprobs[:, 1:]), "of shape"),
        (lambda t: TopScores(t.logprobs, t.top_ids[1:], t.top_logprobs[1:]), "of shape"),
        (lambda t: TopScores(t.logprobs, t.top_ids + VOCAB_SIZE, t.top_logprobs), "outside"),
        (lambda t: TopScores(t.logprobs, t.top_ids * 0, t.top_logprobs), "an id twice"),
        (lambda t: TopScores(t.logprobs, t.top_ids, t.top_logprobs * 0), "a mass of at most one"),
        (lambda t: TopScores(t.logprobs, t.top_ids, t.top_logprobs[:, ::-1]), "falling log-probs"),
        (lambda t: TopScores(t.logprobs - 1, t.top_ids, t.top_logprobs), "among its likeliest"),
        (
            lambda t: TopScores(
                t.logprobs, np.roll(t.top_ids, 1, 0), np.roll(t.top_logprobs, 1, 0) - 0.2
            ),
            "among its likeliest",
        ),
    ],
)
def test_nonsense_from_the_teacher_stops_the_run(dataset, tmp_path, change, message):
    with pytest.raises(TeacherError, match=message):
        score_dataset(dataset, spoiled(change), config_for(tmp_path, codec=TOP_K))
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.parametrize("at_once", [1, 300, 10**6])
def test_a_complaint_names_the_place_that_is_wrong(dataset, monkeypatch, at_once):
    monkeypatch.setattr(score, "_PACKED_PLACES", at_once)
    documents = [dataset.conversation(index) for index in range(4)]
    built = config_for(dataset, codec=TOP_K).codec.build()
    heard = ask_about(dataset, TopPrefixTeacher(), built, documents)
    wrong = heard.said[2].top_ids.copy()
    wrong[5] = VOCAB_SIZE + 7
    said = list(heard.said)
    said[2] = TopScores(said[2].logprobs, wrong, said[2].top_logprobs)
    with pytest.raises(TeacherError) as caught:
        packed(replace(heard, said=said), built)
    assert caught.value.message == (
        f"the teacher named id {VOCAB_SIZE + 7} for token 6 of sequence 2, which is outside the "
        "vocabulary"
    )


@pytest.mark.parametrize("then", ["answers", "breaks"])
def test_what_was_wrong_first_is_told_though_answers_are_checked_later(
    dataset, tmp_path, monkeypatch, then
):
    monkeypatch.setattr(score, "_PIECE_TOKENS", 1)  # a call for every document
    teacher, calls = TopPrefixTeacher(), []

    def score_top(sequences, k):
        calls.append(len(sequences))
        found = [top_scores(s, k) for s in sequences]
        if len(calls) == 1:
            return [TopScores(t.logprobs, t.top_ids * 0, t.top_logprobs) for t in found]
        if then == "breaks":
            raise ConnectionError("the server is gone")
        return found

    teacher.score_top = score_top
    with pytest.raises(TeacherError, match="an id twice"):
        score_dataset(dataset, teacher, config_for(tmp_path, codec=TOP_K))
    assert len(calls) == 2  # the one beside which the answer was checked
    assert not list(tmp_path.glob("*.arrow"))


def test_an_answer_of_another_kind_is_refused(dataset, tmp_path):
    teacher = TopPrefixTeacher()
    teacher.score_top = lambda sequences, k: [prefix_logprobs(s) for s in sequences]
    with pytest.raises(TeacherError, match="answered ndarray where TopScores was asked for"):
        score_dataset(dataset, teacher, config_for(tmp_path, codec=TOP_K))


def test_a_teacher_that_cannot_serve_the_codec_is_refused_in_words(dataset, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_for(tmp_path, codec=SET_CODED, teacher={"kind": "recorded", "path": "x"})
    assert "cannot score" in caught.value.message

    class Plain:
        provides = frozenset({ROLLOUT_LOGPROBS})
        identity = IDENTITY

        def score(self, sequences):
            return [prefix_logprobs(s) for s in sequences]

    with pytest.raises(TeacherError, match="cannot name its likeliest tokens") as refused:
        score_dataset(dataset, Plain(), config_for(tmp_path, codec=TOP_K))
    assert "logprob" in refused.value.hint


ADAPTIVE = {"kind": "adaptive", "k": 40, "worth_nats": 1e-2, "fine_bits": 5}
SAMPLED = {"kind": "sampled", "draws": 20, "seed": 3}


def test_a_real_model_with_every_codec(dataset, tmp_path):
    path = write_teacher(tmp_path / "teacher", None, hidden_size=16, num_hidden_layers=1)
    teacher = {"kind": "local", "path": path, "dtype": "float32"}
    for codec in (TOP_K, SET_CODED, ADAPTIVE, SAMPLED, {"kind": "distillkit"}):
        config = config_for(
            tmp_path / codec["kind"],
            data=str(dataset.path),
            teacher=teacher,
            selection={"fraction": 0.03},
            codec=codec,
        )
        run(config)
        store, local = open_targets(config.output, dataset), config.teacher.build()
        for name in store:
            document = dataset.conversation(dataset.index_of[name])
            trained = np.flatnonzero(document.span_ids != Span.IGNORE)
            found = store.entries([name])
            if codec is SAMPLED:
                drawn = local.score_sampled([document.tokens[:-1]], 20, 3)[0]
                width = found.ids.shape[1]
                same = (found.ids.numpy() == drawn.ids[trained, :width]).all(axis=1)
                assert same.mean() > 0.9  # a rounding error may move a draw to the next id
                weights = drawn.log_weights[trained, :width][same]
                np.testing.assert_allclose(found.logprobs[same], weights, atol=1e-6)
                continue
            top = local.score_top([document.tokens], store.max_entries)[0]
            counts = found.counts.tolist()
            for place, label in enumerate(trained):
                count = counts[place]
                expected = dict(zip(top.top_ids[label], top.top_logprobs[label], strict=True))
                ids = found.ids[place, :count].tolist()
                assert set(ids) == set(top.top_ids[label, :count].tolist())
                if codec["kind"] != "distillkit":
                    values = [expected[i] for i in ids]
                    rounding = 0.15 if codec is ADAPTIVE else 0.05  # its tail is a byte
                    np.testing.assert_allclose(found.logprobs[place, :count], values, atol=rounding)


def test_adaptive_asks_a_teacher_for_no_more_ids_than_it_knows(dataset, tmp_path):
    """Its default of 256 ids, and the whole vocabulary, are for a teacher that has them."""
    known = sorted({int(t) for i in range(len(dataset)) for t in dataset.tokens(i)})[:200_000]
    path = write_teacher(tmp_path / "teacher", known, hidden_size=16, num_hidden_layers=1)
    few = min(len(known), 256)
    teacher = {"kind": "local", "path": path, "dtype": "float32"}
    config = config_for(
        tmp_path / "out",
        data=str(dataset.path),
        teacher=teacher,
        selection={"fraction": 0.03},
        codec={"kind": "adaptive"},
    )
    assert subject_of(config, sequences=2).k == few
    run(config)
    store = open_targets(config.output, dataset)
    assert store.header["codec"]["vocab"] == len(known) and store.header["codec"]["k"] == few
    found = store.entries(list(store))
    assert set(found.ids[found.logprobs > -torch.inf].tolist()) <= set(known)


def test_ids_are_ranked_by_the_train_split(tmp_path):
    """Both splits of a dataset share one ranking, which is that of the trained labels counted."""
    train = build(tmp_path, valid_fraction=0.3)
    valid = Dataset(train.path, "valid")
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for index in range(len(train)):
        document = train.conversation(index)
        for token, span in zip(document.tokens[1:], document.span_ids, strict=False):
            counts[token] += span != Span.IGNORE
    expected = sorted(np.flatnonzero(counts), key=lambda i: (-counts[i], i))
    found = label_ranking(train)
    assert found.ids(torch.device("cpu"))[: len(expected)].tolist() == expected
    for split in (train, valid):
        config = config_for(tmp_path / split.split, codec=ADAPTIVE, selection={"fraction": 1.0})
        score_dataset(split, TopPrefixTeacher(), config)
        store = open_targets(config.output, split)
        assert store.header["ranking_sha256"] == found.sha256
        assert store.manifest["ranking_bytes"] == len(found.to_bytes()) * len(
            store.manifest["shards"]
        )
        document = split.conversation(0)
        entries = store.entries([document.sample_id]).ranked()
        labels = document.tokens[1:][document.span_ids[:-1] != Span.IGNORE]
        assert entries.ids[:, 0].tolist() == labels.tolist()


@pytest.mark.parametrize("codec", [TOP_K, SET_CODED, {"kind": "adaptive"}, {"kind": "logprob"}])
@pytest.mark.parametrize("at_once", [300, 10**6])
def test_documents_packed_together_are_packed_as_alone(dataset, monkeypatch, codec, at_once):
    built = config_for(dataset, codec=codec).codec.build()
    if built.by_rank:
        built = built.ranked_by(label_ranking(dataset))
    documents = [dataset.conversation(index) for index in range(len(dataset))]
    heard = ask_about(dataset, TopPrefixTeacher(), built, documents)
    monkeypatch.setattr(score, "_PACKED_PLACES", 1)
    alone = packed(heard, built)
    monkeypatch.setattr(score, "_PACKED_PLACES", at_once)
    together = packed(heard, built)
    assert len(documents) > 2
    assert [one.sample_id for one in together] == [document.sample_id for document in documents]
    for one, other in zip(alone, together, strict=True):
        assert one.codes.keys() == other.codes.keys()
        assert all(np.array_equal(one.codes[name], other.codes[name]) for name in one.codes)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", [TOP_K, SET_CODED])
def test_a_gpu_packs_the_same_bytes_while_it_computes(dataset, codec):
    built = config_for(dataset, codec=codec).codec.build()
    documents = [dataset.conversation(index) for index in range(len(dataset))]
    heard = ask_about(dataset, TopPrefixTeacher(), built, documents)
    busy = torch.randn(4_096, 4_096, device="cuda")
    for _ in range(50):
        busy = (busy @ busy).clamp(-1, 1)
    there = packed(heard, built, "cuda")
    for one, other in zip(packed(heard, built), there, strict=True):
        assert one.codes.keys() == other.codes.keys()
        assert all(np.array_equal(one.codes[name], other.codes[name]) for name in one.codes)
