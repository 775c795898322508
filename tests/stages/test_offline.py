"""Stage 2 with a teacher's distributions: stored, live, and several teachers in turn."""

import numpy as np
import pytest
import torch

from tests.stages.test_distillation import (
    TEACHER,
    VOCAB,
    Killer,
    kept,
    stage_two,
    started,  # noqa: F401
)
from tests.train.toy import STUDENT
from vpmoe.config import validate
from vpmoe.data.dataset import Dataset
from vpmoe.data.loader import PackedLoader
from vpmoe.data.mixture import uses_anchor
from vpmoe.errors import ConfigError, DataError, RunError
from vpmoe.losses import ForwardKLConfig
from vpmoe.models.config import StudentConfig
from vpmoe.models.student import build_student
from vpmoe.stages import offline, score
from vpmoe.stages.live import TaughtLoss, documents_of, head_of, states_of
from vpmoe.stages.offline import OfflineConfig, store_lines
from vpmoe.stages.score import ScoreConfig
from vpmoe.teachers.local import LocalTeacherConfig
from vpmoe.train.device import world
from vpmoe.train.step import run_student

BOUNDED = {"path": "b", "until_tokens": 20}


@pytest.fixture(scope="session")
def stored(started):  # noqa: F811
    """The folder of the other stages' tests, with a store of distributions in it."""
    chosen = {"data": str(started / "data"), "output": str(started / "top"), "teacher": TEACHER}
    chosen |= {"codec": {"kind": "set_coded", "k": 8}, "selection": {"fraction": 0.5}}
    score.run(validate(ScoreConfig, chosen, source="test"))
    return started


def against_states(folder, name, **changes) -> OfflineConfig:
    tree = {"targets": {"share": 0.75}, "teacher": TEACHER}
    return stage_two(
        folder, name, **tree | {"loss": {"kind": "forward_kl", "against": "hidden"}} | changes
    )


def teacher_and_batch(folder):
    teacher = LocalTeacherConfig(**TEACHER).build()
    loader = PackedLoader(Dataset(str(folder / "data"), "train"), seq_len=256, seed=0)
    return teacher, loader.batch(0, 2)


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "forward_kl"},
        {"kind": "reverse_kl", "temperature": 2.0},
        {"kind": "generalized_jsd"},
    ],
    ids=lambda loss: loss["kind"],
)
def test_stored_distributions_teach(stored, loss):
    name = f"2-{loss['kind']}"
    config = stage_two(
        stored,
        name,
        loss=loss,
        targets={"path": str(stored / "top"), "share": 0.75},
        budget={"steps": 4},
    )
    offline.run(config)
    taught = [row for row in kept(stored / name) if "train/teacher_mass/final" in row]
    assert len(taught) == 3
    for row in taught:
        assert 0.5 < row["train/teacher_mass/final"] <= 1 + 1e-6
        assert 0 <= row["train/student_mass/final"] < 1
        assert row["train/kl_at_least/final"] > 0
        assert row["train/unseen_kl_at_most/final"] > 0


def test_a_live_teacher_teaches_and_a_crash_changes_nothing(stored):
    changes = {"budget": {"steps": 6}, "checkpoint": {"every_steps": 2}}
    offline.run(against_states(stored, "2-live", **changes))
    broken = against_states(stored, "2-live-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        offline.run(broken, observers=[Killer(5)])
    offline.run(broken, resume=True)
    rows = kept(stored / "2-live")
    assert kept(stored / "2-live-broken") == rows
    taught = ["train/kl_at_least/final" in row for row in rows]
    assert taught == [uses_anchor(step, 0.75) for step in range(6)]
    first = rows[taught.index(True)]
    assert first["train/loss/final"] == pytest.approx(first["train/kl_at_least/final"])
    assert first["train/unseen_kl_at_most/final"] == 0


def test_layers_are_matched_beside_stored_targets_and_a_crash_changes_nothing(stored):
    """The student is narrower than the teacher: a projection is trained, saved and restored."""
    changes = {
        "loss": {"kind": "forward_kl", "label_weight": 0.2},
        "teacher": TEACHER,
        "states": {"layers": [[1, 1], [3, 2]], "weight": 0.3},
        "targets": {"path": str(stored / "top"), "share": 0.75},
        "analysis_weights": {},
        "budget": {"steps": 6},
        "checkpoint": {"every_steps": 2},
    }
    offline.run(stage_two(stored, "2-states", **changes))
    broken = stage_two(stored, "2-states-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        offline.run(broken, observers=[Killer(5)])
    offline.run(broken, resume=True)
    rows = kept(stored / "2-states")
    assert kept(stored / "2-states-broken") == rows
    taught = [row for row in rows if "train/kl_at_least/final" in row]
    distances = [row["train/state_distance/final"] for row in taught]
    assert len(distances) == 4 and all(0 < value < 2 for value in distances)


def test_layers_that_are_not_there_are_refused(stored):
    changes = {"states": {"layers": [[4, 1]]}, "teacher": TEACHER}
    with pytest.raises(DataError, match="layer 4 of the student, which has 3"):
        offline.run(stage_two(stored, "2-deep", **changes))


def test_the_last_layers_states_are_the_final_ones(stored):
    teacher, batch = teacher_and_batch(stored)
    last = teacher.num_layers
    found = states_of(teacher, batch, (1, last))
    torch.testing.assert_close(found[:, :, 1], states_of(teacher, batch))
    assert found.shape[2:] == (2, teacher.width)
    student = build_student(StudentConfig(**{**STUDENT, "vocab_subset": VOCAB}), seed=0)
    inputs, _ = run_student(student, batch, layers=(3, 1))
    normed = student.final_norm(inputs.student_states[:, 0])
    torch.testing.assert_close(normed, inputs.hidden)
    assert not torch.equal(inputs.student_states[:, 0], inputs.student_states[:, 1])


def test_states_and_head_give_the_teachers_own_logprobs(stored):
    teacher, batch = teacher_and_batch(stored)
    student = build_student(StudentConfig(**{**STUDENT, "vocab_subset": VOCAB}), seed=0)
    logits = states_of(teacher, batch).float() @ head_of(teacher, student).float().T
    found = logits.log_softmax(dim=2)
    for row, begin, end in documents_of(batch.document_ids):
        tokens = batch.tokens[row, begin:end].numpy()
        (wanted,) = teacher.score([tokens])
        rows = student.rows_of(batch.tokens[row, begin + 1 : end])
        seen = found[row, begin : end - 1].gather(1, rows[:, None]).squeeze(1)
        np.testing.assert_allclose(seen.numpy(), wanted, atol=2e-5)


def test_a_student_with_fewer_words_gets_the_teachers_opinion_among_them(stored):
    teacher, _ = teacher_and_batch(stored)
    fewer = tuple(sorted(VOCAB)[5:])
    student = build_student(StudentConfig(**{**STUDENT, "vocab_subset": fewer}), seed=0)
    whole = build_student(StudentConfig(**{**STUDENT, "vocab_subset": VOCAB}), seed=0)
    rows = [sorted(VOCAB).index(token) for token in fewer]
    torch.testing.assert_close(head_of(teacher, student), head_of(teacher, whole)[rows])
    more = tuple(sorted((*fewer, 3_000)))
    assert 3_000 not in VOCAB
    other = build_student(StudentConfig(**{**STUDENT, "vocab_subset": more}), seed=0)
    with pytest.raises(DataError, match="does not know 1 of the student's"):
        TaughtLoss(ForwardKLConfig(against="hidden").build(), teacher, other)


def test_targets_outside_the_students_words_go_to_the_tail(stored):
    _, batch = teacher_and_batch(stored)
    student = build_student(StudentConfig(**{**STUDENT, "vocab_subset": VOCAB}), seed=0)
    inside, outside = sorted(VOCAB)[3], next(i for i in range(9_000) if i not in VOCAB)
    shape = (*batch.tokens.shape, 3)
    ids = torch.tensor([inside, outside, 0]).expand(shape).clone()
    logprobs = torch.tensor([0.5, 0.2, 0.0]).log().expand(shape).clone()
    given = {"target_ids": ids, "target_logprobs": logprobs}
    given["target_tail"] = torch.full(batch.tokens.shape, 0.3).log()
    inputs, _ = run_student(student, type(batch)(**vars(batch) | given))
    assert inputs.target_ids[0].tolist() == [3, 0, 0]
    assert inputs.target_logprobs[0].exp().tolist() == pytest.approx([0.5, 0, 0])
    assert inputs.target_tail[0].exp().item() == pytest.approx(0.5)
    assert inputs.target_cap[0].item() == 0  # no longer the smallest entry


def test_stores_follow_one_another_by_tokens(stored):
    """Tokens decide, not steps; each store's stream and running means are its own."""
    stores = [
        {"path": str(stored / "targets"), "until_tokens": 1_500},
        {"path": str(stored / "top")},
    ]
    changes = {"targets": {"stores": stores, "share": 0.75}, "budget": {"steps": 8}}
    changes["checkpoint"] = {"every_steps": 2}
    whole = stage_two(stored, "2-two", **changes)
    offline.run(whole)
    broken = stage_two(stored, "2-two-broken", **changes)
    with pytest.raises(KeyboardInterrupt):
        offline.run(broken, observers=[Killer(7)])
    offline.run(broken, resume=True)
    rows = kept(stored / "2-two")
    assert kept(stored / "2-two-broken") == rows
    assert all(("train/weight/final" in row) == uses_anchor(i, 0.75) for i, row in enumerate(rows))
    with pytest.MonkeyPatch.context() as patch:
        taken = []
        patch.setattr(
            offline, "rank_batches", lambda loader, start, *_: taken.append((loader, start))
        )
        with world(whole.device, threads=1) as ranks:
            plan = offline.prepare(whole, ranks).plan
        assert plan.num_steps == 8
        first, second = plan._streams
        for step in range(8):
            plan.micro_batches(step)
        assert 0 < second.first_step < 8
        taught = [pair for pair in taken if pair[0] in (first.loader, second.loader)]
        before = [start for loader, start in taught if loader is first.loader]
        after = [start for loader, start in taught if loader is second.loader]
        assert before == list(range(0, 2 * len(before), 2)) and len(before) + len(after) == 6
        assert after == list(range(0, 2 * len(after), 2)) and after


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kind": "forward_kl", "against": "hidden"}}, r"add a \[teacher\] table"),
        ({"states": {"layers": [[1, 1]]}}, "states needs the states of a teacher"),
        ({"teacher": TEACHER}, r"would never ask \[teacher\]"),
        ({"targets": {}}, "give targets.path"),
        ({"targets": {"path": "a", "stores": [{"path": "b"}]}}, "give one of them"),
        ({"targets": {"stores": [{"path": "a"}, {"path": "b"}]}}, "needs an until_tokens"),
        (
            {
                "targets": {
                    "stores": [{"path": "a", "until_tokens": 9}, {"path": "b", "until_tokens": 20}]
                }
            },
            "and the last none",
        ),
        (
            {"loss": {"kind": "reverse_kl", "against": "hidden"}, "teacher": TEACHER},
            "leave targets.path out",
        ),
        ({"loss": {"kind": "forward_kl", "tail": "renormalized_both"}}, "is zero"),
    ],
    ids=range(9),
)
def test_what_does_not_fit_together_is_refused_by_the_config(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        stage_two(tmp_path, "2", **changes)


def test_drawn_ids_teach(stored):
    chosen = {"data": str(stored / "data"), "output": str(stored / "drawn"), "teacher": TEACHER}
    chosen |= {"codec": {"kind": "sampled", "draws": 12}, "selection": {"fraction": 0.3}}
    score.run(validate(ScoreConfig, chosen, source="test"))
    changes = {"loss": {"kind": "random_sampling"}, "targets": {"path": str(stored / "drawn")}}
    offline.run(stage_two(stored, "2-drawn", **changes))
    rows = [row for row in kept(stored / "2-drawn") if "train/teacher_mass/final" in row]
    assert rows
    for row in rows:
        assert row["train/teacher_mass/final"] == pytest.approx(1, abs=1e-5)
        assert "train/kl_at_least/final" not in row


def test_a_run_does_not_go_on_with_another_store_at_the_same_path(stored):
    chosen = {"data": str(stored / "data"), "output": str(stored / "again"), "teacher": TEACHER}
    chosen |= {"selection": {"fraction": 0.5}}
    changes = {"targets": {"path": str(stored / "again")}, "checkpoint": {"every_steps": 1}}
    for codec in ({"kind": "set_coded", "k": 8}, {"kind": "set_coded", "k": 4}):
        score.run(validate(ScoreConfig, chosen | {"codec": codec}, source="test"), overwrite=True)
        config = stage_two(stored, "2-again", loss={"kind": "forward_kl"}, **changes)
        if codec["k"] == 8:
            with pytest.raises(KeyboardInterrupt):
                offline.run(config, observers=[Killer(2)])
            offline.run(config, resume=True)  # the same one is no other
    with pytest.raises(RunError, match=r"targets\.codec\.k: 8 → 4"):
        offline.run(config, resume=True)


def test_check_knows_a_store_that_lacks_what_the_loss_reads(stored):
    given = {"path": str(stored / "top"), "share": 0.5}
    (line,) = store_lines(stage_two(stored, "x", loss={"kind": "reverse_kl"}, targets=given))
    assert "set_coded targets of teacher" in line
    missing = {"path": str(stored / "nowhere")}
    (line,) = store_lines(stage_two(stored, "x", loss={"kind": "reverse_kl"}, targets=missing))
    assert "not scored yet" in line
    with pytest.raises(DataError, match="holds log-probs alone"):
        store_lines(stage_two(stored, "x", loss={"kind": "reverse_kl"}))
    dataset = {"path": str(stored / "data")}
    with pytest.raises(DataError, match="has schema None"):
        store_lines(stage_two(stored, "x", loss={"kind": "reverse_kl"}, targets=dataset))


@pytest.mark.parametrize(
    ("loss", "store", "message"),
    [
        ("forward_kl", "targets", "holds log-probs alone"),
        ("random_sampling", "top", "needs drawn ids"),
    ],
)
def test_a_store_that_lacks_what_the_loss_reads_is_refused(stored, loss, store, message):
    config = stage_two(
        stored, f"2-refused-{loss}", loss={"kind": loss}, targets={"path": str(stored / store)}
    )
    with pytest.raises(DataError, match=message):
        offline.run(config)
    assert not (stored / f"2-refused-{loss}" / "metrics.jsonl").exists()
