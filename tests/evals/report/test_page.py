import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vpmoe.errors import RunError
from vpmoe.evals.report import page, write_report
from vpmoe.evals.report.charts_training import time_shares
from vpmoe.evals.report.runs import read_runs
from vpmoe.evals.report.tables import differing_settings, summary
from vpmoe.evals.report.theme import short_number, smoothed


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """A tenth of the pixels: what is in them does not change."""
    monkeypatch.setattr(page, "DOTS_PER_INCH", 60)


def share(correct, count):
    return {"correct": correct, "count": count, "share": correct / count, "low": 0.1, "high": 0.9}


def make_run(folder: Path, *, steps: int, correct: int, learning_rate: float) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "tokens_seen": 1_000 * step,
            "train/loss/reasoning": 4.0 / step,
            "train/loss/final": 3.0 / step,
            "valid/loss/reasoning": 4.1 / step,
            "train/tokens_per_s": 900.0 + step,
            "time/step_s": 1.0,
            "time/forward_backward_s": 0.6,
            "time/optimizer_s": 0.3,
            "router/cv_pct": 20.0,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"optimizer": {"lr": learning_rate}, "seed": 1}))
    length = {"count": 8, "mean": 20.0, "p50": 19.0, "p95": 33.0}
    report = {
        "model": {"step": steps, "tokens_seen": 1_000 * steps},
        "heldout": {"loss": {"reasoning": 0.5, "final": 0.4}, "unigram_loss": {"reasoning": 2.0}},
        "exact_match": {"total": share(correct, 8), "families": {"sums": share(correct, 8)}},
        "format": {
            "num_completions": 8,
            "valid": share(6, 8),
            "failures": {"no_final": 1, "no_end": 1, "repetition": 0, "invalid_header": 0},
        },
        "lengths": {
            "reasoning": length,
            "final": length,
            "completion": length,
            "truncated": share(1, 8),
        },
        "router": {"layers": [2, 3], "expert_counts": [[4, 0, 2, 2], [2, 2, 2, 2]]},
        "provenance": {"git_sha": "a" * 40},
    }
    (folder / f"eval-step-{steps:06d}.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    return [
        make_run(tmp_path / "first", steps=20, correct=2, learning_rate=1e-3),
        make_run(tmp_path / "second", steps=30, correct=7, learning_rate=2e-3),
    ]


class Resources(HTMLParser):
    """Every address the page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.addresses, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in {"src", "srcset", "href", "action"}]
        assert tag not in {"script", "link", "iframe"}

    def handle_data(self, data):
        self.text += data


def test_page_needs_nothing_beside_it(two_runs, tmp_path):
    files = write_report(two_runs, tmp_path / "report")
    html = files.page.read_text()
    read = Resources()
    read.feed(html)
    assert read.addresses
    assert all(address.startswith("data:image/png;base64,") for address in read.addresses)
    assert "url(" not in html and "@import" not in html and "http" not in read.text
    assert {image.stem for image in files.images} == {
        "exact-match", "loss", "validity", "router-load", "router-health", "speed",
    }  # fmt: skip
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in files.images)
    assert not list((tmp_path / "report").glob("*.tmp"))


def test_page_tells_what_was_measured(two_runs, tmp_path):
    read = Resources()
    read.feed(write_report(two_runs, tmp_path / "report").page.read_text())
    text = re.sub(r"\s+", " ", read.text)
    for phrase in (
        "25.0 %",
        "87.5 %",
        "0.500",
        "unigram 2.00",
        "30K",
        "optimizer.lr",
        "aaaaaaaaaaaa",
    ):
        assert phrase in text, phrase


def test_same_runs_same_bytes(two_runs, tmp_path):
    first = write_report(two_runs, tmp_path / "one")
    again = write_report(two_runs, tmp_path / "two")
    assert first.page.read_bytes() == again.page.read_bytes()


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "a<b>&c", steps=3, correct=1, learning_rate=1.0)
    html = write_report([run], tmp_path / "report").page.read_text()
    assert "a<b>" not in html and "a&lt;b&gt;&amp;c" in html


def test_unmeasured_things_leave_no_trace(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    report = {"model": {"name": "teacher"}, "exact_match": {"total": share(8, 8), "families": {}}}
    (folder / "eval-step-000000.json").write_text(json.dumps(report))
    files = write_report([folder], tmp_path / "report")
    assert [image.stem for image in files.images] == ["exact-match"]
    assert "held-out loss" not in files.page.read_text()


def test_best_value_is_marked_in_the_right_direction(two_runs):
    columns = {column.title: column for column in summary(read_runs(two_runs))}
    assert [cell.best for cell in columns["exact match"].cells] == [False, True]
    assert [cell.best for cell in columns["held-out loss, final"].cells] == [True, True]
    assert [cell.best for cell in columns["tokens per answer"].cells] == [False, False]


def test_only_differing_settings_are_listed(two_runs):
    assert differing_settings(read_runs(two_runs)) == [("optimizer.lr", ["0.001", "0.002"])]


def test_untimed_part_of_a_step_is_called_other(two_runs):
    shares = time_shares(read_runs(two_runs)[0])
    assert list(shares) == ["forward backward", "optimizer", "other"]
    assert shares["other"] == pytest.approx(0.1)


def test_line_being_written_is_left_out_and_broken_line_is_an_error(two_runs):
    metrics = two_runs[0] / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 21, "train/lo')
    assert len(read_runs(two_runs)[0].metrics) == 20
    metrics.write_text("nonsense\n" + whole)
    with pytest.raises(RunError, match=r"metrics\.jsonl line 1 is not JSON"):
        read_runs(two_runs)


def test_absent_and_empty_runs_are_refused(tmp_path):
    with pytest.raises(RunError, match="no run directory"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(RunError, match="neither metrics"):
        read_runs([tmp_path])


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [
        make_run(tmp_path / seed / "on-policy", steps=2, correct=1, learning_rate=1.0)
        for seed in ("seed-1", "seed-2")
    ]
    assert [run.name for run in read_runs(runs)] == ["seed-1/on-policy", "seed-2/on-policy"]


def test_running_mean_and_short_numbers():
    assert smoothed([1, 2, 3, 4], window=2) == [1, 1.5, 2.5, 3.5]
    assert [short_number(v) for v in (0.25, 12, 1_500, 12_500_000, 8e9)] == [
        "0.25", "12", "1.5K", "12.5M", "8B",
    ]  # fmt: skip


def test_a_kl_is_shown_with_its_noise_floor(tmp_path):
    run = make_run(tmp_path / "run", steps=20, correct=2, learning_rate=1e-3)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"loss": {"kind": "forward_kl"}}))
    report = json.loads((run / "eval-step-000020.json").read_text())
    report["teacher_gap"] = {"k3": {"all": 0.25}, "token_counts": {"all": 9}}
    (run / "eval-step-000020.json").write_text(json.dumps(report))
    floors = [
        {"loss": "k3", "path": "log-probs", "dtype": "float32", "nats": 2e-5},
        {"loss": "forward_kl", "path": "states", "dtype": "float32", "nats": 1e-6},
        {"loss": "forward_kl", "path": "store", "dtype": "bfloat16", "nats": -3e-4},
    ]
    (run / "noise.json").write_text(json.dumps({"schema": "vpmoe_noise_v1", "floors": floors}))
    read = Resources()
    read.feed(write_report([run], tmp_path / "report").page.read_text())
    text = re.sub(r"\s+", " ", read.text)
    assert "nats per token, noise 2.0e-05" in text
    assert "noise floor of the loss" in text and "3.0e-04" in text
    (run / "noise.json").write_text("{}")
    with pytest.raises(RunError, match="holds no noise floors"):
        write_report([run], tmp_path / "report")
