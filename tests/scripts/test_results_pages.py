"""Pages from files of results that are there only after a run on a GPU."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import distillation_page
from performance import REPOSITORY, table
from performance_teacher import teacher_packing

KL = {"cross_entropy": 2.0, "confidence": 1.75, "renormalized": 1.5, "bucket": 1.0}
KL |= {"sampled": 1.25, "exact": 0.75}


def row(method: str, seed: int) -> dict:
    return {
        "method": method, "what": f"by {method}", "seed": seed, "train_s": 20.0 + seed,
        "kl_nats": KL[method] + 0.125 * seed, "loss": 6.0 + KL[method], "teacher_loss": 5.25,
        "teacher_entropy_nats": 4.5, "teacher_top64_mass": 0.625,
        "steps": 72, "student_tokens": 1_500_000 + seed,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(REPOSITORY / "benchmarks" / "results" / "distillation-demo.json", folder)
    rows = [row(m, seed) for m in KL for seed in (0, 1) if (m, seed) != ("sampled", 1)]
    found = {
        "command": "a command", "device": "a GPU", "torch": "2", "tokens": 1_500_000, "k": 64,
        "stores": [{"codec": c, "bytes_per_label": b} for c, b in
                   (("logprob", 2.5), ("top", 178.5), ("sampled", 60.25))],
        "anchors": {
            "unigram": {"kl_nats": 3.5, "loss": 8.25}, "untrained": {"kl_nats": 7.5, "loss": 12.25},
            "teacher_on_train_text": {"teacher_loss": 3.25, "teacher_entropy_nats": 3.125},
            "state_bytes": 1_024,
        },
        "rows": rows, "failed": [],
    }  # fmt: skip
    (folder / "distillation-synth.json").write_text(json.dumps(found))
    teacher = {
        "parameters": 1_234_567,
        "best": {"tokens": 7_654_321, "seconds": 90.25, "loss": 5.25},
    }
    (folder / "codec-teacher.json").write_text(json.dumps(teacher))
    return folder


def test_real_rows_have_a_table_beside_anchors(results):
    text = distillation_page.distillation_text(results)
    assert "| by bucket | 2 | 1.062 ± 0.088 | 7.000 ± 0.000 | 178.5 | 20 |" in text
    assert "| by exact | 2 | 0.812 ± 0.088 | 6.750 ± 0.000 | (1024 if stored) | 20 |" in text
    assert "| no training | | 7.500 | 12.250 | | |" in text
    assert "| frequencies of the labels | | 3.500 | 8.250 | | |" in text
    assert "| the teacher itself | | 0 | 5.250 | | |" in text
    assert "loss 3.250, entropy 3.125" in text and "hold 62 % of its mass" in text
    assert "1,234,567 parameters; it read 7,654,321 tokens of the same train split in 90 s" in text
    assert "Not run" not in text


def test_real_rows_are_compared_with_the_frequencies_of_labels(results):
    path = results / "distillation-synth.json"
    found = json.loads(path.read_text())
    found["anchors"]["unigram"]["kl_nats"] = 1.3
    path.write_text(json.dumps(found))
    text = distillation_page.distillation_text(results)
    order = "by exact (0.81); by bucket (1.06); by sampled (1.25); by renormalized (1.56); by conf"
    assert order in text
    assert "labels (1.30): by exact (0.81), by bucket (1.06) and by sampled (1.25)." in text
    assert "The other 3 lie above, from 1.56 to 2.06; the seeds of one of them are up to" in text
    assert "are up to 0.12 apart" in text


def test_runs_that_are_missing_are_named(results):
    lines = distillation_page.distillation_text(results).splitlines()
    assert lines[-1] == "Missing: prior of seed 0, prior of seed 1, sampled of seed 1."


def test_the_picture_has_a_panel_for_each_experiment(results, tmp_path):
    distillation_page.draw(results, tmp_path / "three.png")
    (results / "distillation-synth.json").unlink()
    distillation_page.draw(results, tmp_path / "two.png")
    assert (tmp_path / "three.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    assert "Not run" in distillation_page.distillation_text(results)


def test_packing_says_by_how_much_the_teacher_is_slower_at_most():
    plain = {
        "codec": "logprob", "tokens": 1_000, "pieces": 4, "repetitions": 1, "bytes_per_label": 2.5,
        "alone_tokens_per_s": 1_000, "packed_tokens_per_s": 980, "slower_packed_pct": 2.04,
        "stored_tokens_per_s": 970, "slower_stored_pct": 12.25,
    }  # fmt: skip
    dear = {"codec": "adaptive", "packed_tokens_per_s": 960, "slower_packed_pct": 4.17}
    dear |= {"labels_packed_per_s": 50_000, "slower_stored_pct": 4.5}
    found = {"device": "a GPU", "torch": "2", "date": "today", "layers": 24}
    text = teacher_packing({**found, "rows": [plain, plain | dear]}, table)
    assert "slows the teacher by 4.2 % at most (adaptive; bar 5, met)." in text
    assert "here one of 4. The whole stage takes 12.2 % longer at most (logprob)." in text
    assert "| logprob | 2.5 | 1,000 | 980 | 2.04 | 970 | 12.25 | - |" in text
    assert "once each way, so without a spread" in text
    dear["slower_packed_pct"] = 5.1
    assert "bar 5, missed" in teacher_packing({**found, "rows": [plain, plain | dear]}, table)
