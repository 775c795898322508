"""Targets whose tail is shared by a prior, from the teacher through the store to the student."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages.test_distillation import TEACHER, kept, stage_two
from tests.stages.test_distillation import started as started  # a fixture
from vpmoe.batch import Batch
from vpmoe.config import validate
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.errors import DataError
from vpmoe.losses import ForwardKLConfig
from vpmoe.losses.base import WrappedLoss
from vpmoe.models.student import build_student
from vpmoe.spans import Span
from vpmoe.stages import offline, score
from vpmoe.stages.label_ranking import label_counts
from vpmoe.stages.score import ScoreConfig, open_targets
from vpmoe.teachers.codecs.base import entries_of_top
from vpmoe.teachers.codecs.worth import departures
from vpmoe.train.graph import forward
from vpmoe.train.step import loss_inputs

CODEC = {"kind": "adaptive", "tail": "prior", "worth_nats": 1e-2, "fine_bits": 6}
LOSS = {"kind": "forward_kl", "tail": "prior"}
SCALES = torch.tensor([0.0, 1.0, 1.0])


def tree_of(folder: Path, name: str, codec: dict) -> dict:
    chosen = {"data": str(folder / "data"), "output": str(folder / name), "teacher": TEACHER}
    return {**chosen, "codec": codec, "selection": {"fraction": 1.0}}


def scored(folder: Path, name: str, codec: dict) -> Path:
    score.run(validate(ScoreConfig, tree_of(folder, name, codec), source="test"))
    return folder / name


@pytest.fixture(scope="module")
def stores(started):
    even = {"kind": "adaptive", "worth_nats": 1e-2}
    return {"prior": scored(started, "prior", CODEC), "even": scored(started, "even", even)}


def test_the_loss_is_the_kl_to_what_the_store_says_of_the_whole_vocabulary(started, stores):
    """Labels, entries, tails and frequencies are put together here by hand, in float64."""
    dataset = Dataset(started / "data", "train")
    store = open_targets(stores["prior"], dataset)
    config = stage_two(started, "unused", targets={"path": str(stores["prior"])}, loss=LOSS)
    student, _ = offline.open_student(config, torch.device("cpu"))
    student = student.double()
    loss = offline.SharedTail(ForwardKLConfig(tail="prior").build(), store.codec, student)
    loader = PackedLoader(dataset, seq_len=256, seed=0, scores=store, targets=store)
    batch = loader.batch(0, 2)
    with torch.no_grad():
        output = forward(student, batch, batch.num_documents)
        inputs = loss_inputs(student, batch, output)
        found = loss(inputs, SCALES)

    ids = student.ids_of(torch.arange(student.config.num_rows))
    counts = label_counts(dataset)[ids].clamp_min(1).double()  # the teacher knows no other ids
    prior = ((8 * counts.log()).round() / 8).exp()
    prior = 0.9 * prior / prior.sum() + 0.1 / len(ids)
    expected = torch.zeros(3, dtype=torch.float64)
    rows = inputs.trained()
    student_logprobs = (rows.hidden @ rows.head_weight.T).log_softmax(1)
    for row in range(len(rows.labels)):
        used = rows.target_logprobs[row] > -torch.inf
        named = rows.target_ids[row][used]
        whole = prior.clone()
        whole[named] = 0
        whole *= rows.target_tail[row].double().exp() / whole.sum().clamp_min(1e-300)
        whole[named] = rows.target_logprobs[row][used].double().exp()
        term = whole * (whole.clamp_min(1e-300).log() - student_logprobs[row])
        expected[int(rows.span_ids[row])] += term.sum()
    torch.testing.assert_close(found.loss_sums, expected, rtol=2e-4, atol=1e-4)


def test_a_student_without_some_named_ids_gets_their_mass_in_the_tail(started, stores):
    dataset = Dataset(started / "data", "train")
    store = open_targets(stores["prior"], dataset)
    student, _ = offline.open_student(
        stage_two(started, "unused", targets={"path": str(stores["prior"])}, loss=LOSS),
        torch.device("cpu"),
    )
    document = dataset.conversation(0)
    labels = set(document.tokens.tolist())
    ids = student.ids_of(torch.arange(student.config.num_rows))
    fewer = [i for i in ids.tolist() if i in labels or i % 3]
    config = student.config.model_copy(update={"vocab_subset": tuple(fewer)})
    small = build_student(config, seed=1, device="cpu").double()
    seen = {}

    class Spy(WrappedLoss):
        def __call__(self, inputs, span_scales):
            seen["inputs"] = inputs
            return super().__call__(inputs, span_scales)

    loss = offline.SharedTail(Spy(ForwardKLConfig(tail="prior").build()), store.codec, small)
    rows = len(document.tokens) - 1
    named = ids[:6].repeat(1, rows, 1)
    chances = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.05, 0.05]).log().repeat(1, rows, 1)
    places = torch.arange(rows)[None]
    batch = Batch(
        torch.from_numpy(document.tokens[:-1].astype("int64"))[None],
        torch.from_numpy(document.tokens[1:].astype("int64"))[None],
        torch.from_numpy(document.span_ids[:-1].copy())[None],
        torch.zeros_like(places),
        places,
        target_ids=named,
        target_logprobs=chances,
        target_tail=torch.full((1, rows), 0.2).log(),
    )
    with torch.no_grad():
        inputs = loss_inputs(small, batch, forward(small, batch, batch.num_documents))
        loss(inputs, SCALES)
    given = seen["inputs"]
    lacking = [i for i in ids[:6].tolist() if i not in fewer]
    assert 0 < len(lacking) < 6 and given.target_cap is None
    torch.testing.assert_close(given.target_prior.exp().sum(), torch.tensor(1.0).double())
    moved = 0.2 + sum(float(chances[0, 0, ids[:6].tolist().index(i)].exp()) for i in lacking)
    assert float(given.target_tail[0].exp()) == pytest.approx(moved, rel=1e-5)


def test_entries_are_what_departs_from_the_frequencies(started, stores):
    dataset = Dataset(started / "data", "train")
    store = open_targets(stores["prior"], dataset)
    prior = store.codec.prior(torch.device("cpu"))
    teacher = validate(ScoreConfig, tree_of(started, "x", CODEC), source="test").teacher.build()
    more_than_one = 0
    for name in store:
        document = dataset.conversation(dataset.index_of[name])
        trained = np.flatnonzero(document.span_ids != Span.IGNORE)
        (top,) = teacher.score_top([document.tokens[:-1]], store.codec.asked)
        said = entries_of_top(*map(torch.from_numpy, (top.top_ids, top.top_logprobs)))
        named, _ = departures(said.select(torch.from_numpy(trained)), worth_nats=1e-2, prior=prior)
        found = store.entries([name])
        assert torch.equal(found.counts, named.sum(1))
        more_than_one += int((named.sum(1) > 1).sum())
    assert more_than_one > 2
    total = found.logprobs.double().exp().sum(1) + found.tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_a_student_learns_from_it(started, stores):
    targets = {"path": str(stores["prior"]), "share": 1.0}
    changes = {"targets": targets, "loss": LOSS, "budget": {"steps": 6}}
    whole = stage_two(started, "whole", **changes)
    offline.run(whole)
    rows = kept(started / "whole")
    losses = [row["train/loss/reasoning"] for row in rows]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all(np.isfinite(row["train/kl_at_least/reasoning"]) for row in rows)


@pytest.mark.parametrize(
    ("store", "loss", "message", "hint"),
    [
        ("prior", {"kind": "forward_kl"}, "names what departs from its prior", "tail = prior, or"),
        ("prior", {"kind": "reverse_kl"}, "names what departs from its prior", "tail = even"),
        ("even", LOSS, "has no prior", "adaptive and codec.tail = prior"),
        ("targets", LOSS, "holds log-probs alone", "adaptive and codec.tail = prior"),
        ("targets", {"kind": "forward_kl"}, "holds log-probs alone", "set_coded"),
    ],
)
def test_store_and_loss_must_agree_on_the_tail(started, stores, store, loss, message, hint):
    path = str(stores.get(store, started / store))
    config = stage_two(started, "refused", targets={"path": path}, loss=loss)
    with pytest.raises(DataError, match=message) as caught:
        offline.run(config)
    assert hint in caught.value.hint
    with pytest.raises(DataError, match=message):
        offline.store_lines(config)
