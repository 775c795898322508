"""One small run through every verb that makes or reads something."""

import io
import json
from pathlib import Path

import pytest

from vpmoe.cli import main
from vpmoe.data.problems import generate, write_problems

REPOSITORY = Path(__file__).resolve().parents[2]
SUBSET = REPOSITORY / "configs" / "demo" / "teacher" / "vocab_ids.json"

DATA = """
kind = "data"
input = "{folder}/rows.parquet"
output = "{folder}/dataset"
valid_fraction = 0.2
oracle_rows = 2
[render]
system = false
"""

STAGE = """
kind = "warm_start"
run = "{folder}/run"
data = "{folder}/dataset"
threads = 1
[student]
extends = "{repository}/configs/models/tiny.toml"
vocab_subset = "{subset}"
[batch]
global_batch_size = 2
micro_batch_size = 2
seq_len = 128
[budget]
steps = 2
[valid]
documents = 2
"""

SCORE = """
kind = "score"
data = "{folder}/dataset"
output = "{folder}/targets"
[teacher]
kind = "local"
path = "{repository}/configs/demo/teacher"
[selection]
fraction = 0.3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("verbs")
    write_problems(folder / "rows.parquet", generate(40, seed=1))
    names = {"folder": folder, "repository": REPOSITORY, "subset": SUBSET}
    for name, text in {"data": DATA, "stage": STAGE, "score": SCORE}.items():
        (folder / f"{name}.toml").write_text(text.format(**names), encoding="utf-8")
    assert main.run(["data", "build", str(folder / "data.toml")]) == 0
    assert main.run(["train", str(folder / "stage.toml")]) == 0
    return folder


def _json(capsys, *words):
    capsys.readouterr()
    code = main.run([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def _fails(capsys, *words):
    capsys.readouterr()
    code = main.run([str(word) for word in words])
    return code, capsys.readouterr().err.splitlines()


def test_data_verify_is_silent_about_a_sound_dataset(folder, capsys):
    report = _json(capsys, "data", "verify", folder / "dataset")
    assert (report["ok"], report["problems"]) == (True, [])
    assert sum(report["rows"].values()) == 40


def test_data_verify_exits_with_3_on_a_flipped_byte(folder, capsys):
    target = sorted((folder / "dataset" / "train").glob("*_span.bin"))[0]
    sound = target.read_bytes()
    target.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    code, said = _fails(capsys, "data", "verify", folder / "dataset")
    target.write_bytes(sound)
    assert code == 3
    assert said[0].startswith(f"error: {folder}/dataset: ")
    assert said[1].startswith("hint: rebuild it")


def test_data_show_takes_a_split_by_folder_or_by_option(folder, capsys):
    assert main.run(["data", "show", str(folder / "dataset" / "valid"), "--example", "1"]) == 0
    by_folder = capsys.readouterr().out
    words = ["data", "show", str(folder / "dataset"), "--split", "valid", "--example", "1"]
    assert main.run(words) == 0
    assert capsys.readouterr().out == by_folder
    assert "<|start|>user<|message|>" in by_folder
    assert "valid example 1" in by_folder


def test_data_build_refuses_a_finished_dataset_and_dry_runs_write_nothing(folder, capsys):
    code, said = _fails(capsys, "data", "build", folder / "data.toml")
    assert code == 1
    assert "is a finished dataset" in said[0]
    words = ["data", "build", str(folder / "data.toml"), f"output={folder}/other", "--dry-run"]
    assert main.run(words) == 0
    assert not (folder / "other").exists()


def test_check_says_what_a_stage_comes_to(folder, capsys):
    (said,) = _json(capsys, "check", folder / "stage.toml", "budget.steps=3")
    assert said["stage"] == "warm_start, 3 steps × 256 tokens = 768 tokens"
    assert "manifest ok" in said["data"]
    assert said["config"]["budget"] == {"tokens": 0, "steps": 3}
    assert said["ok"].startswith("fingerprint ")


def test_check_lists_the_problems_of_every_file(folder, capsys):
    code, said = _fails(capsys, "check", folder / "data.toml", folder / "stage.toml", "sed=1")
    assert code == 1
    assert [line.split(": ")[-1] for line in said] == [
        "sed is not a setting of data",
        "did you mean seed?",
        "sed is not a setting of warm_start",
        "did you mean seed?",
    ]


def test_a_file_without_kind_is_known_by_its_keys(folder, capsys):
    path = folder / "unkind.toml"
    path.write_text('input = "a"\noutput = "b"\nseq_len = 64\n', encoding="utf-8")
    (said,) = _json(capsys, "check", path)
    assert said["config"]["kind"] == "data"
    path.write_text('kind = "dato"\n', encoding="utf-8")
    assert _fails(capsys, "check", path) == (
        1,
        [f"error: {path}: there is no kind 'dato'", "hint: did you mean data?"],
    )


def test_count_adds_up(capsys):
    report = _json(capsys, "count", REPOSITORY / "configs" / "models" / "vpmoe-6b.toml")
    assert sum(item["total"] for item in report["items"]) == report["total"]
    assert report["total"] - sum(report["additions"].values()) == 6_022_571_535


def test_count_reads_the_student_of_a_stage_and_refuses_a_dataset(folder, capsys):
    report = _json(capsys, "count", folder / "stage.toml")
    assert report["name"] == "tiny"
    code, said = _fails(capsys, "count", folder / "data.toml")
    assert (code, said[0]) == (1, f"error: {folder}/data.toml holds no student")


def test_train_refuses_what_is_no_stage_and_a_changed_config(folder, capsys):
    code, said = _fails(capsys, "train", folder / "data.toml")
    assert (code, said[1]) == (1, "hint: use: vpmoe data build CONFIG")
    code, said = _fails(capsys, "train", folder / "stage.toml", "optimizer.lr=1", "--resume")
    assert code == 1
    assert any("optimizer.lr" in line for line in said)
    code, said = _fails(capsys, "train", folder / "stage.toml")
    assert code == 1
    assert said[1].startswith("hint: ")


def test_train_dry_run_names_the_run_and_writes_nothing(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["train", "stage.toml", "--run", "other", "--dry-run"]
    assert main.run(words) == 0
    assert "runs/other" in capsys.readouterr().out
    assert not (folder / "runs").exists()


def test_eval_defaults_to_the_runs_own_data_and_repeats_itself(folder, capsys):
    words = ["eval", folder / "run", "documents=2"]
    first, again = _json(capsys, *words), _json(capsys, *words)
    assert first == again
    assert first["heldout"]["num_documents"] == 2
    assert (folder / "run" / "eval-step-000002.json").is_file()


def test_eval_dry_run_writes_nothing(folder, capsys):
    before = sorted(folder.glob("run/*"))
    assert main.run(["eval", str(folder / "run"), "documents=1", "name=dry", "--dry-run"]) == 0
    assert "loss of 1 valid conversations" in capsys.readouterr().out
    assert sorted(folder.glob("run/*")) == before


def test_eval_on_screen_shows_losses_answers_and_form(folder, capsys):
    words = ["eval", str(folder / "run"), "documents=2", "problems.count=6"]
    words += ["sampling.max_new_tokens=4", "render.system=false", f"data={folder}/dataset"]
    assert main.run(words) == 0
    out = capsys.readouterr().out
    for said in ("nats/token", "unigram", "exact match", "well-formed", "mean tokens", "report"):
        assert said in out


def test_export_loads_and_refuses_to_replace(folder, capsys):
    out = folder / "export"
    manifest = _json(capsys, "export", folder / "run", "--out", out)
    assert manifest["parity"]["is_exact"]
    code, said = _fails(capsys, "export", folder / "run", "--out", out)
    assert (code, said[0]) == (1, f"error: {out} is already there")


def test_chat_reads_questions_from_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Cards black red orange blue: rotate.\n/new\n\n"))
    assert main.run(["chat", str(folder / "run"), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_question_that_cannot_be_asked_ends_a_pipe_but_no_conversation(
    folder, capsys, monkeypatch
):
    words = ("chat", folder / "run", "--max-new-tokens", "4")
    questions = "<|end|>\nCards black red orange blue: rotate.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    code, said = _fails(capsys, *words)
    assert (code, len(said)) == (1, 2)
    assert "special token in text" in said[0]
    terminal = io.StringIO(questions)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert _fails(capsys, *words) == (0, said)


@pytest.mark.parametrize("model", ["run", "export-of-run"])
def test_a_device_that_is_not_there_is_named(folder, capsys, monkeypatch, model):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = folder / "export-of-run"
    _json(capsys, "export", folder / "run", "--out", out, "--overwrite")
    code, said = _fails(capsys, "chat", folder / model, "--device", "cuda")
    assert (code, len(said)) == (1, 2)
    assert said[0].startswith('error: device "cuda" was asked for, but found ')


def test_score_then_report(folder, capsys):
    manifest = _json(capsys, "score", folder / "score.toml")
    assert manifest["header"]["split"] == "train"
    assert main.run(["score", str(folder / "score.toml")]) == 0
    assert "mean log-prob -0." in capsys.readouterr().out
    report = _json(capsys, "report", folder / "run", "--out", folder / "report")
    assert Path(report["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    code, said = _fails(capsys, "report", folder / "run", "--out", folder / "report")
    assert (code, said[1]) == (1, "hint: add --overwrite, or choose another --out")


def test_targets_verify_exits_with_3_on_a_shortened_shard(folder, capsys):
    output = folder / "damaged-targets"
    assert main.run(["score", str(folder / "score.toml"), f"output={output}"]) == 0
    (shard,) = output.glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-100])
    capsys.readouterr()
    assert main.run(["targets", "verify", str(output), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert shard.name in report["problems"][0]
    code, said = _fails(capsys, "targets", "verify", folder / "no-such-store")
    assert code == 1
    assert "hint:" in said[1]
