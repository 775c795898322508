"""The page of the whole student: runs replaced by name, and compared as far as both went."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import full_student


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the results that may be written to."""
    path = tmp_path / "full-student.json"
    path.write_bytes(full_student.RESULTS.read_bytes())
    monkeypatch.setattr(full_student, "RESULTS", path)
    return path


def finished(folder, losses):
    """A run's folder with these losses of each span."""
    folder.mkdir()
    rows = [{"train/loss/reasoning": loss, "train/loss/final": loss} for loss in losses]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"optimizer": {"lr": 0.5}}))
    return folder


def test_collecting_replaces_the_named_runs_alone(kept, tmp_path):
    before = json.loads(kept.read_text())
    folder = finished(tmp_path / "run", [3.0, 2.0])
    full_student.collect({"gentle_control": folder}, before["device"])
    after = json.loads(kept.read_text())
    replaced = after["runs"].pop("gentle_control")
    assert replaced["reasoning"] == [3.0, 2.0] and replaced["config"]["optimizer"] == {"lr": 0.5}
    assert before["runs"].pop("gentle_control")["steps"] == 50 and replaced["steps"] == 2
    assert after == before


def test_unknown_runs_and_runs_of_another_device_are_refused(kept, tmp_path):
    folder, text = finished(tmp_path / "run", [3.0]), kept.read_text()
    with pytest.raises(SystemExit, match="no such runs: fast; there are long, fused"):
        full_student.collect({"fast": folder}, "NVIDIA H200")
    with pytest.raises(SystemExit, match="another GPU beside others on NVIDIA H200"):
        full_student.collect({"fused": folder}, "another GPU")
    assert kept.read_text() == text


def test_runs_are_compared_over_the_steps_that_both_made():
    one, other = ({"reasoning": v, "final": [0.0] * len(v)} for v in ([4.0, 3.0, 2.0], [5.0, 2.0]))
    assert full_student.differences(one, other) == [20.0, 50.0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([1.0, 3.0], "made it holds: 2.00 % against 2.50 % on average, 3.0 % against 4.0 % at"),
        ([1.0, 5.0], "made it does not hold: 3.00 % against 2.50 % on average"),
        ([0.0, 4.5], "made it does not hold: 2.25 % against 2.50 % on average, 4.5 % against 4.0"),
    ],
)
def test_the_tolerance_is_the_control_over_the_same_steps(asked, words):
    text = full_student._tolerance(
        {"fused, reference": asked, "fused, control": [1.0, 4.0, 7.0]}, 3
    )
    assert words in text
    assert "Over all 3 steps rounding alone parts two runs by 4.00 % on average and 7.0 %" in text
    assert "**Not run: steps 3 to 3 of the reference**" in text


def test_nothing_is_left_to_run_when_the_reference_made_all_steps():
    apart = {"fused, reference": [1.0, 1.0], "fused, control": [1.0, 1.0]}
    assert "Not run" not in full_student._tolerance(apart, 2)


def test_steps_that_were_run_after_the_tolerance_was_stated_are_judged_alone(monkeypatch):
    monkeypatch.setattr(full_student, "STATED", 2)
    apart = {"fused, reference": [9.0, 1.0, 2.0, 4.0], "fused, control": [9.0, 9.0, 3.0, 5.0]}
    words = "over the steps after these: 3.00 % against 4.00 % on average, 4.0 % against 5.0 % at"
    assert words in full_student._tolerance(apart, 4)
