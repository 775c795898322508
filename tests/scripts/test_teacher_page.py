"""Teacher scoring's page says whether both sides ran together; its benchmark keeps other sizes."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks import common, teacher_scoring

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import performance_teacher

ABOUT = {"device": "a GPU", "torch": "2", "triton": "3", "date": "2026-01-02"}


def row(what: str, reads: str, speed: int, **more: str) -> dict:
    rest = {"batch_tokens": 8_192, "mfu_pct": 1.0, "peak_gib": 2.0}
    return {"what": what, "reads": reads, "tokens_per_s": speed, **rest, **more}


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (("a", "a"), "in one process"),
        (("a", "b"), "in different runs"),
        ((None, None), "in different runs"),
    ],
)
def test_whether_both_sides_ran_together_is_read_from_the_rows(runs, words):
    first, second = ({} if run is None else {"run": run} for run in runs)
    rows = [
        row("a peer", "log-probs", 1_000, **first),
        row("vpmoe", "log-probs", 2_200, **second),
        row("vpmoe", "top-64", 2_000, **second),
    ]
    about = {"layers": 24, "sequences": 3, "tokens": 9, "mean_length": 3.0, "longest": 4}
    text = performance_teacher.teacher_scoring({**ABOUT, **about, "rows": rows}, lambda *_: "")
    assert f"same kind of device, {words}." in text
    assert "2.20 times the best peer (bar 2); the likeliest ids cost 10.0 % more" in text


def test_a_size_that_is_not_measured_again_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "describe_device", lambda: dict(ABOUT))
    monkeypatch.setattr(teacher_scoring, "build", lambda layers: None)
    monkeypatch.setattr(teacher_scoring, "free", lambda: None)
    monkeypatch.setattr(teacher_scoring, "timed", lambda *_: {"tokens_per_s": 1})
    monkeypatch.setattr(teacher_scoring, "fused", lambda model, size: None)
    (tmp_path / "lengths.json").write_text("[3, 5]")
    out = tmp_path / "scoring.json"

    def measure(size: int) -> list[tuple[int, str]]:
        words = f"scoring --parts ours --lengths {tmp_path}/lengths.json --tokens 20 --out {out}"
        monkeypatch.setattr(sys, "argv", [*words.split(), "--size", str(size)])
        teacher_scoring.main()
        found = json.loads(out.read_text())
        assert (found["sequences"], found["mean_length"], found["longest"]) == (6, 4.0, 5)
        return [(row["batch_tokens"], row["reads"]) for row in found["rows"]]

    reads = ("log-probs", "top-64", "32 draws")
    assert measure(16) == [(16, name) for name in reads]
    assert measure(32) == [*((16, name) for name in reads), *((32, name) for name in reads)]
    assert measure(16) == [*((32, name) for name in reads), *((16, name) for name in reads)]
    out.write_text(json.dumps({**json.loads(out.read_text()), "rows": [{"what": "of no part"}]}))
    monkeypatch.setattr(teacher_scoring, "build", lambda layers: pytest.fail("built for nothing"))
    with pytest.raises(SystemExit, match="has rows of no part: move it away, or give another"):
        measure(16)
