"""`vpmoe targets`: a plan from a real model, and what inspection finds in sound and bad stores."""

import json

import numpy as np
import pytest

from tests.stages.test_score import build, config_for, prefix_logprobs
from tests.stages.test_score_targets import SET_CODED, TOP_K, TopPrefixTeacher
from tests.teachers.tiny import write_teacher
from vpmoe.cli.main import run
from vpmoe.data.dataset import Dataset
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.stages.inspect_targets import shown, target_stats, verify_targets
from vpmoe.stages.plan_targets import plan_targets, write_plan
from vpmoe.stages.score import score_dataset
from vpmoe.storage.manifest import file_sha256
from vpmoe.teachers.shards import SampleTargets
from vpmoe.teachers.store import TargetStore, TargetWriter


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    path = write_teacher(folder, None, hidden_size=16, num_hidden_layers=1)
    return {"kind": "local", "path": path, "dtype": "float32"}


def scored(dataset, path, **changes):
    score_dataset(dataset, TopPrefixTeacher(), config_for(path, **changes))
    return path


def rewritten(store_path, out, change, **header):
    """The same store with its samples changed and every checksum right."""
    store = TargetStore(store_path)
    samples = []
    for name in store:
        shard, row = store._rows[name]  # what a test may read
        spans = store.span_ids(name)
        logprobs = store[name][spans != Span.IGNORE].astype(np.float64)
        codes = {key: value.copy() for key, value in shard.codes(row).items()}
        samples.append(change(SampleTargets(name, spans, logprobs, codes)))
    with TargetWriter(out, {**store.header, **header}) as writer:
        writer.write(0, samples)
        writer.finish(1)
    return out


def test_a_plan_measures_the_configured_teacher(dataset, teacher, tmp_path):
    config = config_for(tmp_path / "out", data=str(dataset.path), teacher=teacher)
    plan = plan_targets(config, places=64)
    assert plan.exact and 64 <= plan.places < 96 and plan.tokens_per_s > 0
    assert 0.3 < plan.trained_share < 1
    points = {point.name: point for point in plan.points}
    assert points["set-64"].bytes_per_token <= 182
    assert 0 < points["set-64"].kl_nats < points["set-16"].kl_nats < plan.entropy_nats
    terabytes, hours = plan.costs(points["set-64"], 1e9)
    expected = 1e9 * plan.trained_share * points["set-64"].bytes_per_token / 1e12
    assert terabytes == pytest.approx(expected)
    assert hours * 3600 == pytest.approx(1e9 / plan.tokens_per_s)
    picture, numbers = write_plan(plan, tmp_path / "reports")
    assert picture.stat().st_size > 10_000
    assert len(json.loads(numbers.read_text())["points"]) == len(plan.points)
    assert not (tmp_path / "out").exists()  # nothing is captured


def test_a_sound_store_passes(dataset, tmp_path):
    for codec in ({"kind": "logprob"}, TOP_K, SET_CODED, {"kind": "adaptive"}):
        path = scored(dataset, tmp_path / codec["kind"], codec=codec)
        report = verify_targets(path, dataset.path)
        assert report.ok and report.compared, report.problems
        assert report.labels == TargetStore(path).manifest["labels"]


def test_what_checksums_do_not_show_is_found(dataset, tmp_path):
    good = scored(dataset, tmp_path / "good", codec=SET_CODED)

    def rolled(sample):
        return SampleTargets(
            sample.sample_id, sample.span_ids, np.roll(sample.logprobs, 1) - 0.7, sample.codes
        )

    def stranger(sample):
        return SampleTargets("x" + sample.sample_id, *(getattr(sample, n) for n in FIELDS))

    def broken(sample):
        codes = {name: data[:-1] for name, data in sample.codes.items()}
        return SampleTargets(sample.sample_id, sample.span_ids, sample.logprobs, codes)

    for name, change, said in (
        ("rolled", rolled, "a label and its entry are"),
        ("stranger", stranger, "is not in the dataset"),
        ("broken", broken, "bytes of"),
    ):
        bad = rewritten(good, tmp_path / name, change)
        report = verify_targets(bad, dataset.path)
        assert not report.ok and said in report.problems[0], report.problems[:1]
    other = rewritten(good, tmp_path / "other", lambda s: s, dataset_sha256="0")
    (only,) = verify_targets(rewritten(other, tmp_path / "b", stranger), dataset.path).problems
    assert "dataset_sha256 is 0" in only


FIELDS = ("span_ids", "logprobs", "codes")


def test_a_damaged_shard_is_named(dataset, tmp_path, capsys):
    path = scored(dataset, tmp_path / "store", codec=TOP_K)
    assert run(["targets", "verify", str(path), "--data", str(dataset.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    shard = next(path.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert file_sha256(shard)[:16] not in shard.name
    assert run(["targets", "verify", str(path), "--json"]) == 3
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "is damaged" in problem
    assert run(["targets", "verify", str(tmp_path / "nowhere")]) == 1


def test_a_store_that_lies_exits_with_three(dataset, tmp_path, capsys):
    path = scored(dataset, tmp_path / "store", codec=TOP_K)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "samples": 1}))
    assert run(["targets", "verify", str(path)]) == 3
    assert "the manifest says 1 samples" in capsys.readouterr().out


def test_statistics_are_those_of_the_stored_numbers(dataset, tmp_path, capsys):
    path = scored(dataset, tmp_path / "store", codec=TOP_K)
    found = target_stats(path)
    store = TargetStore(path)
    values = np.concatenate([store[n][store.span_ids(n) == Span.FINAL] for n in store])
    assert found["spans"]["final"]["labels"] == len(values)
    assert found["spans"]["final"]["entries"] == TOP_K["k"]
    assert found["spans"]["final"]["logprob_mean"] == pytest.approx(values.astype(float).mean())
    assert found["bytes_per_token"] == 2 + 2 * 6 + 14
    assert run(["targets", "stats", str(path)]) == 0
    assert "top_k k 6" in capsys.readouterr().out


def test_a_sample_is_shown_with_its_choices(dataset, tmp_path, capsys):
    path = scored(dataset, tmp_path / "store", codec=SET_CODED)
    name, labels = shown(path, data=dataset.path)
    document = dataset.conversation(dataset.index_of[name])
    place = np.flatnonzero(document.span_ids != Span.IGNORE)
    assert [label.place for label in labels] == place.tolist()
    assert all(label.choices[0][0] == label.token for label in labels)
    assert labels[-1].token == "<|return|>" and len(labels[0].choices) == 4
    assert run(["targets", "show", str(path), name, "--data", str(dataset.path)]) == 0
    assert "<|return|>" in capsys.readouterr().out
    with pytest.raises(DataError, match="has no sample nobody"):
        shown(path, "nobody")


def test_planning_from_the_command_line(dataset, teacher, tmp_path, capsys):
    config = tmp_path / "score.toml"
    settings = [f"{k} = {json.dumps(v)}" for k, v in teacher.items()]
    config.write_text(
        f'kind = "score"\ndata = "{dataset.path}"\noutput = "x"\n[teacher]\n' + "\n".join(settings)
    )
    words = ["targets", "plan", str(config), "--labels", "32", "--out", str(tmp_path / "r")]
    assert run([*words, "--tokens", "2e9"]) == 0
    out = capsys.readouterr().out
    assert "names ids by how often they are labels" in out
    assert "2 B tokens read" in out and "adaptive 0.003" in out and "whole distributions" in out
    assert (tmp_path / "r" / "target-plan.png").exists()


def test_a_teacher_of_log_probs_alone_has_nothing_to_plan(dataset, tmp_path, monkeypatch):
    class Plain:
        provides = frozenset({"teacher_logprobs", "rollout_logprobs"})
        identity = TopPrefixTeacher.identity

        def score(self, sequences):
            return [prefix_logprobs(s) for s in sequences]

    config = config_for(tmp_path, data=str(dataset.path))
    monkeypatch.setattr(type(config.teacher), "build", lambda self: Plain())
    with pytest.raises(Exception, match="nothing to plan"):
        plan_targets(config, places=32)
    monkeypatch.setattr(type(config.teacher), "build", lambda self: TopPrefixTeacher())
    plan = plan_targets(config, places=32)
    assert not plan.exact and plan.kept == 128
